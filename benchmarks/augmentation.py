"""Training augmentation: segnb beside nnU-Net v2 and nnU-Net v1, batches of two, one thread a process.

`recipe_*`: patches are cut already, one process makes batches from them: `segnb` is the fast engine with v1's recipe at v1's
interpolation order 3, `segnb_linear` the same at v2's order 1, `segnb_batchgenerators` the reference engine; `nnunetv2` is v2's
default recipe (order 1); `nnunet_v1` is v1's own (order 3), where SEGNB_V1_PYTHON names the interpreter of an environment with
nnunet 1.7.1 (see tests/record/README.md). `stream_*`: loader and transforms in two worker processes, batches taken as fast as they
come. Transforms are random and most are seldom, so the figures are means over many batches: seconds a batch.
"""
import os, sys
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', nnUNet_compile='false', MPLBACKEND='agg')

import tempfile, time
from pathlib import Path
from types import SimpleNamespace

import inputs
import numpy as np
from common import HERE, TreeMemory, _child, _cpu_seconds, entry, main, mark, measure

PATCHES = {'64x96x96': (64, 96, 96), '96x96x96': (96, 96, 96)}
KINDS = {'ct': (1, 2), 'mr': (4, 3)}                       # channels, labels
LOADED = {'64x96x96': (121, 154, 135), '96x96x96': (154, 154, 154)}   # enlarged patches, the same in v1, v2 and segnb
SCALES = [[2.**-k]*3 for k in range(4)]
TURN, BATCHES, STREAMED, V1 = (-np.pi/6, np.pi/6), 60, 100, os.environ.get('SEGNB_V1_PYTHON')


def volume(shape, kind, seed):
    "A preprocessed case: (C, Z, Y, X) float32 of about -3 to 3, (1, Z, Y, X) int16 labels"
    channels, n = KINDS[kind]
    data = np.concatenate([inputs.image(shape, seed + k) for k in range(channels)])/400 + 1
    return data.astype(np.float32), inputs.labels(shape, n, seed)[None]


def batches(patch, kind):
    "Two loaded batches: data (2, C, Z, Y, X) and seg (2, 1, Z, Y, X), float32"
    for i in range(2):
        data, seg = zip(*(volume(LOADED[patch], kind, 10*i + j) for j in range(2)))
        yield np.stack(data), np.stack(seg).astype(np.float32)


def rounds(work, n):
    "Time n calls of `work(i)` as one call, no batch twice in a row"
    for i in range(3): work(i)
    return {**measure(lambda: [work(i) for i in range(n)], repeats=1, slow=0., per=n), 'unit': 'a batch'}


def ours(patch, kind, order=3, fast=True):
    import torch
    from segnb.augmentation import AugmentationParameters, device_transforms, training_transforms
    torch.set_num_threads(1)
    given, options = (AugmentationParameters(), PATCHES[patch], SCALES), dict(order=order) if fast else {}
    engine, ready = (device_transforms if fast else training_transforms)(*given, **options), list(batches(patch, kind))
    def work(i):
        data, seg = ready[i % 2]
        engine(data=data, seg=seg, rngs=[np.random.default_rng((i, j)) for j in range(2)])
    return rounds(work, BATCHES if fast else BATCHES//2)


def v2_transforms(patch):
    import torch
    torch.set_num_threads(1)
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    return nnUNetTrainer.get_training_transforms(np.array(PATCHES[patch]), TURN, SCALES, (0, 1, 2), False, use_mask_for_norm=None)


def v2(patch, kind):
    import torch
    transform = v2_transforms(patch)
    ready = [(torch.from_numpy(data), torch.from_numpy(seg.astype(np.int16))) for data, seg in batches(patch, kind)]
    torch.manual_seed(0), np.random.seed(0)
    def work(i):
        for image, segmentation in zip(*ready[i % 2]): transform(image=image.clone(), segmentation=segmentation.clone())
    return rounds(work, BATCHES)


def v1(patch, kind):
    "Runs in v1's environment"
    from unittest.mock import patch as replaced
    for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.gettempdir()
    from nnunet.training.data_augmentation import data_augmentation_moreDA as module
    from nnunet.training.data_augmentation.default_data_augmentation import default_3D_augmentation_params as default
    given = {**default, 'scale_range': (.7, 1.4), 'do_elastic': False, 'selected_seg_channels': [0],
             'patch_size_for_spatialtransform': PATCHES[patch], 'num_threads': 1, 'num_cached_per_thread': 1,
             **{f'rotation_{axis}': TURN for axis in 'xyz'}}
    kept = []   # the chain, in place of the processes that would run it
    with replaced.object(module, 'MultiThreadedAugmenter', lambda loader, chain, *_, **__: kept.append(chain)):
        module.get_moreDA_augmentation(None, None, PATCHES[patch], given, deep_supervision_scales=SCALES, use_nondetMultiThreadedAugmenter=False)
    ready = list(batches(patch, kind))
    np.random.seed(0)
    def work(i):
        data, seg = ready[i % 2]
        kept[0](data=data, seg=seg)
    return rounds(work, BATCHES//3)


def stored(folder, patch, kind, n=4):
    "Preprocessed cases as memory maps: name -> data, seg, class_locations"
    shape, out, rng = tuple(2*p for p in PATCHES[patch]), {}, np.random.default_rng(0)
    for i in range(n):
        data, seg = volume(shape, kind, 20 + i)
        places = {int(k): np.argwhere(seg[0] == k) for k in np.unique(seg) if k > 0}
        places = {k: rng.permutation(p)[:10000] for k, p in places.items()}
        for part, array in (('data', data), ('seg', seg)): np.save(Path(folder)/f'{i}_{part}.npy', array)
        maps = [np.load(Path(folder)/f'{i}_{part}.npy', mmap_mode='r') for part in ('data', 'seg')]
        out[f'case_{i}'] = SimpleNamespace(data=maps[0], seg=maps[1], class_locations=places)
    return out


def drain(stream, close):
    "Seconds a batch once the queues are empty; the workers' processor time and memory too"
    used = _cpu_seconds()
    for _ in range(12): next(stream)
    start = time.perf_counter()
    for _ in range(STREAMED): next(stream)
    wall, memory = (time.perf_counter() - start)/STREAMED, TreeMemory().now()
    close()
    cpu = (_cpu_seconds() - used)/(STREAMED + 12)
    return dict(seconds=wall, fastest=wall, cpu_seconds=cpu, calls=STREAMED, peak_mb=round(memory), unit='a batch')


def our_stream(patch, kind, order=3):
    from segnb.augmentation import AugmentationParameters, device_transforms
    from segnb.batches import BatchStream
    from segnb.loader import PatchLoader
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: SimpleNamespace(data=c.data, seg=c.seg[0], class_locations=c.class_locations) for name, c in stored(folder, patch, kind).items()}
        loader = PatchLoader(cases, LOADED[patch], PATCHES[patch], 2)
        engine = device_transforms(AugmentationParameters(), PATCHES[patch], SCALES, order=order)
        stream = BatchStream(loader, engine, seed=0, iterations=STREAMED + 12, n_workers=2)
        return drain(stream.epoch(0), stream.close)


class Fresh:
    "A memory map whose parts are copies, as v2's own storage gives them: v2 changes what it has read in place"
    def __init__(self, array): self.array = array
    def __getattr__(self, name): return getattr(self.array, name)
    def __getitem__(self, part): return np.array(self.array[part])


def v2_stream(patch, kind):
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    with tempfile.TemporaryDirectory() as folder:
        cases, (_, n) = stored(folder, patch, kind), KINDS[kind]
        def load_case(name):
            c = cases[name]
            with_channel = {k: np.c_[np.zeros(len(p), int), p] for k, p in c.class_locations.items()}
            return Fresh(c.data), Fresh(c.seg), None, dict(class_locations=with_channel)
        data = SimpleNamespace(identifiers=list(cases), load_case=load_case)
        labels = SimpleNamespace(has_ignore_label=False, all_labels=list(range(n + 1)), foreground_labels=list(range(1, n + 1)))
        loader = nnUNetDataLoader(data, 2, LOADED[patch], PATCHES[patch], labels, oversample_foreground_percent=.33, transforms=v2_transforms(patch))
        stream = NonDetMultiThreadedAugmenter(loader, None, 2, num_cached=6, seeds=None, pin_memory=False, wait_time=.002)
        return drain(stream, stream._finish)


def from_v1(group):
    return _child(str(HERE/'augmentation.py'), (group, 'nnunet_v1_here'), V1, 900)


for kind in KINDS:
    for patch in PATCHES:
        a, group, stream = dict(patch=patch, kind=kind), f'recipe_{kind}_{patch}', f'stream_{kind}_{patch}'
        entry(group, 'segnb')(lambda a=a: ours(**a))
        entry(group, 'segnb_linear')(lambda a=a: ours(**a, order=1))
        entry(group, 'segnb_batchgenerators')(lambda a=a: ours(**a, fast=False))
        entry(group, 'nnunetv2', 'peers')(lambda a=a: v2(**a))
        if V1: entry(group, 'nnunet_v1')(lambda g=group: from_v1(g))
        if '--one' in sys.argv: entry(group, 'nnunet_v1_here')(lambda a=a: v1(**a))
        entry(stream, 'segnb')(lambda a=a: our_stream(**a))
        entry(stream, 'segnb_linear')(lambda a=a: our_stream(**a, order=1))
        entry(stream, 'nnunetv2', 'peers')(lambda a=a: v2_stream(**a))
        mark(group, 'nnunet_v1', 4)
        mark(group, 'nnunetv2', 1.5, of='segnb_linear')
        mark(stream, 'nnunetv2', 1.5, of='segnb_linear')

if __name__ == '__main__': main(__doc__)
