"""The loader against everything recorded from nnU-Net 1.7.1, and its laws on random cases."""
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from segnb.loader import LoaderError, PatchLoader, cut_patch, is_forced, patch_bounds
from segnb.viewer import recorded

RECORD, ARRAYS = recorded('40_loader.json'), recorded('40_loader.npz')
SIZES = RECORD['patch_size'], RECORD['final_patch_size']


def recorded_case(name):
    seg = ARRAYS[f'{name}/seg']
    coordinates = np.stack(np.meshgrid(*[np.arange(n) for n in seg.shape], indexing='ij')) + 1.
    return SimpleNamespace(data=coordinates, seg=seg, class_locations={k: ARRAYS[f'{name}/locations_{k}'] for k in (1, 2)})


CASES = {name: recorded_case(name) for name in ('ordinary', 'small', 'flat', 'empty')}


class Replay:
    "Hands out the original's draws and insists on its questions"
    def __init__(self, draws, present): self.draws, self.classes = draws, [present]

    def integers(self, low, high=None):
        kind, arguments, result = next(self.draws)
        assert [low, high][:len(arguments)] == arguments
        return self.classes.pop().index(result) if kind == 'choice' and self.classes else result


def start_of(patch):
    inside = np.argwhere(patch[0])[0]
    return (patch[(slice(None), *inside)] - 1 - inside).astype(int)


@pytest.mark.parametrize('i', range(len(RECORD['batches'])))
def test_patches_are_those_of_the_original(i):
    loader, batch = PatchLoader(CASES, *SIZES, RECORD['batch_size'], RECORD['oversample']), RECORD['batches'][i]
    draws = iter(batch['draws'])
    for position, key in enumerate(batch['keys']):
        present = [label for label, voxels in CASES[key].class_locations.items() if len(voxels)]
        data, seg = loader.draw_patch(key, position, Replay(draws, present))
        theirs, upper = ARRAYS[f'batch_{i}/data'][position], patch_bounds(CASES[key].seg.shape, *SIZES)[1]
        if all(start_of(theirs) <= upper):
            np.testing.assert_array_equal(data, theirs)
            np.testing.assert_array_equal(seg, ARRAYS[f'batch_{i}/seg'][position])
        else: # the original leaves its own bounds: a fix
            np.testing.assert_array_equal(start_of(data), np.minimum(start_of(theirs), upper))
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


@pytest.mark.parametrize('arguments, message', [(({}, (4, 4, 4), (4, 4, 4), 2), 'no case'), ((CASES, (4, 4, 4), (5, 4, 4), 2), 'smaller'),
                                                ((CASES, (4, 4, 4), (4, 4, 4), 0), 'batch size 0'), ((CASES, (4,)*3, (4,)*3, 2, -1), 'oversample -1')])
def test_refusals(arguments, message):
    with pytest.raises(LoaderError, match=message): PatchLoader(*arguments)


def test_case_without_locations_is_named():
    case = SimpleNamespace(data=np.zeros((1, 4, 4, 4), np.float32), seg=np.zeros((4, 4, 4), np.int8))
    with pytest.raises(LoaderError, match='case ct_9'): PatchLoader({'ct_9': case}, (2, 2, 2), (2, 2, 2), 2).draw(np.random.default_rng(0))
