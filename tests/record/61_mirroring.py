"""Record what nnU-Net 1.7.1 predicts with mirroring, for the parity checks of the mirroring chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/61_mirroring.py
Writes tests/recorded/61_mirroring.npz: the weights of a small U-Net `w/<tensor>`, its input `x` (1, C, Z, Y, X), per
set of mirror axes `p/<axes>` (mean probabilities) and `calls/<axes>` (how often the network ran); `settings` of the
network; and `error_2d`, what the original says when a 2D network is given its own default mirror axes, mirroring off.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import torch
from torch import nn

SEED = 61
OUT = Path(__file__).resolve().parents[1]/'recorded'/'61_mirroring.npz'
SETTINGS = dict(in_channels=2, n_outputs=3, base_num_features=4, max_num_features=320, pool_op_kernel_sizes=[[1, 2, 2], [2, 2, 2]],
                conv_kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])


def unet(dims):
    "A small U-Net as nnUNetTrainerV2.initialize_network builds it"
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    from nnunet.network_architecture.initialization import InitWeights_He
    conv, norm, drop = (nn.Conv3d, nn.InstanceNorm3d, nn.Dropout3d) if dims == 3 else (nn.Conv2d, nn.InstanceNorm2d, nn.Dropout2d)
    strides, kernels = ([k[-dims:] for k in SETTINGS[key]] for key in ('pool_op_kernel_sizes', 'conv_kernel_sizes'))
    net = Generic_UNet(SETTINGS['in_channels'], SETTINGS['base_num_features'], SETTINGS['n_outputs'], len(strides), 2, 2, conv, norm, {'eps': 1e-5, 'affine': True},
                       drop, {'p': 0, 'inplace': True}, nn.LeakyReLU, {'negative_slope': 1e-2, 'inplace': True}, True, False,
                       lambda x: x, InitWeights_He(1e-2), strides, kernels, False, True, True)
    net.inference_apply_nonlin = lambda x: torch.softmax(x, 1)
    net.do_ds = False
    return net.eval()


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): import nnunet  # noqa: F401
    torch.manual_seed(SEED)
    net, arrays = unet(3), {}
    x = torch.randn(1, SETTINGS['in_channels'], 4, 8, 12)
    arrays |= {f'w/{k}': v.numpy() for k, v in net.state_dict().items()} | {'x': x.numpy()}
    calls = []
    net.register_forward_hook(lambda *a: calls.append(1))
    for axes in ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        calls.clear()
        with torch.no_grad(): p = net._internal_maybe_mirror_and_pred_3D(x.numpy(), axes, True, None)
        name = ''.join(map(str, axes)) or 'none'
        arrays |= {f'p/{name}': p.numpy(), f'calls/{name}': np.array(len(calls))}
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        try: unet(2).predict_3D(np.zeros((2, 4, 8, 8), np.float32), do_mirroring=False, patch_size=(8, 8), mixed_precision=False)
        except ValueError as e: error = str(e)
    about = dict(command='python tests/record/61_mirroring.py', seed=SEED,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}})
    np.savez_compressed(OUT, **arrays, settings=json.dumps(SETTINGS), error_2d=error, about=json.dumps(about))
    print(OUT.name, OUT.stat().st_size, 'bytes')


if __name__ == '__main__': main()
