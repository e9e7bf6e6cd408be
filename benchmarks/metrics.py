"""Metrics of one pair of label maps with three labels: segnb beside medpy, MONAI and nnU-Net v2.

The prediction is the reference moved by two voxels, with speckle and a stray blob. `hd95_*`, `assd_*` and `surface_dice_*` start from arrays:
label maps for segnb, masks for medpy, one-hot tensors (made beforehand, not timed) for MONAI. `surfaces_*` asks for all three at once.
`overlap_*` starts from two compressed files and yields what counts of voxels suffice for. The peers need `monai` and `medpy`. One thread.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MPLBACKEND='agg')

import contextlib, tempfile
from pathlib import Path

import inputs
import numpy as np
from common import entry, main, mark, measure

SIZES = {'128cubed': ((128, 128, 128), (1., 1., 1.)), '64x320x320': ((64, 320, 320), (3., .8, .8))}
LABELS, TOLERANCE = (1, 2, 3), 2.


def pair(size):
    "(reference, prediction, spacing): three ellipsoids for each of three labels"
    (shape, spacing), rng = SIZES[size], np.random.default_rng(12)
    reference = np.zeros(shape, np.uint8)
    for label in LABELS:
        for _ in range(3): reference[inputs._ellipsoid(shape, rng.uniform(-.5, .5, 3), rng.uniform(.12, .4, 3)/label**.5)] = label
    prediction = np.roll(reference, (1, 2, -2), (0, 1, 2))
    prediction[rng.random(shape) < 1e-4] = 1
    prediction[inputs._ellipsoid(shape, (.8, .8, .8), (.08,)*3)] = 2
    return reference, prediction, spacing


def ours(size, metrics):
    from segnb.metrics import evaluate_case
    a, b, spacing = pair(size)
    def work(): return evaluate_case(a, b, LABELS, spacing, metrics, tolerance=TOLERANCE)
    return {**measure(work), 'value': [[s[m] for m in metrics] for s in work().values()]}


def medpy(size, metrics):
    from medpy.metric import binary
    a, b, spacing = pair(size)
    def work(): return [[getattr(binary, m)(b == k, a == k, spacing) for m in metrics] for k in LABELS]
    return {**measure(work, repeats=3), 'value': work()}


def monai(size, metrics):
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
    torch.set_num_threads(1)
    a, b, spacing = pair(size)
    y, p = (torch.nn.functional.one_hot(torch.from_numpy(m).long(), 4).movedim(-1, 0)[None].float() for m in (a, b))
    common = dict(include_background=False, spacing=spacing)
    each = dict(hd95=lambda: compute_hausdorff_distance(p, y, percentile=95, **common),
                assd=lambda: compute_average_surface_distance(p, y, symmetric=True, **common),
                surface_dice=lambda: compute_surface_dice(p, y, [TOLERANCE]*3, **common))
    def work(): return [np.ravel(each[m]()).tolist() for m in metrics]
    return {**measure(work), 'value': [list(label) for label in zip(*work())]}


@contextlib.contextmanager
def files(size):
    "Two folders that hold the pair as one compressed file each"
    import SimpleITK as sitk
    a, b, spacing = pair(size)
    with tempfile.TemporaryDirectory() as folder:
        out = [Path(folder)/name for name in ('reference', 'prediction')]
        for array, where in zip((a, b), out):
            where.mkdir()
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(spacing[::-1])
            sitk.WriteImage(image, str(where/'case.nii.gz'))
        yield out


def our_overlap(size):
    from segnb.metrics import evaluate_folder
    with files(size) as folders: return measure(lambda: evaluate_folder(*folders, LABELS, n_workers=0, progress=False))


def v2_overlap(size):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    with files(size) as folders: return measure(lambda: compute_metrics(*(str(f/'case.nii.gz') for f in folders), SimpleITKIO(), list(LABELS)))


THEIRS = {'hd95': ('hd95',), 'assd': ('assd',), 'surface_dice': ('surface_dice',), 'surfaces': ('hd95', 'assd', 'surface_dice')}
for size in SIZES:
    for name, metrics in THEIRS.items():
        group, a = f'{name}_{size}', dict(size=size, metrics=metrics)
        entry(group, 'segnb')(lambda a=a: ours(**a))
        entry(group, 'monai', 'peers')(lambda a=a: monai(**a))
        mark(group, 'monai', 2)
        if name in ('hd95', 'assd'):
            entry(group, 'medpy', 'peers')(lambda a=a: medpy(**a))
            mark(group, 'medpy', 10)
    group = f'overlap_{size}'
    entry(group, 'segnb')(lambda s=size: our_overlap(s))
    entry(group, 'nnunetv2', 'peers')(lambda s=size: v2_overlap(s))

if __name__ == '__main__': main(__doc__)
