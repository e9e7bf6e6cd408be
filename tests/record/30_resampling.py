"""Record what nnU-Net 1.7.1 makes of small images and label maps when it resamples them.

Needs python 3.11 with nnunet==1.7.1 (README.md beside this file). Writes tests/recorded/30_resampling.npz.
Usage: python tests/record/30_resampling.py
"""
import contextlib, importlib.metadata, io, json
from pathlib import Path

import numpy as np
from scipy import ndimage

CASES = {  # name: (shape, spacing, new spacing, labels, negative area)
    'finer': ((9, 14, 12), (1.0, 1.0, 1.0), (0.8, 0.7, 0.9), 3, True),
    'coarser': ((16, 18, 14), (1.0, 1.0, 1.0), (2.0, 1.5, 1.9), 3, True),
    'mixed': ((12, 15, 13), (1.0, 1.0, 1.0), (1.3, 0.8, 1.1), 3, False),
    'separate_z': ((6, 18, 16), (5.0, 1.0, 1.0), (3.0, 0.8, 0.8), 3, True),
    'separate_z_fewer_slices': ((12, 14, 15), (4.0, 1.0, 1.0), (7.0, 0.8, 1.3), 3, False),
    'separate_z_same_slices': ((6, 16, 16), (5.0, 1.0, 1.0), (5.0, 0.8, 0.8), 3, True),
    'separate_by_target': ((12, 14, 16), (2.0, 1.0, 1.0), (4.0, 1.0, 1.3), 3, False),
    'exactly_three': ((8, 14, 16), (3.0, 1.0, 1.0), (2.0, 0.9, 0.9), 3, False),
    'two_coarse_axes': ((22, 10, 9), (0.24, 1.25, 1.25), (0.3, 1.0, 1.0), 3, False),
    'separate_axis_2': ((16, 14, 6), (1.0, 1.0, 5.0), (0.8, 0.8, 3.0), 3, True),
    'one_slice': ((1, 20, 18), (5.0, 1.0, 1.0), (5.0, 0.7, 0.9), 2, False),
    'many_labels': ((14, 16, 15), (1.0, 1.0, 1.0), (0.9, 0.75, 1.2), 40, False),
    'halved': ((12, 16, 16), (1.0, 1.0, 1.0), (2.0, 2.0, 1.3), 5, True),
    'same': ((6, 8, 7), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0), 2, False),
}
DIRECT = {  # name: (shape, new shape, order, separate axis, order along it)
    'order_1': ((7, 12, 11), (10, 9, 17), 1, None, 0),
    'order_1_separate': ((7, 12, 11), (10, 9, 17), 1, 0, 0),
    'order_0': ((8, 8, 8), (4, 12, 3), 0, None, 0),
    'order_z_1': ((7, 12, 11), (10, 15, 9), 1, 0, 1),
    'order_z_3': ((7, 12, 11), (10, 15, 9), 3, 0, 3),
    'order_2': ((6, 8, 7), (9, 6, 10), 2, None, 0),
    'order_2_halved': ((8, 8, 6), (4, 4, 3), 2, None, 0),
    'order_3_doubled': ((4, 6, 5), (8, 12, 10), 3, None, 0),
    'order_2_z_2_axis_1': ((7, 6, 8), (5, 9, 10), 2, 1, 2),
    'order_0_z_1_axis_2': ((8, 7, 6), (6, 7, 9), 0, 2, 1),
    'order_3_z_2_axis_2': ((8, 7, 6), (6, 10, 4), 3, 2, 2),
    'order_1_z_3_halved': ((8, 6, 6), (4, 6, 6), 1, 0, 3),
    'axes_of_1_and_2': ((1, 2, 7), (3, 5, 4), 3, None, 0),
    'axes_to_1_and_2': ((3, 7, 6), (1, 2, 2), 2, None, 0),
}


def image(rng, shape):
    "Smooth blobs and a little noise, whole numbers"
    smooth = [ndimage.gaussian_filter(rng.normal(size=shape), 1.5) * 900 for _ in range(2)]
    return np.round(np.stack(smooth) + rng.normal(0, 12, (2, *shape))).astype(np.float32)


def label_map(rng, shape, n, negative):
    "Regions nearest to random seeds, a third of them background, and -1 beyond an ellipsoid"
    seeds = rng.uniform(0, 1, (2 * n + 2, 3)) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
    seg = (((grid[..., None, :] - seeds)**2).sum(-1).argmin(-1) - n).clip(0, n)
    if negative: seg[((grid / np.array(shape) - .45)**2).sum(-1) > .3] = -1
    return seg.astype(np.int16)


def main():
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunet.preprocessing.preprocessing import get_do_separate_z, get_lowres_axis, resample_data_or_seg, resample_patient
        out = {}
        for i, (name, (shape, spacing, target, n, negative)) in enumerate(CASES.items()):
            rng = np.random.default_rng([30, i])
            data, seg = image(rng, shape)[:1 + (i < 4)], label_map(rng, shape, n, negative)
            new, new_seg = resample_patient(data, seg[None].astype(np.float32), np.array(spacing), np.array(target), 3, 1, force_separate_z=None)
            out.update({f'{name}/data': data.astype(np.int16), f'{name}/seg': seg, f'{name}/spacing': spacing, f'{name}/target': target,
                        f'{name}/new_data': new, f'{name}/new_seg': new_seg[0].astype(np.int16)})
        for i, (name, (shape, new_shape, order, axis, order_z)) in enumerate(DIRECT.items()):
            rng = np.random.default_rng([31, i])
            data, seg = image(rng, shape), label_map(rng, shape, 4, True)
            ask = dict(axis=None if axis is None else [axis], order=order, do_separate_z=axis is not None, order_z=order_z)
            new = resample_data_or_seg(data, new_shape, False, **ask)
            out.update({f'{name}/data': data.astype(np.int16), f'{name}/seg': seg, f'{name}/new_data': new,
                        f'{name}/ask': np.array([order, -1 if axis is None else axis, order_z])})
            out[f'{name}/new_seg'] = resample_data_or_seg(seg[None].astype(np.float32), new_shape, True, **ask)[0].astype(np.int16)
        new = resample_patient(np.zeros((1, 34, 124, 128), np.float32), None, np.array([3, .8, .8]), np.array([2.5, .8, .8]), force_separate_z=None)[0]
        out['ct_003/new_shape'], out['ct_003/axis'] = np.array(new.shape[1:]), get_lowres_axis([3, .8, .8])[0] if get_do_separate_z([3, .8, .8]) else -1
        hole = np.array([[1, 2], [3, 4]])[None].repeat(2, 1).repeat(2, 2)
        out['hole/seg'], out['hole/new_seg'] = hole, resample_data_or_seg(hole[None].astype(np.float32), (1, 3, 3), True, order=1)[0].astype(np.int16)
    out['command'] = 'python tests/record/30_resampling.py'
    out['versions'] = json.dumps({p: importlib.metadata.version(p) for p in ('nnunet', 'numpy', 'scipy', 'scikit-image', 'batchgenerators')})
    np.savez_compressed(Path(__file__).parents[1] / 'recorded' / '30_resampling.npz', **out)


if __name__ == '__main__': main()
