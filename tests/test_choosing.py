"""From images to a choice, in Python: five folds of two configurations trained for a moment, validated, pooled, averaged, selected."""
import dataclasses, shlex, shutil
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files, tiny_task

from segnb import selection as module
from segnb.dataset import Dataset
from segnb.ensembling import ensemble_probabilities
from segnb.fingerprint import extract_fingerprint
from segnb.image import read_label_map
from segnb.metrics import evaluate_case
from segnb.planning import plan_experiment
from segnb.postprocessing import Postprocessing, determine_postprocessing
from segnb.prediction import Predictor
from segnb.preprocessing import preprocess_dataset
from segnb.selection import Selection, SelectionError, find_best_configuration
from segnb.training import Trainer
from segnb.validation import validate_fold
from segnb.workers import read_json

QUIET = dict(device='cpu', n_workers=0, progress=False)
FAST = dict(mirror=False, step_size=1)  # how the networks are asked


def small(plans):
    "A 2D and a 3D network of two features; 3D sees coarser voxels, so that the two answer on different grids"
    common = dict(do_dummy_2d_data_aug=False, base_num_features=2, batch_size=2)
    flat = dataclasses.replace(plans.configuration('2d'), **common, spacing=(10, 2.4, 2.4), median_shape=(16, 39, 40), patch_size=(32, 32), num_pool_per_axis=(2, 2),
                               pool_op_kernel_sizes=((2, 2),)*2, conv_kernel_sizes=((3, 3),)*3)
    deep = dataclasses.replace(plans.configuration('3d_fullres'), **common, spacing=(10, 4.8, 4.8), median_shape=(16, 20, 20), patch_size=(8, 16, 16), num_pool_per_axis=(1, 1, 1),
                               pool_op_kernel_sizes=((2, 2, 2),), conv_kernel_sizes=((3, 3, 3),)*2)
    return dataclasses.replace(plans, configurations={'2d': flat, '3d_fullres': deep})


@pytest.fixture(scope='module')
def chosen(tmp_path_factory):
    "Six cases that lie obliquely; nothing is validated before, but one fold of 3D without probabilities"
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp('choosing')
    raw = Dataset(tiny_task('Task101_PhantomCT', base/'Task201_TinyCT', (2, 3, 3), n_train=6, n_test=1))
    plans = small(plan_experiment(extract_fingerprint(raw, n_workers=0), planner='cpu', dataset_name=raw.name))
    preprocessed, models = base/'preprocessed', base/'models'/raw.name
    preprocess_dataset(raw, plans, preprocessed, configurations=list(plans.configurations), n_workers=0)
    for name, fold in ((n, f) for n in plans.configurations for f in range(5)):
        Trainer(preprocessed, models/name, name, fold, epochs=1, iterations=6, val_iterations=1, initial_lr=.1, momentum=.9, augmentation='none', **QUIET).fit()
    validate_fold(models/'3d_fullres', 0, preprocessed, **FAST, **QUIET)
    known = (models/'3d_fullres'/'fold_0'/'validation'/'summary.json').read_bytes()
    selection = find_best_configuration(models, preprocessed, **QUIET, **FAST)
    return SimpleNamespace(base=base, raw=raw, preprocessed=preprocessed, models=models, known=known, selection=selection)


def scored(chosen, file_of):
    "Mean foreground Dice by hand: over cases, then over classes"
    labels = sorted(chosen.selection.labels)
    dice = np.array([[s['dice'] for s in evaluate_case(read_label_map(chosen.raw.label_file(c))[0], read_label_map(file_of(c))[0], labels).values()] for c in chosen.raw.cases])
    return np.nanmean(np.nanmean(dice, 0))


def validated(chosen, name, case): return next((chosen.models/name).glob(f'fold_*/validation/{case}.nii.gz'))


def test_every_case_was_predicted_once_by_each(chosen):
    assert set(chosen.selection.cases) == set(chosen.raw.cases) and chosen.selection.folds == (0, 1, 2, 3, 4)
    for name in ('2d', '3d_fullres'):
        found = files(chosen.models/name)
        assert len([f for f in found if f.endswith('.nii.gz')]) == len([f for f in found if f.endswith('.npz')]) == 6
        assert {'cross_validation.json', 'postprocessing.json'} <= found
    assert chosen.selection.predicted == {'2d': 6, '3d_fullres': 6}
    assert {f'{c}.nii.gz' for c in chosen.raw.cases} | {'summary.json', 'postprocessing.json'} <= files(chosen.models/'ensembles'/'2d+3d_fullres')


def test_every_score_can_be_found_again_in_the_files(chosen):
    two, three, pair = chosen.selection.candidates
    assert (two.name, three.name, pair.name) == ('2d', '3d_fullres', '2d+3d_fullres')
    for c in (two, three): assert c.dice == pytest.approx(scored(chosen, lambda case: validated(chosen, c.name, case)), abs=1e-12)
    assert pair.dice == pytest.approx(scored(chosen, lambda case: chosen.models/'ensembles'/pair.name/f'{case}.nii.gz'), abs=1e-12)
    assert chosen.selection.best.dice == max(c.dice for c in chosen.selection.candidates)
    assert len({c.dice for c in chosen.selection.candidates}) > 1


def test_postprocessing_is_that_of_its_candidate(chosen):
    truth = chosen.preprocessed/'gt_segmentations'
    for c in chosen.selection.candidates:
        folder = chosen.models/c.folder
        told = Postprocessing.load(folder/'postprocessing.json')
        source = {case: validated(chosen, c.name, case) for case in chosen.raw.cases} if len(c.configurations) == 1 else folder
        again = determine_postprocessing(source, truth, chosen.raw.labels, n_workers=0, progress=False)
        assert told.which == again.which and c.postprocessed == pytest.approx(np.nanmean(list(again.scores['final'].values())))
        assert c.postprocessed >= c.dice - 1e-12


def test_the_choice_is_written_and_read_back(chosen):
    assert Selection.load(chosen.models) == chosen.selection
    assert read_json(chosen.models/'selection.json')['chosen'] == chosen.selection.chosen in chosen.selection.explain()


def test_asked_again_nothing_is_done_twice(chosen):
    def stamps(): return {f: f.stat().st_mtime_ns for f in chosen.models.rglob('*') if f.suffix in ('.gz', '.npz') or f.name in ('cross_validation.json', 'postprocessing.json') and 'ensembles' not in f.parts}
    before = stamps()
    again = find_best_configuration(chosen.models, chosen.preprocessed, **QUIET)
    assert stamps() == before and again.predicted == {} and again.candidates == chosen.selection.candidates and again.difference == chosen.selection.difference


@pytest.fixture
def copy(chosen, tmp_path): return SimpleNamespace(**{**vars(chosen), 'models': shutil.copytree(chosen.models, tmp_path/'models')})


def test_probabilities_that_are_lost_are_made_again_with_the_same_answer(copy, capsys):
    for file in (copy.models/'2d').glob('fold_[13]/validation/*.npz'): file.unlink()
    maps = {f: f.read_bytes() for f in (copy.models/'2d').glob('fold_*/validation/*.nii.gz')}
    again = find_best_configuration(copy.models, copy.preprocessed, **QUIET | dict(progress='always'))
    said = capsys.readouterr().err
    assert '2d: 2 cases of fold 1, 3 have no probabilities' in said and '3d_fullres' not in said.split('now')[0]
    assert again.predicted == {'2d': 2} and again.candidates == copy.selection.candidates # mirroring and step as in made_with.json, not the defaults
    assert all(read_label_map(f)[0].tobytes() and f.read_bytes() == whole for f, whole in maps.items())


def test_a_network_that_changed_is_asked_again_and_its_pair_made_anew(copy):
    file = copy.models/'3d_fullres'/'fold_2'/'checkpoint_final.pt'
    state = torch.load(file, weights_only=True)
    state['network'] = {k: v + .05*torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in state['network'].items()}
    torch.save(state, file)
    before = {f.name: f.stat().st_mtime_ns for f in (copy.models/'ensembles'/'2d+3d_fullres').glob('*.nii.gz')}
    again = find_best_configuration(copy.models, copy.preprocessed, **QUIET)
    one, other = ({c.name: c.dice for c in s.candidates} for s in (copy.selection, again))
    assert one['2d'] == other['2d'] and one['3d_fullres'] != other['3d_fullres']
    held_back = read_json(file.parent/'validation'/'summary.json')['cases']
    assert again.predicted == {'3d_fullres': len(held_back)} # those that had an answer of the other network
    after = {f.name: f.stat().st_mtime_ns for f in (copy.models/'ensembles'/'2d+3d_fullres').glob('*.nii.gz')}
    assert all(after[f'{c}.nii.gz'] != before[f'{c}.nii.gz'] for c in held_back)
    cases = copy.selection.cases
    assert read_json(copy.models/'3d_fullres'/'cross_validation.json')['cases'].keys() == set(cases)


def test_some_folds_and_single_ones(copy):
    half = find_best_configuration(copy.models, copy.preprocessed, folds=(1, 3), **QUIET)
    assert half.folds == (1, 3) and len(half.cases) == 2 and len(half.candidates) == 3 and '-f 1 3' in half.commands()[0]
    alone = find_best_configuration(copy.models, copy.preprocessed, ['3d_fullres'], ensembling=False, postprocessing=False, **QUIET)
    assert alone.chosen == '3d_fullres' and alone.best.postprocessed is None and alone.difference is None


def test_a_fold_that_is_not_trained(copy):
    shutil.rmtree(copy.models/'2d'/'fold_4')
    left = find_best_configuration(copy.models, copy.preprocessed, **QUIET)
    assert left.chosen == '3d_fullres' and left.left_out == {'2d': 'fold 4 not trained to the end'} and '2d was left out' in left.explain()
    with pytest.raises(SelectionError, match='2d: fold 4 not trained'): find_best_configuration(copy.models, copy.preprocessed, ['2d', '3d_fullres'], **QUIET)


def test_cut_off_while_predicting_it_goes_on(copy, monkeypatch):
    for file in (copy.models/'3d_fullres').glob('fold_[012]/validation/*.npz'): file.unlink()
    (copy.models/'selection.json').unlink()
    validate, asked = module.validate_fold, []
    def cut(model, fold, *args, **how):
        if fold == 1: raise KeyboardInterrupt
        return validate(model, fold, *args, **how)
    monkeypatch.setattr(module, 'validate_fold', cut)
    with pytest.raises(KeyboardInterrupt): find_best_configuration(copy.models, copy.preprocessed, **QUIET)
    assert not (copy.models/'selection.json').exists()
    monkeypatch.setattr(module, 'validate_fold', lambda model, fold, *args, **how: (asked.append(fold), validate(model, fold, *args, **how)))
    assert find_best_configuration(copy.models, copy.preprocessed, **QUIET).candidates == copy.selection.candidates and asked == [1, 2]


def test_new_images_by_the_commands_and_by_hand(chosen, tmp_path, segnb):
    "The commands of a pair, run one after the other, give what the functions give"
    pair = dataclasses.replace(chosen.selection, chosen='2d+3d_fullres')
    lines = [shlex.split(line) for line in pair.commands(chosen.raw.folder/'imagesTs', tmp_path/'said')]
    assert len(lines) == 3 and all(words[0] == 'segnb' for words in lines)
    for words in lines:
        done = segnb(*words[1:], *(['--device', 'cpu', '-q'] if words[1] == 'predict' else ['-q']))
        assert done.returncode == 0, done.stderr
    for name in ('2d', '3d_fullres'):
        Predictor.from_folder(chosen.models/name, device='cpu').predict_folder(chosen.raw.folder/'imagesTs', tmp_path/name, save_probabilities=True, progress=False)
    ensemble_probabilities([tmp_path/'2d', tmp_path/'3d_fullres'], tmp_path/'mean', labels=chosen.raw.labels, n_workers=0, progress=False,
                           postprocessing=chosen.models/'ensembles'/'2d+3d_fullres'/'postprocessing.json')
    for case in chosen.raw.test_cases:
        by_command, grid = read_label_map(tmp_path/'said'/'ensemble'/f'{case}.nii.gz')
        by_hand, other = read_label_map(tmp_path/'mean'/f'{case}.nii.gz')
        assert not grid.differences(other) and (by_command == by_hand).all()
