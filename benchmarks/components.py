"""Keeping the largest connected component of label maps of 256 x 256 x 256 voxels, on one thread.

Everybody does the same: find the components by faces, count them, blank all but the largest of each label. `scipy` is
scipy's search with one count; `nnunetv1` looks at the whole volume once per component, as the original does (its steps, written
down here; only where components are few, else it takes minutes); `nnunetv2` is nnU-Net v2's own function, which keeps one
component where several are equal. `sponge` is half of the volume, `blobs` a thousand pieces, `organs` 25 compact labels with
a few stray pieces each, every label on its own.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

import inputs
import numpy as np
from common import entry, main, mark, measure

SHAPE = (256, 256, 256)


def label_map(kind):
    "(label map, labels to clean)"
    from scipy.ndimage import gaussian_filter
    if kind == 'organs':
        rng, out = np.random.default_rng(1), inputs.labels(SHAPE, 25)
        for k in range(1, 26):
            for _ in range(4):
                corner = rng.integers(0, 250, 3)
                out[tuple(slice(c, c + 4) for c in corner)] = k
        return out, list(range(1, 26))
    smooth = gaussian_filter(np.random.default_rng(11).normal(0, 1, SHAPE).astype(np.float32), 4)
    return (smooth > (0 if kind == 'sponge' else 1.5*smooth.std())).astype(np.int16), [1]


def ours(kind):
    from segnb.postprocessing import keep_largest_component
    labels, which = label_map(kind)
    return measure(lambda: keep_largest_component(labels, which), 3)


def scipy(kind):
    from scipy.ndimage import label
    labels, which = label_map(kind)
    def work():
        out = labels.copy()
        for k in which:
            pieces, n = label(out == k)
            voxels = np.bincount(pieces.ravel(), minlength=n + 1)
            voxels[0] = 0
            keep = voxels == voxels.max()
            keep[0] = True
            out[~keep[pieces]] = 0
        return out
    return measure(work, 3)


def nnunetv1(kind):
    from scipy.ndimage import label
    labels, which = label_map(kind)
    def work():
        out = labels.copy()
        for k in which:
            mask = out == k
            pieces, n = label(mask.astype(int))
            voxels = {i: (pieces == i).sum() for i in range(1, n + 1)}
            for i, size in voxels.items():
                if size != max(voxels.values()): out[(pieces == i) & mask] = 0
        return out
    return measure(work, 2)


def nnunetv2(kind):
    from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation as keep
    labels, which = label_map(kind)
    def work():
        out = labels
        for k in which: out = keep(out, k)
        return out
    return measure(work, 3)


for kind in ('sponge', 'blobs', 'organs'):
    entry(kind, 'segnb')(lambda k=kind: ours(k))
    entry(kind, 'scipy')(lambda k=kind: scipy(k))
    if kind == 'sponge': entry(kind, 'nnunetv1')(lambda k=kind: nnunetv1(k))
    entry(kind, 'nnunetv2', 'peers')(lambda k=kind: nnunetv2(k))
    mark(kind, 'scipy', 1)
    mark(kind, 'nnunetv2', 1)

if __name__ == '__main__': main(__doc__)
