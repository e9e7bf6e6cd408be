"""Cropping beside nnU-Net 1.7.1 (recorded by tests/record/20_cropping.py), and laws on random images."""
from pathlib import Path

import numpy as np
import pytest

from segnb.cropping import CropBox, CroppingError, bounding_box, crop_to_nonzero, fill_holes, nonzero_box, nonzero_mask, uncrop

with np.load(Path(__file__).parent/'recorded'/'20_cropping.npz') as file: RECORDED = {k: file[k] for k in file.files}
NAMES = sorted({k.split('/')[0] for k in RECORDED if k.endswith('/data')})


def same(a, b): return np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize('name', NAMES)
def test_as_the_original(name):
    data, seg = RECORDED[f'{name}/data'], RECORDED.get(f'{name}/seg')
    out, out_seg, box = crop_to_nonzero(data, seg)
    assert [list(span) for span in box] == RECORDED[f'{name}/bbox'].tolist()
    assert same(out, RECORDED[f'{name}/out_data']) and out.dtype == data.dtype
    assert same(out_seg, RECORDED[f'{name}/out_seg']) and out_seg.dtype.kind == 'i'
    assert same(nonzero_mask(data), RECORDED[f'{name}/mask'])
    assert nonzero_box(data) == box == bounding_box(RECORDED[f'{name}/mask'])


def sparse(rng):
    data = rng.normal(size=(rng.integers(1, 4), *rng.integers(1, 9, 3))).astype(np.float32) * (rng.random(1) < .9)
    data *= rng.random(data.shape) < rng.choice([.02, .3, .9])
    data.flat[rng.integers(data.size)] = 1
    return data


@pytest.mark.parametrize('seed', range(40))
def test_filling_inside_the_box_is_filling_everywhere(seed):
    from scipy.ndimage import binary_fill_holes
    data = sparse(np.random.default_rng(seed))
    assert same(nonzero_mask(data), binary_fill_holes((data != 0).any(axis=0)))


@pytest.mark.parametrize('seed', range(40))
def test_the_way_back(seed):
    rng = np.random.default_rng(seed)
    data = sparse(rng)
    seg = rng.integers(0, 4, data.shape[1:])
    before = data.copy(), seg.copy()
    out, out_seg, box = crop_to_nonzero(data, seg)
    assert same(uncrop(out, box, data.shape[1:]), data)
    inside = uncrop(np.ones(box.shape, bool), box, data.shape[1:])
    assert same(uncrop(np.maximum(out_seg, 0), box, data.shape[1:]), seg * inside)
    out[:], out_seg[:] = 7, 7
    assert same(data, before[0]) and same(seg, before[1]), 'the inputs were changed'


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int16, np.int64, np.float32, bool])
def test_label_types_can_hold_minus_one(dtype):
    data = np.zeros((1, 3, 3, 3), np.float32); data[0, 0, 0, 0] = data[0, 2, 2, 2] = 1
    _, seg, _ = crop_to_nonzero(data, np.zeros((3, 3, 3), dtype))
    assert seg.dtype.kind == 'i' and np.unique(seg).tolist() == [-1, 0] and (seg == 0).sum() == 2


def test_refusals():
    ones = np.ones((2, 4, 4, 4), np.float32)
    with pytest.raises(CroppingError, match='0000, 0001'): crop_to_nonzero(ones * 0)
    with pytest.raises(CroppingError, match=r'\(4, 4, 5\).*\(4, 4, 4\)'): crop_to_nonzero(ones, np.zeros((4, 4, 5), int))
    with pytest.raises(CroppingError, match='1.5'): crop_to_nonzero(ones, np.full((4, 4, 4), 1.5))
    with pytest.raises(CroppingError, match='axes'): crop_to_nonzero(ones[0])
    with pytest.raises(CroppingError, match='stop'): CropBox([[3, 3], [0, 1], [0, 1]])
    with pytest.raises(CroppingError, match='inside'): uncrop(ones, [[0, 4]] * 3, (4, 4, 3))
    with pytest.raises(CroppingError, match='fit'): uncrop(ones, [[0, 3]] * 3, (4, 4, 4))


def test_a_box_travels_as_json_and_pickle():
    import json, pickle
    box = CropBox([[1, 4], [0, 2], [5, 6]])
    assert CropBox(json.loads(json.dumps(box))) == box == pickle.loads(pickle.dumps(box))
    assert box.shape == (3, 2, 1) and type(pickle.loads(pickle.dumps(box))) is CropBox


@pytest.mark.parametrize('seed', range(30))
@pytest.mark.parametrize('density', [.02, .5, .9, .99, 1.])
def test_holes_filled_by_runs_are_those_of_scipy(seed, density):
    from scipy.ndimage import binary_fill_holes
    rng = np.random.default_rng(seed)
    for shape in (rng.integers(1, 25, 3), (1, 1, rng.integers(1, 9)), (rng.integers(1, 9), 1, 5)):
        mask = rng.random(shape) < density
        before = mask.copy()
        assert same(fill_holes(mask), binary_fill_holes(before)) and same(mask, before)


def test_a_shell_with_a_tunnel_is_no_hole():
    shell = np.ones((7, 8, 9), bool)
    shell[1:-1, 1:-1, 1:-1] = False
    assert fill_holes(shell).all()
    for at in ((0, 3, 3), (3, 0, 3), (3, 3, 0), (6, 3, 3), (3, 7, 3), (3, 3, 8)):
        open_ = shell.copy(); open_[at] = False
        assert same(fill_holes(open_), open_), at
    corner = shell.copy(); corner[0, 0, 0] = False # corners do not connect
    assert fill_holes(corner).sum() == corner.size - 1


@pytest.mark.parametrize('seed', range(40))
def test_the_box_without_the_mask(seed):
    data = sparse(np.random.default_rng(seed))
    for view in (data, data[:, ::-1], data.transpose(0, 3, 1, 2), data.astype(np.int16) + (data != 0), data != 0):
        if (view != 0).any(): assert nonzero_box(view) == bounding_box((view != 0).any(axis=0))
    data[:] = -0.; data[0, -1, -1, -1] = np.nan # minus zero is zero, NaN is not
    assert nonzero_box(data).shape == (1, 1, 1)


def test_a_view_instead_of_a_copy():
    data = sparse(np.random.default_rng(0))
    full, seg, box = crop_to_nonzero(data)
    view, seg_, box_ = crop_to_nonzero(data, copy=False)
    assert same(view, full) and same(seg, seg_) and box == box_ and np.shares_memory(view, data) and not np.shares_memory(full, data)


def test_memory_of_a_crop():
    import tracemalloc
    data = np.ones((1, 40, 128, 128), np.float32); data[0, 20, 64, 64] = 0 # a CT: full faces, a zero within
    tracemalloc.start(); box = nonzero_box(data); scan = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    tracemalloc.start(); crop_to_nonzero(data, copy=False); crop = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert box.shape == data.shape[1:] and scan < .1 * data[0].size and crop < 6 * data[0].size, (scan, crop)


def test_nested_lists_are_welcome():
    from segnb.cropping import crop_to_nonzero, nonzero_mask, uncrop
    image, labels = [[[[0, 0, 0], [0, 5, 0], [0, 0, 0]]]], [[[0, 0, 0], [0, 1, 0], [0, 0, 0]]]
    data, seg, box = crop_to_nonzero(image, labels)
    assert data.tolist() == [[[[5]]]] and seg.tolist() == [[[1]]] and box == ((0, 1), (1, 2), (1, 2))
    assert nonzero_mask(image).sum() == 1 and uncrop(seg.tolist(), box, (1, 3, 3)).tolist() == labels
