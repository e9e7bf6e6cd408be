"""Regions beside nnU-Net 1.7.1 (recorded by tests/record/81_regions.py); laws on random declarations; data sets of regions and of sparse annotation."""
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segnb.dataset import Dataset, check_dataset, convert_brats
from segnb.image import Geometry, SegnbError, read_label_map, write_image, write_label_map
from segnb.labels import LabelError, Labels
from segnb.loss import DeepSupervisionLoss, DiceBCELoss, deep_supervision_weights
from segnb.metrics import MetricsError, compare_folders, evaluate_case, evaluate_folder
from segnb.network import build_unet, v1_key_map
from segnb.postprocessing import Postprocessing, PostprocessingError, apply_postprocessing
from segnb.regions import (BRATS_VALUES, AnnotatedLoader, RegionError, RegionPostprocessing, SmallRegion, brats_scores, contradictions, decide_small_region, determine_small_region, export_brats,
                           from_brats, load_postprocessing, lost_labels,
                           make_nested, make_region_dataset, make_sparse_dataset, nesting, region_order, regions_from_classes, sparse_scribbles, sparse_slices, to_brats)
from segnb.sliding_window import predict_sliding_window
from segnb.training import PatchDice, make_optimizer, training_step

RECORDED = json.loads((Path(__file__).parent/'recorded'/'81_regions.json').read_text())
with np.load(Path(__file__).parent/'recorded'/'81_regions.npz') as file: ARRAYS = {k: file[k] for k in file.files}
V1 = Labels.from_dict({'labels': {'background': 0, 'whole': [1, 2, 3], 'core': [2, 3], 'enhancing': 3}, 'regions_class_order': [1, 2, 3]})
CLASSES = Labels.from_dict({'labels': {'0': 'background', '1': 'edema', '2': 'necrotic core', '3': 'enhancing'}})
WANTED = {'whole tumour': [1, 2, 3], 'tumour core': [2, 3], 'enhancing': 3}
REAL = Path(os.environ.get('SEGNB_REAL_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))
ALONE = dict(n_workers=0, progress=False)


def network(deep_supervision=True):
    plan = SimpleNamespace(**RECORDED['network'])
    return build_unet(plan, plan.in_channels, plan.n_outputs, deep_supervision=deep_supervision), v1_key_map(len(plan.pool_op_kernel_sizes))


# the original -----------------------------------------------------------------------------------------------------
def test_five_steps_of_training():
    net, names = network()
    net.load_state_dict({names[k[3:]]: torch.from_numpy(v) for k, v in ARRAYS.items() if k.startswith('w0/')})
    optimizer, loss = make_optimizer(net), DeepSupervisionLoss(DiceBCELoss(), deep_supervision_weights(3))
    assert deep_supervision_weights(3) == pytest.approx(RECORDED['weights'])
    for i, theirs in enumerate(RECORDED['losses']):
        data, masks = torch.from_numpy(ARRAYS[f'data{i}']).float(), V1.masks(ARRAYS[f'seg{i}'][:, 0]).transpose(1, 0, 2, 3, 4)
        targets = [torch.from_numpy(np.ascontiguousarray(masks[..., ::z, ::y, ::y])) for z, y in ((1, 1), (1, 2), (2, 4))]
        for s, target in enumerate(targets): assert np.array_equal(target.numpy().astype(bool), ARRAYS[f'target{i}_{s}'])
        counter = PatchDice(3, regions=True)
        with torch.no_grad(): counter.add(net(data)[0], targets[0])
        for k in ('tp', 'fp', 'fn'): assert np.abs(getattr(counter, k) - RECORDED['online'][i][k]).max() <= 2 # a voxel at one half
        assert training_step(net, loss, optimizer, data, targets) == pytest.approx(theirs, rel=1e-5)
    for k, theirs in ARRAYS.items():
        if not k.startswith('w5/'): continue
        ours = net.state_dict()[names[k[3:]]].numpy()
        assert np.abs(ours - theirs).max() <= (1e-6 if names[k[3:]].endswith('conv.bias') else 1e-4 * np.abs(theirs).max()), k


def test_prediction_with_the_weights_of_the_original():
    "Mirrored, tiled, a sigmoid each, and decided in two orders of the classes"
    net, names = network(deep_supervision=False)
    rng = np.random.default_rng(RECORDED['seed'])
    shapes = {k[3:]: v.shape for k, v in ARRAYS.items() if k.startswith('w0/')}
    net.load_state_dict({names[k]: torch.from_numpy(rng.normal(0, 9. if 'seg_outputs' in k else .3, shape).astype(np.float32)) for k, shape in shapes.items()})
    image, theirs = ARRAYS['image'].astype(np.float32), ARRAYS['probabilities']
    ours = predict_sliding_window(net.eval(), image, tuple(RECORDED['patch']), 3, mirror_axes=(0, 1, 2), regions=True)
    assert np.abs(ours - theirs).max() <= 1e-4
    crossed = Labels.from_dict({'labels': {'background': 0, 'a': [1, 2, 3], 'b': [2, 3], 'c': 2}, 'regions_class_order': [1, 3, 2]})
    tie = (np.abs(theirs - .5) < 1e-4).any(0)
    for labels, name in ((V1, 'decided_123'), (crossed, 'decided_132')):
        assert np.array_equal(labels.to_label_map(theirs), ARRAYS[name])
        assert not ((labels.to_label_map(ours) != ARRAYS[name]) & ~tie).any() and tie.mean() < .02


def test_scores_of_the_challenge_and_of_the_trainer():
    for i, theirs in enumerate(RECORDED['scores']):
        truth, said = ARRAYS[f'truth{i}'], ARRAYS[f'said{i}']
        ours = brats_scores(truth, said, V1)
        assert [ours[r]['dice'] for r in V1.regions] == pytest.approx(theirs['challenge'][:3], abs=1e-12)
        assert [ours[r]['hd95'] for r in V1.regions] == pytest.approx(theirs['challenge'][3:], abs=1e-6)
        plain = evaluate_case(truth, said, [(1, 2, 3), (2, 3), (3,)])
        assert [s['dice'] for s in plain.values()] == pytest.approx(theirs['regions'], abs=1e-12, nan_ok=True)


def test_small_enhancing_parts():
    said, truth = ({i: ARRAYS[f'{name}{i}'] for i in range(10)} for name in ('said', 'truth'))
    theirs = RECORDED['thresholds']
    found = determine_small_region(said, truth, V1, sizes=theirs['sizes'])
    assert [found.means[n] for n in theirs['sizes'][1:]] == pytest.approx(theirs['means'][1:], abs=1e-12)
    lacking = sum((said[i] != 3).all() and (truth[i] != 3).all() for i in range(10)) # the original counts these 0 at size 0 and 1 above
    assert lacking > 0 and found.means[0] == pytest.approx(theirs['means'][0] + lacking/10, abs=1e-12)
    assert (found.value, found.replace_with) == (3, 2)
    for size in theirs['sizes'][1:]: assert np.array_equal(SmallRegion(3, 2, size).apply(said[3]), ARRAYS[f'replaced{size}'])
    assert SmallRegion(3, 2, 0).apply(said[3]) is said[3]


def test_label_values_of_brats():
    assert np.array_equal(from_brats(ARRAYS['brats'], CLASSES), ARRAYS['classes'])
    assert np.array_equal(to_brats(ARRAYS['classes'], V1), ARRAYS['back']) and np.array_equal(ARRAYS['back'], ARRAYS['brats'])


# laws -------------------------------------------------------------------------------------------------------------
def nested(rng, n, values):
    "Random nested regions over n values in random order"
    order = rng.permutation(values)
    return {f'r{i}': [int(v) for v in order[i:]] for i in range(n)}, [int(v) for v in order]


@pytest.mark.parametrize('seed', range(25))
def test_nested_regions_are_lossless_and_ordered(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    values = sorted(int(v) for v in rng.choice(np.arange(1, 40), n, replace=False))
    classes = Labels.from_dict({'labels': {'background': 0, **{f'class {v}': v for v in values}, **({'ignore': 50} if seed % 2 else {})}})
    regions, order = nested(rng, n, values)
    shuffled = {k: regions[k] for k in rng.permutation(list(regions))}
    assert list(region_order(shuffled).values()) == order
    json = regions_from_classes(classes, shuffled)
    labels = Labels.from_dict(json)
    assert lost_labels(labels) == {} and (labels.ignore is not None) == bool(seed % 2)
    assert all(len(outer) == int(name[1:]) for name, outer in nesting(labels).items())
    m = rng.choice([0, *values], (4, 5, 6))
    assert np.array_equal(labels.to_label_map(labels.one_hot(m)), m)
    assert sum(contradictions(labels.one_hot(m), labels).values()) == 0
    p = rng.random((n, 4, 5, 6), np.float32)
    assert np.array_equal(labels.to_label_map(make_nested(p, labels, 'inner')), labels.to_label_map(p))
    cautious = labels.to_label_map(make_nested(p, labels, 'outer'))
    assert not ((cautious > 0) & (labels.to_label_map(p) == 0)).any() and ((cautious > 0) == (p[list(labels.regions).index('r0')] > .5)).all()
    for believe in ('inner', 'outer'): assert sum(contradictions(make_nested(p, labels, believe), labels).values()) == 0


def test_two_trees_of_regions():
    "Left and right kidney with their tumours: two chains that know nothing of each other"
    classes = Labels.from_dict({'labels': {'background': 0, 'left': 1, 'left tumour': 2, 'right': 3, 'right tumour': 4}})
    labels = Labels.from_dict(regions_from_classes(classes, {'left kidney': [1, 2], 'right kidney': [3, 4], 'left tumour': 2, 'right tumour': 4}))
    assert lost_labels(labels) == {} and nesting(labels)['left tumour'] == ('left kidney',) and nesting(labels)['right kidney'] == ()
    p = np.array([.2, .9, .9, .1]).reshape(4, 1)  # a tumour on the left without a left kidney, inside the right one
    assert contradictions(p, labels) == {('left tumour', 'left kidney'): 1, ('right tumour', 'right kidney'): 0}
    assert labels.to_label_map(p) == [2] and labels.to_label_map(make_nested(p, labels, 'outer')) == [3]


@pytest.mark.parametrize('wanted, order, words', [
    ({'whole': [1, 2, 3], 'core': [2, 7]}, None, 'not declared'), ({'whole': ['edema', 'cyst']}, None, "'cyst', which is not declared"), ({'core': [2, 3]}, None, 'in no region'),
    ({'whole': [0, 1, 2, 3]}, None, 'the background'), ({'whole': ['background', 1, 2, 3]}, None, 'the background'), ({'whole': [1, 2, 3], 'enhancing': 3}, None, 'several labels'),
    ({'whole': [1, 2], 'a': 1, 'b': [2, 3]}, None, 'several labels|no label of its own'), (WANTED, [1, 2], 'one label for each region'), (WANTED, {'whole tumour': 1}, 'names other regions'),
    (WANTED, [1, 1, 3], 'not declared|does not hold'), (WANTED, [3, 3, 3], 'never|'), ({}, None, 'no regions'), ({'a': 1, 'b': 2, 'c': 3}, None, 'more than one class'),
    ({'ignore': [1, 2, 3]}, None, 'a name of its own'), ({'background': [1, 2, 3]}, None, 'a name of its own'), ({'whole': [1, 1, 2, 3]}, [1], 'named once'),
    ({'enhancing': 3, 'tumour core': [2, 3], 'whole': [1, 2, 3]}, [3, 2, 1], 'never be seen')])
def test_what_cannot_be_a_region(wanted, order, words):
    if order == [3, 3, 3]: # every region may write the same label: whole and core then look like enhancing, and lost_labels says so
        assert lost_labels(Labels.from_dict(regions_from_classes(CLASSES, wanted, order))) == {1: 3, 2: 3}
        return
    with pytest.raises((RegionError, LabelError), match=words): regions_from_classes(CLASSES, wanted, order)


@pytest.mark.parametrize('json, words', [
    ({'labels': {'background': 0, 'whole': [1, 2], 'core': 2}}, 'regions need the key'), ({'labels': {'background': 0, 'whole': [1, 2], 'core': 2}, 'regions_class_order': [1]}, 'wrong length'),
    ({'labels': {'background': 0, 'core': 2, 'whole': [1, 2]}, 'regions_class_order': [2, 1]}, 'never be seen'),
    ({'labels': {'background': 0, 'whole': [1, 2], 'core': 2, 'ignore': 2}, 'regions_class_order': [1, 2]}, 'ignore'),
    ({'labels': {'background': 0, 'whole': [1, 2], 'core': 2, 'ignore': [3, 4]}, 'regions_class_order': [1, 2]}, 'ignore'),
    ({'labels': {'background': 0, 'whole': [0, 1, 2], 'core': 2}, 'regions_class_order': [1, 2]}, '0 must be the background')])
def test_what_dataset_json_may_not_say(json, words):
    with pytest.raises(LabelError, match=words): Labels.from_dict(json, 'dataset.json')


def test_one_size_too_small_everywhere():
    truth, said = {'a': np.array([1, 2, 3, 4])}, {'a': np.array([1, 2, 3, 4])}
    plain = Labels.from_dict({'labels': {'0': 'background', '1': 'a'}})
    for labels, region, words in ((plain, None, 'no region inside'), (V1, 'core', 'no region inside'), (V1, 'nobody', 'no region inside')):
        with pytest.raises(RegionError, match=words): determine_small_region(said, truth, labels, region)
    with pytest.raises(RegionError, match='differ in shape'): determine_small_region(said, {'a': np.zeros(3, int)}, V1)
    with pytest.raises(RegionError, match='one at least'): determine_small_region({}, truth, V1)
    ignoring = Labels.from_dict({'labels': {'background': 0, 'whole': [1, 2, 3], 'core': [2, 3], 'enhancing': 3, 'ignore': 4}, 'regions_class_order': [1, 2, 3]})
    assert determine_small_region({'a': np.array([3, 3])}, {'a': np.array([4, 3])}, ignoring, sizes=(1,)).means[0] == 1 # what nobody judged counts nowhere


# data sets --------------------------------------------------------------------------------------------------------
GRID = Geometry((2., 1., 1.), (5., 6., 7.), (1., 0., 0., 0., 1., 0., 0., 0., 1.), (12, 16, 14))


def balls(folder, n=4, values=(0, 1, 2, 3), ending='.nii.gz', json=None):
    "A small data set of nested balls"
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (folder/part).mkdir(parents=True)
    z, y, x = np.mgrid[:12, :16, :14]
    for i in range(n):
        r = np.sqrt((z - 6)**2 + (y - 8)**2 + (x - 7 + i % 2)**2)
        m = np.array(values)[(r < 5.5).astype(int) + (r < 4) + (r < 2.2)]
        write_image((50*m + 100 + np.random.default_rng(i).normal(0, 9, m.shape)).astype(np.float32), GRID, folder/'imagesTr'/f'c{i}_0000{ending}')
        write_label_map(m.astype(np.int16), GRID, folder/'labelsTr'/f'c{i}{ending}')
    (folder/'dataset.json').write_text(json_text(json or {'channel_names': {'0': 'MR'}, 'labels': {'background': 0, 'edema': values[1], 'necrotic core': values[2], 'enhancing': values[3]}, 'file_ending': ending}))
    return Dataset(folder)


def json_text(x): return json.dumps(x)


@pytest.mark.parametrize('link', ['auto', 'symlink', 'hardlink', 'reference'])
@pytest.mark.parametrize('ending', ['.nii.gz', '.mha'])
def test_data_sets_by_every_kind_of_link(tmp_path, link, ending):
    source = balls(tmp_path/'Task001_Balls', ending=ending)
    before = {f: f.read_bytes() for f in (tmp_path/'Task001_Balls').rglob('*') if f.is_file()}
    made = make_region_dataset(source, tmp_path/'Task201_R', WANTED, link=link)
    check_dataset(made)
    assert made.cases == source.cases and np.array_equal(made.read('c1').label, source.read('c1').label) and made.json['name'] == 'Task201_R'
    sparse = make_sparse_dataset(made, tmp_path/'deep'/'Task202_S', every=4, link=link, **{'n_workers': 0})
    check_dataset(sparse)
    for case in sparse.cases:
        m, full = sparse.read(case).label, source.read(case).label
        judged = m != sparse.labels.ignore
        assert np.array_equal(m[judged], full[judged]) and judged.sum() == 3*16*14
    again = make_sparse_dataset(sparse, tmp_path/'Task203_Sparser', every=6, axis=1, n_workers=0)
    assert again.labels.values[again.labels.ignore] == 4 and (again.read('c0').label != again.labels.ignore).mean() < .05
    assert {f: f.read_bytes() for f in before} == before, 'the source has changed'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['Task001_Balls', 'Task201_R', 'Task202_S', 'Task203_Sparser'][:2] + ['Task203_Sparser', 'deep'], 'something half made is left'


def test_nothing_is_left_of_what_fails(tmp_path):
    source = balls(tmp_path/'Task001_Balls')
    (tmp_path/'taken').mkdir(); (tmp_path/'taken'/'x').write_text('')
    for action, words in ((lambda: make_region_dataset(source, tmp_path/'taken', WANTED), 'exists already'), (lambda: make_sparse_dataset(source, tmp_path/'taken'), 'exists already'),
                          (lambda: make_sparse_dataset(source, tmp_path/'new', every=99, n_workers=0), 'so far apart'), (lambda: make_region_dataset(source, tmp_path/'new', {'a': [9]}), 'not declared'),
                          (lambda: make_sparse_dataset(source, tmp_path/'new', 'dots'), 'no such sparse'), (lambda: make_sparse_dataset(source, tmp_path/'new', cases=['c9']), 'c9')):
        with pytest.raises(Exception, match=words): action()
    (tmp_path/'Task001_Balls'/'imagesTr'/'c1_0000.nii.gz').unlink()
    with pytest.raises(Exception, match='c1'): make_region_dataset(source, tmp_path/'new', WANTED)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['Task001_Balls', 'taken']


def test_scribbles_never_cross_a_border(tmp_path):
    m = balls(tmp_path/'t').read('c0').label
    for seed in range(8):
        s = sparse_scribbles(m, 9, np.random.default_rng(seed), n=2 + seed, length=1 + 3*seed, width=1 + seed % 3)
        assert ((s == 9) | (s == m)).all() and set(np.unique(s)) == {0, 1, 2, 3, 9} and s.dtype == np.uint8
    flat = m[6:7]
    assert set(np.unique(sparse_scribbles(flat, 4, np.random.default_rng(0)))) == {0, 1, 2, 3, 4}          # one slice
    assert sparse_slices(m, 300, np.random.default_rng(0), every=3).dtype == np.uint16
    kept = [np.flatnonzero((sparse_slices(m, 9, np.random.default_rng(seed), every=5) != 9).any((1, 2)))[0] for seed in range(30)]
    assert set(kept) == {0, 1, 2, 3, 4}                                                                     # the first slice is drawn


def test_export_and_compare_folders(tmp_path):
    source = balls(tmp_path/'Task001_Balls')
    made = make_region_dataset(source, tmp_path/'Task201_R', WANTED)
    for name in ('good', 'bad'): (tmp_path/name).mkdir()
    for case in made.cases:
        m, grid = read_label_map(made.label_file(case))
        write_label_map(m, grid, tmp_path/'good'/f'{case}.nii.gz'); write_label_map(np.where(m == 3, 2, m), grid, tmp_path/'bad'/f'{case}.nii.gz')
    found = compare_folders(tmp_path/'bad', tmp_path/'good', made.folder/'labelsTr', made.labels, **ALONE)
    assert found.rows['tumour core']['difference'] == 0 and found.rows['whole tumour']['first'] == 1 and found.rows['enhancing']['difference'] == 1
    assert set(found.rows) == {1, 2, 3, 'foreground', 'whole tumour', 'tumour core', 'enhancing'} and 'whole tumour' in found.table() and found.to_dict()['labels']['tumour core'] == 'tumour core'
    with pytest.raises(MetricsError, match='differ in their regions'):
        from segnb.metrics import compare_results
        compare_results(*(evaluate_folder(made.folder/'labelsTr', tmp_path/'good', labels, **ALONE) for labels in (made.labels, {1: 'label 1', 2: 'label 2', 3: 'enhancing'})))
    files = export_brats(tmp_path/'good', tmp_path/'out', made.labels, n_workers=0)
    for file in files:
        m, grid = read_label_map(file)
        assert set(np.unique(m)) == {0, *BRATS_VALUES.values()} and not grid.differences(GRID) and np.array_equal(from_brats(m, made.labels), read_label_map(tmp_path/'good'/file.name)[0])
    (tmp_path/'good'/'dataset.json').write_text((made.folder/'dataset.json').read_text())                  # labels are found beside the files
    assert len(export_brats(tmp_path/'good', tmp_path/'out2', n_workers=0)) == 4
    write_label_map(np.full(GRID.shape, 7), GRID, tmp_path/'bad'/'c0.nii.gz')
    with pytest.raises(Exception, match='c0.*no part of the tumour|no part of the tumour.*c0'): export_brats(tmp_path/'bad', tmp_path/'out3', made.labels, n_workers=0)
    with pytest.raises(RegionError, match='labels are not known'): export_brats(tmp_path/'bad', tmp_path/'out4')


@pytest.mark.parametrize('regions', [False, True])
def test_brats_there_and_back(tmp_path, regions):
    "A folder of BraTS becomes a data set whose predictions are BraTS's again, without renumbering anything"
    rng = np.random.default_rng(0)
    for i in range(2):
        folder = tmp_path/'source'/f'BraTS20_Training_{i:03d}'
        folder.mkdir(parents=True)
        m = rng.choice([0, 1, 2, 4], GRID.shape)
        for kind in ('t1', 't1ce', 't2', 'flair'): write_image(rng.random(GRID.shape, np.float32) + m, GRID, folder/f'{folder.name}_{kind}.nii.gz')
        write_label_map(m, GRID, folder/f'{folder.name}_seg.nii.gz')
    data = convert_brats(tmp_path/'source', tmp_path/'Task082_BraTS', regions=regions)
    for case in data.cases:
        stored, _ = read_label_map(data.label_file(case))
        decided = data.labels.to_label_map(data.labels.one_hot(stored))
        assert np.array_equal(decided, stored) and np.array_equal(to_brats(decided, data.labels), stored)
    if regions: assert lost_labels(data.labels) == {} and region_order({n: [data.labels.values[k] for k in m] for n, m in data.labels.regions.items()}) == {'whole tumour': 2, 'tumour core': 1, 'enhancing': 4}


@pytest.mark.parametrize('action, words', [
    (lambda m: sparse_slices(m, 9, axis=3), 'no such axis'), (lambda m: sparse_slices(m, 9, every=0), 'so far apart'), (lambda m: sparse_slices(m, 9, every=99), 'so far apart'),
    *((lambda m, k=k: sparse_scribbles(m, 9, np.random.default_rng(0), **{k: 0}), 'leave nothing') for k in ('n', 'length', 'width')),
    (lambda m: to_brats(m), '--labels'), (lambda m: regions_from_classes(Labels.from_dict({'labels': {'background': 0, 'a': 2}}), {'whole': None}), 'names nothing')])
def test_options_that_mean_nothing(action, words):
    with pytest.raises(RegionError, match=words): action(np.ones((4, 6, 5), np.uint8))


# sampling ---------------------------------------------------------------------------------------------------------
class FakeCase:
    def __init__(self, seg, locations): self.data, self.seg, self.class_locations = np.zeros((1, *seg.shape), np.float32), seg, locations


@pytest.mark.parametrize('patch', [(8, 8, 8), (8, 8)])
@pytest.mark.parametrize('seed', range(3))
def test_free_patches_show_something_judged(patch, seed):
    rng = np.random.default_rng(seed)
    seg = np.full((30, 40, 36), 2, np.int8)
    seg[:, :6] = -1
    at = tuple(int(rng.integers(8, n)) for n in seg.shape)
    seg[at] = 0
    loader = AnnotatedLoader({'a': FakeCase(seg, {}), 'none': FakeCase(np.full((9, 9, 9), 2, np.int8), {})}, patch, patch, 2, 0., seed=seed, highest_label=2)
    loader.ignore = 2
    for i in range(30):
        sample = loader.cut('a', 0, np.random.default_rng([seed, i]))
        assert (sample.seg[0] == 0).sum() == 1 and sample.label is None
    with pytest.raises(RegionError, match='case none.*nobody has judged'): loader.cut('none', 0, rng)
    loader.ignore = None
    assert any((loader.cut('a', 0, np.random.default_rng([seed, i])).seg[0] == 0).sum() == 0 for i in range(30))


def test_forced_patches_stay_around_foreground():
    seg = np.full((20, 20, 20), 2, np.int8)
    seg[3, 3, 3], seg[16, 16, 16] = 1, 0
    loader = AnnotatedLoader({'a': FakeCase(seg, {1: np.array([[3, 3, 3]], np.int32)})}, (4, 4, 4), (4, 4, 4), 2, 1.)
    loader.ignore = 2
    for i in range(10):
        sample = loader.cut('a', 1, np.random.default_rng(i))
        assert sample.label == 1 and (sample.seg[0] == 1).any()


# real data --------------------------------------------------------------------------------------------------------
GLIOMA = REAL/'Task014_Glioma'

@pytest.fixture(scope='module')
def glioma(tmp_path_factory):
    if not (GLIOMA/'dataset.json').exists(): pytest.skip(f'{GLIOMA} is not there (SEGNB_REAL_DATA)')
    folder = tmp_path_factory.mktemp('glioma')
    return make_region_dataset(GLIOMA, folder/'Task214_Glioma', {'whole tumour': [1, 2, 3], 'tumour core': [1, 3], 'enhancing': 3}, link='reference')


def test_glioma_as_regions(glioma):
    case = glioma.read(glioma.cases[0])
    assert glioma.labels.region_order == (2, 1, 3) and lost_labels(glioma.labels) == {}
    masks = glioma.labels.one_hot(case.label)
    assert masks[0].sum() >= masks[1].sum() >= masks[2].sum() > 0 and sum(contradictions(masks, glioma.labels).values()) == 0
    for labels in (glioma.labels, Dataset(GLIOMA).labels):
        brats = to_brats(case.label, labels)
        assert set(np.unique(brats)) <= {0, 1, 2, 4} and np.array_equal(from_brats(brats, labels), case.label)
        assert np.array_equal(brats == 4, case.label == 3) and np.array_equal(brats == 1, case.label == 1)


@pytest.mark.parametrize('kind', ['regions', 'classes'])
def test_glioma_is_learnt_and_comes_out_as_brats(glioma, kind, tmp_path):
    "Trained and asked about the one case that there is: what the whole way can do, not how well it generalises"
    import dataclasses
    from segnb.fingerprint import extract_fingerprint
    from segnb.planning import plan_experiment
    from segnb.prediction import Predictor
    from segnb.preprocessing import preprocess_dataset
    from segnb.training import Trainer
    torch.set_num_threads(1)
    data = glioma if kind == 'regions' else Dataset(GLIOMA)
    plans = plan_experiment(extract_fingerprint(data, n_workers=0), planner='cpu')
    small = dataclasses.replace(plans.configuration('3d_fullres'), spacing=(5, 5, 5), median_shape=(28, 34, 27), patch_size=(16, 24, 16), num_pool_per_axis=(2, 2, 2), batch_size=2,
                                pool_op_kernel_sizes=((2, 2, 2),)*2, conv_kernel_sizes=((3, 3, 3),)*3, do_dummy_2d_data_aug=False, base_num_features=8)
    plans = dataclasses.replace(plans, configurations={'3d_fullres': small})
    preprocess_dataset(data, plans, tmp_path/'pre', n_workers=0)
    trainer = Trainer(tmp_path/'pre', tmp_path/'3d_fullres', fold='all', epochs=4, iterations=25, val_iterations=1, n_workers=0, device='cpu', progress=False, initial_lr=.05, momentum=.9, augmentation='none')
    trainer.fit()
    assert trainer.history[-1]['train_loss'] < trainer.history[0]['train_loss'] - .1
    predictor = Predictor.from_folder(tmp_path/'3d_fullres', folds=['all'], device='cpu', mirror=False)
    case, file = data.cases[0], tmp_path/'out'/f'{data.cases[0]}.nii.gz'
    predictor.predict_folder({case: data.image_files(case)}, tmp_path/'out', progress=False, n_workers=0)
    said, truth = read_label_map(file)[0], data.read(case).label
    scores = brats_scores(truth, said, glioma.labels)
    assert scores['whole tumour']['dice'] > .5, scores
    assert set(np.unique(to_brats(said, data.labels))) <= {0, 1, 2, 4}


# the command line -------------------------------------------------------------------------------------------------
def test_the_whole_way_on_the_command_line(tmp_path, capsys, monkeypatch):
    "A folder of BraTS to regions, two folds, a selection, a prediction in BraTS's numbers, and scores of regions"
    from segnb.cli import main
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    big = Geometry((1., 1., 1.), (0., 0., 0.), (1., 0., 0., 0., 1., 0., 0., 0., 1.), (24, 24, 24))
    z, y, x = np.mgrid[:24, :24, :24]
    for i in range(5):
        name = f'BraTS20_{"Training" if i < 4 else "Validation"}_{i:03d}'
        folder, r = tmp_path/'source'/name, np.sqrt((z - 12)**2 + (y - 12)**2 + (x - 11 + i % 3)**2)
        folder.mkdir(parents=True)
        m = np.array([0, 2, 4, 1])[(r < 9).astype(int) + (r < 7) + (r < 4)]
        for kind in ('t1', 't1ce', 't2', 'flair'): write_image((40*m + 100 + np.random.default_rng(i).normal(0, 5, m.shape)).astype(np.float32), big, folder/f'{name}_{kind}.nii.gz')
        if i < 4: write_label_map(m, big, folder/f'{name}_seg.nii.gz')
        (tmp_path/'truth').mkdir(exist_ok=True)
        write_label_map(m, big, tmp_path/'truth'/f'{name}.nii.gz')

    def segnb(line): assert main(line.split()) == 0, line + capsys.readouterr().err
    segnb('convert brats source raw/Task082_BraTS --regions')
    segnb('plan raw/Task082_BraTS -w ws -j 0 --planner cpu')
    segnb('plan 82 -w ws --edit 3d_fullres patch_size=16,16,16 base_num_features=4')
    segnb('preprocess 82 -w ws -j 0')
    for fold in (0, 1): segnb(f'train 82 {fold} -w ws -q -j 0 --device cpu --epochs 2 --iterations 12 --val-iterations 1 --n-folds 2 --lr 0.05 --momentum 0.9 --disable-tta --augmentation none')
    segnb('select 82 -w ws -j 0 -q --device cpu')
    pooled = json.loads((tmp_path/'ws'/'models'/'Task082_BraTS'/'3d_fullres'/'fold_0'/'validation'/'summary.json').read_text())
    assert set(pooled['regions']['mean']) == {'whole tumour', 'tumour core', 'enhancing'}
    segnb('predict -i raw/Task082_BraTS/imagesTs -o out -d 82 -w ws -q -j 0 --device cpu --disable-tta')
    said = read_label_map(tmp_path/'out'/'BraTS20_Validation_004.nii.gz')[0]
    assert set(np.unique(said)) <= {0, 1, 2, 4} and np.array_equal(to_brats(said, Dataset(tmp_path/'raw'/'Task082_BraTS').labels), said)
    capsys.readouterr()
    segnb('evaluate -r truth -p out -l raw/Task082_BraTS/dataset.json --cases BraTS20_Validation_004 -j 0 -q --convention absent=1 one_sided=373.12866')
    assert 'whole tumour' in capsys.readouterr().out
    summary = json.loads((tmp_path/'out'/'summary.json').read_text())
    assert summary['regions']['mean']['whole tumour']['dice'] > .3


# small regions in post-processing ------------------------------------------------------------------------------------------
def decided(**how): return RegionPostprocessing(**dict(which=((1, 2, 3), 3), names={1: 'edema', 2: 'core', 3: 'enhancing'}, n_cases=4, small=SmallRegion(3, 2, 30, {0: .5, 30: .75})) | how)


@pytest.mark.parametrize('how', [{}, dict(small=None), dict(which=()), dict(min_sizes={(1, 2, 3): 10., 3: 4.5}), dict(small=SmallRegion(3, 2, 0)), dict(scores={'raw': {1: .5}, 'final': {1: .6}}, small=SmallRegion(3, 1, 7))], ids=range(6))
def test_both_decisions_there_and_back(how, tmp_path):
    both = decided(**how)
    both.save(tmp_path/'postprocessing.json')
    again = load_postprocessing(tmp_path/'postprocessing.json')
    assert again == both and again.explain() == both.explain() and isinstance(again, RegionPostprocessing) and type(again.pieces()) is Postprocessing
    with pytest.raises(PostprocessingError): Postprocessing.load(tmp_path/'postprocessing.json')       # half of it is never done
    both.pieces().save(tmp_path/'pieces.json')
    assert load_postprocessing(tmp_path/'pieces.json') == both.pieces()


@pytest.mark.parametrize('seed', range(4))
def test_pieces_first_then_the_size(seed):
    m = np.random.default_rng(seed).choice(4, (8, 9, 10), p=[.4, .2, .2, .2]).astype(np.uint8)
    for n in (0, 30, 1000):
        both = decided(small=SmallRegion(3, 2, n))
        after = both.pieces().apply(m, (1, 1, 1))
        expected = np.where(after == 3, 2, after) if 0 < (after == 3).sum() < n else after
        assert np.array_equal(both(m, (1, 1, 1)), expected) and np.array_equal(both.apply(m, (1, 1, 1)), expected) and both(m, (1, 1, 1)).dtype == np.uint8
    assert np.array_equal(decided(small=None)(m, (1, 1, 1)), decided().pieces()(m, (1, 1, 1)))


@pytest.mark.parametrize('text', ['{"small_region": 3}', '{"small_region": {}, "pieces": {}}', '{"small_region": null}', '{"small_region": {"value": "3", "replace_with": 2, "min_voxels": 4, "means": null}, "pieces": {}}',
                                  '{"small_region": {"value": 3, "replace_with": 2, "min_voxels": 4, "means": {"x": 1}}, "pieces": null}', '[1]', '{', '{}'])
def test_files_that_hold_no_decision(text, tmp_path):
    (tmp_path/'p.json').write_text(text)
    with pytest.raises(SegnbError, match='p.json'): load_postprocessing(tmp_path/'p.json')


@pytest.mark.parametrize('wrong', [(0, 2, 4), (3, 2, -1), (3, 2, 1.5), (3, None, 4), (True, 2, 4)])
def test_small_regions_that_cannot_be(wrong):
    with pytest.raises(RegionError, match='cannot be'): SmallRegion(*wrong)


ROOM = Geometry((1., 1., 1.), (0., 0., 0.), (1., 0., 0., 0., 1., 0., 0., 0., 1.), (10, 12, 12))


@pytest.fixture
def validated(tmp_path):
    "The folder of a model of regions with two validated folds; two cases without an enhancing part, in which the networks see a little of it"
    model = tmp_path/'models'/'Task202'/'3d_fullres'
    (tmp_path/'gt').mkdir()
    for i in range(4):
        truth = np.zeros((10, 12, 12), np.uint8)
        truth[2:8, 2:10, 2:10], truth[3:7, 3:8, 3:8] = 1, 2
        if i < 2: truth[4:6, 4:7, 4:7] = 3
        said = truth.copy()
        said[4, 4, 4:4 + (2 if i >= 2 else 3)] = 3
        said[0, 0, 0] = 3 if i == 3 else 0                                   # a stray voxel, which the largest piece does away with
        folder = model/f'fold_{i % 2}'/'validation'
        folder.mkdir(parents=True, exist_ok=True)
        write_label_map(truth, ROOM, tmp_path/'gt'/f'c{i}.nii.gz')
        write_label_map(said, ROOM, folder/f'c{i}.nii.gz')
    for k in range(2): (model/f'fold_{k}'/'validation'/'summary.json').write_text(json.dumps({'cases': {f'c{i}': {} for i in range(k, 4, 2)}}))
    (model/'dataset.json').write_text(json.dumps(V1.to_dict('v2') | {'channel_names': {'0': 'T1'}}))
    return model, tmp_path/'gt'


def test_a_small_region_is_decided_by_all_folds_and_kept_with_the_model(validated, tmp_path):
    model, reference = validated
    found = decide_small_region(model, reference, sizes=(1, 2, 3, 4, 18, 19), n_workers=0)
    assert (found.small.value, found.small.replace_with, found.small.min_voxels) == (3, 2, 4) and found.which == ()   # 2 and 3 voxels are said where nothing is, 18 where something is
    assert load_postprocessing(model/'postprocessing.json') == found and 'fewer than 4 voxels in all become core' in found.explain()
    Postprocessing(which=(3,), names={3: 'enhancing'}, n_cases=4).save(model/'postprocessing.json')
    after = decide_small_region(model, reference, 'enhancing', sizes=(1, 2, 3, 4, 18), n_workers=0)
    assert after.which == (3,) and after.small.min_voxels == 3 and after.n_cases == 4                                # the stray voxel is gone before
    assert decide_small_region(model, reference, sizes=(1, 2, 3, 4, 18), n_workers=2) == after                       # decided again: from the pieces, not from itself
    done = apply_postprocessing(tmp_path/'models'/'Task202'/'3d_fullres'/'fold_1'/'validation', tmp_path/'out', after, n_workers=2)
    assert done == {'c1': 0, 'c3': 3} and not (read_label_map(tmp_path/'out'/'c3.nii.gz')[0] == 3).any() and load_postprocessing(tmp_path/'out'/'postprocessing.json') == after
    with pytest.raises(RegionError, match='no region inside'): decide_small_region(model, reference, 'whole')
    with pytest.raises(SegnbError, match='fold'): decide_small_region(model, reference, folds=[5])


def test_the_command_decides_and_applies_both(validated, tmp_path, capsys):
    from segnb.cli import main as segnb
    model, reference = validated
    (tmp_path/'preprocessed'/'Task202').mkdir(parents=True)
    shutil.copy(model/'dataset.json', tmp_path/'preprocessed'/'Task202'/'dataset.json')
    for folder in (model, tmp_path/'preprocessed'/'Task202'): (folder/'plans.json').write_text('{}')
    shutil.move(reference, tmp_path/'preprocessed'/'Task202'/'gt_segmentations')
    assert segnb(['postprocess', 'determine', '202', '-w', str(tmp_path), '--small-region', 'enhancing', '-j', '0', '-q']) in (0, None)
    assert 'fewer than' in capsys.readouterr().out
    rule = load_postprocessing(model/'postprocessing.json')
    assert isinstance(rule, RegionPostprocessing) and rule.small.value == 3
    assert segnb(['postprocess', 'apply', str(model/'postprocessing.json'), '-i', str(model/'fold_1'/'validation'), '-o', str(tmp_path/'out'), '-j', '0', '-q']) in (0, None)
    for case in ('c1', 'c3'):
        said, made = (read_label_map(f/f'{case}.nii.gz')[0] for f in (model/'fold_1'/'validation', tmp_path/'out'))
        assert np.array_equal(made, rule(said, (1, 1, 1)))
