"""The recipe against everything recorded from nnU-Net 1.7.1, by both engines; tables, records, targets, faults."""
import json
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from segnb import augmentation as A
from segnb.viewer import recorded

RECORD, ARRAYS = recorded('41_augmentation.json'), recorded('41_augmentation.npz')
KINDS, BOX = RECORD['settings'], (10, 10, 10)
SOURCE = ARRAYS['one/data'], ARRAYS['one/seg'].astype(np.float32)


def plan(patch, dummy=False): return SimpleNamespace(patch_size=tuple(patch), do_dummy_2d_data_aug=dummy)


def scales(kind):
    dims = len(KINDS[kind]['patch_size'])
    return A.deep_supervision_scales(RECORD['pool_op_kernel_sizes' if dims == 3 else 'pool_op_kernel_sizes_2d'])


def parameters(kind):
    s = KINDS[kind]
    return A.preset_parameters(s['preset'] or 'default', plan(s['patch_size'], s['dummy_2d']))


def chain(kind):
    more = dict(regions=((1, 2), (2,))) if kind == 'regions' else dict(previous_classes=(1, 2)) if kind == 'cascade' else {}
    p = parameters(kind).replace(remove_previous=0.) # the original never removes a component
    return A.training_transforms(p, KINDS[kind]['patch_size'], scales(kind), RECORD['use_mask_for_norm'], **more)


@pytest.mark.parametrize('kind', KINDS)
def test_same_draws_same_batch(kind):
    assert parameters(kind).loaded_patch_size(KINDS[kind]['patch_size']) == ARRAYS[f'{kind}/data'].shape[2:]
    engine = chain(kind)
    for seed in range(KINDS[kind]['seeds']):
        np.random.seed(seed), random.seed(seed)
        ours = engine(data=ARRAYS[f'{kind}/data'], seg=ARRAYS[f'{kind}/seg'])
        theirs = ARRAYS[f'{kind}/{seed}/data']
        assert np.abs(ours['data'] - theirs).max() <= 2e-6*np.abs(theirs).max()
        assert len(ours['target']) == len(scales(kind))
        for i, target in enumerate(ours['target']): np.testing.assert_array_equal(target, ARRAYS[f'{kind}/{seed}/target_{i}'])


def test_recorded_tables():
    r30 = (-np.pi/6, np.pi/6)
    for patch, first, second, plane in RECORD['loaded_patch_sizes']:
        assert A.enlarged_patch_size(patch, r30, (0.85, 1.25)) == A.AugmentationParameters().loaded_patch_size(patch) == tuple(first)
        assert A.enlarged_patch_size(np.array(patch), (r30, r30, r30), 0.7) == tuple(second)
        assert A.default_parameters(plan(patch, True)).loaded_patch_size(patch) == tuple(plane)
    for patch, dummy, name, size in RECORD['preset_patch_sizes']:
        assert A.preset_parameters(name or 'default', plan(patch, dummy)).loaded_patch_size(patch) == tuple(size)
    for name, picks in RECORD['picks'].items():
        n, scale = name.split(', ')
        assert A.downsample_targets(np.arange(int(n)).reshape(1, 1, -1), [(1, 1, float(scale))])[0].ravel().tolist() == picks
    for kind in KINDS: assert [s[:len(KINDS[kind]['patch_size'])] for s in KINDS[kind]['scales']] == scales(kind)


@pytest.mark.parametrize('kind', ['3d', 'dummy_2d', '2d', 'DA2', 'DA3', 'insane'])
def test_transforms_carry_the_recorded_settings(kind):
    names = {'GaussianNoiseTransform', 'GaussianBlurTransform', 'BrightnessMultiplicativeTransform', 'BrightnessTransform',
             'ContrastAugmentationTransform', 'SimulateLowResolutionTransform', 'GammaTransform', 'MirrorTransform'}
    ours = [t for t in chain(kind).transforms if type(t).__name__ in names]
    theirs = [(name, settings) for name, settings in KINDS[kind]['transforms'] if name in names]
    assert [type(t).__name__ for t in ours] == [name for name, _ in theirs]
    for transform, (name, settings) in zip(ours, theirs):
        for key, value in settings.items():
            mine = getattr(transform, key)
            assert (list(mine) if isinstance(mine, tuple) else mine) == value, (name, key)


def only(name):
    "The recipe that does one recorded step to every sample"
    step, preset = name, 'default'
    for suffix in ('DA3', 'DA5', 'insane'): step, preset = (step[:-len(suffix) - 1], suffix) if name.endswith(suffix) else (step, preset)
    if step not in (*A._ORDER, *A._SPACE) or step == 'brightness_shift': preset = 'DA5'
    p = A.preset_parameters(preset, plan(BOX))
    off = {f'p_{s}': 0. for s in (*A._SPACE, *A._STEPS) if s not in ('mirror', 'contrast_free')}
    on = {} if step == 'mirror' else {'p_contrast' if step == 'contrast_free' else f'p_{step}': 1.}
    return p.replace(**{**off, 'mirror_axes': p.mirror_axes if step == 'mirror' else (), **on}, order=(step,) if step in A._STEPS else ())


def many(make, name, n):
    engine, rows, small = make(only(name), BOX), [], A.centre_crop(SOURCE[0], BOX)[0]
    for i in range(n):
        out = engine(data=SOURCE[0][None], seg=SOURCE[1][None], rngs=[np.random.default_rng((i, len(name), 7))])
        x, seg = np.asarray(out['data'][0, 0], float), np.asarray(out['target'][0])
        rows.append([np.abs(x - small).mean(), x.mean(), x.std(), x.min(), x.max(), x.ravel()[0], (seg == 1).mean(), (seg == 2).mean()])
    return np.array(rows)


@pytest.mark.parametrize('make', [A.training_transforms, A.device_transforms])
@pytest.mark.parametrize('name', RECORD['spread'])
def test_engines_draw_from_the_original_distribution(make, name):
    theirs = RECORD['spread'][name]
    rows = many(make, name, 100 if name.startswith(('elastic', 'median')) else 300)
    n, m, sd = len(rows), theirs['draws'], np.array(theirs['sd']) + 1e-4
    assert (np.abs(rows.mean(0) - theirs['mean'])/(sd*np.sqrt(1/n + 1/m))).max() < 5.5
    for q, values in zip(np.arange(.05, .96, .05), np.array(theirs['quantiles'])):
        eps, error = 1e-4*sd + 1e-6, np.sqrt(q*(1 - q)*(1/n + 1/m))
        low, high = (rows < values - eps).mean(0), (rows <= values + eps).mean(0) # ties count for either side
        assert (np.maximum(low - q, q - high)/error).max() < 5.5, q


@pytest.mark.parametrize('order', [3, 1, 0])
@pytest.mark.parametrize('kind', ['3d', '2d', 'dummy_2d', 'DA5'])
def test_both_engines_leave_what_they_got(kind, order):
    data, seg = ARRAYS[f'{kind}/data'].copy(), ARRAYS[f'{kind}/seg'].copy()
    rngs = lambda: [np.random.default_rng(i) for i in (1, 2)]
    for engine in (chain(kind), A.device_transforms(parameters(kind), KINDS[kind]['patch_size'], scales(kind), (True, False), order=order)):
        states = pickle.dumps((np.random.get_state(), random.getstate()))
        first, second = (engine(data=data, seg=seg, rngs=rngs()) for _ in range(2))
        assert pickle.dumps((np.random.get_state(), random.getstate())) == states
        assert np.array_equal(first['data'], second['data']) and all(np.array_equal(a, b) for a, b in zip(first['target'], second['target']))
        assert np.array_equal(data, ARRAYS[f'{kind}/data']) and np.array_equal(seg, ARRAYS[f'{kind}/seg'])
        copy = pickle.loads(pickle.dumps(engine)) # workers that are spawned receive it so
        assert np.array_equal(copy(data=data, seg=seg, rngs=rngs())['data'], first['data'])


def test_tensors_and_arrays_are_the_same_to_the_fast_engine():
    torch = pytest.importorskip('torch')
    data, seg = ARRAYS['cascade/data'], ARRAYS['cascade/seg']
    engine = A.device_transforms(A.AugmentationParameters(), (8, 12, 12), scales('3d'), (True, False), previous_classes=(2, 1), regions=((1,), (1, 2)), ignore=2)
    rngs = lambda: [np.random.default_rng(i) for i in (1, 2)]
    a, b = engine(data=data, seg=seg, rngs=rngs()), engine(data=torch.tensor(data), seg=torch.tensor(seg), rngs=rngs())
    assert torch.equal(a['data'], b['data']) and a['data'].shape[1] == 4 and [t.shape[1] for t in a['target']] == [3]*3


def test_a_cascade_is_damaged_alike_by_both_engines():
    p = A.AugmentationParameters(**A.PRESETS['none']).replace(p_reshape_previous=.4, p_remove_previous=.5, reshape_previous=(1, 3))
    seg = np.zeros((1, 2, 12, 12, 12), np.float32)
    seg[0, 1, 2:6, 2:6, 2:6], seg[0, 1, 7:11, 7:11, 7:9], seg[0, 1, 7:9, 2, 2] = 1, 2, 1
    found = []
    for make in (A.training_transforms, A.device_transforms):
        engine = make(p, (12, 12, 12), previous_classes=(1, 2))
        out = [np.asarray(engine(data=np.zeros((1, 1, 12, 12, 12), np.float32), seg=seg, rngs=[np.random.default_rng(i)])['data'][0, 1:]) for i in range(400)]
        assert max(m.sum(0).max() for m in out) == 1
        found.append([[m[k].sum() for m in out] for k in (0, 1)])
    for ours, theirs in zip(*found):
        assert abs(np.mean(ours) - np.mean(theirs)) < 5*np.std(ours)*np.sqrt(2/400)
        assert np.abs(np.subtract(*(np.quantile(x, [.25, .5, .75]) for x in (ours, theirs)))).max() <= .2*np.std(ours) + 8


def test_import_needs_no_torch():
    code = 'import sys, segnb.augmentation, segnb.loader; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('change', [dict(p_noise=1.2), dict(p_noise='often'), dict(scale=(1.4, 0.7)), dict(rotation=((0, 1), (0, 1), (2, 1))),
                                    dict(rotation=((0, 1), (0, 1))), dict(gamma=(.5, .9)), dict(blur=(-1, 1)), dict(blur=3), dict(mirror_axes=(0, 0)),
                                    dict(mirror_axes=(3,)), dict(order=('noise', 'magic')), dict(low_resolution=(.5, 2)), dict(margin_scale=-1)])
def test_refused_parameters(change):
    with pytest.raises(A.AugmentationError, match=next(iter(change))): A.AugmentationParameters().replace(**change)


def test_tables_survive_json():
    for name in A.PRESETS:
        for patch, dummy in (((40, 56, 40), False), ((8, 64, 64), True), ((64, 32), False)):
            p = A.preset_parameters(name, plan(patch, dummy))
            assert A.AugmentationParameters(**json.loads(json.dumps(p.to_dict()))) == p
            assert p.without_mirroring().mirror_axes == () and '| mirror |' not in str(p.without_mirroring())
    assert A.default_parameters(plan((64, 32))).rotation == ((-np.pi/12, np.pi/12),)
    assert A.default_parameters(plan((64, 48))).rotation == ((-np.pi, np.pi),) and A.default_parameters(plan((64, 48))).mirror_axes == (0, 1)


def test_mirror_axes_of_oblique_and_of_differing_cases():
    tilt, axial = .3, np.eye(3)
    oblique = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    assert A.anatomical_axes(oblique.ravel()) == A.anatomical_axes(axial.ravel()) == {'inferior-superior': 0, 'anterior-posterior': 1, 'left-right': 2}
    assert A.find_mirror_axes(['left-right', 0], [axial.ravel(), oblique.ravel(), -axial.ravel()]) == (0, 2)
    with pytest.raises(A.AugmentationError, match='not the same'): A.find_mirror_axes(['left-right'], [axial.ravel(), axial[:, [1, 0, 2]].ravel()])
    with pytest.raises(A.AugmentationError, match='no such axis'): A.find_mirror_axes(['inferior-superior'], [axial.ravel()], dimensions=2)
    with pytest.raises(A.AugmentationError, match='no such axis'): A.find_mirror_axes([2], [axial.ravel()], dimensions=2)


def test_empty_masks_and_tiny_patches():
    engine = A.device_transforms(A.preset_parameters('DA5', plan((4, 4, 4))), (4, 4, 4))
    for i in range(30):
        out = engine(data=np.ones((1, 1, 5, 5, 5), np.float32), seg=np.zeros((1, 1, 5, 5, 5)), rngs=[np.random.default_rng(i)])
        assert np.isfinite(out['data'].numpy()).all()
    assert not A.reshape_mask(np.zeros((3, 3, 3)), 'grow', 2).any() and A.reshape_mask(np.ones((3, 3, 3)), 'shrink', 2).all()
    assert len(A.small_components(np.zeros((3, 3)), .5)[1]) == 0
