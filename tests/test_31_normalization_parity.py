"""Normalisation beside nnU-Net 1.7.1 (recorded by tests/record/31_normalization.py), and what cells do not try."""
import json
from pathlib import Path

import numpy as np
import pytest

from segnb.normalization import SCHEMES, NormalizationError, Scheme, normalize, register_scheme

with np.load(Path(__file__).parent/'recorded'/'31_normalization.npz') as file: RECORDED = {k: file[k] for k in file.files}
STATISTICS = json.loads(str(RECORDED['statistics']))
NAMES = [str(s) for s in RECORDED['schemes']]


@pytest.mark.parametrize('name', ['plain', 'masked'])
@pytest.mark.parametrize('keys', [int, str])
def test_every_scheme_with_and_without_the_mask(name, keys):
    data, before = RECORDED['data'], RECORDED['data'].copy()
    new = normalize(data, RECORDED['seg'], NAMES, [bool(m) for m in RECORDED[f'{name}/use_mask']], {keys(c): STATISTICS for c in range(5)})
    assert new.dtype == np.float32 and np.array_equal(data, before)
    for ours, theirs in zip(new, RECORDED[f'{name}/new']): assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_odd_inputs():
    flat = np.full((1, 2, 3, 4), 7, np.int16)
    assert np.array_equal(normalize(flat, None, ['nonCT'], [False], None), np.zeros((1, 2, 3, 4)))          # the 1e-8 saves the division
    assert np.array_equal(normalize(flat, np.full((2, 3, 4), -1), ['nonCT'], [True], None), np.zeros((1, 2, 3, 4)))
    kept = normalize(flat, None, ['noNorm'], [False], None)
    assert kept.dtype == np.float32 and np.array_equal(kept, flat) and not np.shares_memory(kept, flat)
    turned = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).transpose(0, 3, 1, 2)
    assert normalize(turned, None, ['nonCT'] * 2, [False] * 2, None).flags['C_CONTIGUOUS']


@pytest.mark.parametrize('schemes, masks, intensities, word', [
    (['CT'], [False], None, 'statistics'), (['CT2'], [False], {1: STATISTICS}, 'statistics'), (['z'], [False], None, 'unknown scheme'),
    (['nonCT'], [True], None, 'no label map'), (['nonCT', 'nonCT'], [False], None, 'disagree'), (['CT2'], [False], {0: STATISTICS}, 'strictly between'),
    (['CT'], [False], {0: {**STATISTICS, 'sd': 0.}}, 'sd')])
def test_refusals_say_what_was_found(schemes, masks, intensities, word):
    with pytest.raises(NormalizationError, match=word): normalize(np.full((1, 2, 2, 2), 1e6), None, schemes, masks, intensities)


def out_of_place(data, seg, scheme, masked, s):
    "The formulas one temporary after the other, as they were before they were done in place"
    x, inside = np.array(data, np.float32), None if not masked else seg >= 0
    if scheme == 'nonCT' and masked:
        new, v = np.zeros_like(x), x[inside]
        new[inside] = (v - v.mean()) / (v.std() + np.float32(1e-8))
        return new
    if scheme == 'nonCT': return (x - x.mean()) / (x.std() + np.float32(1e-8))
    low, high = s['percentile_00_5'], s['percentile_99_5']
    mean, sd = (s['mean'], s['sd']) if scheme == 'CT' else ((v := x[(x > low) & (x < high)]).mean(), v.std())
    new = (np.clip(x, low, high) - mean) / sd
    if masked: new[~inside] = 0
    return new


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('scheme', ['CT', 'CT2', 'nonCT'])
@pytest.mark.parametrize('masked', [False, True])
def test_in_place_is_the_same_to_the_last_bit(seed, scheme, masked):
    rng = np.random.default_rng(seed)
    data = rng.normal(100, rng.uniform(1, 300), (1, *rng.integers(2, 40, 3))).astype(np.float32)
    seg = rng.integers(-1, 3, data.shape[1:])
    expected = out_of_place(data[0], seg, scheme, masked, STATISTICS)
    for copy in (True, False):
        new = normalize(data.copy(), seg, [scheme], [masked], {0: STATISTICS}, copy=copy)
        assert np.array_equal(new[0], expected)


def test_0_to_1_as_nnunet_v2():
    with np.load(Path(__file__).parent/'recorded'/'31_normalization_v2.npz') as v2:
        for name, other in (('rescale01', 'rescale_to_0_1'), ('rgb', 'RGB_to_0_1')):
            for spelt in (name, other):
                assert np.array_equal(normalize(v2[f'{name}/data'], None, [spelt] * 3, [True] * 3, None), v2[f'{name}/new'])


@pytest.mark.parametrize('value', [0., 7., .1, 1000.1, -300.3, 1e6])
def test_an_image_of_one_value_becomes_zero(value):
    flat = np.full((1, 40, 50, 60), value, np.float32)
    body = np.full(flat.shape[1:], -1); body[10:30, 10:30, 10:30] = 0
    for scheme in ('nonCT', 'rescale01'):
        for masked in (False, True): assert not normalize(flat, body, [scheme], [masked], None).any()


@pytest.mark.parametrize('scheme', ['CT', 'CT2', 'nonCT', 'noNorm', 'rescale01', 'rgb'])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_and_named(scheme, bad):
    data = np.random.default_rng(0).uniform(40, 150, (2, 3, 4, 5)).astype(np.float32)
    data[1, 2, 0, 3] = bad
    with pytest.raises(NormalizationError, match=rf'channel 1, scheme {scheme}: .*1 NaN or infinite.*\(2, 0, 3\)'):
        normalize(data, None, ['noNorm', scheme], [False] * 2, {1: STATISTICS})


def test_a_scheme_of_ones_own():
    class Half(Scheme):
        name, needs = 'half', ('intensities', 'mask')
        def __call__(self, channel, mask=None, statistics=None): return (channel - statistics['mean']) * .5 * mask
    assert register_scheme(Half) is Half
    try:
        data, seg = np.full((1, 2, 2, 2), 101.7 + 4, np.float32), np.array([[[0, -1], [1, 2]]] * 2)
        assert np.allclose(normalize(data, seg, ['half'], [True], {'0': STATISTICS})[0], 2 * (seg >= 0), atol=1e-5)
        with pytest.raises(NormalizationError, match='channel 0, scheme half.*statistics'): normalize(data, seg, ['half'], [True], None)
    finally: del SCHEMES['half']
    with pytest.raises(NormalizationError, match='channel 0, scheme half: unknown.*one of CT, CT2, nonCT, noNorm, rescale01, rgb'):
        normalize(data, seg, ['half'], [True], None)
    class Shrinks(Scheme):
        name = 'shrinks'
        def __call__(self, channel, mask=None, statistics=None): return channel[1:]
    register_scheme(Shrinks)
    try:
        with pytest.raises(NormalizationError, match='changes the shape'): normalize(data, seg, ['shrinks'], [False], None)
    finally: del SCHEMES['shrinks']


@pytest.mark.parametrize('cls', [dict, type('NoName', (Scheme,), {}), type('Odd', (Scheme,), dict(name='odd', needs=('age',))),
                                 type('Text', (Scheme,), dict(name='text', needs='mask'))])
def test_malformed_schemes_are_refused(cls):
    before = dict(SCHEMES)
    with pytest.raises(NormalizationError): register_scheme(cls)
    assert SCHEMES == before


def test_rgb_refuses_what_is_no_picture():
    with pytest.raises(NormalizationError, match='channel 0, scheme rgb.*-5 to 9'):
        normalize(np.array([[[[-5., 9.]]]]), None, ['rgb'], [False], None)


def test_memory_stays_below_two_volumes_beside_the_result():
    import tracemalloc
    data, seg = np.random.default_rng(0).normal(size=(1, 60, 100, 100)).astype(np.float32), np.zeros((60, 100, 100), np.int8)
    for scheme, most in (('nonCT', 1.1), ('CT', .1), ('rescale01', .1)):
        tracemalloc.start()
        normalize(data, seg, [scheme], [False], {0: STATISTICS}, copy=False)
        peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert peak <= most * data.nbytes, (scheme, peak / data.nbytes)
