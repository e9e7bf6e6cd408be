"""Record what nnU-Net 1.7.1's networks compute with given weights, for the parity checks of the network chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/50_network.py
Writes tests/recorded/50_network.npz: per network `<name>/x`, `<name>/y<i>` (logits, full resolution first),
`<name>/grad_x` (gradient of the sum over outputs of the mean squared logit); `<name>/gradients`: a row per tensor of the
weights, in the order of the drawing: the gradient's length and its projection on a drawn direction; for batch
normalisation `<name>/eval<i>`, the logits in evaluation mode after that one training pass.
tests/recorded/50_network.json: the networks' settings and the shapes of their weights, which are drawn from the seed
(`draw_weights`); for plans of real data sets the parameter count, the tensor shapes and the spread of the initial weights.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import torch
from torch import nn

SEED = 50
OUT = Path(__file__).resolve().parents[1]/'recorded'
# in channels, outputs, base, cap, strides, kernels, input (B, *spatial), options
SMALL = {
    'isotropic': (1, 3, 4, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (2, 8, 12, 8), {}),
    'anisotropic': (4, 4, 3, 8, [[1, 2, 2], [2, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]], (1, 8, 8, 16), {}),
    'unequal_pools': (1, 2, 2, 320, [[1, 2, 2], [1, 2, 2], [2, 2, 1]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], (2, 4, 16, 8), {}),
    'one_pool': (4, 3, 3, 320, [[2, 2, 2]], [[3, 1, 3], [3, 3, 3]], (1, 6, 6, 6), {}),
    'flat': (1, 3, 4, 12, [[2, 2]]*3, [[3, 3]]*4, (3, 16, 24), {}),
    'flat_unequal': (3, 2, 3, 480, [[2, 2], [1, 2]], [[3, 3], [3, 3], [1, 3]], (1, 8, 16), {}),
    'batch': (1, 3, 4, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (2, 8, 8, 8), dict(norm='batch')),
    'group': (1, 3, 8, 16, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (1, 8, 8, 8), dict(norm='group')),
    'none_relu': (1, 3, 4, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (1, 8, 8, 8), dict(norm='none', activation='relu')),
    'three_convolutions': (1, 2, 3, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (1, 8, 8, 8), dict(convs_per_block=3, activation='mish')),
    'residual': (1, 3, 4, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (2, 8, 12, 8), dict(blocks=([1, 2, 3], [1, 1]))),
    'residual_anisotropic': (2, 4, 3, 8, [[1, 2, 2], [2, 2, 2], [2, 2, 1]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], (1, 8, 8, 8), dict(blocks=([2, 1, 1, 2], [2, 1, 1]))),
    'residual_flat': (1, 3, 4, 320, [[2, 2]]*2, [[3, 3]]*3, (2, 16, 12), dict(blocks=([1, 2, 1], [1, 2]), activation='relu')),
    'residual_batch': (1, 2, 3, 320, [[2, 2, 2]], [[3, 3, 3]]*2, (2, 4, 8, 8), dict(blocks=([1, 2], [1]), norm='batch')),
    'residual_both': (1, 3, 3, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (1, 8, 8, 8), dict(blocks=([1, 1, 2], [2, 1]), residual_decoder=True)),
}
# in channels, outputs, cap, strides, kernels, blocks; 32 features
PLANS = {
    'Hippocampus': (1, 3, 320, [[2, 2, 2]]*3, [[3, 3, 3]]*4, None),
    'BraTS': (4, 4, 320, [[2, 2, 2]]*5, [[3, 3, 3]]*6, None),
    'Prostate': (2, 3, 320, [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]], [[1, 3, 3], [1, 3, 3]] + [[3, 3, 3]]*5, None),
    'Hippocampus 2D': (1, 3, 480, [[2, 2]]*3, [[3, 3]]*4, None),
    'Prostate 2D': (2, 3, 480, [[2, 2]]*6, [[3, 3]]*7, None),
    'Hippocampus residual': (1, 3, 320, [[2, 2, 2]]*3, [[3, 3, 3]]*4, ([1, 2, 3, 4], [1, 1, 1])),
    'Prostate residual': (2, 3, 320, [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]], [[1, 3, 3], [1, 3, 3]] + [[3, 3, 3]]*5,
                          ([1, 2, 3, 4, 4, 4, 4], [1]*6)),
}


def generic_unet(channels, outputs, base, cap, strides, kernels, norm='instance', activation='leaky_relu', convs_per_block=2):
    "The U-Net as nnUNetTrainerV2.initialize_network builds it, and the variants of its trainers in architectural_variants"
    from nnunet.network_architecture.custom_modules.helperModules import Identity, MyGroupNorm
    from nnunet.network_architecture.custom_modules.mish import Mish
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    from nnunet.network_architecture.initialization import InitWeights_He
    flat = len(kernels[0]) == 2
    affine = {'eps': 1e-5, 'affine': True}
    norms = {'instance': (nn.InstanceNorm2d if flat else nn.InstanceNorm3d, affine), 'batch': (nn.BatchNorm2d if flat else nn.BatchNorm3d, affine),
             'group': (MyGroupNorm, {**affine, 'num_groups': 8}), 'none': (Identity, {})}
    bends = {'leaky_relu': (nn.LeakyReLU, {'negative_slope': 1e-2, 'inplace': True}), 'relu': (nn.ReLU, {'inplace': True}), 'mish': (Mish, {})}
    return Generic_UNet(channels, base, outputs, len(strides), convs_per_block, 2, nn.Conv2d if flat else nn.Conv3d, *norms[norm],
                        nn.Dropout2d if flat else nn.Dropout3d, {'p': 0, 'inplace': True}, *bends[activation], True, False,
                        lambda x: x, InitWeights_He(1e-2), strides, kernels, False, True, True, max_num_features=cap)


def residual_unet(channels, outputs, base, cap, strides, kernels, blocks, norm='instance', activation='leaky_relu', residual_decoder=False):
    "The U-Net as nnUNetTrainerV2_ResencUNet.initialize_network builds it; with residual blocks in the decoder too, the class beside it"
    from nnunet.network_architecture import generic_modular_residual_UNet as modular
    from nnunet.network_architecture.initialization import InitWeights_He
    props = modular.get_default_network_config(len(kernels[0]), None, {'leaky_relu': 'LeakyReLU', 'relu': 'ReLU'}[activation], {'instance': 'in', 'batch': 'bn'}[norm])
    return (modular.ResidualUNet if residual_decoder else modular.FabiansUNet)(
        channels, base, blocks[0], 2, [[1]*len(kernels[0]), *strides], kernels, props, outputs, blocks[1], True, False, cap, InitWeights_He(1e-2))


def draw_weights(shapes):
    "Weights for every tensor, in the order of `shapes`: whoever knows the seed and the shapes can draw them again"
    rng = np.random.default_rng(SEED)
    return {k: rng.normal(0, .3, shape).astype(np.float32) for k, shape in shapes.items()}


def settings(channels, outputs, base, cap, strides, kernels, options, net):
    "What is needed to build the network again"
    d = dict(in_channels=channels, n_outputs=outputs, base_num_features=base, max_num_features=cap, pool_op_kernel_sizes=strides, conv_kernel_sizes=kernels,
             parameters=sum(p.numel() for p in net.parameters()), names=list(net.state_dict()))
    blocks = options.get('blocks')
    if blocks: d |= dict(architecture='residual', blocks_per_stage_encoder=blocks[0], blocks_per_stage_decoder=blocks[1])
    return d | dict(options={k: v for k, v in options.items() if k != 'blocks'})


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): import nnunet  # noqa: F401
    torch.manual_seed(SEED)
    arrays, small, plans = {}, {}, {}
    for name, (channels, outputs, base, cap, strides, kernels, shape, options) in SMALL.items():
        net = (residual_unet if 'blocks' in options else generic_unet)(channels, outputs, base, cap, strides, kernels, **options)
        weights = draw_weights({k: v.shape for k, v in net.named_parameters()})
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
        x = torch.randn(shape[0], channels, *shape[1:], requires_grad=True)
        ys = net(x)
        sum((y**2).mean() for y in ys).backward()
        arrays |= {f'{name}/y{i}': y.detach().numpy() for i, y in enumerate(ys)}
        rng = np.random.default_rng(SEED + 1)
        gradients = [(np.linalg.norm(g := p.grad.numpy().astype(float)), (g*rng.normal(0, 1, g.shape)).sum()) for p in net.parameters()]
        arrays |= {f'{name}/x': x.detach().numpy(), f'{name}/grad_x': x.grad.numpy(), f'{name}/gradients': np.array(gradients)}
        if options.get('norm') == 'batch':
            with torch.no_grad(): arrays |= {f'{name}/eval{i}': y.numpy() for i, y in enumerate(net.eval()(x))}
        small[name] = settings(channels, outputs, base, cap, strides, kernels, options, net) | dict(weights={k: list(v.shape) for k, v in weights.items()})
    for name, (channels, outputs, cap, strides, kernels, blocks) in PLANS.items():
        options = dict(blocks=blocks) if blocks else {}
        net = (residual_unet if blocks else generic_unet)(channels, outputs, 32, cap, strides, kernels, **options)
        tensors = {k: dict(shape=list(v.shape), sd=float(v.detach().std())) if v.ndim > 1 else dict(shape=list(v.shape), values=sorted(set(v.tolist())))
                   for k, v in net.named_parameters()}
        kinds = {}
        for m in net.modules():
            if not list(m.children()): kinds[type(m).__name__] = kinds.get(type(m).__name__, 0) + 1
        plans[name] = settings(channels, outputs, 32, cap, strides, kernels, options, net) | dict(tensors=tensors, modules=kinds)
    about = dict(command='python tests/record/50_network.py', seed=SEED,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}})
    np.savez_compressed(OUT/'50_network.npz', **arrays, about=json.dumps(about))
    (OUT/'50_network.json').write_text(json.dumps(about | dict(networks=small, plans=plans), separators=(',', ':')) + '\n')
    for f in ('50_network.npz', '50_network.json'): print(f, (OUT/f).stat().st_size, 'bytes')


if __name__ == '__main__': main()
