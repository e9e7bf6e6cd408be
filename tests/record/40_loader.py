"""Record where nnU-Net 1.7.1 cuts its patches, for the parity checks of the loader chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/40_loader.py
Writes tests/recorded/40_loader.json (the bounds and every random draw of each sample, the oversampling table) and
tests/recorded/40_loader.npz (label maps and class locations that went in, patches that came out), and the same for the
other loaders of the original to 40_loader_kinds.json and 40_loader_kinds.npz: 2D, 2D with neighbouring slices, and 3D with the
label map of the stage before. The image of each case holds the voxels' own coordinates plus one, so a patch tells where it was cut.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED, BATCHES = 40, 12
PATCH, FINAL, BATCH_SIZE, OVERSAMPLE = (9, 14, 12), (6, 11, 9), 5, 0.33
SHAPES = {'ordinary': (14, 22, 20), 'small': (5, 9, 30), 'flat': (4, 25, 13), 'empty': (10, 15, 12)}
NEIGHBOURS = 3 # slices of a 2D sample with its neighbours
OUT = Path(__file__).resolve().parents[1]/'recorded'


def label_map(rng, shape, empty):
    seg = np.zeros(shape, np.int8)
    if empty: return seg
    for label in (1, 2):
        start = [int(rng.integers(0, n - 2)) for n in shape]
        seg[tuple(slice(s, s + int(rng.integers(2, 6))) for s in start)] = label
    seg[-1, -1, -1] = 1 # a location in the corner: its patch would start far beyond the upper bound
    seg[0, 0] = -1      # outside the body
    return seg


def spy(log):
    "Let every draw of the loader be seen: name, arguments, result"
    for name in ('randint', 'choice'):
        def seen(*args, name=name, draw=getattr(np.random, name)):
            result = draw(*args)
            log.append([name, [len(a) if np.ndim(a) else None if a is None else int(a) for a in args], np.asarray(result).tolist()])
            return result
        setattr(np.random, name, seen)


def record_kind(kind, data, n_channels, log, arrays):
    "Batches of another loader of the original, with the draws of each"
    from nnunet.training.dataloading.dataset_loading import DataLoader2D, DataLoader3D
    options = dict(oversample_foreground_percent=OVERSAMPLE, pad_mode='constant', memmap_mode='r')
    if kind == 'cascade': loader = DataLoader3D(data, np.array(PATCH), np.array(FINAL), BATCH_SIZE, True, **options)
    else:
        n = NEIGHBOURS if kind == 'neighbours' else 1
        loader = DataLoader2D(data, np.array(PATCH[1:]), np.array(FINAL[1:]), BATCH_SIZE, pseudo_3d_slices=n, **options)
        loader.data_shape = (BATCH_SIZE, n*n_channels, *PATCH[1:]) # with neighbours its own shape lacks their channels, and it fails
    np.random.seed(SEED)
    batches = []
    for i in range(BATCHES):
        log.clear()
        batch = loader.generate_train_batch()
        batches.append({'keys': [str(k) for k in batch['keys']], 'draws': log[1:]})
        arrays[f'{kind}_{i}/data'], arrays[f'{kind}_{i}/seg'] = batch['data'].astype(np.int16), batch['seg'].astype(np.int8)
    return batches


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.training.dataloading.dataset_loading import DataLoader3D
    rng, folder, arrays, data = np.random.default_rng(SEED), Path(tempfile.mkdtemp()), {}, {}
    for name, shape in SHAPES.items():
        seg = arrays[f'{name}/seg'] = label_map(rng, shape, name == 'empty')
        coordinates = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing='ij')) + 1
        before = np.roll(np.maximum(seg, 0), 1, axis=2) # what the stage before is said to have found
        np.save(folder/f'{name}_before.npy', before)
        np.save(folder/f'{name}.npy', np.concatenate([coordinates, seg[None]]).astype(np.float32))
        locations = {label: np.argwhere(seg == label) for label in (1, 2)}
        for label, voxels in locations.items(): arrays[f'{name}/locations_{label}'] = voxels.astype(np.int16)
        data[name] = {'data_file': str(folder/f'{name}.npz'), 'seg_from_prev_stage_file': str(folder/f'{name}_before.npz'),
                      'properties': {'class_locations': {k: v if len(v) else [] for k, v in locations.items()}}}
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        loader = DataLoader3D(data, np.array(PATCH), np.array(FINAL), BATCH_SIZE, False, oversample_foreground_percent=OVERSAMPLE,
                              pad_mode='constant', memmap_mode='r')
        np.random.seed(SEED)
        log, batches = [], []
        spy(log)
        for i in range(BATCHES):
            log.clear()
            batch = loader.generate_train_batch()
            batches.append({'keys': [str(k) for k in batch['keys']], 'draws': log[1:]})
            arrays[f'batch_{i}/data'], arrays[f'batch_{i}/seg'] = batch['data'].astype(np.int16), batch['seg'].astype(np.int8)
        kinds, patches = {}, {}
        for kind in ('2d', 'neighbours', 'cascade'): kinds[kind] = record_kind(kind, data, 3, log, patches)
    table = {}
    for fraction in (0, .1, .33, .5, 1):
        for size in range(1, 33):
            loader.batch_size, loader.oversample_foreground_percent = size, fraction
            table[f'{fraction}, {size}'] = [int(loader.get_do_oversample(i)) for i in range(size)]
    record = dict(command='python tests/record/40_loader.py',
                  versions={'python': platform.python_version(), **{k: version(k) for k in ('nnunet', 'numpy', 'batchgenerators')}},
                  patch_size=PATCH, final_patch_size=FINAL, batch_size=BATCH_SIZE, oversample=OVERSAMPLE, batches=batches, forced=table)
    (OUT/'40_loader.json').write_text(json.dumps(record) + '\n', encoding='utf-8')
    np.savez_compressed(OUT/'40_loader.npz', **arrays)
    about = {k: record[k] for k in ('command', 'versions', 'patch_size', 'final_patch_size', 'batch_size', 'oversample')}
    (OUT/'40_loader_kinds.json').write_text(json.dumps({**about, 'neighbours': NEIGHBOURS, 'batches': kinds}) + '\n', encoding='utf-8')
    np.savez_compressed(OUT/'40_loader_kinds.npz', **patches)
    print('wrote', OUT/'40_loader.json', OUT/'40_loader.npz')


if __name__ == '__main__':
    main()
