"""What the chapter's cells cannot show of segnb.transforms: late imports, a place without a cache, number types, threads."""
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from segnb import transforms as T

TILT = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]


def test_numba_and_torch_are_imported_when_needed():
    code = "import sys, segnb.transforms; assert not {'numba', 'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_without_a_place_to_keep_compiled_code(monkeypatch):
    import numba
    real = numba.njit
    def refuses(*args, cache=False, **options):
        if cache: raise RuntimeError('cannot cache function: no locator available')
        return real(*args, **options)
    monkeypatch.setattr(numba, 'njit', refuses)
    c = np.ones((3, 4), np.float32)
    T._compile(T._mirror_ends.function)(c, 0)
    x = np.arange(6, dtype=np.float32)
    T._compile(T._mirror_ends.function)(x, 3)
    assert x.tolist() == [2, 1, 2, 3, 2, 1]


@pytest.mark.parametrize('kind', (torch.int8, torch.int16, torch.uint8))
def test_labels_of_any_number_type(kind):
    seg = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, 4, 5, 6)).repeat(2, 2).repeat(2, 3))
    for order in (0, 1):
        expected = T.warp_label_maps(seg.float(), TILT, (6, 7, 8), order)
        found = T.warp_label_maps(seg.to(kind), TILT, (6, 7, 8), order)
        assert found.dtype == kind and (found.float() == expected).all()


def test_many_channels_take_turns(monkeypatch):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 6, 7, 8)).astype(np.float32))
    at_once = T.warp_images(x, TILT, (5, 5, 5))
    monkeypatch.setattr(T, 'COEFFICIENTS', 1)
    assert (T.warp_images(x, TILT, (5, 5, 5)) == at_once).all()


def test_inputs_stay_as_they_are():
    x, seg = torch.randn(2, 5, 6, 7), torch.ones(1, 5, 6, 7)
    before = x.clone()
    T.warp_images(x, TILT, (4, 4, 4)), T.blur(x, 1.), T.gamma(x, 2., invert=True), T.contrast(x, 2.), T.mask_outside(x, -seg, [1, 1])
    T.low_resolution(x, .5), T.add_noise(x, 1., np.random.default_rng(0)), T.sharpen(x, .5), T.brightness(x, 2.), T.mirror(x, (0,))
    assert (x == before).all()


def test_threads_agree():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32))
    expected = T.warp_images(x, TILT, (16, 16, 16))
    with ThreadPoolExecutor(4) as pool: assert all((y == expected).all() for y in pool.map(lambda _: T.warp_images(x, TILT, (16, 16, 16)), range(8)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_on_a_gpu():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 20, 21, 22)).astype(np.float32))
    seg = (x[:1] > 0).to(torch.int16)
    for order in (0, 1, 3): torch.testing.assert_close(T.warp_images(x.cuda(), TILT, (16, 16, 16), order).cpu(), T.warp_images(x, TILT, (16, 16, 16), order), atol=1e-4, rtol=0)
    assert (T.warp_label_maps(seg.cuda(), TILT, (16, 16, 16)).cpu() == T.warp_label_maps(seg, TILT, (16, 16, 16))).all()
    for change in (lambda a: T.blur(a, 1.), lambda a: T.low_resolution(a, .6), lambda a: T.gamma(a, .7), lambda a: T.contrast(a, 1.2)):
        torch.testing.assert_close(change(x.cuda()).cpu(), change(x), atol=1e-4, rtol=0)
    assert abs(float(T.add_noise(x.cuda()*0, .5, np.random.default_rng(0)).std()) - .5) < .02
