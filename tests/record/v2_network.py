"""Record what nnU-Net v2's networks answer with drawn weights.

    python tests/record/v2_network.py tests/recorded/v2_network.npz

needs nnunetv2 2.8.1 (dynamic_network_architectures) and torch; see README.md.
"""
import json, sys
import numpy as np
import torch
from torch import nn
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

torch.set_num_threads(1)
SEED = 20260
flat, cube = [[1, 2, 2], [2, 2, 2]], [[2, 2, 2], [2, 2, 2]]
NETWORKS = {
    'plain': dict(pools=cube, kernels=[[3, 3, 3]] * 3, shape=[8, 8, 16], down=[2, 2, 2], up=[2, 2]),
    'flat kernels': dict(pools=flat, kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]], shape=[4, 16, 16], down=[2, 2, 2], up=[2, 2]),
    'other counts': dict(pools=flat, kernels=[[1, 3, 3], [1, 3, 3], [3, 3, 3]], shape=[4, 16, 16], down=[1, 3, 2], up=[1, 3]),
    'no bias': dict(pools=cube, kernels=[[3, 3, 3]] * 3, shape=[8, 8, 8], down=[2, 2, 2], up=[2, 2], bias=False),
    'plain 2D': dict(pools=[[2, 2]] * 3, kernels=[[3, 3]] * 4, shape=[16, 32], down=[2] * 4, up=[2] * 3),
    'residual': dict(pools=flat, kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]], shape=[4, 16, 16], down=[1, 3, 4], up=[1, 1], residual=True),
    'residual, capped': dict(pools=[[1, 2, 2], [2, 2, 2], [1, 1, 2]], kernels=[[3, 3, 3]] * 4, shape=[4, 8, 16], down=[1, 2, 1, 2], up=[1, 1, 1],
                             residual=True, cap=8),
    'residual 2D': dict(pools=[[2, 2]] * 3, kernels=[[3, 3]] * 4, shape=[16, 32], down=[1, 3, 4, 6], up=[1] * 3, residual=True),
    'batch norm': dict(pools=cube, kernels=[[3, 3, 3]] * 3, shape=[8, 8, 8], down=[2, 2, 2], up=[2, 2], norm='batch'),
}


def build(d):
    axes = len(d['shape'])
    norms = dict(instance=(nn.InstanceNorm2d, nn.InstanceNorm3d), batch=(nn.BatchNorm2d, nn.BatchNorm3d))
    common = dict(input_channels=2, n_stages=len(d['kernels']), features_per_stage=[min(4 * 2**i, d.get('cap', 12)) for i in range(len(d['kernels']))],
                  conv_op=(nn.Conv2d, nn.Conv3d)[axes - 2], kernel_sizes=d['kernels'], strides=[[1] * axes, *d['pools']], num_classes=3,
                  n_conv_per_stage_decoder=d['up'], conv_bias=d.get('bias', True), norm_op=norms[d.get('norm', 'instance')][axes - 2],
                  norm_op_kwargs=dict(eps=1e-5, affine=True), nonlin=nn.LeakyReLU, nonlin_kwargs=dict(inplace=True), deep_supervision=True)
    if d.get('residual'): return ResidualEncoderUNet(n_blocks_per_stage=d['down'], **common)
    return PlainConvUNet(n_conv_per_stage=d['down'], **common)


def main(file):
    arrays, about = {}, {}
    for name, d in NETWORKS.items():
        network, rng = build(d).eval(), np.random.default_rng(SEED)
        state, seen, weights = network.state_dict(keep_vars=True), {}, {}
        for key, tensor in state.items():           # each tensor once, under its first name
            if tensor.data_ptr() in seen or not tensor.is_floating_point(): continue
            seen[tensor.data_ptr()] = weights[key] = list(tensor.shape)
            drawn = rng.normal(0, .3, tensor.shape).astype(np.float32)
            tensor.data.copy_(torch.from_numpy(np.abs(drawn) + .5 if key.endswith('running_var') else drawn))
        x = np.random.default_rng(1).normal(size=(2, 2, *d['shape'])).astype(np.float32)
        with torch.inference_mode(): ys = network(torch.from_numpy(x))
        about[name] = dict(d, weights=weights, names=list(state), parameters=sum(p.numel() for p in network.parameters()))
        for i, y in enumerate(ys): arrays[f'{name}/y{i}'] = y.numpy()
    np.savez_compressed(file, about=json.dumps(dict(seed=SEED, networks=about)), **arrays)


if __name__ == '__main__': main(sys.argv[1])
