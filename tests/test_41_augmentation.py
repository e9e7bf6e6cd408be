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


def test_turns_and_loaded_sizes():
    for angles in ([.3], [.3, -.2, .9]):  # turning keeps lengths, and turning back undoes it
        R = A.rotation_matrix(angles)
        np.testing.assert_allclose(R @ R.T, np.eye(len(R)), atol=1e-12)
        assert np.isclose(np.linalg.det(R), 1)
    both = A.Draws((('rotation', {'angles': (np.pi/2,)}), ('scale', {'factors': (2., 2.)})))
    np.testing.assert_allclose(A.warp_matrix(both, 2), [[0, 2], [-2, 0]], atol=1e-12)
    assert A.warp_matrix(A.Draws(), 3) is None and A.centre_crop(np.arange(7), (4,)).tolist() == [1, 2, 3, 4]


def test_names_of_axes_follow_the_plan():
    axial = np.eye(3).ravel()
    assert A.anatomical_axes(axial, (2, 0, 1)) == {'left-right': 0, 'inferior-superior': 1, 'anterior-posterior': 2}
    assert A.anatomical_axes(axial, dimensions=2) == {'anterior-posterior': 0, 'left-right': 1}
    assert A.anatomical_axes(-axial) == A.anatomical_axes(axial) # a flipped axis keeps its name
    assert A.find_mirror_axes((0, 2), []) == (0, 2)
    assert A.find_mirror_axes(('posterior-anterior',), [axial]) == A.find_mirror_axes(('anterior-posterior',), [axial])
    with pytest.raises(A.AugmentationError, match='no such axis'): A.find_mirror_axes(('up-down',), [axial])


@pytest.mark.parametrize('name', A.PRESETS)
def test_records_stay_in_their_ranges(name):
    for size, dummy in (((48, 40), False), ((20, 56, 56), True), ((40, 40, 40), False)):
        p = A.preset_parameters(name, plan(size, dummy))
        assert str(p).startswith('| step')
        for i in range(60): # four channels and a cascade
            d = A.draw(p, np.random.default_rng(i), 4, size, 2)
            assert str(d) and d == A.draw(p, np.random.default_rng(i), 4, size, 2)
            if d.get('rotation'): assert len(d.get('rotation')['angles']) == (1 if dummy or len(size) == 2 else 3)
            if d.get('scale'): assert all(p.scale[0] <= f <= p.scale[1] for f in d.get('scale')['factors'])
            for start, stop in (b for boxes in (d.get('rectangles') or {'boxes': []})['boxes'] if boxes for b in boxes):
                assert all(0 <= a < b <= n for a, b, n in zip(start, stop, size))
    if name == 'none': assert A.draw(p, np.random.default_rng(0), 4, size) == A.Draws() and 'copied' in str(A.Draws())


def test_how_often_a_step_is_drawn():
    counted = [A.draw(A.AugmentationParameters(), np.random.default_rng(i), 2, (40, 40, 40)) for i in range(1500)]
    for step, chance in (('rotation', .2), ('noise', .1), ('blur', .2*.75), ('low_resolution', .25*.75), ('gamma', .3), ('mirror', 7/8)):
        share = np.mean([d.get(step) is not None for d in counted])
        assert abs(share - chance) < 4*np.sqrt(chance*(1 - chance)/1500), (step, share)
    below = [d.get('scale')['factors'][0] < 1 for d in counted if d.get('scale')]
    assert abs(np.mean(below) - .5) < .12


HILL = {'centre': [(.2, .5, .7)]*2, 'width': [(3., 4., 5.)]*2}
BY_HAND = {'rotation': {'angles': (.3, -.2, .5)}, 'scale': {'factors': (1.2,)*3}, 'blur': {'sigma': [.8]*2}, 'brightness': {'factor': [1.2]*2},
           'brightness_shift': {'shift': [.4]*2}, 'contrast': {'factor': [1.3]*2}, 'contrast_free': {'factor': [1.3]*2},
           'low_resolution': {'zoom': [.6]*2}, 'gamma': {'exponent': [1.4]*2}, 'gamma_inverted': {'exponent': [1.4]*2}, 'median': {'size': [3]*2},
           'gradient': {**HILL, 'height': [-2.]*2}, 'local_gamma': {**HILL, 'exponent': [2.5]*2}, 'sharpen': {'strength': [.5]*2}}
MORE = {'mirror': {'axes': (1, 2)}, 'noise': {'sd': .1, 'seed': 0}, 'elastic': {'sigma': (3.,)*3, 'height': (1.5,)*3, 'seed': 1},
        'transpose': {'order': (0, 2, 1)}, 'quarter_turn': {'turns': 1, 'axes': (0, 1)}, 'rectangles': {'boxes': [[((0, 1, 2), (5, 4, 6))], None]}}


@pytest.mark.parametrize('step', BY_HAND)
def test_same_numbers_as_the_original_same_patch(step):
    "The fast engine, told which numbers the original's transform was told"
    x, s = A.apply_draws(A.Draws(((step, BY_HAND[step]),)), *SOURCE, BOX)
    theirs = ARRAYS[f'one/{step}']
    assert np.abs(x.numpy() - theirs).max() < 2e-5*np.abs(theirs).max()
    if f'one/{step}/seg' in ARRAYS: np.testing.assert_array_equal(s.numpy(), ARRAYS[f'one/{step}/seg'])


def test_every_step_changes_the_image_and_labels_only_where_it_moves():
    still, labels = A.apply_draws(A.Draws(), *SOURCE, BOX)
    np.testing.assert_array_equal(still.numpy(), A.centre_crop(SOURCE[0], BOX))
    np.testing.assert_array_equal(labels.numpy(), A.centre_crop(SOURCE[1], BOX))
    assert {*BY_HAND, *MORE} == {*A._SPACE, *A._STEPS}
    for step, numbers in (BY_HAND | MORE).items():
        x, s = A.apply_draws(A.Draws(((step, numbers),)), *SOURCE, BOX)
        assert not np.array_equal(x, still) and x.shape == still.shape, step
        assert (not np.array_equal(s, labels)) == (step in (*A._SPACE, *A._MOVE)), step
    x, s = A.apply_draws(A.Draws((('mirror', MORE['mirror']),)*2), *SOURCE, BOX)
    assert np.array_equal(x, still) and np.array_equal(s, labels)
    noisy = A.apply_draws(A.Draws((('noise', MORE['noise']),)), *SOURCE, BOX)[0] - still
    assert abs(float(noisy.std()) - .1) < .006 # an sd, not a variance
    gamma = A.apply_draws(A.Draws((('gamma', BY_HAND['gamma']),)), *SOURCE, BOX)[0]
    np.testing.assert_allclose([gamma[0].mean(), gamma[0].std()], [still[0].mean(), still[0].std()], atol=1e-4)
    flat = A.apply_draws(A.Draws((('rotation', {'angles': (.5,)}), ('mirror', {'axes': (0,)}))), np.ones((2, 14, 16)), np.ones((1, 14, 16)), (8, 9))
    assert [tuple(a.shape) for a in flat] == [(2, 8, 9), (1, 8, 9)]
    outside = A.apply_draws(A.Draws(), np.ones((2, 1, 1, 2)), np.array([-1, 0]).reshape(1, 1, 1, 2), (1, 1, 2), use_mask_for_norm=(True, False))
    assert outside[0].ravel().tolist() == [0, 1, 1, 1]


def test_balls_and_components():
    from scipy import ndimage
    def ball(n): return np.sum(np.square(np.meshgrid(*[np.arange(n) - (n - 1)/2]*3)), 0) <= ((n - 1)/2)**2
    rng = np.random.default_rng(0)
    for i in range(24):
        mask, radius = ndimage.gaussian_filter(rng.normal(size=(14, 17, 15)), 1.5) > .1, rng.uniform(1, 6)
        element = ball(int(2*radius + 1))
        def grow(m): return ndimage.binary_dilation(m, element)
        def shrink(m): return ndimage.binary_erosion(m, element, border_value=True)
        for how, wanted in (('grow', grow(mask)), ('shrink', shrink(mask)), ('open', grow(shrink(mask))), ('close', shrink(grow(mask)))):
            np.testing.assert_array_equal(A.reshape_mask(mask, how, radius), wanted)
    square = np.zeros((7, 7)); square[2:5, 2:5] = 1
    assert A.reshape_mask(square, 'shrink', 1).sum() == 1 and A.reshape_mask(square, 'close', 1).sum() == 9
    lumps = np.zeros((6, 6)); lumps[0, 0] = lumps[1, 1] = lumps[4, 2:5] = 1
    parts, small = A.small_components(lumps, 3/36)
    assert (parts.max(), small.tolist()) == (2, [1]) # joined at a corner; three voxels are not below 3/36
    assert A.apply_previous(A.Draws((('remove_previous', dict(which=(.9,), below=.5)),)), lumps, (1,))[0].sum() == 2
    assert A.apply_previous(A.Draws(), [[0, 1], [2, 1]], (1, 2)).tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 0]]]
    shape2 = A.Draws((('reshape_previous', dict(classes=(1, 0), how=('shrink', 'grow'), radius=(1., 1.))),))
    assert A.apply_previous(shape2, np.arange(9).reshape(3, 3)%3, (1, 2)).sum(0).max() == 1 # still at most one class a voxel
    for seed in range(6): # the removal as the original meant it
        np.random.seed(seed)
        masks = ARRAYS['remove/masks'][0].astype(bool)
        A._Previous((), A.AugmentationParameters(p_remove_previous=.6, remove_previous=.05))._remove(masks)
        np.testing.assert_array_equal(masks, ARRAYS[f'remove/{seed}'][0])


def test_both_engines_warp_alike():
    import torch
    from segnb import transforms as T
    rng = np.random.default_rng(0)
    for i in range(12):
        blocks = rng.integers(-1 if i % 2 else 0, 4, (3, 3, 4)).repeat(4, 0).repeat(3, 1).repeat(3, 2)
        matrix = A.rotation_matrix(rng.uniform(-.5, .5, 3)*(i % 3 > 0)).T*rng.choice([.7, 1, 1.3])
        fast = T.warp_label_maps(torch.tensor(blocks[None], dtype=torch.float32), matrix, (9, 8, 10))[0].numpy()
        assert (A.warp_labels(blocks, matrix, (9, 8, 10)) != fast).mean() < .01 # ties at exactly one half may round either way
        image = rng.normal(size=(12, 9, 12)).astype(np.float32)
        fast = T.warp_images(torch.tensor(image[None]), matrix, (9, 8, 10))[0].numpy()
        np.testing.assert_allclose(A.warp_image(image, matrix, (9, 8, 10)), fast, atol=1e-4)


@pytest.mark.parametrize('make', [A.training_transforms, A.device_transforms])
def test_engines_keep_their_promises(make):
    kind, data, seg = 'cascade', ARRAYS['cascade/data'][:1], ARRAYS['cascade/seg'][:1]
    final = KINDS[kind]['patch_size']
    engine, one = make(A.AugmentationParameters(), final, scales('3d')), dict(data=data, seg=seg[:, :1])
    first = engine(**one, rngs=[np.random.default_rng(5)])
    assert [tuple(t.shape[2:]) for t in first['target']] == [tuple(int(round(n*s)) for n, s in zip(final, scale)) for scale in scales('3d')]
    assert {str(t.dtype).split('.')[-1] for t in (first['data'], *first['target'])} == {'float32'}
    twice = engine(data=np.repeat(data, 2, 0), seg=np.repeat(seg[:, :1], 2, 0), rngs=[np.random.default_rng(i) for i in (9, 5)], keys=['a', 'b'])
    assert twice['keys'] == ['a', 'b'] and np.array_equal(twice['data'][1], first['data'][0]) # a sample does not depend on its neighbours
    assert not np.array_equal(twice['data'][0], twice['data'][1])
    again = []
    for _ in range(2):
        np.random.seed(0), random.seed(0)
        again.append(np.asarray(engine(**one)['data']))
    assert np.array_equal(*again)
    with pytest.raises(A.AugmentationError, match='do not fit'): engine(data=data[0], seg=seg[0])
    with pytest.raises(A.AugmentationError, match='one generator per sample'): engine(**one, rngs=[])
    more = dict(previous_classes=(1, 2), regions=((1, 2), (2,)), ignore=3)
    out = make(A.AugmentationParameters(), final, scales('3d'), **more)(data=data, seg=seg, rngs=[np.random.default_rng(0)])
    assert (out['data'].shape[1], out['target'][0].shape[1]) == (data.shape[1] + 2, 3)
    with pytest.raises(A.AugmentationError, match='previous stage is missing'): make(A.AugmentationParameters(), final, **more)(**one)
    out = make(A.default_parameters(plan((8, 10))), (8, 10), [[1, 1], [.5, .5]])(data=data[:, :, 10], seg=seg[:, :1, 10], rngs=[np.random.default_rng(3)])
    assert [tuple(t.shape) for t in out['target']] == [(1, 1, 8, 10), (1, 1, 4, 5)]


def test_devices_orders_and_validation():
    p, final = A.AugmentationParameters(), (8, 12, 12)
    assert A.device_transforms(p, final).on_device is None and A.training_transforms(p, final).on_device is None
    assert A.device_transforms(p, final, device='cuda').on_device == 'cuda'
    with pytest.raises(A.AugmentationError, match='interpolation order'): A.device_transforms(p, final, order=2)
    data, seg = (A.centre_crop(ARRAYS[f'cascade/{k}'], final) for k in ('data', 'seg'))
    v = A.validation_transforms(scales('3d'), previous_classes=(1, 2), regions=((1, 2), (2,)), ignore=3)(data=data, seg=seg)
    np.testing.assert_array_equal(v['data'], np.concatenate([data, seg[:, 1:] == 1, seg[:, 1:] == 2], 1))
    assert A.validation_transforms()(data=data, seg=-np.ones_like(seg))['target'].max() == 0


def test_how_many_samples_stay_as_they_were():
    p = A.AugmentationParameters().without_mirroring()
    sources = np.random.default_rng(0).normal(size=(600, 1, 2, 7, 7)).astype(np.float32)
    result = A.device_transforms(p, (2, 6, 6))(data=sources, seg=np.zeros_like(sources), rngs=[np.random.default_rng(i) for i in range(600)])['data'].numpy()
    share = (result == A.centre_crop(sources, (2, 6, 6))).all(axis=(1, 2, 3, 4)).mean()
    wanted = .8*.8*.9*.85*.85*.9*.7*(1 - .2*.5)*(1 - .25*.5) # nobody's coin said yes
    assert abs(share - wanted) < 4*np.sqrt(wanted/600)


@pytest.mark.parametrize('kind', ['2d', 'dummy_2d'])
@pytest.mark.parametrize('step', ['rotation', 'scale', 'low_resolution', 'blur', 'mirror', 'everything'])
def test_engines_agree_in_the_plane_too(kind, step):
    "What was recorded of single steps is three-dimensional; here the engines are compared with one another"
    from scipy import stats
    patch, rows = KINDS[kind]['patch_size'], []
    p = parameters(kind)
    if step != 'everything':
        off = {f'p_{s}': 0. for s in (*A._SPACE, *A._STEPS) if s not in ('mirror', 'contrast_free')}
        p = p.replace(**off | {'mirror_axes': p.mirror_axes if step == 'mirror' else ()}, order=(step,) if step in A._STEPS else ())
        if step != 'mirror': p = p.replace(**{f'p_{step}': 1.})
    data, seg = ARRAYS[f'{kind}/data'][:1], ARRAYS[f'{kind}/seg'][:1]
    for make in (A.training_transforms, A.device_transforms):
        engine, found = make(p, patch), []
        for i in range(200):
            out = engine(data=data, seg=seg, rngs=[np.random.default_rng((i, 3))])
            x, t = np.asarray(out['data'][0], float), np.asarray(out['target'])
            found.append([x.mean(), x.std(), x.min(), x.max(), x.ravel()[0], *(np.abs(np.diff(x, axis=a)).mean() for a in (-1, -2)), (t == 1).mean(), (t == 2).mean()])
        rows.append(np.round(found, 3))
    for a, b in zip(*(r.T for r in rows)): assert stats.ks_2samp(a, b).pvalue > 1e-5
