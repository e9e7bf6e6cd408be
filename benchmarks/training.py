"""One optimiser step on the CPU with two threads (forward, deeply supervised Dice + cross-entropy, backward, clip, SGD): segnb beside nnU-Net v2.

hippocampus: patch 40 x 56 x 40, three poolings; cube_64: 64^3, four poolings. Batch 2, 32 features, one channel, three classes, as
both sides plan them. `segnb` and `nnunetv2` compute in float32; `segnb_auto` uses the precision that segnb chooses for this
processor, `nnunetv2_bf16` is nnU-Net's step under bfloat16 autocast, which it does not do by itself on a CPU.
"""
from types import SimpleNamespace

from common import entry, main, mark, measure

NETWORKS = dict(hippocampus=((40, 56, 40), 3), cube_64=((64, 64, 64), 4))


def batch(patch, n_pools):
    "Noise and random labels, with the labels at every resolution"
    import torch
    generator = torch.Generator().manual_seed(0)
    data, target = torch.randn((2, 1, *patch), generator=generator), torch.randint(0, 3, (2, 1, *patch), generator=generator)
    return data, [target[..., ::2**i, ::2**i, ::2**i].contiguous() for i in range(n_pools)]


def ours(name, precision):
    import torch
    torch.set_num_threads(2)
    torch.manual_seed(0)
    from segnb.loss import DeepSupervisionLoss, DiceCELoss, deep_supervision_weights
    from segnb.network import build_network
    from segnb.optimization import choose_precision, keep_memory, make_optimizer, training_step
    patch, n_pools = NETWORKS[name]
    plan = SimpleNamespace(pool_op_kernel_sizes=[(2, 2, 2)]*n_pools, conv_kernel_sizes=[(3, 3, 3)]*(n_pools + 1), base_num_features=32,
                           max_num_features=320, architecture='plain', dimensions=3, patch_size=patch)
    network = build_network(plan, 1, 3, channels_last=True)   # the trainer's choice on a CPU
    loss = DeepSupervisionLoss(DiceCELoss(batch_dice=False), deep_supervision_weights(n_pools))
    keep_memory()                                              # and this
    optimizer, (data, targets) = make_optimizer(network), batch(patch, n_pools)
    targets = [t.float() for t in targets]   # as the loader gives them
    dtype = choose_precision(precision, torch.device('cpu'))
    found = measure(lambda: training_step(network, loss, optimizer, data, targets, dtype=dtype))
    return {**found, 'precision': str(dtype or torch.float32), 'parameters': sum(p.numel() for p in network.parameters())}


def theirs(name, bf16=False):
    import numpy as np, torch
    torch.set_num_threads(2)
    torch.manual_seed(0)
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    patch, n_pools = NETWORKS[name]
    n = n_pools + 1
    network = PlainConvUNet(1, n, [min(32*2**i, 320) for i in range(n)], torch.nn.Conv3d, [3]*n, [1] + [2]*n_pools, [2]*n, 3, [2]*n_pools, conv_bias=True,
                            norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs=dict(eps=1e-5, affine=True), nonlin=torch.nn.LeakyReLU,
                            nonlin_kwargs=dict(inplace=True), deep_supervision=True)
    network.apply(InitWeights_He(1e-2))
    loss = DC_and_CE_loss(dict(batch_dice=False, smooth=1e-5, do_bg=False, ddp=False), {}, weight_ce=1, weight_dice=1, ignore_label=None,
                          dice_class=MemoryEfficientSoftDiceLoss)
    weights = np.array([1/2**i for i in range(n_pools)])
    weights[-1] = 0
    loss = DeepSupervisionWrapper(loss, weights/weights.sum())
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=.99, nesterov=True)
    data, targets = batch(patch, n_pools)
    targets = [t.to(torch.int16) for t in targets]
    def work():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16): value = loss(network(data), targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        return float(value.detach())
    return {**measure(work), 'parameters': sum(p.numel() for p in network.parameters())}


for name in NETWORKS:
    group = f'step_{name}'
    entry(group, 'segnb')(lambda n=name: ours(n, 'fp32'))
    entry(group, 'nnunetv2', 'peers')(lambda n=name: theirs(n))
    entry(group, 'segnb_auto')(lambda n=name: ours(n, 'auto'))
    entry(group, 'nnunetv2_bf16', 'peers')(lambda n=name: theirs(n, True))
    mark(group, 'nnunetv2', 1)
    mark(group, 'nnunetv2', 1.5, of='segnb_auto')

if __name__ == '__main__': main(__doc__)
