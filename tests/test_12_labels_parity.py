"""Labels beside nnU-Net 1.7.1 (recorded by tests/record/12_labels.py), and laws on random maps."""
from pathlib import Path

import numpy as np
import pytest

from segnb.labels import LabelError, Labels, count_labels

with np.load(Path(__file__).parent/'recorded'/'12_labels.npz') as file: RECORDED = {k: file[k] for k in file.files}
FIVE = Labels({k: f'class {k}' for k in range(5)})


def test_one_hot_as_the_original():
    assert np.array_equal(FIVE.one_hot(RECORDED['labels']), RECORDED['one_hot'])
    assert len(RECORDED['one_hot_of_what_occurs']) == 4   # without a list, the original leaves the absent label out


def test_decision_as_the_original():
    assert np.array_equal(FIVE.to_label_map(RECORDED['scores']), RECORDED['decided'])


@pytest.mark.parametrize('declared, accepted', list(zip(RECORDED['declared'].tolist(), RECORDED['accepted'].tolist())))
def test_verdict_as_the_original(declared, accepted):
    labels = Labels.from_dict({'labels': {str(k): f'class {k}' for k in declared if k >= 0}})
    if accepted: labels.check(RECORDED['labels'])
    else:
        with pytest.raises(LabelError): labels.check(RECORDED['labels'])


@pytest.mark.parametrize('seed', range(8))
def test_laws(seed):
    rng = np.random.default_rng(seed)
    k, shape = int(rng.integers(2, 7)), tuple(rng.integers(1, 9, 3))
    labels = Labels({int(i): f'n{i}' for i in rng.permutation(k)})
    m = rng.integers(0, k, shape)
    hot = labels.one_hot(m)
    assert hot.shape == (k, *shape) and hot.dtype == np.float32 and (hot.sum(0) == 1).all()
    assert np.array_equal(labels.to_label_map(hot), m)
    assert count_labels(m) == {int(v): int(n) for v, n in zip(*np.unique(m, return_counts=True))}
    assert labels.foreground == tuple(i for i in labels.names if i) and labels.n_outputs == k
    assert Labels.from_dict(labels.to_dict()) == labels and list(Labels.from_dict(labels.to_dict()).names) == list(labels.names)
    assert Labels.from_dict({'labels': {v: n for n, v in labels.names.items()}}).foreground == labels.foreground
    with pytest.raises(LabelError, match=f'found {k} in 1 voxels'): labels.check(np.array([*range(k + 1)]))


BRATS = Labels.from_dict({'labels': {'background': 0, 'whole': [1, 2, 3], 'core': [2, 3], 'enhancing': 3}, 'regions_class_order': [1, 2, 3]})


def test_regions_as_the_original():
    assert np.array_equal(BRATS.one_hot(RECORDED['parts']), RECORDED['region_masks'])
    assert np.array_equal(BRATS.to_label_map(RECORDED['region_scores']), RECORDED['region_decided'])
    assert (RECORDED['region_scores'] == .5).sum() > 20   # exactly one half writes nothing


def declaration(rng, regions, ignore):
    "A random dataset.json with gaps in the values; regions nested by random order so that each can be seen"
    values = [int(v) for v in rng.choice(np.arange(1, 400), int(rng.integers(2, 7)), replace=False)]
    labels = {'background': 0, **{f'n{v}': v for v in values}}
    if regions: labels = {'background': 0, **{f'r{i}': values[i:] if i < len(values) - 1 else values[-1] for i in range(len(values))}}
    if ignore: labels['ignore'] = int(rng.choice(np.setdiff1d(np.arange(1, 500), values)))
    return {'labels': labels, **({'regions_class_order': values} if regions else {})}, values


@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('regions', [False, True])
@pytest.mark.parametrize('ignore', [False, True])
def test_laws_of_values_and_indices(seed, regions, ignore):
    rng = np.random.default_rng(seed)
    json, values = declaration(rng, regions, ignore)
    labels = Labels.from_dict(json)
    assert Labels.from_dict(labels.to_dict()) == labels == Labels.from_dict(labels.to_dict('v2')) and labels.to_dict('v2') == json
    assert labels.foreground == tuple(sorted(values).index(v) + 1 for v in values) and labels.n_outputs == len(values) + (not regions)
    assert [labels.values[k] for k in sorted(labels.names)] == [0, *sorted(values)] and (labels.ignore == len(values) + 1 if ignore else labels.ignore is None)
    stored = rng.choice([0, *values, *([json['labels']['ignore']] if ignore else [])], tuple(rng.integers(1, 9, 3))).astype(rng.choice([np.int16, np.uint16, np.int64]))
    indices = labels.encode(stored)
    assert np.array_equal(labels.decode(indices), stored) and indices.max() < len(labels.values)
    hot = labels.one_hot(stored)
    judged = indices != labels.ignore if ignore else np.ones(stored.shape, bool)
    for mask, members in zip(hot, labels.regions.values() or [(k,) for k in range(len(labels.names))]): assert np.array_equal(mask, np.isin(indices, members))
    assert np.array_equal(labels.to_label_map(hot)[judged], stored[judged]) and not hot[:, ~judged].any()
    with pytest.raises(LabelError, match='501 in 1 voxels'): labels.encode(np.append(stored, 501))


@pytest.mark.parametrize('seed', range(6))
def test_decision_is_argmax_or_the_written_order(seed):
    rng = np.random.default_rng(seed)
    for regions in (False, True):
        json, values = declaration(rng, regions, False)
        labels = Labels.from_dict(json)
        scores = np.round(rng.random((labels.n_outputs, 4, 5, 6)), 1)
        if regions:
            naive = np.zeros((4, 5, 6), int)
            for q, v in zip(scores, json['regions_class_order']): naive[q > .5] = v
        else: naive = np.array([0, *sorted(values)])[scores.argmax(0)]
        assert np.array_equal(labels.to_label_map(scores), naive)


@pytest.mark.parametrize('labels, order', [
    ({'background': 0, 'a': True}, None), ({'background': 0, 'a': 1.}, None), ({'background': 0, 'a': '1'}, None), ({'background': False, 'a': 1}, None), ({'0': 'background', '1.0': 'a'}, None),
    ({'0': 'background', '1': 'a', '2': 'a'}, None), ({'background': 0, 'a': 1, 'b': 1}, None), ({'background': 1, 'a': 2}, None), ({'a': 1, 'b': 2}, None), ({'background': 0}, None),
    ({'background': [0], 'a': [0, 1]}, [1]), ({'background': 0, 'a': [1, 2], 'b': 2}, None), ({'background': 0, 'a': [1, 2], 'b': 2}, [1]), ({'background': 0, 'a': [1, 2], 'b': 2}, [1, 2, 2]),
    ({'background': 0, 'a': [1, 2], 'b': 2}, [1, 1]), ({'background': 0, 'a': [1, 2], 'b': 2}, [1, 3]), ({'background': 0, 'b': 2, 'a': [1, 2]}, [2, 1]), ({'background': 0, 'a': []}, []),
    ({'background': 0, 'a': [1, 1]}, [1]), ({'background': 0, 'a': 1, 'ignore': 1}, None), ({'background': 0, 'a': 1, 'ignore': 0}, None), ({'background': 0, 'a': 1, 'ignore': [2, 3]}, None),
    ({'background': 0, 'a': [1, [2]]}, [1]), ({'background': 0, 'a': {'1': 2}}, None), ({'background': 0, 'a': 1e3}, None), ({'background': 0, 'a': 40000}, None)])
def test_refusals(labels, order):
    with pytest.raises(LabelError, match='file d.json'): Labels.from_dict({'labels': labels, 'regions_class_order': order}, 'd.json')
