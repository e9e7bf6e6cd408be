"""Plans beside nnU-Net 1.7.1 (recorded by tests/record/24_planning.py), and the original's own plans of Decathlon Task05."""
import dataclasses, hashlib, importlib.util, json, os, time
from pathlib import Path

import numpy as np
import pytest

from segnb.fingerprint import Fingerprint
from segnb.planning import PLANNERS, Counts, Plans, PlansError, masks_for_norm, normalization_schemes, plan_experiment, snap_patch

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


# Every kind of data, every planner of the original -----------------------------------------------------------------------
def load_inputs():
    spec = importlib.util.spec_from_file_location('planning_inputs', HERE/'record'/'24_planning_inputs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INPUTS = load_inputs()
with np.load(HERE/'recorded'/'24_planning_all.npz') as file: ALL = {k: file[k] for k in file.files}
ERRORS = {w: {int(i): e for i, e in found.items()} for w, found in json.loads(str(ALL['errors'])).items()}


def made(i):
    spacings, shapes, channels, labels = INPUTS.fingerprint(int(ALL['seed']), i)
    return Fingerprint(spacings, shapes, ['MRI']*channels, range(1, labels + 1))


def whole(plans, which):
    "The hash of a whole plan, in the spelling of the record"
    found = [plans.configurations['2d']] if which == '2d' else volumes(plans)
    rows = [list(plans.transpose_forward)]
    for c in found:
        d, residual = c.to_dict(), which == 'residual'
        rows.append([[float(f'{mm:.9g}') for mm in d['spacing']], d['patch_size'], d['batch_size'], d['median_shape'], d['num_pool_per_axis'],
                     [[1, 1, 1]]*residual + d['pool_op_kernel_sizes'], d['conv_kernel_sizes'], d['do_dummy_2d_data_aug'], d['blocks_per_stage_encoder'], d['blocks_per_stage_decoder']])
    return int(hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16], 16)


def test_the_inputs_are_those_of_the_record():
    plain = lambda v: [plain(x) for x in v] if isinstance(v, (list, tuple, np.ndarray)) else v.item() if isinstance(v, np.generic) else v
    digest = hashlib.sha256()
    for i in range(len(ALL['3d_plan'])):
        digest.update(hashlib.sha256(json.dumps([plain(v) for v in INPUTS.fingerprint(int(ALL['seed']), i)]).encode()).hexdigest().encode())
    assert digest.hexdigest() == str(ALL['inputs']), "numpy draws other numbers than when this was recorded: record again"


@pytest.mark.parametrize('part', range(4))
def test_every_kind_of_data_by_every_planner(part):
    n, counted = len(ALL['3d_plan']), 0
    for i in range(part, n, 4):
        f, plans = made(i), {}
        for which in ('3d', '2d', 'residual'):
            if i in ERRORS[which]: continue                             # the original crashed; see below
            name = 'nnunet_v1_residual' if which == 'residual' else 'nnunet_v1'
            p = plans.setdefault(name, None) or plan_experiment(f, planner=name)
            plans[name] = p
            found, where = ([p.configurations['2d']] if which == '2d' else volumes(p)), f'fingerprint {i} ({INPUTS.KINDS[i % len(INPUTS.KINDS)]}), {which}'
            assert len(found) == ALL[f'{which}_stages'][i], where
            for c, patch, batch in zip(found, ALL[f'{which}_patch'][i][-len(found):], ALL[f'{which}_batch'][i][-len(found):]):
                assert list(c.patch_size) == patch[:len(c.patch_size)].tolist() and c.batch_size == batch, where
            assert whole(p, which) == int(ALL[f'{which}_plan'][i]), where
            counted += 1
    assert counted > .9*3*n/4


def test_where_the_original_crashes_ours_plans():
    "UnboundLocalError: exactly four patches; IndexError: nothing to halve in a residual network; OverflowError: a slice too large for 3D"
    for which, found in ERRORS.items():
        for i, error in found.items():
            p = plan_experiment(made(i), planner='nnunet_v1_residual' if which == 'residual' else 'nnunet_v1')
            if error == 'UnboundLocalError': assert p.trace['patches_per_case'] == 4 and '3d_lowres' not in p.configurations
            if error == 'IndexError': assert p.configuration('3d_fullres').pool_op_kernel_sizes == ()
            if error == 'OverflowError': assert list(p.configurations) == ['2d'] and 'slices are too large' in p.explain()


# What the original's published and recorded plans say --------------------------------------------------------------------
def test_published_2d_plans():
    for name, patch, batch in [('Hippocampus, 260 cases', (56, 40), 366), ('Hippocampus, 200 cases', (56, 40), 281), ('Liver', (512, 512), 12)]:
        c = plan_experiment(known(name)).configuration('2d')
        assert (c.patch_size, c.batch_size, c.max_num_features, c.batch_dice) == (patch, batch, 480, True), name
    assert plan_experiment(known('BraTS 2020')).configuration('2d').patch_size == (192, 160)


@pytest.mark.skipif(not (REAL/'recorded_v1_Task005_Prostate').exists(), reason='recorded plans not here; set SEGNB_REAL_DATA')
def test_prostate_2d():
    folder = REAL/'recorded_v1_Task005_Prostate'
    d, theirs = (json.loads((folder/f).read_text()) for f in ('dataset_properties.json', 'nnUNetPlansv2.1_plans_2D.json'))
    c = plan_experiment(Fingerprint(d['all_spacings'], d['all_sizes'], d['modalities'].values(), d['all_classes'], d['size_reductions'], d['intensityproperties'])).configuration('2d')
    stage = next(iter(theirs['plans_per_stage'].values()))
    assert {k: c.to_dict()[k] for k in KEYS} == {k: stage[v] for k, v in KEYS.items()} and (c.patch_size, c.batch_size) == ((320, 320), 32)


# Configurations, plans of earlier versions, identities --------------------------------------------------------------------
def test_the_cascade_and_what_it_reads():
    p = plan_experiment(known('Liver'))
    full, cascade = p.configuration('3d_fullres'), p.configuration('3d_cascade_fullres')
    assert list(p.configurations) == ['2d', '3d_lowres', '3d_fullres', '3d_cascade_fullres']
    assert [c.data_configuration for c in p.configurations.values()] == ['2d', '3d_lowres', '3d_fullres', '3d_fullres']
    assert [c.dimensions for c in p.configurations.values()] == [2, 3, 3, 3] and cascade.previous_stage == '3d_lowres'
    assert dataclasses.replace(cascade, name='3d_fullres', previous_stage=None) == full
    assert len({p.identity(n) for n in p.configurations} | {p.identity()}) == 5
    coarser = dataclasses.replace(p.configuration('3d_lowres'), spacing=(3, 3, 3))
    other = dataclasses.replace(p, configurations={**p.configurations, '3d_lowres': coarser})
    assert [other.identity(n) == p.identity(n) for n in p.configurations] == [True, False, True, False]


def test_identity_of_a_plan_written_before_there_were_more_configurations():
    p = plan_experiment(known('Hippocampus, 200 cases'))
    alone = dataclasses.replace(p, configurations={'3d_fullres': p.configuration('3d_fullres')})
    assert alone.identity() == p.identity('3d_fullres') == IDENTITY_OF_VERSION_0_1


IDENTITY_OF_VERSION_0_1 = 'bde0426aab2ae427'


@pytest.mark.parametrize('planner', PLANNERS)
@pytest.mark.parametrize('gb', [4, 8, 24, 80])
def test_what_holds_for_every_plan(planner, gb):
    for i in range(0, 27):
        p = plan_experiment(made(i), planner=planner, memory_gb=gb)
        for c in p.configurations.values():
            how = p.trace['configurations'][c.data_configuration]
            assert how['steps'][-1]['memory'] <= how['limit'] and how['steps'][-1]['patch_size'] == list(c.patch_size)
            assert all(n % 2**k == 0 for n, k in zip(c.patch_size, c.num_pool_per_axis)) and len(c.strides) == len(c.conv_kernel_sizes) == len(c.features_per_stage)
            assert c.batch_size <= max(2, how['by_memory']) and c.do_dummy_2d_data_aug == (c.dimensions == 3 and max(c.patch_size)/c.patch_size[0] > 3)
        assert Plans.from_dict(json.loads(json.dumps(p.to_dict()))) == p and p.explain()


@pytest.mark.parametrize('seed', range(3))
def test_edits_stay_legal(seed):
    rng, p = np.random.default_rng(seed), plan_experiment(known('Liver'))
    for _ in range(8):
        name, wish = ['2d', '3d_lowres', '3d_fullres'][rng.integers(3)], {}
        n = 2 if name == '2d' else 3
        if rng.integers(2): wish['patch_size'] = rng.integers(16, 140, n)
        if rng.integers(2): wish['spacing'] = rng.uniform(.6, 4, 3)
        if not wish: wish['base_num_features'] = int(rng.integers(8, 48))
        try: q = p.edit(name, say=None, **wish)
        except PlansError: continue
        c = q.configuration(name)
        how = q.trace['configurations'][name]
        assert how['steps'][-1]['memory'] <= how['limit'] and Plans.from_dict(q.to_dict()) == q and q.explain()
        assert q.configurations['3d_fullres'].batch_dice == ('3d_lowres' in q.configurations) == ('3d_cascade_fullres' in q.configurations)
        if 'patch_size' in wish: assert c.patch_size == snap_patch(c.spacing[-n:], wish['patch_size'])
        p = q


# Data at the edges of what can be planned ---------------------------------------------------------------------------------
@pytest.mark.parametrize('planner', PLANNERS)
@pytest.mark.parametrize('spacing', [(1, 1, 1), (5, 1, 1), (1, 1, 20)], ids=str)
@pytest.mark.parametrize('shape', [(1, 1, 1), (4, 4, 4), (1, 2000, 2000), (8, 2000, 2000), (2000,) * 3], ids=str)
def test_tiny_and_huge_data_have_a_plan_and_more_memory_never_shrinks_a_patch(shape, spacing, planner):
    for channels, labels in ((1, 1), (12, 61)):
        largest = {}
        for gb in (4, 11, 80):
            p = plan_experiment(Fingerprint([spacing]*3, [shape]*3, ['MRI']*channels, range(1, labels + 1)), gb, planner)
            assert f'for {gb} GB' in p.explain() and '2d' in p.configurations
            for name in ('2d', '3d_fullres'):
                if name not in p.configurations: continue
                voxels = int(np.prod(p.configuration(name).patch_size))
                assert voxels >= largest.get(name, 0), (name, gb)
                largest[name] = voxels


def test_one_voxel_along_a_fine_axis_leaves_the_2d_network_and_says_why():
    p = plan_experiment(Fingerprint([(1, 1, 20)]*3, [(1, 2000, 2000)]*3, ['MRI'], [1]), planner='cpu')
    assert list(p.configurations) == ['2d'] and 'no patch fits the memory limit' in p.explain()


def test_patches_that_cannot_see_enough_are_not_tried():
    "The planner for the CPU leaves out trials of the low resolution that its largest patch rules out; the plans stay the same"
    class EveryStep(type(PLANNERS['cpu'])):
        def low_resolution(self, target, median, patch_voxels):
            forward = self.transpose(target)
            def tried(spacing):
                mm, counts = spacing[forward], Counts(len(one.shapes), len(one.channels), len(one.labels) + 1)
                shape = self.shape_at(median[forward], target[forward], mm)
                assert patch_voxels(spacing) >= (voxels := int(np.prod(self.patch(tuple(mm.tolist()), tuple(shape), counts, self.limit(3, 8)).patch_size)))
                return voxels
            return super().low_resolution(target, median, tried)
    slow = EveryStep('cpu', base_num_features=16, max_patch_voxels=40*56*40, max_batch=2)
    for i in range(0, 1000, 25):
        one = fingerprint(i)
        quick = plan_experiment(one, planner='cpu')
        assert plan_experiment(one, planner=slow) == quick and quick.explain()


@pytest.mark.parametrize('wanted, spacing, legal', [((116,)*3, (1, 1, 1), (112,)*3), ((120,)*3, (1, 1, 1), (128,)*3), ((60,)*3, (1, 1, 1), (64,)*3), ((116, 116), (1, 1), (112, 112)),
                                                    ((20, 320, 256), (3.6, .625, .625), (20, 320, 256)), ((7, 7, 7), (1, 1, 1), (7, 7, 7)), ((150, 90, 33), (1, 1, 1), (144, 96, 32))])
def test_a_wish_goes_to_the_nearest_legal_size(wanted, spacing, legal):
    assert snap_patch(spacing, wanted) == legal and snap_patch(list(spacing), np.array(wanted)) == legal


def test_no_edit_takes_the_last_halving_away_and_plans_without_one_can_be_edited():
    p = plan_experiment(known('Liver'))
    for wish in (dict(spacing=(100, 100, 100)), dict(patch_size=(7, 7, 7))):
        with pytest.raises(PlansError, match='too small for a U-Net'): p.edit('3d_fullres', say=None, **wish)
    tiny = plan_experiment(Fingerprint([(1, 1, 1)]*9, [(5, 6, 7)]*9, ['MRI'], [1]))
    assert not tiny.configuration('3d_fullres').pool_op_kernel_sizes
    assert tiny.edit('3d_fullres', batch_size=1, say=None).configuration('3d_fullres').batch_size == 1
