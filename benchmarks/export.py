"""Export on one thread: probabilities of every class to a label map on the grid of the image, segnb beside nnU-Net v2.

Both get the same half precision array of made-up scores (noise in blocks of four voxels: many borders, so little can be
skipped; `organs` is smooth, as a network's answer is) and give a label map; no file is written. nnU-Net's default
interpolates every class with skimage; its torch way interpolates with torch. "added MB" is the peak less what was there
before the first call, input included; libraries are loaded and loops compiled before. `whole_body` reads 117 classes from
a memory map of half precision, 7.4 GB, and fills 512 x 512 x 800 voxels.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

import tempfile
from pathlib import Path

import numpy as np
from common import HERE, _status, entry, main, mark, measure

#                   scores           to               mm of the scores   mm of the image
SIZES = dict(
    large=((120, 256, 256), (160, 384, 384), (1., 1., 1.), (.75, .6667, .6667)),
    thick=((80, 197, 197), (64, 160, 160), (2., .65, .65), (2.5, .8, .8)),
    same=((64, 160, 160), (64, 160, 160), (2.5, .8, .8), (2.5, .8, .8)))
WHOLE = (117, 427, 273, 273), (800, 512, 512), (1.5, 1.5, 1.5), (.8, .8, .8)


def noise(n, shape, cell=4):
    "Scores that change every `cell` voxels, (n, *shape) float16"
    rng, out = np.random.default_rng(0), np.empty((n, *shape), np.float16)
    for one in out:
        blocks = rng.normal(size=[-(-s//cell) for s in shape]).astype(np.float16)
        for axis in range(3): blocks = np.repeat(blocks, cell, axis)
        one[...] = blocks[tuple(slice(s) for s in shape)]
    return out


def organs(n, shape, out=None):
    "Smooth scores of n - 1 balls in background, (n, *shape) float16; only the boxes of the balls are written"
    rng, out = np.random.default_rng(0), np.zeros((n, *shape), np.float16) if out is None else out
    background = np.ones(shape, np.float16)
    for k in range(1, n):
        radius = [max(3, int(rng.uniform(.03, .12)*s)) for s in shape]
        start = [int(rng.integers(0, s - 2*r)) for s, r in zip(shape, radius)]
        box = tuple(slice(a, a + 2*r) for a, r in zip(start, radius))
        z, y, x = np.ogrid[tuple(slice(-1, 1, 2j*r) for r in radius)]
        out[k][box] = 1/(1 + np.exp(20*(np.sqrt(z*z + y*y + x*x) - .8)))
        background[box] -= np.minimum(out[k][box], background[box])
    out[0] = background
    return out


def added(work, **options):
    "What `measure` gives, and the memory that the work added"
    before = _status('VmRSS')
    figures = measure(work, **options)
    return {**figures, 'added_mb': round(figures['peak_mb'] - before, 1)}


def ours(scores, new, mm_now, mm_then, prepare=lambda x: x):
    from segnb.export import to_original_grid
    from segnb.labels import Labels
    def properties(old, new): return dict(
        shape=new, spacing=mm_then, bbox=[(0, s) for s in new], shape_after_crop=new, shape_after_resampling=old,
        spacing_after_resampling=mm_now, transpose_forward=(0, 1, 2), transpose_backward=(0, 1, 2))
    labels = Labels.from_dict(dict(labels={f'c{i}' if i else 'background': i for i in range(len(scores))}))
    to_original_grid(np.array(scores[:, :4, :8, :8]), properties((4, 8, 8), (5, 9, 9)), labels)   # compiles
    case = properties(scores.shape[1:], new)
    return added(lambda: to_original_grid(prepare(scores), case, labels), slow=30.)


def v2(scores, new, mm_now, mm_then, resampling=None):
    import torch
    import v2 as peer
    torch.set_num_threads(1)
    plans, known = peer.planned(HERE.parent/'data_samples'/'Task101_PhantomCT')
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as export
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    configuration = plans['configurations']['3d_fullres']
    configuration['spacing'] = list(mm_now)
    if resampling: configuration.update(resampling_fn_probabilities=resampling, resampling_fn_probabilities_kwargs={})
    plans.update(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    manager = PlansManager(plans)
    known = {**known, 'labels': {f'c{i}' if i else 'background': i for i in range(len(scores))}}
    properties = dict(spacing=list(mm_then), shape_before_cropping=new, shape_after_cropping_and_before_resampling=new,
                      bbox_used_for_cropping=[[0, s] for s in new])
    scores, labels = torch.from_numpy(scores), manager.get_label_manager(known)
    return added(lambda: export(scores, manager, manager.get_configuration('3d_fullres'), labels, dict(properties), False, 1))


def whole_body():
    shape, *geometry = WHOLE
    with tempfile.TemporaryDirectory(dir=os.environ.get('SEGNB_BENCH_SCRATCH')) as folder:
        file = Path(folder)/'probabilities'
        organs(shape[0], shape[1:], np.memmap(file, np.float16, 'w+', shape=shape)).flush()
        return ours(np.memmap(file, np.float16, 'r', shape=shape), *geometry)


def slabs(scores, planes=8):
    "Single precision, some planes at a time, as the sliding window gives them"
    for start in range(0, scores.shape[1], planes): yield start, scores[:, start:start + planes].astype(np.float32)


def group(name, make, geometry):
    "One input, four ways"
    entry(name, 'segnb')(lambda: ours(make(), *geometry))
    entry(name, 'segnb_slabs')(lambda: ours(make(), *geometry, prepare=slabs))
    entry(name, 'nnunetv2', 'peers')(lambda: v2(make(), *geometry))
    entry(name, 'nnunetv2_torch', 'peers')(lambda: v2(make(), *geometry, resampling='resample_torch_fornnunet'))


for n in (3, 25, 61): group(f'large_{n}', lambda n=n: noise(n, SIZES['large'][0]), SIZES['large'][1:])
group('organs_25', lambda: organs(25, SIZES['large'][0]), SIZES['large'][1:])
group('thick_25', lambda: noise(25, SIZES['thick'][0]), SIZES['thick'][1:])
group('same_25', lambda: noise(25, SIZES['same'][0]), SIZES['same'][1:])
for name in ('large_25', 'large_61'):
    mark(name, 'nnunetv2', 10)
    mark(name, 'nnunetv2', 8, 'added_mb')
entry('whole_body_117', 'segnb')(whole_body)

if __name__ == '__main__': main(__doc__)
