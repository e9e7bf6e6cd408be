"""Folds beside those of nnU-Net 1.7.1 (recorded by tests/record/52_splits.py), and laws on random names."""
import json
from pathlib import Path

import numpy as np
import pytest

from segnb.splits import SplitError, check_splits, five_folds, load_splits, random_split, save_splits, split_for_fold

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
