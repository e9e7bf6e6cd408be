"""Record what nnU-Net 1.7.1's transforms do with given numbers, for the parity checks of the transforms chapter.

Needs Python 3.11 with batchgenerators==0.25 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/39_transforms.py
Writes tests/recorded/39_transforms.npz: `<3d|2d>/data`, `<3d|2d>/seg` (inputs) and `<3d|2d>/<transform>`, where ranges are
shrunk to one number or draws are replaced by it.
"""
from pathlib import Path
from unittest.mock import patch

import numpy as np
from batchgenerators.augmentations import color_augmentations as color, noise_augmentations as noise
from batchgenerators.augmentations.resample_augmentations import augment_linear_downsampling_scipy as lower
from batchgenerators.augmentations.spatial_transformations import augment_spatial
from batchgenerators.transforms.local_transforms import BrightnessGradientAdditiveTransform, LocalGammaTransform
from batchgenerators.transforms.noise_transforms import MedianFilterTransform, SharpeningTransform

SHAPES = {'3d': ((2, 9, 12, 11), (7, 9, 10)), '2d': ((1, 20, 18), (14, 15))}
CENTRE, WIDTH = (.2, 1.1, .6), (6., 4., 9.)
OUT = Path(__file__).resolve().parents[1]/'recorded'


def inputs(shape):
    "Smooth noise with a bright block, and blocks of four labels and -1"
    rng = np.random.default_rng(39)
    data = rng.normal(size=shape)
    for axis in range(1, len(shape)): data = data + np.roll(data, 1, axis)
    seg = rng.integers(-1, 4, [1 + n//4 for n in shape[1:]])
    for axis, n in enumerate(shape[1:]): seg = seg.repeat(4, axis).take(range(n), axis)
    return data.astype(np.float32), seg[None].astype(np.float32)


def spatial(data, seg, size, **given):
    "One matrix for all: angles and scale are ranges of one number; order 3 and 1, as the trainer has it"
    off = dict(do_elastic_deform=False, random_crop=False, border_mode_data='constant', border_mode_seg='constant', border_cval_seg=-1, order_seg=1)
    new, labels = augment_spatial(data[None], seg[None], size, **{**off, **given})
    return new[0], labels[0]


def all_of(shape, size):
    data, seg = inputs(shape)
    fresh = lambda: data.copy()[None]
    out = dict(data=data, seg=seg)
    turn = dict(do_rotation=True, angle_x=(.4, .4), angle_y=(-.3, -.3), angle_z=(.2, .2), do_scale=False)
    out['turned'], out['turned_seg'] = spatial(data, seg, size, **turn)
    out['grown'], out['grown_seg'] = spatial(data, seg, size, **{**turn, 'do_scale': True, 'scale': (1.3, 1.3)})
    out['linear'], _ = spatial(data, seg, size, **turn, order_data=1)
    for g in (.7, 1.5):
        for invert in (False, True):
            with patch('numpy.random.uniform', return_value=g):
                out[f'gamma_{g}_{int(invert)}'] = color.augment_gamma(data.copy(), (g, g), invert, per_channel=True, retain_stats=True)
        out[f'contrast_{g}'] = color.augment_contrast(data.copy(), lambda: g)
        out[f'contrast_{g}_free'] = color.augment_contrast(data.copy(), lambda: g, preserve_range=False)
    for z in (.5, .81): out[f'low_{z}'] = lower(data.copy(), (z, z), order_downsample=0, order_upsample=3)
    out['low_plane'] = lower(data.copy(), (.6, .6), order_downsample=0, order_upsample=3, ignore_axes=(0,))
    out['blur'] = noise.augment_gaussian_blur(data.copy(), (.8, .8))
    out['median'] = MedianFilterTransform(3)(data=fresh())['data'][0]
    out['sharp'] = SharpeningTransform(.4)(data=fresh())['data'][0]
    at, wide = (lambda shape, d: CENTRE[d]), (lambda shape, d: WIDTH[d])
    out['gradient'] = BrightnessGradientAdditiveTransform(wide, at, max_strength=2., mean_centered=False)(data=fresh())['data'][0]
    out['local_gamma'] = LocalGammaTransform(wide, at, gamma=lambda: 2.)(data=fresh())['data'][0]
    return {k: np.asarray(v, np.float32) for k, v in out.items()}


if __name__ == '__main__':
    found = {f'{kind}/{k}': v for kind, sizes in SHAPES.items() for k, v in all_of(*sizes).items()}
    np.savez_compressed(OUT/'39_transforms.npz', **found)
    print({k: v.shape for k, v in found.items()})
