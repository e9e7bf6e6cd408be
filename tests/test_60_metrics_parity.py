"A folder of label maps scores as nnU-Net 1.7.1 scores it (recorded by tests/record/60_metrics.py)."
import numpy as np
import pytest
from segnb.image import Geometry, write_label_map
from segnb.metrics import evaluate_folder
from segnb.viewer import recorded

INFO, ARRAYS = recorded('60_metrics.json'), recorded('60_metrics.npz')

@pytest.fixture(scope='module', params=[0, 2])
def result(request, tmp_path_factory):
    "The recorded label maps, written to two folders and evaluated with 0 and 2 workers"
    folders = {name: tmp_path_factory.mktemp(name) for name in ('reference', 'prediction')}
    for key, labels in ARRAYS.items():
        if key == 'about': continue
        case, name = key.split('/')
        write_label_map(labels, Geometry((1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), labels.shape), folders[name]/f'{case}.nii.gz')
    return evaluate_folder(folders['reference'], folders['prediction'], INFO['labels'], n_workers=request.param)

def same(a, b): return a == b or (np.isnan(a) and np.isnan(b))

def test_cases(result):
    assert set(result['cases']) == set(INFO['cases'])
    for case, scores in INFO['cases'].items():
        for label, theirs in scores.items():
            ours = result['cases'][case][int(label)]
            assert same(ours['dice'], theirs['dice']), (case, label)
            assert ours['n_reference'] == theirs['n_reference'] and ours['n_prediction'] == theirs['n_prediction']

def test_means(result):
    for label, theirs in INFO['mean'].items():
        ours = result['mean'][int(label)]['dice']
        assert same(ours, theirs) or abs(ours - theirs) < 1e-12
    assert abs(result['foreground_mean']['dice'] - INFO['foreground_mean']) < 1e-12
