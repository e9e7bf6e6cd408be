"A folder of label maps scores as nnU-Net 1.7.1 scores it (recorded by tests/record/60_metrics.py and 60_metrics_surface.py)."
import json

import numpy as np
import pytest
from segnb.image import Geometry, write_label_map
from segnb.metrics import evaluate_case, evaluate_folder, surface_dice, surface_distances, v1_scores, write_v1_summary
from segnb.viewer import recorded

INFO, ARRAYS = recorded('60_metrics.json'), recorded('60_metrics.npz')
SURFACES, MAPS = recorded('60_metrics_surface.json'), recorded('60_metrics_surface.npz')
NAMES = {'Hausdorff Distance 95': 'hd95', 'Avg. Symmetric Surface Distance': 'assd'}


def write(arrays, spacings, folders):
    for key, labels in arrays.items():
        case, _, name = key.partition('/')
        if case not in spacings: continue
        write_label_map(labels, Geometry(spacings[case], (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), labels.shape), folders[name]/f'{case}.nii.gz')


@pytest.fixture(scope='module', params=[0, 2])
def result(request, tmp_path_factory):
    "The recorded label maps, written to two folders and evaluated with 0 and 2 workers"
    folders = {name: tmp_path_factory.mktemp(name) for name in ('reference', 'prediction')}
    write(ARRAYS, dict.fromkeys(INFO['cases'], (1, 1, 1)), folders)
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


def known():
    "(case, label or region, what the original says)"
    for case, labels in SURFACES['cases'].items():
        yield from ((case, int(label), scores) for label, scores in labels.items())
        yield case, tuple(SURFACES['region']), SURFACES['regions'][case]


@pytest.mark.parametrize('case,label,theirs', list(known()))
def test_every_score_of_a_case(case, label, theirs):
    reference, prediction, spacing = MAPS[f'{case}/reference'], MAPS[f'{case}/prediction'], tuple(SURFACES['spacings'][case])
    scores = evaluate_case(reference, prediction, (label,), spacing, 'all')[label]
    for name, value in v1_scores(scores).items(): assert same(value, theirs[name]) or (name in NAMES and abs(value - theirs[name]) < 1e-9), name
    for name, ours in NAMES.items(): assert same(scores[ours], theirs[name]) or abs(scores[ours] - theirs[name]) < 1e-9, name
    out, back = surface_distances(reference, prediction, label, spacing)
    if not len(out): return
    assert abs(out.mean() - theirs['Avg. Surface Distance']) < 1e-9 or abs(back.mean() - theirs['Avg. Surface Distance']) < 1e-9
    assert abs(max(out.max(), back.max()) - theirs['Hausdorff Distance']) < 1e-9
    for tolerance, value in zip(SURFACES['tolerances'], theirs['surface Dice']):
        parts = [(d <= tolerance*(1 + 1e-6)).mean() for d in (out, back)]
        assert np.mean(parts) == pytest.approx(value, abs=1e-7)   # theirs is the mean of the two parts
        assert min(parts) - 1e-12 <= surface_dice(reference, prediction, label, spacing, tolerance) <= max(parts) + 1e-12


def test_v1_summary(tmp_path):
    folders = {name: tmp_path/name for name in ('reference', 'prediction')}
    for folder in folders.values(): folder.mkdir()
    write(MAPS, SURFACES['spacings'], folders)
    result = evaluate_folder(folders['reference'], folders['prediction'], SURFACES['labels'], metrics=('dice', 'hd95'), n_workers=0)
    write_v1_summary(result, folders['prediction']/'summary.json', reference=folders['reference'], name='a name', description='some words', task='Task001_Test')
    ours, theirs = json.loads((folders['prediction']/'summary.json').read_text()), SURFACES['summary']
    assert set(ours) == set(theirs)
    assert {k: ours[k] for k in ('name', 'description', 'task')} == {k: theirs[k] for k in ('name', 'description', 'task')}
    assert set(ours['results']['mean']) == set(theirs['results']['mean'])
    for key, scores in theirs['results']['mean'].items(): assert ours['results']['mean'][key] == pytest.approx(scores, rel=1e-12, nan_ok=True), key
    order = {case['test']: case for case in theirs['results']['all']}
    for case in ours['results']['all']:
        known = order[case['test'].rsplit('/', 1)[-1]]
        assert set(case) == set(known) and case['reference'] == str(folders['reference']/known['reference'])
        for key in map(str, SURFACES['labels']): assert case[key] == pytest.approx(known[key], rel=1e-12, nan_ok=True), (known['test'], key)
