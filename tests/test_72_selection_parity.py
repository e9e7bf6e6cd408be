"""Which candidate is chosen, beside nnU-Net 1.7.1 (recorded by tests/record/72_selection.py); laws, refusals, what is missing."""
import json, os
from pathlib import Path

import numpy as np
import pytest

from segnb import selection
from segnb.image import SegnbError
from segnb.selection import Selection, SelectionError, choose, dice_table, find_best_configuration, foreground_dice, how_sure, select

TASKS = json.loads((Path(__file__).parent/'recorded'/'72_selection.json').read_text())['tasks']


def results_of(dice):
    "Candidates as `evaluate_folder` would give them, from {name: Dice (cases, classes)}; with a background that must not count"
    return {name: {'cases': {f'case_{i}': {0: {'dice': .99}} | {k + 1: {'dice': d} for k, d in enumerate(row)} for i, row in enumerate(table)}} for name, table in dice.items()}


@pytest.mark.parametrize('task', TASKS, ids=[t['name'] for t in TASKS])
def test_as_the_original(task):
    n_classes = len(next(iter(task['dice'].values()))[0])
    if 'error' in task and n_classes == 1:
        with pytest.raises(SelectionError, match='no candidate has a score'): select(results_of(task['dice']))
        return
    chosen = select(results_of(task['dice']), n_draws=20)
    assert [c.name for c in chosen.candidates] == list(task['dice'])
    if 'error' in task: # a class that no case has: the original stops, here it is left out
        assert all(np.isnan(c.classes[max(c.classes)]) for c in chosen.candidates)
        assert chosen.best.dice == pytest.approx(np.mean([v for v in chosen.best.classes.values() if not np.isnan(v)]), abs=1e-12)
        return
    assert {c.name: c.dice for c in chosen.candidates} == pytest.approx(task['scores'], abs=1e-15)
    assert chosen.chosen == task['chosen']


def test_the_record_holds_every_kind():
    known = [t for t in TASKS if 'chosen' in t]
    assert sum(len(t['named']) > 1 for t in known) >= 5 and len(known) >= 30 and len(known) < len(TASKS)
    assert {len(t['dice']) for t in known} >= {1, 3, 6, 10} and any('+' in t['chosen'] for t in known)


# ---- laws ----

@pytest.mark.parametrize('seed', range(15))
def test_order_of_cases_and_files_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    n, k = rng.integers(1, 9, 2)
    dice = {name: np.where(rng.random((n, k)) < .2, np.nan, rng.random((n, k))) for name in ('2d', '3d_fullres', '2d+3d_fullres')}
    if all(np.isnan(d).all() for d in dice.values()): return
    given = results_of(dice)
    shuffled = {name: {'cases': {c: dict(reversed(r['cases'][c].items())) for c in rng.permutation(list(r['cases']))}} for name, r in given.items()}
    one, other = select(given, n_draws=50), select(json.loads(json.dumps(shuffled)), n_draws=50)
    assert one.table() == other.table() and one.chosen == other.chosen and json.dumps(one.difference) == json.dumps(other.difference)
    assert sum(c.wins for c in one.candidates) == pytest.approx(1)


@pytest.mark.parametrize('seed', range(5))
def test_draws_are_means_of_drawn_cases(seed):
    rng = np.random.default_rng(seed)
    dice = np.where(rng.random((12, 3)) < .3, np.nan, rng.random((12, 3)))
    drawn = rng.integers(0, 12, (30, 12))
    weights = np.stack([np.bincount(row, minlength=12) for row in drawn])
    np.testing.assert_allclose(foreground_dice(dice, weights), [foreground_dice(dice[row]) for row in drawn], rtol=1e-12)


def test_an_interval_narrows_with_the_cases_and_holds_the_mean():
    rng, widths = np.random.default_rng(1), []
    for n in (10, 100, 1000):
        dice = rng.beta(8, 2, (n, 1))
        low, high = how_sure({'one': dice})['one']['interval']
        assert low < dice.mean() < high
        widths.append(high - low)
    assert widths[0] > 2*widths[1] > 4*widths[2]
    spread = dice.std()/np.sqrt(1000)
    assert widths[2] == pytest.approx(2*1.96*spread, rel=.1)


def test_a_difference_that_all_share_is_none():
    "The same draws for all: what is hard for every candidate does not blur their difference"
    rng = np.random.default_rng(0)
    hard = rng.beta(4, 2, (30, 1))
    chosen = select(results_of({'a': hard - .01, 'b': hard}))
    assert chosen.chosen == 'b' and chosen.best.wins == 1
    assert chosen.difference['interval'] == pytest.approx([.01, .01]) and np.ptp(chosen.best.interval) > .05


@pytest.mark.parametrize('scores, name', [({'a': 1, 'b': 1, 'c': 0}, 'b'), ({'a': float('nan'), 'b': 0.}, 'b'), ({'a': 0., 'b': None}, 'a'), ({'only': .3}, 'only')])
def test_of_equals_the_last(scores, name): assert choose(scores) == name


@pytest.mark.parametrize('scores', [{}, {'a': None}, {'a': float('nan'), 'b': float('nan')}])
def test_nothing_to_choose_from(scores):
    with pytest.raises(SelectionError, match='no candidate has a score'): choose(scores)


# ---- words and commands ----

def made_up(**changes):
    rng = np.random.default_rng(4)
    hard = rng.beta(8, 2, (20, 2))
    dice = {'2d': hard - .05, '3d_fullres': hard, '2d+3d_fullres': hard + rng.normal(.001, .02, (20, 2))}
    return select(results_of(dice), **{'labels': {1: 'organ', 2: 'lesion'}, 'folds': (0, 1), **changes})


def test_words_say_what_is_known(tmp_path):
    chosen = made_up(models=tmp_path, postprocessed={'2d+3d_fullres': .9}, left_out={'3d_lowres': 'fold 3 not trained to the end'})
    text = chosen.explain()
    for words in (f'{chosen.chosen} is chosen', '20 cases of 2 folds', 'highest of 3 candidates', 'the next best', 'of the draws', '3d_lowres was left out: fold 3'): assert words in text
    lines = chosen.table().splitlines()
    assert lines[0].split()[0] == 'candidate' and lines[0].split()[-2:] == ['organ', 'lesion'] and sum(line.startswith('->') for line in lines) == 1
    assert len({*map(len, lines[2:])}) == 1
    chosen.save()
    assert Selection.load(tmp_path) == chosen and Selection.load(tmp_path/'selection.json').explain() == text
    assert json.loads((tmp_path/'selection.json').read_text())['commands'] == chosen.commands()


def test_a_choice_without_rivals_says_so():
    text = select(results_of({'2d': np.ones((3, 1))})).explain()
    assert 'the only candidate' in text and 'next best' not in text and 'too good' not in text


def test_equal_scores_are_called_equal():
    same = select(results_of({'2d': np.ones((3, 1)), '3d_fullres': np.ones((3, 1))}))
    assert same.chosen == '3d_fullres' and '2d is exactly as good' in same.explain() and 'do not tell the two apart' in same.explain()


def test_one_case_has_no_interval():
    one = select(results_of({'2d': np.full((1, 2), .5), '3d_fullres': np.full((1, 2), .6)}))
    assert np.isnan(one.best.interval).all() and 'drawn again' not in one.explain() and 'nan' not in one.explain() + one.table() and '- to -' in one.table()


@pytest.mark.parametrize('name, n, words', [('2d', 1, []), ('2d+3d_fullres', 3, ['ensemble']), ('3d_cascade_fullres', 2, ['--previous OUT/3d_lowres']),
                                            ('3d_fullres+3d_cascade_fullres', 4, ['--previous OUT/3d_lowres', 'ensemble OUT/3d_fullres OUT/3d_cascade_fullres']),
                                            ('3d_lowres+3d_cascade_fullres', 3, ['--previous OUT/3d_lowres', 'ensemble OUT/3d_lowres'])])
def test_commands(name, n, words):
    chosen = select(results_of({name: np.ones((2, 1))}), models='m', previous={'3d_cascade_fullres': '3d_lowres'})
    lines = chosen.commands('IN', 'OUT')
    assert len(lines) == n and all(w in '\n'.join(lines) for w in words)
    assert all(line.startswith('segnb predict -i IN -o OUT') for line in lines if 'ensemble' not in line.split()[:2])


def test_commands_name_the_folds_where_more_are_trained(tmp_path):
    for fold in (0, 1, 2, 'all'): (tmp_path/'2d'/f'fold_{fold}').mkdir(parents=True), (tmp_path/'2d'/f'fold_{fold}'/'checkpoint_final.pt').touch()
    one = results_of({'2d': np.ones((2, 1))})
    assert select(one, models=tmp_path, folds=(0, 1)).commands()[0].endswith('-f 0 1') and '-f' not in select(one, models=tmp_path, folds=(0, 1, 2)).commands()[0]


def test_a_folder_with_a_blank_in_its_name_is_quoted(tmp_path):
    assert "'my images'" in select(results_of({'2d': np.ones((2, 1))})).commands('my images')[0]


@pytest.mark.parametrize('text', ['{}', '[]', '{"chosen": "2d"}', '{"chosen": "2d", "candidates": [1]}'])
def test_files_that_hold_no_choice(tmp_path, text):
    (tmp_path/'selection.json').write_text(text)
    with pytest.raises(SelectionError, match='not a selection'): Selection.load(tmp_path)


def test_a_post_processing_from_elsewhere_has_no_score():
    assert selection._after(selection.Postprocessing((1,))) is None
    assert selection._after(selection.Postprocessing((1,), scores={'raw': {1: .5}})) is None
    one = select(results_of({'2d': np.ones((1, 1))}), postprocessed={'2d': None})
    assert 'After its' not in one.explain() and 'over 1 case,' in one.explain()


# ---- folders ----

FOLDS = (0, 1)


def write_model(folder, name, folds=FOLDS, cases=2, probabilities=True):
    "The folders that a trained and validated configuration leaves, with hardly anything in them"
    for fold in folds:
        said = folder/name/f'fold_{fold}'/'validation'
        said.mkdir(parents=True)
        (folder/name/'plans.json').write_text('{}')
        (said.parent/'checkpoint_final.pt').touch()
        mine = [f'case_{fold}{i}' for i in range(cases)]
        for i, case in enumerate(mine):
            for ending in ('.nii.gz', '.npz')[:1 + probabilities]:
                (said/f'{case}{ending}').touch()
                os.utime(said/f'{case}{ending}', (10*i, 10*i))
        (said/'summary.json').write_text(json.dumps({'cases': {c: {'1': {'dice': .5}} for c in mine}}))


def test_what_is_complete_is_found_in_the_order_of_the_original(tmp_path):
    for name in ('own_kind', '3d_cascade_fullres', '3d_fullres', '2d'): write_model(tmp_path, name)
    write_model(tmp_path, '3d_lowres', folds=(0,))
    (tmp_path/'ensembles').mkdir()
    found, left_out = selection._find_configurations(tmp_path, None, FOLDS)
    assert found == ['2d', '3d_fullres', '3d_cascade_fullres', 'own_kind'] and left_out == {'3d_lowres': 'fold 1 not trained to the end'}
    assert selection._find_configurations(tmp_path, ('3d_fullres', '2d'), FOLDS)[0] == ['3d_fullres', '2d'] # the order that was asked for decides ties
    with pytest.raises(SelectionError, match='3d_lowres: fold 1 not trained'): selection._find_configurations(tmp_path, ['2d', '3d_lowres'], FOLDS)
    with pytest.raises(SelectionError, match='fold 7, 8'): selection._find_configurations(tmp_path, None, (0, 7, 8))


def test_what_is_missing_is_found(tmp_path):
    write_model(tmp_path, '2d')
    model = tmp_path/'2d'
    assert selection._missing(model, FOLDS, True) == {}
    (model/'fold_0'/'validation'/'case_01.npz').unlink()
    assert selection._missing(model, FOLDS, True) == {0: ['case_01']} and selection._missing(model, FOLDS, False) == {}
    (model/'fold_1'/'validation'/'case_10.nii.gz').unlink()
    assert selection._missing(model, FOLDS, False) == {1: ['case_10']}
    (model/'fold_0'/'checkpoint_final.pt').touch() # trained longer since, perhaps
    os.utime(model/'fold_0'/'validation'/'summary.json', (1, 1))
    read = selection.load_checkpoint
    selection.load_checkpoint = lambda file: {'val_cases': ['case_00', 'case_01', 'case_02']}
    try: assert selection._missing(model, (0,), False) == {0: ['case_02']}
    finally: selection.load_checkpoint = read


def test_the_time_is_that_of_the_last_time(tmp_path):
    write_model(tmp_path, '2d', cases=4)
    assert selection._seconds_a_case(tmp_path/'2d') == 10
    write_model(tmp_path, '3d_fullres', cases=1)
    assert selection._seconds_a_case(tmp_path/'3d_fullres') is None


def test_missing_answers_are_announced_before_the_first_prediction_and_asked_as_before(tmp_path, monkeypatch):
    write_model(tmp_path, '2d', cases=3, probabilities=False)
    write_model(tmp_path, '3d_fullres', cases=3)
    made = {'step_size': .7, 'precision': 'fp32', 'mirror_axes': [0, 2], 'whole_image': False, 'export_order': 3, 'weights': 'abc'}
    (tmp_path/'2d'/'fold_0'/'validation'/'made_with.json').write_text(json.dumps(made))
    said, asked = [], []
    def validate(model, fold, preprocessed, **how):
        asked.append((len(said), model.name, fold, how))
        for file in (model/f'fold_{fold}'/'validation').glob('*.nii.gz'): file.unlink(), file.write_text('new')
    monkeypatch.setattr(selection, 'validate_fold', validate)
    done = selection._predict_missing(tmp_path, tmp_path, ['2d', '3d_fullres'], FOLDS, True, said.append, {'device': 'cpu'})
    assert done == {'2d': 6} and len(said) == 1 and '6 cases of fold 0, 1' in said[0] and 'about 60 s at 10.0 s a case' in said[0]
    assert [a[:3] for a in asked] == [(1, '2d', 0), (1, '2d', 1)]
    assert asked[0][3] == dict(save_probabilities=True, overwrite=False, step_size=.7, precision='fp32', mirror=(0, 2), whole_image=False, export_order=3, device='cpu')
    assert asked[1][3] == dict(save_probabilities=True, overwrite=False, device='cpu')


def test_scores_that_are_older_than_the_network_are_made_anew(tmp_path, monkeypatch):
    write_model(tmp_path, '2d')
    os.utime(tmp_path/'2d'/'fold_1'/'validation'/'summary.json', (1, 1))
    monkeypatch.setattr(selection, 'load_checkpoint', lambda file: {'val_cases': ['case_10', 'case_11']})
    monkeypatch.setattr(selection, 'validate_fold', lambda *_, **__: None)
    said = []
    assert selection._predict_missing(tmp_path, tmp_path, ['2d'], FOLDS, True, said.append, {}) == {'2d': 0} # the answers were this network's
    assert said == ['2d: fold 1 is scored again: the network is newer than its scores']
    monkeypatch.setattr(selection, 'validate_fold', lambda model, fold, *_, **__: (model/f'fold_{fold}'/'validation'/'case_10.nii.gz').write_text('another answer'))
    assert selection._predict_missing(tmp_path, tmp_path, ['2d'], FOLDS, True, said.append, {}) == {'2d': 1} # what was written is counted


def test_models_of_different_labels_are_refused_before_anything_is_predicted(tmp_path):
    for name, labels in (('2d', {'0': 'background', '7': 'a', '9': 'b'}), ('3d_fullres', {'0': 'background', '7': 'a'}), ('own', {'0': 'background', '7': 'a', '9': 'b'})):
        write_model(tmp_path, name, probabilities=False)
        (tmp_path/name/'dataset.json').write_text(json.dumps({'labels': labels}))
    (tmp_path/'splits.json').write_text(json.dumps([{'train': ['b'], 'val': ['a']}, {'train': ['a'], 'val': ['b']}]))
    with pytest.raises(SelectionError, match='different labels'): find_best_configuration(tmp_path, tmp_path, progress=False)
    assert selection._one_set_of_labels(tmp_path, ['2d', 'own']).foreground == (1, 2)


def test_folds_that_do_not_belong_together(tmp_path):
    write_model(tmp_path, '2d')
    assert len(selection._pool(tmp_path, '2d', FOLDS)['cases']) == 4
    file = tmp_path/'2d'/'fold_1'/'validation'/'summary.json'
    file.write_text((tmp_path/'2d'/'fold_0'/'validation'/'summary.json').read_text())
    with pytest.raises(SelectionError, match='case_00.*held back by two folds'): selection._pool(tmp_path, '2d', FOLDS)
    with pytest.raises(SelectionError, match='case_10.*2 cases of 2d or 3d_fullres'):
        selection._same_cases({'2d': {'cases': {'a': 1}}, '3d_fullres': {'cases': {'a': 1, 'case_10': 1, 'case_11': 1}}})


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path/'models').write_text('a file')
    with pytest.raises(SegnbError, match='models'): find_best_configuration(tmp_path/'models', tmp_path)
