"""Cascade: the graph of its pieces, what makes each stale, going on after a stop, both stages in one call, what is refused."""
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.cascade import CascadeError, CascadePredictor, NoteInputs, build_cascade, examine_cascade, prepare_next_stage, previous_stage_maps, stages, training_inputs
from segnb.checkpoints import load_checkpoint
from segnb.dataset import Dataset
from segnb.image import Geometry, SegnbError, read_label_map, write_image, write_label_map
from segnb.planning import Plans, PlansError
from segnb.prediction import PredictionError, Predictor
from segnb.preprocessing import load_preprocessed, preprocess_dataset, preprocess_previous_stage
from segnb.splits import five_folds, save_splits
from segnb.training import Trainer
from segnb.workers import read_json, write_json

torch.set_num_threads(1)
TINY = dict(epochs=1, iterations=2, val_iterations=1, n_workers=0, progress=False, say=lambda text: None, predict=dict(mirror=False, device='cpu'), device='cpu')
PLAIN = {'labels': {'0': 'background', '1': 'ball', '2': 'core'}}
GEOMETRY = Geometry((1.5, 1., 1.), (3., -7., 2.), (1., 0., 0., 0., 1., 0., 0., 0., 1.), (22, 24, 26))


def make_raw(folder, n=4, said=PLAIN, numbers=(1, 2)):
    "Balls with a core in a body that air surrounds"
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True)
    rng = np.random.default_rng(1)
    z, y, x = np.ogrid[:22, :24, :26]
    for i in range(n):
        r = sum((a - c)**2 for a, c in zip((z, y, x), rng.integers(9, 14, 3)))**.5
        label = np.where(r < 3, numbers[1], np.where(r < 6, numbers[0], 0))
        image = 100 + 80*(r < 6) + 60*(r < 3) + rng.normal(0, 12, r.shape)
        image[:2], image[:, :3], image[:, :, -4:] = 0, 0, 0
        write_image(np.round(image).astype(np.int16), GEOMETRY, folder/'imagesTr'/f'c{i}_0000.nii.gz')
        write_label_map(label, GEOMETRY, folder/'labelsTr'/f'c{i}.nii.gz')
    write_json({'modality': {'0': 'MR'}, **said, 'training': [{'image': f'./imagesTr/c{i}.nii.gz', 'label': f'./labelsTr/c{i}.nii.gz'} for i in range(n)]}, folder/'dataset.json')
    return Dataset(folder)


def make_plans(dataset, **changes):
    one = dict(patch_size=[8, 8, 8], batch_size=2, median_shape=[20, 21, 22], num_pool_per_axis=[1]*3, pool_op_kernel_sizes=[[2]*3], conv_kernel_sizes=[[3]*3]*2, do_dummy_2d_data_aug=False,
               base_num_features=2, max_num_features=320, batch_dice=False) | changes
    found = {'3d_lowres': one | dict(name='3d_lowres', spacing=[3, 2, 2]), '3d_fullres': one | dict(name='3d_fullres', spacing=[1.5, 1, 1]),
             '3d_cascade_fullres': one | dict(name='3d_cascade_fullres', spacing=[1.5, 1, 1], previous_stage='3d_lowres')}
    return Plans('Task009_Balls', 'hand', 8, ['MR'], list(dataset.labels.foreground), [1.5, 1, 1], [0, 1, 2], [0, 1, 2], ['nonCT'], [False], None, found, {})


def start(folder, n_folds=2, **how):
    "A preprocessed data set with its folds, nothing trained"
    dataset = make_raw(folder/'raw'/'Task009_Balls', **how)
    preprocess_dataset(dataset, make_plans(dataset), folder/'pre', ['3d_lowres', '3d_fullres'], n_workers=0)
    save_splits(five_folds(dataset.cases, n_folds=n_folds), folder/'pre'/'splits.json')
    return folder


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    folder = start(tmp_path_factory.mktemp('built'))
    build_cascade(folder/'pre', folder/'models', **TINY)
    return folder


@pytest.fixture
def done(built, tmp_path):
    "A finished cascade to do something to"
    return Path(shutil.copytree(built, tmp_path/'done', copy_function=shutil.copy2))


def look(folder, **how): return examine_cascade(folder/'pre', folder/'models', **how)
def build(folder, **how):
    said = []
    found = build_cascade(folder/'pre', folder/'models', **TINY | {'say': said.append} | how)
    return found, said
def not_done(found): return {s.node.name: s.status for s in found.todo}
def dataset_of(folder): return Dataset(folder/'raw'/'Task009_Balls')


# ---- the graph ------------------------------------------------------------------------------------------------------
def test_every_piece_comes_after_those_it_needs_and_second_stages_wait_for_all_maps(built):
    nodes = stages(Plans.load(built/'pre'/'plans.json'), folds=range(3))
    names = [n.name for n in nodes]
    assert len(set(names)) == len(names) == 2 + 3*3 + 3*2
    for i, node in enumerate(nodes): assert set(node.after) <= set(names[:i])
    maps = {n for n in names if n.startswith('maps')}
    for node in nodes:
        if node.step == 'train' and node.configuration == '3d_cascade_fullres': assert maps <= set(node.after)
        if node.step == 'maps': assert f'train 3d_lowres fold {node.fold}' in node.after


def test_one_fold_of_the_second_stage_needs_every_fold_of_the_first(built):
    names = [s.node.name for s in look(built, folds=[1]).states]
    assert 'maps 3d_lowres fold 0' in names and 'train 3d_cascade_fullres fold 0' not in names and 'train 3d_cascade_fullres fold 1' in names


@pytest.mark.parametrize('name', ['3d_fullres', '3d_lowres'])
def test_what_is_no_second_stage_is_refused(built, name):
    with pytest.raises(CascadeError, match='no second stage.*3d_cascade_fullres'): look(built, configuration=name)


def test_three_stages_and_strange_folds_are_refused(built):
    plans = Plans.load(built/'pre'/'plans.json')
    third = replace(plans.configuration('3d_cascade_fullres'), name='third', previous_stage='3d_cascade_fullres')
    with pytest.raises(CascadeError, match='itself a second stage'): stages(replace(plans, configurations=plans.configurations | {'third': third}), 'third')
    with pytest.raises(PlansError): stages(plans, 'nothing')
    with pytest.raises(CascadeError, match='no fold'): look(built, folds=['first'])


# ---- what is done, missing, stale -----------------------------------------------------------------------------------
def test_a_finished_cascade_is_done_and_left_alone(done):
    before = {f: f.stat().st_mtime_ns for f in done.rglob('*') if f.is_file()}
    assert not look(done, dataset=dataset_of(done)).todo
    found, said = build(done)
    assert not found.todo and said == ['0 of 12 pieces of 3d_cascade_fullres to do', 'all pieces are done']
    assert {f: f.stat().st_mtime_ns for f in done.rglob('*') if f.is_file()} == before


def test_no_case_is_shown_a_map_of_a_network_that_trained_on_it(built):
    for case, one in load_preprocessed(built/'pre'/'3d_fullres').items():
        source = one.properties['previous_source']
        state = load_checkpoint(built/'models'/'3d_lowres'/f"fold_{source['fold']}"/source['checkpoint'])
        assert case in state['val_cases'] and case not in state['train_cases'] and source['held_back']


def test_a_map_is_what_its_fold_says(built):
    low, full = (load_preprocessed(built/'pre'/name) for name in ('3d_lowres', '3d_fullres'))
    for case, one in full.items():
        predictor = Predictor.from_folder(built/'models'/'3d_lowres', folds=[one.properties['previous_source']['fold']], mirror=False, device='cpu')
        label_map, probabilities = previous_stage_maps(predictor, low[case], one)
        assert np.array_equal(label_map, one.previous) and np.allclose(probabilities.sum(0), 1, atol=1e-5)


def touch_weights(folder, configuration, fold):
    "Other weights, as another training would leave them"
    file = folder/'models'/configuration/f'fold_{fold}'/'checkpoint_final.pt'
    state = torch.load(file, weights_only=True)
    for v in state['network'].values(): v += .05*torch.randn(v.shape, generator=torch.Generator().manual_seed(3))
    torch.save(state, file)


def lost_map(f): (f/'pre'/'3d_fullres'/'c0_previous.npy').unlink()
def lost_summary(f): (f/'models'/'3d_lowres'/'fold_0'/'validation'/'summary.json').unlink()
def other_weights(f): touch_weights(f, '3d_lowres', 0)
def other_second_weights(f): touch_weights(f, '3d_cascade_fullres', 1)
def damaged_weights(f): (f/'models'/'3d_lowres'/'fold_1'/'checkpoint_final.pt').write_bytes(b'no archive')
def other_labels(f):
    file = f/'pre'/'dataset.json'
    write_json(read_json(file) | {'labels': {'background': 0, 'a new name': 1, 'core': 2, 'ignore': 3}}, file)
def lost_training(f): shutil.rmtree(f/'models'/'3d_cascade_fullres'/'fold_0')
def new_names(f):
    file = f/'pre'/'dataset.json'
    write_json(read_json(file) | {'labels': {'background': 0, 'sphere': 1, 'kernel': 2}}, file)
def lost_case(f): (f/'pre'/'3d_lowres'/'c1.json').unlink()
def new_split(f): save_splits([dict(train=['c0', 'c1'], val=['c2', 'c3']), dict(train=['c2', 'c3'], val=['c0', 'c1'])], f/'pre'/'splits.json')
def other_plan(f):
    plans = Plans.load(f/'pre'/'plans.json')
    low = replace(plans.configuration('3d_lowres'), base_num_features=3)
    replace(plans, configurations=plans.configurations | {'3d_lowres': low}).save(f/'pre'/'plans.json')
def another_label(f):
    file = f/'raw'/'Task009_Balls'/'labelsTr'/'c2.nii.gz'
    label, geometry = read_label_map(file)
    label[5:8, 5:8, 5:8] = 1
    file.unlink() # the linked copy in gt_segmentations keeps the old one
    write_label_map(label, geometry, file)


def fold_of(folder, case): return next(k for k, part in enumerate(read_json(folder/'pre'/'splits.json')) if case in part['val'])


CHANGES = {
    lost_map: ({'maps': 'missing'}, 'c0'), lost_summary: ({'validate 3d_lowres fold 0': 'missing'}, 'no summary'), other_weights: ({'maps 3d_lowres fold 0': 'stale', 'validate 3d_lowres fold 0': 'stale'}, 'other weights'),
    other_second_weights: ({'validate 3d_cascade_fullres fold 1': 'stale'}, 'other weights'), lost_training: ({'train 3d_cascade_fullres fold 0': 'missing', 'validate 3d_cascade_fullres fold 0': 'missing'}, 'not trained'),
    damaged_weights: ({'train 3d_lowres fold 1': 'stale'}, 'damaged'), other_labels: ({f'train {c} fold {k}': 'stale' for c in ('3d_lowres', '3d_cascade_fullres') for k in (0, 1)}, 'other labels'),
    lost_case: ({'preprocess 3d_lowres': 'missing'}, 'c1'), new_split: ({'train 3d_lowres fold 0': 'stale', 'train 3d_lowres fold 1': 'stale', 'train 3d_cascade_fullres fold 1': 'stale'}, 'another division'),
    other_plan: ({'train 3d_lowres fold 0': 'stale', 'train 3d_lowres fold 1': 'stale'}, 'another plan'), another_label: ({'preprocess 3d_fullres': 'stale', 'preprocess 3d_lowres': 'stale'}, 'c2')}


@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
def test_what_is_missing_or_stale_is_found_told_and_rebuilt(done, change):
    change(done)
    expected, words = CHANGES[change]
    if 'maps' in expected: expected = {f"maps 3d_lowres fold {fold_of(done, 'c0')}": 'missing'}
    dataset = dataset_of(done)
    found = look(done, dataset=dataset)
    assert expected.items() <= not_done(found).items() and words in found.explain()
    downstream = {s.node.name for s in found.states if set(s.node.after) & set(expected)}
    assert downstream <= set(not_done(found))
    after, said = build(done, dataset=dataset)
    assert not after.todo and not look(done, dataset=dataset).todo
    assert all(any(str(found[name].node) in line for line in said) for name in expected if not name.startswith('validate 3d_lowres')), said


def test_a_map_made_again_by_the_same_weights_starts_no_training(done):
    before = {f: f.stat().st_mtime_ns for f in (done/'models').rglob('checkpoint_final.pt')}
    lost_map(done)
    found, said = build(done)
    assert sum('hand the maps' in line for line in said) == 1 and not any(line.startswith('train') for line in said)
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_other_maps_start_the_second_stage_anew_and_only_it(done):
    other_weights(done)
    before = {f: f.stat().st_mtime_ns for f in (done/'models'/'3d_lowres').rglob('checkpoint_final.pt')}
    found, said = build(done)
    trained = [line for line in said if line.startswith('train')]
    assert len(trained) == 2 and all(line.startswith('train 3d_cascade_fullres') and 'maps of the first stage changed' in line for line in trained)
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_trainings_of_another_plan_are_kept_aside(done):
    other_plan(done)
    weights = (done/'models'/'3d_lowres'/'fold_0'/'checkpoint_final.pt').read_bytes()
    found, said = build(done)
    [kept] = (done/'models').glob('.3d_lowres_of_plan_*')
    assert (kept/'fold_0'/'checkpoint_final.pt').read_bytes() == weights and any(kept.name in line for line in said)


def test_damage_that_leaves_the_size_is_found_when_contents_are_read(done):
    file = done/'pre'/'3d_fullres'/'c0_previous.npy'
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not look(done).todo
    fold = fold_of(done, 'c0')
    assert look(done, verify=True)[f'maps 3d_lowres fold {fold}'].status == 'missing'
    file = done/'pre'/'3d_fullres'/'c1_data.npy'
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert look(done, verify=True)['preprocess 3d_fullres'].status == 'stale'


def test_maps_of_unknown_origin_count_and_are_told(done):
    assert preprocess_previous_stage(done/'raw'/'Task009_Balls'/'labelsTr', done/'pre', Plans.load(done/'pre'/'plans.json'), n_workers=0) == ('c0', 'c1', 'c2', 'c3')
    found = look(done)
    assert found['maps 3d_lowres fold 0'].status == 'done' and 'unknown origin' in found['maps 3d_lowres fold 0'].reason
    assert found['train 3d_cascade_fullres fold 0'].status == 'stale' and 'maps of the first stage changed' in found['train 3d_cascade_fullres fold 0'].reason


def test_a_training_without_a_note_is_judged_by_the_clock(done):
    for file in (done/'models').rglob('inputs.json'): file.unlink()
    assert not look(done).todo
    os.utime(done/'pre'/'3d_fullres'/'c0_previous.npy', (time.time() + 100,)*2)
    assert 'younger than the training' in look(done)['train 3d_cascade_fullres fold 0'].reason


# ---- stopped and going on -------------------------------------------------------------------------------------------
class StopAt:
    def __init__(self, configuration, epoch): self.at = configuration, epoch
    def on_epoch(self, t, row):
        if (t.configuration, t.epoch) == self.at: raise KeyboardInterrupt


def test_a_stopped_build_goes_on_and_ends_where_an_unbroken_one_does(tmp_path, built):
    whole, broken = (Path(shutil.copytree(built, tmp_path/name, ignore=shutil.ignore_patterns('models'))) for name in ('whole', 'broken'))
    build(whole, epochs=3)
    with pytest.raises(KeyboardInterrupt): build(broken, epochs=3, callbacks=(StopAt('3d_cascade_fullres', 2),))
    state = look(broken)['train 3d_cascade_fullres fold 0']
    assert state.status == 'begun' and 'epochs done' in state.reason and not state.reason.startswith('0')
    build(broken, epochs=3)
    for name in ('3d_lowres', '3d_cascade_fullres'):
        for fold in '01':
            a, b = (load_checkpoint(f/'models'/name/f'fold_{fold}'/'checkpoint_final.pt')['network'] for f in (whole, broken))
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_killed_it_goes_on(tmp_path):
    start(tmp_path)
    code = f'''import torch, signal, os
torch.set_num_threads(1)
from segnb.cascade import build_cascade
class Kill:
    def on_epoch(self, t, row):
        if t.configuration == '3d_lowres' and t.fold == 1 and t.epoch == 2: os.kill(os.getpid(), signal.SIGKILL)
build_cascade({str(tmp_path/'pre')!r}, {str(tmp_path/'models')!r}, epochs=3, iterations=2, val_iterations=1, n_workers=0, device='cpu', progress=False, predict=dict(mirror=False), callbacks=(Kill(),))'''
    ended = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert look(tmp_path)['train 3d_lowres fold 1'].status == 'begun'
    found, said = build(tmp_path, epochs=3)
    assert not found.todo and not any(line.startswith('train 3d_lowres, fold 0') for line in said)


def test_a_training_does_not_go_on_with_other_maps(done):
    model, pre = done/'models'/'3d_cascade_fullres', done/'pre'
    options = dict(iterations=2, val_iterations=1, n_workers=0, progress=False, device='cpu')
    preprocess_previous_stage(done/'raw'/'Task009_Balls'/'labelsTr', pre, Plans.load(pre/'plans.json'), n_workers=0)
    with pytest.raises(CascadeError, match='changed after epoch 0'): Trainer(pre, model, '3d_cascade_fullres', 0, epochs=2, callbacks=(NoteInputs(),), **options).resume()


def test_a_time_is_foretold_from_what_was_measured(done):
    shutil.rmtree(done/'models'/'3d_cascade_fullres'/'fold_1')
    said = build(done)[1]
    assert any('of training' in line or 'about' in line for line in said)


def test_a_new_name_of_a_class_trains_nothing_anew(done):
    new_names(done)
    assert not look(done).todo


# ---- what is known without a list of cases --------------------------------------------------------------------------
def test_a_description_without_a_list_of_cases_is_read_from_where_the_data_lie(tmp_path):
    dataset = make_raw(tmp_path/'raw'/'Task009_Balls')
    (tmp_path/'pre').mkdir()
    make_plans(dataset).save(tmp_path/'pre'/'plans.json')
    said = {k: v for k, v in read_json(dataset.folder/'dataset.json').items() if k != 'training'}
    write_json(said | {'source': str(dataset.folder)}, tmp_path/'pre'/'dataset.json')
    found = look(tmp_path)
    assert found['preprocess 3d_lowres'].reason.startswith('4 of 4 cases') and len(found.todo) == len(found.states)
    write_json(said, tmp_path/'pre'/'dataset.json') # nobody knows where the data lie
    assert look(tmp_path)['preprocess 3d_lowres'].status == 'missing'
    with pytest.raises(CascadeError, match='segnb preprocess DATASET -c 3d_lowres'): build(tmp_path)


def test_folds_that_are_not_there_are_refused(built):
    for wrong in (dict(folds=[7]), dict(first_folds=['2']), dict(folds=[]), dict(first_folds=[]), dict(folds=['x'])):
        with pytest.raises(CascadeError, match='no fold'): look(built, **wrong)


def test_a_first_stage_without_the_asked_fold_answers_with_all_of_its_own(done):
    models = done/'models'
    (models/'3d_cascade_fullres'/'fold_0').rename(models/'3d_cascade_fullres'/'fold_all')
    cascade = CascadePredictor.from_folder(models/'3d_cascade_fullres', folds=['all'], mirror=False, device='cpu')
    assert (len(cascade.first.networks), len(cascade.second.networks)) == (2, 1)

# ---- what is refused ------------------------------------------------------------------------------------------------
def test_missing_things_are_named_with_the_command_that_makes_them(tmp_path, built):
    with pytest.raises(CascadeError, match='segnb plan'): look(tmp_path)
    bare = Path(shutil.copytree(built, tmp_path/'bare', ignore=shutil.ignore_patterns('models', '3d_lowres')))
    with pytest.raises(CascadeError, match='segnb preprocess DATASET -c 3d_lowres'): build(bare)
    with pytest.raises(CascadeError, match='segnb train DATASET 0 -c 3d_lowres'): prepare_next_stage(bare/'pre', bare/'models'/'3d_lowres')
    half = Path(shutil.copytree(built, tmp_path/'half', ignore=shutil.ignore_patterns('fold_1')))
    with pytest.raises(CascadeError, match='segnb train DATASET 1 -c 3d_lowres'): prepare_next_stage(half/'pre', half/'models'/'3d_lowres', [0, 1])


def test_handing_on_does_only_what_is_to_be_done(done):
    how = dict(progress=False, mirror=False, device='cpu')
    model = done/'models'/'3d_lowres'
    assert prepare_next_stage(done/'pre', model, **how) == ()
    lost_map(done)
    assert prepare_next_stage(done/'pre', model, **how) == ('c0',)
    assert sorted(prepare_next_stage(done/'pre', model, overwrite=True, **how)) == ['c0', 'c1', 'c2', 'c3']
    assert sorted(prepare_next_stage(done/'pre', model, step_size=1, **how)) == ['c0', 'c1', 'c2', 'c3'] # asked in another way


def test_one_pass_of_the_network_gives_maps_and_validation(done, monkeypatch):
    shutil.rmtree(done/'models'/'3d_lowres'/'fold_0'/'validation')
    lost = [c for c in ('c0', 'c1', 'c2', 'c3') if fold_of(done, c) == 0]
    for case in lost: (done/'pre'/'3d_fullres'/f'{case}_previous.npy').unlink()
    asked, real = [], Predictor.predict_preprocessed
    monkeypatch.setattr(Predictor, 'predict_preprocessed', lambda self, *a: asked.append(1) or real(self, *a))
    monkeypatch.setattr(Predictor, 'predict_slabs', lambda *a: pytest.fail('predicted twice'))
    build(done)
    assert len(asked) == len(lost)
    expected = read_json(done/'models'/'3d_lowres'/'fold_0'/'validation'/'summary.json')
    assert sorted(expected['cases']) == sorted(lost)


# ---- folds of all cases ---------------------------------------------------------------------------------------------
def test_fold_all_builds_on_the_maps_of_the_folds(done):
    found, said = build(done, folds=['all'])
    assert not found.todo and (done/'models'/'3d_cascade_fullres'/'fold_all'/'checkpoint_final.pt').exists()
    assert not (done/'models'/'3d_lowres'/'fold_all').exists()


def test_maps_of_a_network_that_saw_all_cases_are_told_apart(done):
    found, said = build(done, folds=['all'], first_folds=['all'])
    assert 'trained on them' in found['maps 3d_lowres fold all'].reason
    again = look(done)
    assert 'made by 3d_lowres, fold all' in again['maps 3d_lowres fold 0'].reason


# ---- both stages in one call ----------------------------------------------------------------------------------------
def test_both_stages_answer_as_two_predictors_one_after_the_other(built):
    image = np.random.default_rng(0).normal(100, 40, (1, 22, 24, 26)).astype(np.float32)
    image[:, :3] = 0
    options = dict(mirror=False, device='cpu')
    cascade = CascadePredictor.from_folder(built/'models'/'3d_cascade_fullres', **options)
    first, second = (Predictor.from_folder(built/'models'/name, **options) for name in ('3d_lowres', '3d_cascade_fullres'))
    low = first.predict(image, GEOMETRY.spacing)
    high, probabilities = second.predict(image, GEOMETRY.spacing, True, previous=low)
    found = cascade.predict(image, GEOMETRY.spacing, True, return_first=True)
    for a, b in zip(found, (high, probabilities, low)): assert np.array_equal(a, b)
    assert np.array_equal(cascade.predict(image, GEOMETRY.spacing), high)
    assert cascade.made_with()['first']['configuration'] == '3d_lowres'


def test_stages_that_do_not_belong_together_are_refused(built, tmp_path):
    low, high = (Predictor.from_folder(built/'models'/name, device='cpu') for name in ('3d_lowres', '3d_cascade_fullres'))
    with pytest.raises(CascadeError, match='no second stage'): CascadePredictor(low, low)
    with pytest.raises(CascadeError, match='not the stage before'): CascadePredictor(high, high)
    alone = Path(shutil.copytree(built/'models'/'3d_cascade_fullres', tmp_path/'3d_cascade_fullres'))
    with pytest.raises(CascadeError, match='segnb train DATASET 0 -c 3d_lowres'): CascadePredictor.from_folder(alone)
    with pytest.raises(CascadeError, match='not a trained model'): CascadePredictor.from_folder(tmp_path)
    with pytest.raises(CascadeError, match='no second stage'): CascadePredictor.from_folder(built/'models'/'3d_lowres')


def test_a_case_that_fails_is_named_and_the_others_are_predicted(built, tmp_path):
    source = Path(shutil.copytree(built/'raw'/'Task009_Balls'/'imagesTr', tmp_path/'in'))
    (source/'c1_0000.nii.gz').write_bytes((source/'c1_0000.nii.gz').read_bytes()[:500])
    cascade = CascadePredictor.from_folder(built/'models'/'3d_cascade_fullres', mirror=False, device='cpu')
    with pytest.raises(PredictionError, match='1 of 4 cases failed') as told: cascade.predict_folder(source, tmp_path/'out', progress=False)
    assert list(told.value.failed) == ['c1'] and [f.name for f in told.value.written] == ['c0.nii.gz', 'c2.nii.gz', 'c3.nii.gz']
    parts = [f.name for k in (0, 1) for f in cascade.predict_folder(built/'raw'/'Task009_Balls'/'imagesTr', tmp_path/f'part_{k}', progress=False, part_id=k, num_parts=2)]
    assert sorted(parts) == [f'c{i}.nii.gz' for i in range(4)]


@pytest.mark.parametrize('said, numbers', [({'labels': {'background': 0, 'ball': 5, 'core': 9}}, (5, 9)), ({'labels': {'background': 0, 'ball': [1, 2], 'core': 2}, 'regions_class_order': [1, 2]}, (1, 2))],
                         ids=['numbers 5 and 9', 'regions'])
def test_other_numbers_and_regions_pass_through_both_stages(tmp_path, said, numbers):
    folder = start(tmp_path, said=said, numbers=numbers)
    build(folder, folds=[0])
    for one in load_preprocessed(folder/'pre'/'3d_fullres').values(): assert set(np.unique(one.previous)) <= {0, 1, 2}
    files = CascadePredictor.from_folder(folder/'models'/'3d_cascade_fullres', folds=[0], mirror=False, device='cpu').predict_folder(folder/'raw'/'Task009_Balls'/'imagesTr', folder/'out', progress=False)
    for file in files: assert set(np.unique(read_label_map(file)[0])) <= {0, *numbers}
