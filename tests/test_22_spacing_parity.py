"""Spacings beside nnU-Net 1.7.1 (recorded by tests/record/22_spacing.py), and recorded plans of real data sets."""
import json, os
from pathlib import Path

import numpy as np
import pytest

from segnb.spacing import SpacingError, is_anisotropic, lowres_spacing, median_shape, resampled_shape, target_spacing

HERE = Path(__file__).parent
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.parents[1]/'shared'/'data'))
with np.load(HERE/'recorded'/'22_spacing.npz') as file: RECORDED = {k: file[k] for k in file.files}


def data_set(i):
    rows = slice(*RECORDED['first'][i:i + 2])
    return RECORDED['spacings'][rows], RECORDED['shapes'][rows]


def test_every_target_to_the_last_bit():
    n, moved = len(RECORDED['target']), 0
    for i, target in enumerate(RECORDED['target']):
        spacings, shapes = data_set(i)
        ours = target_spacing(spacings, shapes)
        assert ours.tobytes() == target.tobytes(), f'data set {i}: {ours} is not {target}'
        median = np.median(spacings, axis=0)
        moved += is_anisotropic(median, np.median(shapes, axis=0))
    assert n >= 300 and 30 <= moved <= n / 2, 'the records hold both branches'


@pytest.mark.parametrize('k', range(len(RECORDED['lowres_set'])))
def test_low_resolution_takes_the_same_steps(k):
    spacings, shapes = data_set(RECORDED['lowres_set'][k])
    patches = RECORDED['lowres_patch'][slice(*RECORDED['lowres_first'][k:k + 2])].tolist()
    tried = []
    def patch_voxels(spacing):
        tried.append(spacing)
        return patches[len(tried) - 1]
    target = target_spacing(spacings, shapes)
    ours = lowres_spacing(target, median_shape(spacings, shapes, target), patch_voxels)
    last = RECORDED['lowres_last'][k]
    assert len(tried) == len(patches) and tried[-1].tobytes() == last.tobytes()
    assert (ours is not None) == RECORDED['lowres_kept'][k] and (ours is None or ours.tobytes() == last.tobytes())


@pytest.mark.parametrize('seed', range(20))
def test_axes_have_no_favourite(seed):
    "Permuting the axes of all cases permutes the target"
    spacings, shapes = data_set(seed * 7)
    order = np.random.default_rng(seed).permutation(3)
    assert np.array_equal(target_spacing(spacings[:, order], shapes[:, order]), target_spacing(spacings, shapes)[order])
    mixed = np.random.default_rng(seed).permutation(len(spacings))
    assert np.array_equal(target_spacing(spacings[mixed], shapes[mixed]), target_spacing(spacings, shapes))


def test_shapes_round_halves_to_even():
    assert resampled_shape((5, 7, 9), (1, 1, 1), (2, 2, 2)) == (2, 4, 4)
    assert all(type(n) is int for n in resampled_shape(np.array([5, 7, 9]), np.ones(3), np.full(3, .3)))


def test_refusals():
    with pytest.raises(SpacingError, match='one each'): target_spacing([(1, 1, 1)] * 2, [(5, 5, 5)])
    with pytest.raises(SpacingError, match='positive'): target_spacing([(1, 0, 1)], [(5, 5, 5)])
    with pytest.raises(SpacingError, match='positive'): target_spacing([(1, np.nan, 1)], [(5, 5, 5)])
    with pytest.raises(SpacingError, match='at least one case'): target_spacing([], [])


def test_prostate_as_recorded_by_the_original():
    folder = REAL/'recorded_v1_Task005_Prostate'
    if not folder.is_dir(): pytest.skip(f'no {folder}; set SEGNB_REAL_DATA')
    found = json.loads((folder/'dataset_properties.json').read_text())
    target = target_spacing(found['all_spacings'], found['all_sizes'])
    assert np.allclose(target, (3.6, .625, .625), rtol=1e-6)
    plans = json.loads((folder/'nnUNetPlansv2.1_plans_3D.json').read_text())
    stage = plans['plans_per_stage']['0']
    assert target.tolist() == stage['current_spacing']
    assert list(resampled_shape(median_shape(found['all_spacings'], found['all_sizes'], target), target, target)) == stage['median_patient_size_in_voxels']


def test_coarsening_ends_where_an_axis_would_lose_its_last_voxel():
    tried = []
    def no_patch(spacing):
        tried.append(spacing)
        return 0
    assert lowres_spacing((1, 1, 20), (1, 2000, 2000), no_patch) is None
    assert len(tried) < 200 and all(resampled_shape((1, 2000, 2000), (1, 1, 20), s)[0] == 1 for s in tried)
