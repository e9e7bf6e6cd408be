"""Record what nnU-Net 1.7.1's U-Net computes with given weights, for the parity checks of the network chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/50_network.py
Writes tests/recorded/50_network.npz: per network `<name>/x`, `<name>/y<i>` (logits, full resolution first),
`<name>/grad_x` (gradient of the sum over outputs of the mean squared logit). tests/recorded/50_network.json: the
networks' settings and the shapes of their weights, which are drawn from the seed (`draw_weights`); for plans of real
data sets the parameter count, the tensor shapes and the spread of the initial weights.
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
# in channels, outputs, base, cap, strides, kernels, input (B, Z, Y, X)
SMALL = {
    'isotropic': (1, 3, 4, 320, [[2, 2, 2]]*2, [[3, 3, 3]]*3, (2, 8, 12, 8)),
    'anisotropic': (4, 4, 3, 8, [[1, 2, 2], [2, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]], (1, 8, 8, 16)),
    'unequal_pools': (1, 2, 2, 320, [[1, 2, 2], [1, 2, 2], [2, 2, 1]], [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], (2, 4, 16, 8)),
    'one_pool': (4, 3, 3, 320, [[2, 2, 2]], [[3, 1, 3], [3, 3, 3]], (1, 6, 6, 6)),
}
# in channels, outputs, strides, kernels; 32 features, capped at 320
PLANS = {
    'Hippocampus': (1, 3, [[2, 2, 2]]*3, [[3, 3, 3]]*4),
    'BraTS': (4, 4, [[2, 2, 2]]*5, [[3, 3, 3]]*6),
    'Prostate': (2, 3, [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]], [[1, 3, 3], [1, 3, 3]] + [[3, 3, 3]]*5),
}


def generic_unet(channels, outputs, base, cap, strides, kernels):
    "The U-Net as nnUNetTrainerV2.initialize_network builds it for 3D"
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    from nnunet.network_architecture.initialization import InitWeights_He
    return Generic_UNet(channels, base, outputs, len(strides), 2, 2, nn.Conv3d, nn.InstanceNorm3d, {'eps': 1e-5, 'affine': True},
                        nn.Dropout3d, {'p': 0, 'inplace': True}, nn.LeakyReLU, {'negative_slope': 1e-2, 'inplace': True}, True, False,
                        lambda x: x, InitWeights_He(1e-2), strides, kernels, False, True, True, max_num_features=cap)


def draw_weights(shapes):
    "Weights for every tensor, in the order of `shapes`: whoever knows the seed and the shapes can draw them again"
    rng = np.random.default_rng(SEED)
    return {k: rng.normal(0, .3, shape).astype(np.float32) for k, shape in shapes.items()}


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): import nnunet  # noqa: F401
    torch.manual_seed(SEED)
    arrays, small, plans = {}, {}, {}
    for name, (channels, outputs, base, cap, strides, kernels, shape) in SMALL.items():
        net = generic_unet(channels, outputs, base, cap, strides, kernels)
        weights = draw_weights({k: v.shape for k, v in net.state_dict().items()})
        net.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
        x = torch.randn(shape[0], channels, *shape[1:], requires_grad=True)
        ys = net(x)
        sum((y**2).mean() for y in ys).backward()
        arrays |= {f'{name}/y{i}': y.detach().numpy() for i, y in enumerate(ys)}
        arrays |= {f'{name}/x': x.detach().numpy(), f'{name}/grad_x': x.grad.numpy()}
        small[name] = dict(in_channels=channels, n_outputs=outputs, base_num_features=base, max_num_features=cap, pool_op_kernel_sizes=strides,
                           conv_kernel_sizes=kernels, parameters=sum(p.numel() for p in net.parameters()), weights={k: list(v.shape) for k, v in weights.items()})
    for name, (channels, outputs, strides, kernels) in PLANS.items():
        net = generic_unet(channels, outputs, 32, 320, strides, kernels)
        tensors = {k: dict(shape=list(v.shape), sd=float(v.std())) if v.ndim > 1 else dict(shape=list(v.shape), values=sorted(set(v.tolist())))
                   for k, v in net.state_dict().items()}
        kinds = {}
        for m in net.modules():
            if not list(m.children()): kinds[type(m).__name__] = kinds.get(type(m).__name__, 0) + 1
        plans[name] = dict(in_channels=channels, n_outputs=outputs, base_num_features=32, max_num_features=320, pool_op_kernel_sizes=strides,
                           conv_kernel_sizes=kernels, parameters=sum(p.numel() for p in net.parameters()), tensors=tensors, modules=kinds)
    about = dict(command='python tests/record/50_network.py', seed=SEED,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}})
    np.savez_compressed(OUT/'50_network.npz', **arrays, about=json.dumps(about))
    (OUT/'50_network.json').write_text(json.dumps(about | dict(networks=small, plans=plans), indent=1) + '\n')
    for f in ('50_network.npz', '50_network.json'): print(f, (OUT/f).stat().st_size, 'bytes')


if __name__ == '__main__': main()
