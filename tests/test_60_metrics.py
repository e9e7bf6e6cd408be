"Metrics where cells cannot go: other algorithms, files, workers, faults, what is imported when, real data."
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from segnb.image import Geometry, SegnbError, write_label_map
from segnb.labels import Labels
from segnb.metrics import (METRICS, Comparison, Convention, MetricsError, bootstrap_interval, compare_folders, compare_results, evaluate_case,
                           evaluate_folder, find_lesions, format_table, hausdorff95, surface_dice, surface_distances, write_v1_summary)
from segnb.workers import read_json, write_json

UPRIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)
REAL = Path(os.environ.get('SEGNB_REAL_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))/'Task004_Hippocampus'


def blobs(rng, shape, n=3, labels=3):
    "A label map of ellipsoids"
    grid, out = np.ogrid[tuple(slice(0, k) for k in shape)], np.zeros(shape, np.uint8)
    for label in range(1, labels + 1):
        for _ in range(n):
            out[sum(((g - rng.uniform(.1, .9)*k)/max(1, rng.uniform(.05, .25)*k))**2 for g, k in zip(grid, shape)) <= 1] = label
    return out


def by_transform(reference, prediction, label, spacing):
    "The same distances from an erosion and a distance transform of the whole image"
    from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
    surfaces = [m ^ binary_erosion(m, generate_binary_structure(3, 1)) for m in (reference == label, prediction == label)]
    return [distance_transform_edt(~surfaces[1 - i], spacing)[surfaces[i]] for i in (0, 1)]


@pytest.mark.parametrize('seed', range(12))
def test_distances_agree_with_a_distance_transform(seed):
    rng = np.random.default_rng(seed)
    shape, spacing = tuple(int(n) for n in rng.integers(2, 40, 3)), tuple(rng.uniform(.3, 5, 3))
    a, b = blobs(rng, shape), blobs(rng, shape)
    if seed % 3 == 0: b = np.where(rng.random(shape) < .05, rng.integers(0, 4, shape), np.roll(a, 1, 0)).astype(np.uint8)
    for label in (1, 2, 3):
        ours = surface_distances(a, b, label, spacing)
        if not len(ours[0]): continue
        for mine, theirs in zip(ours, by_transform(a, b, label, spacing)): np.testing.assert_allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize('dtype', [bool, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_every_kind_of_integer_scores_the_same(dtype):
    rng = np.random.default_rng(0)
    a, b = (blobs(rng, (9, 14, 13), labels=1) for _ in range(2))
    known = evaluate_case(a, b, (1,), (2, 1, 1), 'all')
    for x, y in ((a.astype(dtype), b.astype(dtype)), (a.astype(dtype), b), (np.asfortranarray(a).astype(dtype), b[::-1][::-1].astype(dtype))):
        assert evaluate_case(x, y, (1,), (2, 1, 1), 'all') == known


def test_regions_are_labels_joined():
    rng = np.random.default_rng(1)
    a, b = blobs(rng, (12, 20, 20)), blobs(rng, (12, 20, 20))
    joined = evaluate_case(*(np.isin(m, (1, 3)) for m in (a, b)), (1,), (3, 1, 1), 'all')[1]
    assert evaluate_case(a, b, ((1, 3),), (3, 1, 1), 'all')[1, 3] == pytest.approx(joined, nan_ok=True)


def test_flipped_and_transposed_images_score_the_same():
    rng = np.random.default_rng(2)
    a, b, spacing = blobs(rng, (10, 15, 20)), blobs(rng, (10, 15, 20)), (3., 1., .5)
    known = evaluate_case(a, b, (1, 2, 3), spacing, 'all')
    for x, y, mm in ((a[::-1], b[::-1], spacing), (a.transpose(2, 0, 1), b.transpose(2, 0, 1), (.5, 3., 1.))):
        for label, scores in evaluate_case(x, y, (1, 2, 3), mm, 'all').items(): assert scores == pytest.approx(known[label], rel=1e-9, nan_ok=True)


def test_a_margin_of_background_changes_nothing_but_the_count():
    rng = np.random.default_rng(3)
    a, b = blobs(rng, (10, 15, 20)), blobs(rng, (10, 15, 20))
    known, padded = evaluate_case(a, b, (1, 2), (1, 1, 1), 'all'), evaluate_case(np.pad(a, 3), np.pad(b, 3), (1, 2), (1, 1, 1), 'all')
    for label in known: assert {**padded[label], 'n_voxels': 0} == pytest.approx({**known[label], 'n_voxels': 0}, rel=1e-9, nan_ok=True)


def test_a_tolerance_that_is_a_distance_counts_as_within():
    a, b = (np.zeros((1, 1, 12), np.uint8) for _ in range(2))
    a[..., 2], b[..., 5] = 1, 1
    for x in (.1, .7, .8, .9766, 1.1): assert surface_dice(a, b, 1, (1, 1, x), 3*x) == 1 and surface_dice(a, b, 1, (1, 1, x), 2.99*x) == 0


def test_lesions_lie_where_they_are_said_to():
    reference = np.zeros((8, 20, 20), np.uint8)
    reference[1:4, 2:5, 2:5], reference[5:7, 10:14, 10:14] = 2, 2
    prediction = np.zeros_like(reference)
    prediction[1:4, 2:5, 2:4], prediction[0, 17, 17] = 2, 2
    found = find_lesions(reference, prediction, 2, (2, 1, 1))
    assert [part['centre'] for part in found['lesions']] == [(2, 3, 3), (5.5, 11.5, 11.5)]
    assert [part['volume'] for part in found['lesions']] == pytest.approx([27*2/1000, 32*2/1000])
    assert [part['overlap'] for part in found['lesions']] == pytest.approx([2/3, 0]) and [part['found'] for part in found['lesions']] == [True, False]
    assert sorted(part['found'] for part in found['predictions']) == [False, True]
    assert (found['n_lesions'], found['n_lesions_found'], found['n_lesions_predicted'], found['n_lesions_false']) == (2, 1, 2, 1)
    assert json.loads(json.dumps(found)) and find_lesions(reference, prediction, 2, min_overlap=.7)['n_lesions_found'] == 0


@pytest.mark.parametrize('shape', [(1, 1, 5), (5, 1, 1), (1, 3, 3), (3, 1, 3), (3, 3, 1), (2, 3, 2)])
def test_lesions_in_thin_boxes(shape):
    from scipy.ndimage import generate_binary_structure, label
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = rng.random((2, *shape)) < .6
        for connectivity, rank in ((6, 1), (18, 2), (26, 3)):
            found = evaluate_case(a, b, (1,), metrics='lesion_f1', connectivity=connectivity)[1]
            assert (found['n_lesions'], found['n_lesions_predicted']) == tuple(label(m, generate_binary_structure(3, rank))[1] for m in (a, b))


def test_many_numbers_that_nobody_asked_for():
    a = np.arange(300*200).reshape(1, 300, 200)
    b = np.where(a % 2, a, 7)
    found = evaluate_case(a, b, (7, 59999, (7, 9)), ignore=5)
    assert [found[7][k] for k in ('n_reference', 'n_prediction', 'n_shared', 'n_voxels')] == [1, 30001, 1, 59999]
    assert found[59999]['dice'] == 1 and found[7, 9]['n_shared'] == 2


def test_a_label_that_no_case_has_is_compared_without_a_value(folders, tmp_path):
    options = dict(metrics='all', n_workers=0, progress=False)
    one, two = (evaluate_folder(folders['truth'], folders[name], {1: 'organ', 9: 'nowhere'}, **options) for name in ('one', 'two'))
    for i, result in enumerate((one, two)): write_json(result, tmp_path/f'{i}.json')
    for pair in ((one, two), [read_json(tmp_path/f'{i}.json') for i in (0, 1)]):
        for metric in ('dice', 'hd95'):
            row = compare_results(*pair, metric).rows[9]
            assert row['n'] == 0 and np.isnan([row['difference'], *row['interval']]).all() and (row['p_sign'], row['p_wilcoxon']) == (1, 1)
            assert 'nowhere' in compare_results(*pair, metric).table()
    assert np.isnan(bootstrap_interval([])).all()
    assert all(m in format_table(one, 'all') for m in METRICS)


def test_what_was_measured_otherwise_is_not_compared(folders):
    loose, strict = (evaluate_folder(folders['truth'], folders['one'], [1], metrics=('dice', 'surface_dice', 'lesion_f1'), tolerance=mm, min_overlap=mm/2, n_workers=0) for mm in (2, 1))
    assert compare_results(loose, strict).rows[1]['difference'] == 0
    for metric in ('surface_dice', 'lesion_f1'):
        with pytest.raises(MetricsError, match='differ in their settings'): compare_results(loose, strict, metric)


@pytest.mark.parametrize('n', [2, 5, 40])
def test_bootstrap(n):
    values = np.random.default_rng(n).beta(8, 2, n)
    low, high = bootstrap_interval(values)
    assert low <= values.mean() <= high and (low, high) == bootstrap_interval(values)
    assert bootstrap_interval(values + 3) == pytest.approx((low + 3, high + 3)) and bootstrap_interval(-values)[0] == pytest.approx(-high)
    inner = bootstrap_interval(values, .5)
    assert low <= inner[0] <= inner[1] <= high
    assert bootstrap_interval(np.stack([values, values], 1)) == pytest.approx((low, high))
    if n == 40:
        from scipy.stats import norm
        assert (high - low)/2 == pytest.approx(norm.ppf(.975)*values.std()/np.sqrt(n), rel=.1)   # the bell curve, for many cases
        assert bootstrap_interval(values, seed=1) != (low, high) and bootstrap_interval(values, seed=1) == pytest.approx((low, high), abs=.01)


@pytest.fixture
def folders(tmp_path):
    "Six cases of a reference and two predictions, on grids of their own"
    rng, out = np.random.default_rng(4), {name: tmp_path/name for name in ('truth', 'one', 'two')}
    for folder in out.values(): folder.mkdir()
    for i in range(6):
        shape, spacing = tuple(int(k) for k in rng.integers(10, 20, 3)), tuple(rng.uniform(.5, 3, 3).round(2))
        truth = blobs(rng, shape)
        for name, by in (('truth', 0), ('one', 2), ('two', 1)):
            write_label_map(np.roll(truth, by, 2), Geometry(spacing, (0, 0, 0), UPRIGHT, shape), out[name]/f'c{i}.nii.gz')
    return out


@pytest.mark.parametrize('n_workers', [0, 2])
def test_a_folder_is_its_cases(folders, n_workers):
    from segnb.image import read_label_map
    result = evaluate_folder(folders['truth'], folders['one'], [1, 2, 3], metrics='all', n_workers=n_workers, progress=False)
    assert list(result['definitions']) == list(METRICS)
    for case, scores in result['cases'].items():
        (a, grid), (b, _) = (read_label_map(folders[k]/f'{case}.nii.gz') for k in ('truth', 'one'))
        for label, known in evaluate_case(a, b, (1, 2, 3), grid.spacing, 'all').items(): assert scores[label] == pytest.approx(known, nan_ok=True)
    for label, mean in result['mean'].items():
        for metric in METRICS:
            values = np.array([case[label][metric] for case in result['cases'].values()])
            assert mean[metric] == pytest.approx(np.nanmean(values)) and mean['interval'][metric] == list(bootstrap_interval(values))


def test_a_result_survives_json_and_is_printed_whole(folders, tmp_path):
    declared = Labels.from_dict({'labels': {'background': 0, 'whole': [1, 2], 'core': 2, 'rest': 3}, 'regions_class_order': [1, 2, 3]})
    result = evaluate_folder(folders['truth'], folders['one'], declared, metrics='all', n_workers=0, convention=Convention(absent=1.))
    write_json(result, tmp_path/'summary.json')
    back = read_json(tmp_path/'summary.json')
    for metrics in (None, 'dice', ('hd95', 'lesion_f1')): assert format_table(back, metrics) == format_table(result, metrics)
    text = format_table(result)
    assert all(word in text for word in ('whole', 'core', 'hd95', 'surface_dice', 'lesion_f1', 'counts 1', '95 % of means', 'foreground mean'))
    assert back['settings']['absent'] == 1 and back['regions']['mean']['whole']['dice'] == result['regions']['mean']['whole']['dice']
    bare = {k: ({label: {m: v for m, v in mean.items() if m in ('dice', 'n_cases')} for label, mean in result[k].items()} if k == 'mean' else result[k]) for k in ('cases', 'mean', 'labels', 'convention')}
    assert '95 % of means' in format_table(result, 'dice') and '95 % of means' not in format_table(bare | {'foreground_mean': {'dice': .5}}, 'dice')   # written before means had intervals


def test_two_folders_are_compared_case_by_case(folders, tmp_path):
    paired = compare_folders(folders['one'], folders['two'], folders['truth'], {0: 'background', 1: 'a', 2: 'b', 3: 'c'}, metric='hd95', n_workers=0)
    assert isinstance(paired, Comparison) and paired.names == ('one', 'two') and set(paired.rows) == {1, 2, 3, 'foreground'}
    turned = compare_folders(folders['two'], folders['one'], folders['truth'], [1, 2, 3], metric='hd95', n_workers=0)
    for key, row in paired.rows.items():
        assert turned.rows[key]['difference'] == pytest.approx(-row['difference']) and turned.rows[key]['p_sign'] == row['p_sign']
        assert turned.rows[key]['interval'] == pytest.approx([-x for x in row['interval'][::-1]])
        assert row['n'] <= 6 and row['higher'] + row['lower'] <= row['n']
    paired.save(tmp_path/'comparison.json')
    assert read_json(tmp_path/'comparison.json')['meaning'] and 'foreground' in paired.table()
    assert len(paired.draw().axes) == 1


def test_what_does_not_belong_together_is_refused(folders, tmp_path):
    (folders['two']/'c3.nii.gz').unlink()
    with pytest.raises(MetricsError, match='no prediction for c3'): compare_folders(folders['one'], folders['two'], folders['truth'], [1], n_workers=0)
    one = evaluate_folder(folders['truth'], folders['one'], [1], n_workers=0)
    two = evaluate_folder(folders['truth'], folders['one'], [1], n_workers=0, convention=Convention(absent=1.))
    with pytest.raises(MetricsError, match='differ in their convention'): compare_results(one, two)
    with pytest.raises(MetricsError, match='differ in their labels'): compare_results(one, evaluate_folder(folders['truth'], folders['one'], [1, 2], n_workers=0))
    with pytest.raises(MetricsError, match='there is no such metric'): evaluate_folder(folders['truth'], folders['one'], [1], metrics=('hd59',), n_workers=0)
    with pytest.raises(MetricsError, match='the spacing is missing'): hausdorff95(np.ones((2, 2, 2), int), np.ones((2, 2, 2), int), 1, None)
    (folders['one']/'c2.nii.gz').write_bytes(b'no image')
    with pytest.raises(SegnbError, match='c2'): evaluate_folder(folders['truth'], folders['one'], [1], n_workers=0)


def test_a_summary_is_written_whole_or_not_at_all(folders, tmp_path, monkeypatch):
    result = evaluate_folder(folders['truth'], folders['one'], [1, 2], n_workers=0)
    file = tmp_path/'summary.json'
    write_v1_summary(result, file)
    before = file.read_text()
    write_json(result, tmp_path/'kept.json')
    assert write_v1_summary(read_json(tmp_path/'kept.json'), tmp_path/'again.json')['results']['mean'] == json.loads(before)['results']['mean']
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(OSError): write_v1_summary(result, file)
    monkeypatch.undo()
    assert file.read_text() == before and sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ['again.json', 'kept.json', 'summary.json']


def test_what_is_not_asked_for_is_not_imported():
    code = ('import sys, numpy as np; from segnb.metrics import evaluate_case; evaluate_case(np.ones((2, 2, 2), int), np.ones((2, 2, 2), int), (1,), (1, 1, 1));'
            'print([m for m in ("scipy", "matplotlib", "cc3d", "torch", "skimage", "numba") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.skipif(not REAL.exists(), reason='the hippocampus data set is not there')
def test_real_label_maps(tmp_path):
    from segnb.image import read_label_map
    cases = sorted(p.name for p in (REAL/'labelsTr').glob('*.nii.gz'))[:12]
    (tmp_path/'prediction').mkdir()
    for name in cases:
        labels, grid = read_label_map(REAL/'labelsTr'/name)
        write_label_map(np.roll(labels, 1, 1), grid, tmp_path/'prediction'/name)
    result = evaluate_folder(REAL/'labelsTr', tmp_path/'prediction', {0: 'background', 1: 'anterior', 2: 'posterior'}, cases=[n[:-7] for n in cases], metrics='all', progress=False)
    for case, scores in result['cases'].items():
        spacing = read_label_map(REAL/'labelsTr'/f'{case}.nii.gz')[1].spacing
        for label in (1, 2):
            assert .5 < scores[label]['dice'] < 1 and 0 < scores[label]['hd95'] <= spacing[1]*1.5 and scores[label]['surface_dice'] == 1
            assert scores[label]['lesion_sensitivity'] == 1
