"""Plans beside nnU-Net 1.7.1 (recorded by tests/record/24_planning.py), and the original's own plans of Decathlon Task05."""
import json, os, time
from pathlib import Path

import numpy as np
import pytest

from segnb.fingerprint import Fingerprint
from segnb.planning import masks_for_norm, normalization_schemes, plan_experiment

HERE = Path(__file__).parent
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.parents[1]/'shared'/'data'))
with np.load(HERE/'recorded'/'24_planning.npz') as file: RECORDED = {k: file[k] for k in file.files}
NAMED = json.loads((HERE/'recorded'/'24_planning.json').read_text())
KEYS = dict(patch_size='patch_size', batch_size='batch_size', spacing='current_spacing', median_shape='median_patient_size_in_voxels', num_pool_per_axis='num_pool_per_axis',
            pool_op_kernel_sizes='pool_op_kernel_sizes', conv_kernel_sizes='conv_kernel_sizes', do_dummy_2d_data_aug='do_dummy_2D_data_aug')


def rows(table): return [r.tolist() for r in table if r.any()]


def volumes(plans): return [plans.configurations[n] for n in ('3d_lowres', '3d_fullres') if n in plans.configurations]


def known(name):
    d = NAMED['data sets'][name]
    spacings, shapes = ((d[k] * d['n_cases'])[:d['n_cases']] for k in ('spacings', 'shapes'))
    return Fingerprint(spacings, shapes, d['channels'], d['labels'])


def fingerprint(i):
    r, n = RECORDED, int(RECORDED['repeats'][i])
    return Fingerprint(np.tile(r['spacings'][i], (n, 1)), np.tile(r['shapes'][i], (n, 1)), ['MRI']*int(r['channels'][i]), range(1, int(r['labels'][i]) + 1))


@pytest.fixture(scope='module')
def plans():
    fingerprints = [fingerprint(i) for i in range(len(RECORDED['stages']))]
    start = time.process_time()
    planned = [plan_experiment(f) for f in fingerprints]
    assert time.process_time() - start < 10, "a thousand plans take under ten seconds"
    return planned


def test_every_plan_is_the_same(plans):
    r = RECORDED
    for i, p in enumerate(plans):
        if r['stages'][i] == 0: continue                                # the original crashed; see below
        assert list(p.configurations) == (['2d', '3d_lowres', '3d_fullres', '3d_cascade_fullres'] if r['stages'][i] == 2 else ['2d', '3d_fullres']), i
        assert list(p.original_spacing_target) == r['target'][i].tolist(), i
        assert list(p.transpose_forward) == r['forward'][i].tolist() and list(p.transpose_backward) == r['backward'][i].tolist(), i
        for c in volumes(p):
            s, d = int(c.name == '3d_fullres'), c.to_dict()
            for ours, theirs in dict(patch_size='patch', batch_size='batch', spacing='spacing', median_shape='median', num_pool_per_axis='number', do_dummy_2d_data_aug='dummy').items():
                assert d[ours] == r[theirs][i, s].tolist(), f'plan {i}, {c.name}, {ours}'
            assert d['pool_op_kernel_sizes'] == rows(r['pools'][i, s]) and d['conv_kernel_sizes'] == rows(r['kernels'][i, s]), f'plan {i}, {c.name}'
            if r['batch_dice'][i, s] >= 0: assert c.batch_dice == bool(r['batch_dice'][i, s]), f'plan {i}, {c.name}, batch_dice'
    assert (r['stages'] == 2).sum() > 100 and (r['batch_dice'] == 1).any() and (r['batch_dice'] == 0).any(), 'the records hold both kinds'


def test_exactly_four_patches_are_planned_where_the_original_crashes(plans):
    crashed = np.flatnonzero(RECORDED['stages'] == 0)
    assert len(crashed)
    for i in crashed:
        assert plans[i].trace['patches_per_case'] == 4 and list(plans[i].configurations) == ['2d', '3d_fullres']


@pytest.mark.parametrize('name', NAMED['data sets'])
def test_known_data_sets(name):
    d, p = NAMED['data sets'][name], plan_experiment(known(name))
    ours = [c.to_dict() for c in volumes(p)]
    assert [{k: c[k] for k in KEYS} for c in ours] == [{k: s[v] for k, v in KEYS.items()} for s in d['stages']]


def test_published_plans():
    for name, which, patch, batch, pools in [('Hippocampus, 260 cases', '3d_fullres', (40, 56, 40), 9, (3, 3, 3)), ('Hippocampus, 200 cases', '3d_fullres', (40, 56, 40), 7, (3, 3, 3)),
                                             ('BraTS 2020', '3d_fullres', (128, 128, 128), 2, (5, 5, 5)), ('Pancreas CT (NIH)', '3d_lowres', (80, 192, 160), 2, (4, 5, 5))]:
        c = plan_experiment(known(name)).configuration(which)
        assert (c.patch_size, c.batch_size, c.num_pool_per_axis) == (patch, batch, pools), name


def test_normalisation_agrees_where_the_name_is_read_alike():
    for row in NAMED['normalization']:
        schemes = normalization_schemes(row['channels'])
        assert schemes == row['schemes']
        for name, ours, theirs in zip(row['channels'], masks_for_norm(schemes, [row['reduction']]), row['masks']):
            if name in ('ct', 'SPECT', 'CT2'): continue       # 'ct' is CT, 'SPECT' and 'CT2' are not: the original searches for 'CT' in the name
            assert ours == theirs, (name, row['reduction'])


def test_normalisation_differs_where_the_original_searches_a_substring():
    row = NAMED['normalization'][0]
    theirs = dict(zip(row['channels'], row['masks']))
    ours = dict(zip(row['channels'], masks_for_norm(normalization_schemes(row['channels']), [row['reduction']])))
    assert theirs['ct'] and not ours['ct'], 'a CT written in small letters keeps its air'
    assert ours['SPECT'] and not theirs['SPECT'], 'SPECT is z-scored inside the body like any other image'


@pytest.mark.skipif(not (REAL/'recorded_v1_Task005_Prostate').exists(), reason='recorded plans not here; set SEGNB_REAL_DATA')
def test_prostate():
    folder = REAL/'recorded_v1_Task005_Prostate'
    d, theirs = (json.loads((folder/f).read_text()) for f in ('dataset_properties.json', 'nnUNetPlansv2.1_plans_3D.json'))
    p = plan_experiment(Fingerprint(d['all_spacings'], d['all_sizes'], d['modalities'].values(), d['all_classes'], d['size_reductions'], d['intensityproperties']))
    stages = [theirs['plans_per_stage'][k] for k in sorted(theirs['plans_per_stage'])]
    assert [{k: c.to_dict()[k] for k in KEYS} for c in volumes(p)] == [{k: s[v] for k, v in KEYS.items()} for s in stages]
    assert list(p.transpose_forward) == theirs['transpose_forward'] and list(p.transpose_backward) == theirs['transpose_backward']
    assert list(p.normalization_schemes) == list(theirs['normalization_schemes'].values()) and list(p.use_mask_for_norm) == list(theirs['use_mask_for_norm'].values())
    c = p.configuration('3d_fullres')
    assert (c.patch_size, c.batch_size, c.num_pool_per_axis) == ((20, 320, 256), 2, (2, 6, 6)) and c.base_num_features == theirs['base_num_features']
