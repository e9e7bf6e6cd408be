"""Resampling beside nnU-Net 1.7.1 (recorded by tests/record/30_resampling.py), and what cells do not try."""
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from segnb import resampling
from segnb.resampling import ResamplingError, resample_case, resample_image, resample_label_map, spline_matrix

with np.load(Path(__file__).parent/'recorded'/'30_resampling.npz') as file: RECORDED = {k: file[k] for k in file.files}
CASES = sorted({k.split('/')[0] for k in RECORDED if '/target' in k})
DIRECT = sorted({k.split('/')[0] for k in RECORDED if '/ask' in k})


def record(name): return {k.split('/')[1]: v for k, v in RECORDED.items() if k.startswith(name + '/')}


def relative(a, b): return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize('name', CASES)
def test_images_to_rounding_and_labels_in_every_voxel(name):
    r = record(name)
    data, seg = resample_case(r['data'].astype(np.float32), r['seg'], tuple(r['spacing']), tuple(r['target']))
    assert data.dtype == np.float32 and seg.dtype == r['seg'].dtype
    assert data.shape == r['new_data'].shape and relative(data, r['new_data']) <= 1e-6
    assert np.array_equal(seg, r['new_seg'])


@pytest.mark.parametrize('name', DIRECT)
def test_orders_along_a_separate_axis(name):
    r = record(name)
    order, axis, order_z = (int(i) for i in r['ask'])
    ask = dict(order=order, order_z=order_z, separate_axis=None if axis < 0 else axis)
    new = resample_image(r['data'].astype(np.float32), r['new_data'].shape[1:], **ask)
    assert relative(new, r['new_data']) <= 1e-6
    assert np.array_equal(resample_label_map(r['seg'], r['new_seg'].shape, **ask), r['new_seg'])


@pytest.mark.parametrize('order', (0, 1, 2, 3))
def test_random_shapes_against_scipy(order):
    rng = np.random.default_rng(5)
    for i in range(25):
        old, new = rng.integers(1, 24, (2, 3))
        if i % 3 == 0: new = np.maximum(1, (old * rng.choice([.5, 1, 2, .8, 1.25], 3)).round()).astype(int)
        data = rng.normal(1000, 100, (1, *old)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            expected = ndimage.zoom(data[0].astype(float), new / old, order=order, mode='nearest', grid_mode=True)
        assert relative(resample_image(data, new, order)[0], np.clip(expected, data.min(), data.max())) <= 1e-6
        seg = rng.integers(-1, rng.integers(1, 30), old).astype(np.int16)
        if i % 2: seg = seg.repeat(3, 0).repeat(2, 2)[:old[0], :, :old[2]]
        voted = np.zeros(new, np.int16)
        for label in np.unique(seg):
            voted[ndimage.zoom((seg == label).astype(float), new / old, order=order, mode='nearest', grid_mode=True) >= .5] = label
        assert np.array_equal(resample_label_map(seg, new, order), voted), (old, new)


ASKS = [dict(order=3), dict(order=1), dict(order=2, separate_axis=0, order_z=0), dict(order=3, separate_axis=1, order_z=1),
        dict(order=1, separate_axis=2, order_z=3), dict(order=0)]


@pytest.mark.parametrize('ask', ASKS, ids=str)
@pytest.mark.parametrize('old, new', [((40, 22, 26), (61, 31, 17)), ((61, 20, 31), (33, 27, 31)), ((20, 24, 24), (20, 31, 18)), ((30, 9, 8), (7, 9, 8))])
def test_slabs_files_and_devices_change_nothing(old, new, ask, tmp_path, monkeypatch):
    rng = np.random.default_rng(8)
    data = rng.normal(500, 100, (2, *old)).astype(np.float32)
    seg = rng.integers(-1, 6, (-(-old[0] // 3), -(-old[1] // 4), old[2])).astype(np.int16).repeat(3, 0).repeat(4, 1)[:old[0], :old[1]]
    whole, voted = resample_image(data, new, **ask), resample_label_map(seg, new, **ask)
    by_torch = resample_image(data, new, device='cpu', **ask)
    assert relative(by_torch, whole) <= 1e-6 and np.array_equal(resample_label_map(seg, new, device='cpu', **ask), voted)
    monkeypatch.setattr(resampling, 'CHUNK', 2**12)
    monkeypatch.setattr(resampling, 'WORKING', 1)                   # the smallest slabs that will do
    monkeypatch.setattr(resampling, 'SLAB', 1)
    to = {name: np.lib.format.open_memmap(tmp_path/f'{name}.npy', 'w+', dtype, shape)
          for name, dtype, shape in (('image', np.float32, (2, *new)), ('labels', np.int16, new))}
    np.save(tmp_path/'from.npy', data)
    assert resample_image(np.load(tmp_path/'from.npy', mmap_mode='r'), new, out=to['image'], **ask) is to['image']
    resample_label_map(seg, new, out=to['labels'], **ask)
    assert np.array_equal(to['image'], whole) and np.array_equal(to['labels'], voted)
    assert relative(resample_image(data, new, device='cpu', **ask), whole) <= 1e-6
    wide = np.empty((2, *new))                                     # double precision, and not contiguous
    assert relative(resample_image(data, new, out=wide[..., ::-1], **ask), whole) <= 1e-6
    assert np.array_equal(wide[..., ::-1].astype(np.float32), whole)


@pytest.mark.parametrize('new', [(300, 40, 50), (60, 180, 170), (150, 96, 200)])
@pytest.mark.parametrize('separate', [None, 0])
def test_working_memory_keeps_its_bound(new, separate):
    rng = np.random.default_rng(9)
    data, allowed = rng.normal(size=(1, 150, 96, 96)).astype(np.float32), 16_000_000
    seg = np.zeros(data.shape[1:], np.int16)
    seg[20:90, 30:60, 20:70], seg[60:110, 50:80, 40:90] = 1, 2
    out, to = np.empty((1, *new), np.float32), np.empty(new, np.int16)
    for call in (lambda: resample_image(data, new, 3, 1, separate, max_bytes=allowed, out=out),
                 lambda: resample_label_map(seg, new, 1, 1, separate, max_bytes=allowed, out=to)):
        call()                                                      # builds the matrices
        tracemalloc.start()
        call()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert used <= allowed


def test_an_offset_costs_no_precision():
    "A large value everywhere must not eat the small differences that normalisation blows up"
    rng = np.random.default_rng(7)
    data = rng.normal(5000, 50, (1, 12, 14, 13)).astype(np.float32)
    expected = np.clip(ndimage.zoom(data[0].astype(float), (1.5, 10 / 14, 17 / 13), order=3, mode='nearest', grid_mode=True), data.min(), data.max())
    assert np.abs(resample_image(data, (18, 10, 17))[0] - expected).max() <= 5e-4 + 1e-6 * np.ptp(data)      # 5e-4: what float32 can hold at 5000


def test_inputs_stay_as_they_were_and_any_memory_order_will_do():
    rng = np.random.default_rng(6)
    data, seg = rng.normal(size=(2, 9, 8, 7)).astype(np.float32), rng.integers(-1, 4, (9, 8, 7))
    before = data.copy(), seg.copy()
    new, new_seg = resample_image(data, (5, 9, 12), separate_axis=1), resample_label_map(seg, (5, 9, 12), separate_axis=1)
    assert np.array_equal(data, before[0]) and np.array_equal(seg, before[1])
    turned, turned_seg = data.transpose(0, 3, 1, 2), seg.transpose(2, 0, 1)
    assert np.allclose(resample_image(turned, (12, 5, 9), separate_axis=2), new.transpose(0, 3, 1, 2), atol=1e-6)
    assert np.array_equal(resample_label_map(turned_seg, (12, 5, 9), separate_axis=2), new_seg.transpose(2, 0, 1))
    assert np.array_equal(resample_label_map(seg.astype(np.float32), (5, 9, 12)), resample_label_map(seg, (5, 9, 12)))


@pytest.mark.parametrize('array, shape, more, word', [
    (np.zeros((1, 4, 4, 4)), (4, 4), {}, 'expected'), (np.zeros((1, 4, 4, 4)), (4, 4, 0), {}, 'at least 1'),
    (np.zeros((0, 4, 4, 4)), (4, 4, 5), {}, 'at least 1'), (np.full((1, 2, 2, 2), np.inf), (4, 4, 4), {}, 'not finite'),
    (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'order': 4}, 'order'), (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'order_z': -1}, 'order'), (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'separate_axis': -1}, 'axis'),
    (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'max_bytes': 0}, 'no working memory'), (np.zeros((1, 40, 40, 40)), (50, 50, 50), {'max_bytes': 99}, 'smallest slab'),
    (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'out': np.zeros((1, 5, 5, 4))}, 'out')])
def test_refusals_say_what_was_found(array, shape, more, word):
    with pytest.raises(ResamplingError, match=word): resample_image(array, shape, **more)


def test_matrices_are_shared_and_cannot_be_changed():
    assert spline_matrix(9, 12, 3) is spline_matrix(9, 12, 3)
    with pytest.raises(ValueError): spline_matrix(9, 12, 3)[0, 0] = 1


def test_lists_are_arrays_too():
    data, seg = np.arange(24.).reshape(1, 2, 3, 4), np.arange(24).reshape(2, 3, 4) % 3
    for ours, theirs in zip(resample_case(data.tolist(), seg.tolist(), [2, 1, 1], [1, 1, 1]), resample_case(data, seg, (2, 1, 1), (1, 1, 1))):
        assert np.array_equal(ours, theirs)


@pytest.mark.filterwarnings('error')
def test_a_read_only_file_is_no_reason_to_warn(tmp_path):
    np.save(tmp_path/'data.npy', np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32) - 50)
    np.save(tmp_path/'zero.npy', np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32))
    for name in ('data', 'zero'):
        data = np.load(tmp_path/f'{name}.npy', mmap_mode='r')
        assert relative(resample_image(data, (9, 7, 5), device='cpu'), resample_image(data, (9, 7, 5))) <= 1e-6
