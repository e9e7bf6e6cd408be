"""Resampling beside nnU-Net 1.7.1 (recorded by tests/record/30_resampling.py), and what cells do not try."""
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

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
    if 'new_seg' in r: assert np.array_equal(resample_label_map(r['seg'], r['new_seg'].shape, **ask), r['new_seg'])


def test_random_shapes_against_scipy():
    rng = np.random.default_rng(5)
    for i in range(25):
        old, new = rng.integers(1, 24, (2, 3))
        data = rng.normal(1000, 100, (1, *old)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            expected = ndimage.zoom(data[0].astype(float), new / old, order=3, mode='nearest', grid_mode=True)
        assert relative(resample_image(data, new)[0], np.clip(expected, data.min(), data.max())) <= 1e-6
        seg = rng.integers(-1, rng.integers(1, 30), old).astype(np.int16)
        voted = np.zeros(new, np.int16)
        for label in np.unique(seg):
            voted[ndimage.zoom((seg == label).astype(float), new / old, order=1, mode='nearest', grid_mode=True) >= .5] = label
        assert np.array_equal(resample_label_map(seg, new), voted), (old, new)


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
    (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'order': 2}, 'order'), (np.zeros((1, 4, 4, 4)), (5, 5, 5), {'separate_axis': -1}, 'axis')])
def test_refusals_say_what_was_found(array, shape, more, word):
    with pytest.raises(ResamplingError, match=word): resample_image(array, shape, **more)


def test_matrices_are_shared_and_cannot_be_changed():
    assert spline_matrix(9, 12, 3) is spline_matrix(9, 12, 3)
    with pytest.raises(ValueError): spline_matrix(9, 12, 3)[0, 0] = 1
