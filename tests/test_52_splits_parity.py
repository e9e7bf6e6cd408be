"""Folds beside those of nnU-Net 1.7.1 (recorded by tests/record/52_splits.py), and laws on random names."""
import json, os, pickle, shlex, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from segnb.dataset import Dataset
from segnb.splits import (SplitError, adopt_splits, check_splits, class_balance, class_presence, five_folds, load_splits, propose_splits, random_split, save_splits,
                          split_findings, split_for_fold)

TASKS = json.loads((Path(__file__).parent/'recorded'/'52_splits.json').read_text())['tasks']


@pytest.mark.parametrize('task', TASKS)
def test_as_the_original(task):
    cases = [TASKS[task]['names'].format(i) for i in range(TASKS[task]['n'])]
    number = {c: i for i, c in enumerate(sorted(cases))}
    folds = five_folds(cases[::-1])
    for fold, lists in TASKS[task]['folds'].items():
        train, val = split_for_fold(folds, cases[::-1], fold if fold == 'all' else int(fold))
        assert [number[c] for c in train] == lists['train'] and [number[c] for c in val] == lists['val'], f'fold {fold}'


@pytest.mark.parametrize('seed', range(20))
def test_every_case_is_held_back_once(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 80)), int(rng.integers(2, 12))
    cases = [f'{v:x}' for v in rng.choice(10**6, n, replace=False)]
    if n < k:
        with pytest.raises(SplitError, match=f'{n} cases cannot make {k} folds: at most {n}'): five_folds(cases, n_folds=k)
        return
    folds = five_folds(cases, n_folds=k)
    assert len(folds) == k and sorted(c for f in folds for c in f['val']) == sorted(cases)
    assert all(sorted(f['train'] + f['val']) == sorted(cases) for f in folds)
    assert np.ptp([len(f['val']) for f in folds]) <= 1
    check_splits(folds)
    train, val = random_split(cases, k + seed)
    assert sorted(train + val) == sorted(cases) and len(train) == int(.8 * n)


def test_global_randomness_is_left_alone():
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    five_folds('abcdefg')
    random_split('abcdefg', 9)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize('fold', [-1, 'every', '-1', 1.5, None, True])
def test_folds_that_do_not_exist(fold):
    with pytest.raises(SplitError, match='folds 0 to 4'): split_for_fold(five_folds('abcdef'), 'abcdef', fold)


def test_numbers_as_text():
    assert split_for_fold(five_folds('abcdef'), 'abcdef', '3') == split_for_fold(five_folds('abcdef'), 'abcdef', 3)


@pytest.mark.parametrize('text, problem', [('[]', 'list of folds'), ('{"train": []}', 'list of folds'), ('[{"train": ["a"]}]', 'fold 0'),
                                           ('[{"train": ["a"], "val": "b"}]', 'fold 0'), ('[{"train": ["a"], "val": ["a", "b"]}]', 'a in both'),
                                           ('[{"train": [], "val": ["a"]}]', "'train' lists no case"), ('[{"train"', 'not valid JSON')])
def test_split_files_that_people_may_write(tmp_path, text, problem):
    (tmp_path/'splits.json').write_text(text)
    with pytest.raises(ValueError, match=problem) as error: load_splits(tmp_path/'splits.json')
    assert 'splits.json' in str(error.value)


def test_file_and_back(tmp_path):
    save_splits(five_folds('abcdefg'), tmp_path/'splits.json')
    assert load_splits(tmp_path/'splits.json') == five_folds('abcdefg')


# ---- patients, classes, files of one's own ----

def study(seed):
    "Random cases, their patients, and the classes in them"
    rng = np.random.default_rng(seed)
    cases = [f'{v:05d}' for v in rng.choice(10**5, int(rng.integers(10, 150)), replace=False)]
    patients = {c: f'p{rng.integers(len(cases) // 2 + 1)}' for c in cases}
    chance = rng.random(int(rng.integers(1, 8)))**2
    return cases, patients, {c: {k for k, p in enumerate(chance) if rng.random() < p} for c in cases}


@pytest.mark.parametrize('seed', range(25))
@pytest.mark.parametrize('grouped, stratified', [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_laws_of_proposed_folds(seed, grouped, stratified):
    cases, patients, presence = study(seed)
    said = dict(groups=patients if grouped else None, presence=presence if stratified else None)
    splits = propose_splits(cases, **said)
    assert sorted(c for f in splits for c in f['val']) == sorted(cases)
    assert all(f['train'] == sorted(set(cases) - set(f['val'])) for f in splits)
    assert propose_splits(cases[::-1], **said) == splits and propose_splits(cases, seed=1, **said) != splits
    assert splits.method == {(0, 0): 'shuffled', (0, 1): 'by class', (1, 0): 'by patient', (1, 1): 'by patient and class'}[grouped, stratified] and splits.reason
    if grouped: assert not split_findings(splits, groups=patients)
    else: assert np.ptp([len(f['val']) for f in splits]) <= 1
    if not grouped and not stratified: assert splits == five_folds(cases)


def test_classes_are_spread_better_than_by_chance():
    spread = lambda splits, presence: max(np.ptp(counts) for counts in class_balance(splits, presence).values())
    ours, chance = zip(*[(spread(propose_splits(c, presence=p), p), spread(five_folds(c), p)) for c, _, p in map(study, range(40)) if any(p.values())])
    assert np.mean(ours) < .5*np.mean(chance) and all(a <= b for a, b in zip(ours, chance))


def test_patients_fill_the_folds_evenly():
    for seed in range(20):
        cases, patients, _ = study(seed)
        largest = max(list(patients.values()).count(p) for p in patients.values())
        assert np.ptp([len(f['val']) for f in propose_splits(cases, groups=patients)]) <= largest


def test_a_fold_beyond_the_file_keeps_patients_whole(tmp_path):
    cases, patients, _ = study(3)
    save_splits(propose_splits(cases, groups=patients), tmp_path/'splits.json')
    splits = load_splits(tmp_path/'splits.json')
    for fold in (5, 6, 40):
        train, val = split_for_fold(splits, cases, fold)
        assert sorted(train + val) == sorted(cases) and not {patients[c] for c in train} & {patients[c] for c in val}


def test_files_with_a_reason_and_files_of_other_tools(tmp_path):
    splits = propose_splits([f'{p}_{v}' for p in 'abcdefg' for v in (1, 2)], groups='[a-g]')
    save_splits(splits, tmp_path/'splits.json')
    stored = json.loads((tmp_path/'splits.json').read_text())
    assert set(stored) == {'method', 'reason', 'seed', 'groups', 'folds'} and stored['groups']['a'] == ['a_1', 'a_2']
    again = load_splits(tmp_path/'splits.json')
    assert again == splits and (again.method, again.reason, again.seed, again.groups) == (splits.method, splits.reason, splits.seed, splits.groups)
    save_splits(five_folds('abcdefg'), tmp_path/'splits_final.json') # what nnU-Net v2 reads
    assert isinstance(json.loads((tmp_path/'splits_final.json').read_text()), list)
    (tmp_path/'own.csv').write_text('\ufeffcase,fold\r\na,0\r\nb,1\r\n\r\nc,1\r\n')
    assert load_splits(tmp_path/'own.csv') == [{'train': ['b', 'c'], 'val': ['a']}, {'train': ['a'], 'val': ['b', 'c']}]


def test_the_way_out_of_a_pickle_works(tmp_path):
    folds = [{k: np.array(v) for k, v in f.items()} for f in five_folds('abcdefg')]
    (tmp_path/'splits_final.pkl').write_bytes(pickle.dumps(folds))
    with pytest.raises(SplitError, match='runs? code') as error: load_splits(tmp_path/'splits_final.pkl')
    command = str(error.value).split('python -c ')[1].split(' (where')[0]
    subprocess.run(f'{shlex.quote(sys.executable)} -c {command}', shell=True, cwd=tmp_path, check=True)
    assert load_splits(tmp_path/'splits_final.json') == five_folds('abcdefg')


@pytest.mark.parametrize('name, text, problem', [
    ('x.json', '{"train": ["a"]}', "key 'folds'"), ('x.json', '{"folds": []}', 'list of folds'), ('x.csv', '', 'number of a fold'), ('x.csv', 'a;0\nb;1', 'number of a fold'),
    ('x.csv', 'a,0\nb,2', "'val' lists no case"), ('x.csv', 'a,0\na,1', 'two lines'), ('x.csv', 'a,0\nb,0', "'train' lists no case")])
def test_files_of_ones_own_that_are_wrong(tmp_path, name, text, problem):
    (tmp_path/name).write_text(text)
    with pytest.raises(SplitError, match=problem) as error: load_splits(tmp_path/name)
    assert name in str(error.value)


def test_folds_for_other_cases_are_refused(tmp_path):
    save_splits(five_folds('abcdefg'), tmp_path/'splits.json')
    with pytest.raises(SplitError, match='1 of 7 cases have no data.*found g'): adopt_splits(tmp_path/'splits.json', 'abcdef')
    taken = adopt_splits(tmp_path/'splits.json', 'abcdefghi')
    assert taken == five_folds('abcdefg') and taken.method == 'own file' and '2 of 9 cases are never held back: h, i' in taken.reason


@pytest.mark.parametrize('groups, problem', [({'p': ['a'], 'q': ['a']}, 'two patients'), ('(b)', 'fits 1 of 7'), ('(', 'no regular expression'), ({'z': 'y'}, 'none of the cases'), ({}, 'none of the cases; found no patient'), (7, 'no regular expression')])
def test_groups_that_say_nothing(groups, problem):
    with pytest.raises(SplitError, match=problem): propose_splits('abcdefg', groups=groups)


def test_few_patients():
    visits = [f'{p}{v}' for p in 'abc' for v in range(4)]
    splits = propose_splits(visits, groups='[abc]')
    assert [len(f['val']) for f in splits] == [4, 4, 4] and 'no more patients' in splits.reason
    with pytest.raises(SplitError, match='3 patients cannot make 5 folds: at most 3'): propose_splits(visits, groups='[abc]', n_folds=5)
    with pytest.raises(SplitError, match='1 patient'): propose_splits(visits[:4], groups='[abc]')
    assert len(propose_splits('abcd')) == 4
    assert 'as was asked for' in propose_splits('abcdef', n_folds=2).reason and 'no more patients' in propose_splits('abcd').reason


def test_what_a_split_cannot_tell():
    presence = {c: {'rare'} if c == 'd' else set() for c in 'abcdefg'}
    said = split_findings(five_folds('abcdefg'), presence)
    fold = next(k for k, f in enumerate(five_folds('abcdefg')) if 'd' in f['val'])
    assert said == [f'fold {fold} trains without rare', f"folds {', '.join(str(k) for k in range(5) if k != fold)} are not asked about rare"]


def test_presence_from_label_maps_and_from_preprocessed_cases():
    class Preprocessed:
        def __init__(self, *there): self.class_locations = {k: np.zeros((int(k in there), 3)) for k in (1, 2, 3)}
    assert class_presence({'a': Preprocessed(1, 3), 'b': Preprocessed()}) == {'a': {1, 3}, 'b': set()}
    dataset = Dataset(Path(__file__).parents[1]/'data_samples'/'Task101_PhantomCT')
    named = class_presence({'a': Preprocessed(2)}, dataset.labels)
    assert named == {'a': {'lesion'}} and class_presence(dataset, n_workers=2)['ct_004'] == {'organ', 'lesion', 'other organ'}


def test_real_patients_by_their_names():
    root = Path(os.environ.get('SEGNB_REAL_DATA', Path(__file__).parents[2]/'shared'/'data'))/'Task016_Axon2D'
    if not root.exists(): pytest.skip('no real data here (SEGNB_REAL_DATA)')
    cases = Dataset(root).cases
    splits = propose_splits(cases, groups=r'(sub-[a-z]+\d+)_')
    assert not split_findings(splits, groups=r'(sub-[a-z]+\d+)_')
