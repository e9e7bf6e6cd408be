"""The loader against everything recorded from nnU-Net 1.7.1, and its laws on random cases."""
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from segnb.image import SegnbError
from segnb.loader import LoaderError, PatchLoader, cut_patch, is_forced, patch_bounds
from segnb.preprocessing import load_preprocessed, save_preprocessed
from segnb.viewer import recorded

RECORD, ARRAYS = recorded('40_loader.json'), recorded('40_loader.npz')
KINDS, PATCHES = recorded('40_loader_kinds.json'), recorded('40_loader_kinds.npz')
SIZES = RECORD['patch_size'], RECORD['final_patch_size']


def recorded_case(name):
    seg = ARRAYS[f'{name}/seg']
    coordinates = np.stack(np.meshgrid(*[np.arange(n) for n in seg.shape], indexing='ij')) + 1.
    return SimpleNamespace(data=coordinates, seg=seg, class_locations={k: ARRAYS[f'{name}/locations_{k}'] for k in (1, 2)})


CASES = {name: recorded_case(name) for name in ('ordinary', 'small', 'flat', 'empty')}


class Replay:
    "Hands out the original's draws and insists on its questions"
    def __init__(self, draws, case, forced, flat=False):
        present = [label for label, voxels in case.class_locations.items() if len(voxels)]
        self.draws, self.case, self.label = draws, case, None
        self.lists = [lambda: present, lambda: np.unique(case.class_locations[self.label][:, 0]).tolist()][:1 + flat] if forced and present else []

    def integers(self, low, high=None):
        kind, arguments, result = next(self.draws)
        assert [low, high][:len(arguments)] == arguments
        if kind == 'randint' or not self.lists: return result
        values, self.label = self.lists.pop(0)(), result
        return values.index(result)


def start_of(patch):
    inside = np.argwhere(patch[0])[0]
    return (patch[(slice(None), *inside)] - 1 - inside).astype(int)


@pytest.mark.parametrize('i', range(len(RECORD['batches'])))
def test_patches_are_those_of_the_original(i):
    loader, batch = PatchLoader(CASES, *SIZES, RECORD['batch_size'], RECORD['oversample']), RECORD['batches'][i]
    draws = iter(batch['draws'])
    for position, key in enumerate(batch['keys']):
        forced = is_forced(position, RECORD['batch_size'], RECORD['oversample'])
        data, seg = loader.draw_patch(key, position, Replay(draws, CASES[key], forced))
        theirs, upper = ARRAYS[f'batch_{i}/data'][position], patch_bounds(CASES[key].seg.shape, *SIZES)[1]
        if all(start_of(theirs) <= upper):
            np.testing.assert_array_equal(data, theirs)
            np.testing.assert_array_equal(seg, ARRAYS[f'batch_{i}/seg'][position])
        else: # the original leaves its own bounds: a fix
            np.testing.assert_array_equal(start_of(data), np.minimum(start_of(theirs), upper))
    assert next(draws, None) is None


def start_2d(data, n):
    middle = data[n//2::n]
    i, j = np.argwhere(middle[0])[0]
    return tuple(int(v) for v in middle[:, i, j] - [1, 1 + i, 1 + j])


@pytest.mark.parametrize('kind', KINDS['batches'])
@pytest.mark.parametrize('i', range(12))
def test_the_other_loaders_of_the_original(kind, i):
    flat, n = kind != 'cascade', KINDS['neighbours'] if kind == 'neighbours' else 1
    cases = {name: SimpleNamespace(**vars(c), previous=np.roll(np.maximum(c.seg, 0), 1, axis=2)) for name, c in CASES.items()}
    sizes = [tuple(size[flat:]) for size in (KINDS['patch_size'], KINDS['final_patch_size'])]
    loader = PatchLoader(cases, *sizes, KINDS['batch_size'], KINDS['oversample'], previous=not flat, n_slices=n)
    batch = KINDS['batches'][kind][i]
    draws = iter(batch['draws'])
    for position, key in enumerate(batch['keys']):
        if not flat: assert next(draws) == ['choice', [1], 0]
        forced = is_forced(position, KINDS['batch_size'], KINDS['oversample'])
        sample = loader.cut(key, position, Replay(draws, cases[key], forced, flat))
        theirs, their_seg = (PATCHES[f'{kind}_{i}/{what}'][position] for what in ('data', 'seg'))
        start = start_2d(theirs, n) if flat else tuple(start_of(theirs).tolist())
        allowed = (*start[:flat], *np.minimum(start[flat:], patch_bounds(cases[key].seg.shape[flat:], *sizes)[1]).tolist())
        assert sample.start == allowed
        if start == allowed:
            np.testing.assert_array_equal(sample.data, theirs)
            np.testing.assert_array_equal(sample.seg, their_seg)
    assert next(draws, None) is None


@pytest.mark.parametrize('setting', RECORD['forced'])
def test_forced_by_position(setting):
    oversample, size = setting.split(', ')
    assert [is_forced(i, int(size), float(oversample)) for i in range(int(size))] == RECORD['forced'][setting]


def random_cases(rng, n=3):
    out = {}
    for i in range(n):
        seg = rng.integers(-1, 4, rng.integers(3, 30, 3)).astype(np.int8)
        out[f'c{i}'] = SimpleNamespace(data=np.stack([seg, 2*seg]).astype(np.float32), seg=seg,
                                       class_locations={k: np.argwhere(seg == k) for k in (1, 2, 3)})
    return out


@pytest.mark.parametrize('seed', range(8))
def test_laws_of_slices_on_random_cases(seed):
    rng = np.random.default_rng(seed)
    cases, final, n = random_cases(rng), rng.integers(2, 12, 2), int(rng.choice([1, 3, 5]))
    for case in cases.values(): case.previous = np.maximum(case.seg, 0)
    loader = PatchLoader(cases, final + rng.integers(0, 6, 2), final, 6, .5, n_slices=n, previous=True)
    for position in range(6):
        sample = loader.cut(loader.draw_key(rng), position, rng)
        middle = sample.data[[n//2, n + n//2]]
        assert sample.data.shape == (2*n, *loader.patch_size) and sample.seg.shape == (2, *loader.patch_size)
        inside = sample.seg[0] >= 0
        np.testing.assert_array_equal(middle[0][inside], sample.seg[0][inside])
        np.testing.assert_array_equal(sample.data[n:], 2*sample.data[:n])
        np.testing.assert_array_equal(sample.seg[1], np.maximum(sample.seg[0], 0))
        assert sample.forced == (position >= 3)
        if sample.label: assert (sample.seg[0] == sample.label).any()


@pytest.mark.parametrize('seed', range(5))
def test_laws_on_random_cases(seed):
    rng = np.random.default_rng(seed)
    cases, final = random_cases(rng), rng.integers(2, 12, 3)
    loader = PatchLoader(cases, final + rng.integers(0, 6, 3), final, 4, 0.5)
    batch = loader.draw(np.random.default_rng(seed))
    assert batch['data'].shape == (4, 2, *loader.patch_size) and batch['seg'].shape == (4, 1, *loader.patch_size)
    assert batch['data'].dtype == batch['seg'].dtype == np.float32
    inside = batch['seg'] >= 0
    np.testing.assert_array_equal(batch['data'][:, :1][inside], batch['seg'][inside])     # image and labels stay together
    np.testing.assert_array_equal(batch['data'][:, 1], 2*batch['data'][:, 0])             # channels too
    assert (batch['seg'][2:] > 0).any(axis=(1, 2, 3, 4)).all()                            # forced ones show foreground
    again = pickle.loads(pickle.dumps(loader)).draw(np.random.default_rng(seed))          # also in another process
    np.testing.assert_array_equal(again['data'], batch['data'])


def test_class_before_voxel_and_case_uniform():
    seg = np.zeros((12, 12, 12), np.int8)
    seg[:6], seg[11, 11, 11] = 1, 2
    case = SimpleNamespace(data=seg[None].astype(np.float32), seg=seg, class_locations={k: np.argwhere(seg == k) for k in (1, 2)})
    loader, rng = PatchLoader({'a': case, 'b': case, 'c': case}, (1, 1, 1), (1, 1, 1), 1, 1.), np.random.default_rng(0)
    batches = [loader.draw(rng) for _ in range(900)]
    assert 380 < sum(int(b['seg'].item()) == 2 for b in batches) < 520
    assert all(240 < [b['keys'][0] for b in batches].count(k) < 360 for k in 'abc')


def test_memory_map_is_left_alone_and_no_torch(tmp_path):
    array = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
    np.save(tmp_path/'a.npy', array)
    mapped = np.load(tmp_path/'a.npy', mmap_mode='r')
    cut_patch(mapped, (-1, 2, 3), (4, 9, 3), 0)[:] = 5
    np.testing.assert_array_equal(np.load(tmp_path/'a.npy'), array)


def stored(tmp_path, shape=(40, 100, 100)):
    rng = np.random.default_rng(0)
    seg = np.zeros(shape, np.int8)
    seg[10:20, 50:90, 60:80] = 1
    data = rng.normal(size=(2, *shape)).astype(np.float32)
    save_preprocessed(data, seg, {'class_locations': {1: np.argwhere(seg == 1).astype(np.int32)}}, tmp_path, 'c0')
    return data, seg


def resident(file):
    "Bytes of a mapped file that this process holds, from the kernel's own book"
    found = 0
    for part in re.split(r'\n(?=[0-9a-f]+-[0-9a-f]+ )', Path('/proc/self/smaps').read_text()):
        if str(file) in part.split('\n')[0]: found += int(re.search(r'Rss:\s+(\d+) kB', part)[1])*1024
    return found


@pytest.mark.skipif(not Path('/proc/self/smaps').exists(), reason='only Linux says which pages of a file are held')
def test_only_the_patch_is_read(tmp_path):
    data, seg = stored(tmp_path, (120, 200, 200))
    mapped = np.load(tmp_path/'c0_data.npy', mmap_mode='r')
    case = SimpleNamespace(data=mapped, seg=seg, class_locations={})
    PatchLoader({'c0': case}, (4, 20, 20), (4, 20, 20), 1).draw(np.random.default_rng(0))
    held = resident(tmp_path/'c0_data.npy')
    assert 0 < held < mapped.nbytes/4 # two channels of a few slices, and what the kernel maps around a page: up to 2 MB


@pytest.mark.parametrize('damage, message', [('missing', 'missing'), ('short', 'another size'), ('header', 'cannot be opened'),
                                             ('nan', 'no finite numbers'), ('label', 'no class.*found 7'), ('negative', 'no class.*found -3')])
def test_a_case_damaged_during_training_is_named(tmp_path, damage, message):
    stored(tmp_path)
    file = tmp_path/('c0_seg.npy' if damage in ('label', 'negative') else 'c0_data.npy')
    loader = PatchLoader(load_preprocessed(tmp_path), (8, 60, 60), (8, 60, 60), 2, highest_label=2)
    loader.sample((0, 0, 1))
    if damage == 'missing': file.unlink()
    elif damage in ('short', 'header'):
        with open(file, 'r+b') as f: f.truncate(1000) if damage == 'short' else f.write(b'no numpy')
    else:
        array = np.load(file, mmap_mode='r+')
        array[..., ::3] = {'nan': np.nan, 'label': 7, 'negative': -3}[damage]
        array.flush()
    with pytest.raises(SegnbError, match=f'case c0.*{message}'): loader.sample((0, 0, 1))


def test_keys_name_samples():
    cases = random_cases(np.random.default_rng(0))
    loader = PatchLoader(cases, (4, 4, 4), (3, 3, 3), 2, seed=5, stage='val', transforms=lambda data, seg, rngs: {'data': data + rngs[0].normal()})
    first = loader.replay((5, 'val', 0, 1, 1))
    assert first.forced and first.key == (5, 'val', 0, 1, 1) and first.data.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(loader.sample((0, 1, 1))['data'], first.result['data'])
    assert len({loader.sample((e, i, p))['data'].tobytes() for e in range(3) for i in range(3) for p in range(2)}) == 18
    loader.transforms = None
    assert set(loader.sample((0, 1, 1))) == {'data', 'seg'} and loader.replay((0, 1, 1)).result is None


def test_transforms_that_draw_from_global_generators_are_repeatable():
    import torch
    def shift(data, seg): return {'data': data + np.random.normal() + random.random() + float(torch.rand(1))}
    loader = PatchLoader(random_cases(np.random.default_rng(0)), (4, 4, 4), (3, 3, 3), 2, transforms=shift)
    states = np.random.get_state()[1].tobytes(), random.getstate(), torch.get_rng_state().numpy().tobytes()
    first = loader.sample((0, 0, 0))['data']
    assert states == (np.random.get_state()[1].tobytes(), random.getstate(), torch.get_rng_state().numpy().tobytes())
    np.random.seed(1), random.seed(1), torch.manual_seed(1)
    np.testing.assert_array_equal(loader.sample((0, 0, 0))['data'], first)


def test_probability_and_position():
    cases = random_cases(np.random.default_rng(0))
    loader = PatchLoader(cases, (4, 4, 4), (3, 3, 3), 1, .33, sampling='probability')
    share = np.mean([loader.cut_key((0, i, 0)).forced for i in range(1500)])
    assert abs(share - .33) < .05
    assert not any(PatchLoader(cases, (4, 4, 4), (3, 3, 3), 1).cut_key((0, i, 0)).forced for i in range(50))


@pytest.mark.parametrize('arguments, message', [(({}, (4, 4, 4), (4, 4, 4), 2), 'no case'), ((CASES, (4, 4, 4), (5, 4, 4), 2), 'smaller'),
                                                ((CASES, (4, 4, 4), (4, 4, 4), 0), 'batch size 0'), ((CASES, (4,)*3, (4,)*3, 2, -1), 'oversample -1')])
def test_refusals(arguments, message):
    with pytest.raises(LoaderError, match=message): PatchLoader(*arguments)


def test_case_without_locations_is_named():
    case = SimpleNamespace(data=np.zeros((1, 4, 4, 4), np.float32), seg=np.zeros((4, 4, 4), np.int8))
    with pytest.raises(LoaderError, match='case ct_9'): PatchLoader({'ct_9': case}, (2, 2, 2), (2, 2, 2), 2).draw(np.random.default_rng(0))
