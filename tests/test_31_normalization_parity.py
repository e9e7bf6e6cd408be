"""Normalisation beside nnU-Net 1.7.1 (recorded by tests/record/31_normalization.py), and what cells do not try."""
import json
from pathlib import Path

import numpy as np
import pytest

from segnb.normalization import NormalizationError, normalize

with np.load(Path(__file__).parent/'recorded'/'31_normalization.npz') as file: RECORDED = {k: file[k] for k in file.files}
STATISTICS = json.loads(str(RECORDED['statistics']))
SCHEMES = [str(s) for s in RECORDED['schemes']]


@pytest.mark.parametrize('name', ['plain', 'masked'])
@pytest.mark.parametrize('keys', [int, str])
def test_every_scheme_with_and_without_the_mask(name, keys):
    data, before = RECORDED['data'], RECORDED['data'].copy()
    new = normalize(data, RECORDED['seg'], SCHEMES, [bool(m) for m in RECORDED[f'{name}/use_mask']], {keys(c): STATISTICS for c in range(5)})
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
