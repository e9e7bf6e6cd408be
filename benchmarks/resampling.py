"""Resampling images and label maps on one thread: segnb beside skimage, nnU-Net v2 (default and torch) and torch's trilinear.

skimage and nnU-Net's default compute the same cubic values as segnb (for `thick`: cubic in the slices, nearest between
them); the torch entries interpolate linearly and are a floor. Label maps: nnU-Net's default and segnb let every label vote
by linear interpolation; nnU-Net's torch way takes the largest of the linear masks.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

import inputs
import numpy as np
from common import entry, main, mark, measure


def ours(size):
    from segnb.resampling import resample_image, separate_axis
    old, new, before, after = inputs.SIZES[size]
    data, axis = inputs.image(old), separate_axis(before, after)
    return measure(lambda: resample_image(data, new, separate_axis=axis))


def skimage(size):
    from skimage.transform import resize
    data, new = inputs.image(inputs.SIZES[size][0])[0], inputs.SIZES[size][1]
    return measure(lambda: resize(data, new, 3, mode='edge', anti_aliasing=False))


def v2(size, seg=None):
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape as resample
    old, new, before, after = inputs.SIZES[size]
    data = inputs.image(old) if seg is None else inputs.labels(old, seg)[None].astype(np.float32)
    order = 3 if seg is None else 1
    return measure(lambda: resample(data, new, before, after, is_seg=seg is not None, order=order, order_z=0, force_separate_z=None))


def v2_torch(size, seg=None, memory_efficient=False):
    import torch
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet as resample
    torch.set_num_threads(1)
    old, new, before, after = inputs.SIZES[size]
    data = inputs.image(old) if seg is None else inputs.labels(old, seg)[None].astype(np.float32)
    options = dict(memefficient_seg_resampling=memory_efficient) if seg else {}
    return measure(lambda: resample(data, new, before, after, is_seg=seg is not None, num_threads=1, **options))


def trilinear(size):
    import torch
    torch.set_num_threads(1)
    data, new = torch.from_numpy(inputs.image(inputs.SIZES[size][0]))[None], inputs.SIZES[size][1]
    return measure(lambda: torch.nn.functional.interpolate(data, new, mode='trilinear', align_corners=False))


def our_labels(size, n):
    from segnb.resampling import resample_label_map, separate_axis
    old, new, before, after = inputs.SIZES[size]
    seg, axis = inputs.labels(old, n), separate_axis(before, after)
    return measure(lambda: resample_label_map(seg, new, separate_axis=axis))


for size in inputs.SIZES:
    group = f'image_{size}'
    entry(group, 'segnb')(lambda s=size: ours(s))
    entry(group, 'nnunetv2', 'peers')(lambda s=size: v2(s))
    if size != 'thick': entry(group, 'skimage', 'peers')(lambda s=size: skimage(s))
    entry(group, 'nnunetv2_torch', 'peers')(lambda s=size: v2_torch(s))
    entry(group, 'torch_trilinear', 'segnb')(lambda s=size: trilinear(s))
mark('image_ct_up', 'skimage', 15)
mark('image_large', 'nnunetv2', 15)

for size, n in (('ct_up', 3), ('ct_up', 61), ('large', 3), ('large', 61), ('thick', 3), ('small', 2)):
    group = f'labels{n}_{size}'
    entry(group, 'segnb')(lambda s=size, n=n: our_labels(s, n))
    entry(group, 'nnunetv2', 'peers')(lambda s=size, n=n: v2(s, n))
    entry(group, 'nnunetv2_torch', 'peers')(lambda s=size, n=n: v2_torch(s, n))
    entry(group, 'nnunetv2_torch_lean', 'peers')(lambda s=size, n=n: v2_torch(s, n, True))
    if n == 61:
        mark(group, 'nnunetv2', 30)
        mark(group, 'nnunetv2_torch', 3)
        mark(group, 'nnunetv2_torch_lean', 3)

if __name__ == '__main__': main(__doc__)
