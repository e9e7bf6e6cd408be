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
