"""Time a whole training step on the CPU with segnb's network and with nnU-Net v2's, for the network chapter.

Needs nnunetv2 2.8.1 and what segnb needs, in one environment; a processor that is otherwise idle.
Usage, from the project root: OMP_NUM_THREADS=1 python tests/record/50_network_speed.py [rounds]
Writes tests/recorded/50_network_speed.json: per network the CPU seconds of every way (least of the rounds, in which the
ways take turns), and how many times faster than nnU-Net v2 in single precision each is.
"""
import contextlib, json, os, platform, sys, time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

WHAT = {'hippocampus': ((40, 56, 40), [32, 64, 128, 256]), 'cube': ((64,)*3, [32, 64, 128, 256, 320])}


def v2(features):
    "Network and loss of nnU-Net v2's trainer"
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    n = len(features)
    net = PlainConvUNet(1, n, features, torch.nn.Conv3d, 3, [1] + [2]*(n - 1), 2, 3, 2, True, torch.nn.InstanceNorm3d, {'eps': 1e-5, 'affine': True},
                        None, None, torch.nn.LeakyReLU, {'inplace': True}, deep_supervision=True)
    loss = DC_and_CE_loss({'batch_dice': False, 'smooth': 1e-5, 'do_bg': False, 'ddp': False}, {}, weight_ce=1, weight_dice=1,
                          ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss)
    weights = np.array([.5**i for i in range(n - 2)] + [0])
    return net, DeepSupervisionWrapper(loss, weights/weights.sum()), torch.int16


def ours(features, **options):
    "Network and loss of segnb"
    from segnb.loss import DeepSupervisionLoss, DiceCELoss, deep_supervision_weights
    from segnb.network import build_unet
    n = len(features)
    plan = SimpleNamespace(base_num_features=32, max_num_features=320, pool_op_kernel_sizes=[[2]*3]*(n - 1), conv_kernel_sizes=[[3]*3]*n)
    return build_unet(plan, 1, 3, **options), DeepSupervisionLoss(DiceCELoss(batch_dice=False), deep_supervision_weights(n - 1)), torch.float32


def stepper(patch, made, bf16):
    "A function that does one step"
    net, loss, dtype = made
    parameters, g = list(net.parameters()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(parameters, 1e-2, momentum=.99, nesterov=True, weight_decay=3e-5)
    x = torch.randn(2, 1, *patch, generator=g)
    ys = [torch.randint(0, 3, (2, 1, *[s//2**i for s in patch]), generator=g).to(dtype) for i in range(len(net(x)))]
    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16) if bf16 else contextlib.nullcontext(): value = loss(net(x), ys)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 12)
        optimizer.step()
    return step


def main(rounds=5):
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
    out = {}
    for what, (patch, features) in WHAT.items():
        ways = {'v2': lambda: v2(features), 'plain': lambda: ours(features), 'channels_last': lambda: ours(features, channels_last=True)}
        steps = {name + tail: stepper(patch, make(), bool(tail)) for tail in ('', '_bf16') for name, make in ways.items()}
        seconds = {name: [] for name in steps}
        for round in range(rounds + 1):
            for name, step in steps.items():
                start = time.process_time(); step()
                if round: seconds[name].append(time.process_time() - start)
        least = {name: min(s) for name, s in seconds.items()}
        out[what] = dict(patch=patch, batch=2, features=features, seconds={k: round_(v) for k, v in least.items()},
                         faster={k: round_(least['v2']/v) for k, v in least.items()})
        print(what, out[what]['faster'], flush=True)
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    about = dict(command='OMP_NUM_THREADS=1 python tests/record/50_network_speed.py', rounds=rounds, threads=torch.get_num_threads(), bf16_instructions='avx512_bf16' in flags or 'amx_bf16' in flags,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('torch', 'nnunetv2', 'dynamic_network_architectures')}})
    (ROOT/'tests'/'recorded'/'50_network_speed.json').write_text(json.dumps(about | out) + '\n')


def round_(x): return float(f'{x:.3g}')


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
