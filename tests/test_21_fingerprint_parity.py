"""Fingerprints beside nnU-Net 1.7.1 (recorded by tests/record/21_fingerprint.py), and of real data where there is some."""
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest

from segnb.dataset import Dataset
from segnb.fingerprint import (STATISTICS, Fingerprint, FingerprintError, collects_intensities, extract_fingerprint,
                               fingerprint_page, foreground_intensities, intensity_histogram, intensity_statistics)
from segnb.image import Geometry, SegnbError, write_image, write_label_map
from segnb.spacing import median_shape, target_spacing

HERE = Path(__file__).parent
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.parents[1]/'shared'/'data'))
RECORDED = json.loads((HERE/'recorded'/'21_fingerprint.json').read_text())
TASKS = ('two_channels', 'lower_case', 'no_ct')


def same(ours, theirs):
    "Counts to the last bit, statistics to 1e-6 of their size or of the sd"
    ours = ours.to_dict()
    for key in ('spacings', 'shapes', 'channels', 'labels', 'size_reductions'): assert ours[key] == theirs[key], key
    if theirs['intensities'] is None: return ours['intensities'] is None
    for c, row in theirs['intensities'].items():
        for k, v in row.items(): assert abs(ours['intensities'][c][k] - v) <= 1e-6 * max(abs(v), row['sd']), (c, k)
    return set(ours['intensities']) == set(theirs['intensities'])


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "The recorded made-up tasks as raw data sets"
    root, out = tmp_path_factory.mktemp('raw'), {}
    with np.load(HERE/'recorded'/'21_fingerprint.npz') as arrays:
        for task in TASKS:
            known, folder = RECORDED[task], root/task
            for sub in ('imagesTr', 'labelsTr'): (folder/sub).mkdir(parents=True)
            for i, spacing in enumerate(known['spacings']):
                image, seg = arrays[f'{task}/{i}/image'], arrays[f'{task}/{i}/seg']
                geometry = Geometry(spacing, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), seg.shape)
                for c, channel in enumerate(image): write_image(channel, geometry, folder/'imagesTr'/f'case_{i}_{c:04d}.nii.gz')
                write_label_map(seg.astype(np.int16), geometry, folder/'labelsTr'/f'case_{i}.nii.gz')
            names = [f'./imagesTr/case_{i}.nii.gz' for i in range(len(known['spacings']))]
            labels = {'0': 'background', **{str(l): f'label {l}' for l in known['labels']}}
            (folder/'dataset.json').write_text(json.dumps({
                'modality': {str(c): name for c, name in enumerate(known['channels'])}, 'labels': labels,
                'training': [{'image': n, 'label': n.replace('imagesTr', 'labelsTr')} for n in names], 'test': []}))
            out[task] = folder
    return out


@pytest.mark.parametrize('n_workers', [0, 2])
@pytest.mark.parametrize('task', TASKS)
def test_made_up_tasks_as_the_original(folders, task, n_workers):
    assert same(extract_fingerprint(Dataset(folders[task]), n_workers), RECORDED[task])


@pytest.mark.parametrize('task', ['Task101_PhantomCT', 'Task102_PhantomMR'])
def test_samples_as_the_original(task):
    assert same(extract_fingerprint(Dataset(HERE.parent/'data_samples'/task)), RECORDED['samples'][task])


def test_floats_of_a_large_pool():
    known = RECORDED['pool']
    pool = np.random.default_rng(known['seed']).integers(-64_000, 192_000, 300_001).astype(np.float32) / 64
    assert pool.sum(dtype=float) == known['sum']
    ours = intensity_statistics(pool)
    for k in STATISTICS: assert abs(ours[k] - known['statistics'][k]) <= 1e-6 * max(abs(known['statistics'][k]), 1), k


@pytest.mark.parametrize('channels, measured', [(('CT',), True), (('ct',), True), (('MR', 'CT'), True), (('Ct',), False),
                                                (('CTA',), False), (('SPECT',), False), (('noNorm',), False)])
def test_which_channels_count_as_ct(channels, measured): assert collects_intensities(channels) is measured


@pytest.mark.parametrize('seed', range(10))
def test_every_tenth_in_c_order(seed):
    rng = np.random.default_rng(seed)
    data, seg = rng.normal(size=(2, *rng.integers(1, 12, 3))).astype(np.float32), None
    seg = rng.integers(-1, 3, data.shape[1:])
    assert np.array_equal(foreground_intensities(data, seg), np.stack([c[seg > 0][::10] for c in data]))


def test_there_and_back(tmp_path):
    ours = Fingerprint([(.1 + .2, 1/3, 1)], [(3, 4, 5)], ('CT',), (2, 1), {'a': .5}, {0: dict.fromkeys(STATISTICS, 1/7)})
    ours.save(tmp_path/'f.json')
    assert Fingerprint.load(tmp_path/'f.json') == ours and ours.size_reductions == (.5,) and ours.labels == (2, 1)


@pytest.mark.parametrize('change, problem', [
    (dict(spacings=[(1, 1)]), 'impossible spacings'), (dict(spacings=[]), 'too many or too few spacings'),
    (dict(spacings=[(1, float('nan'), 1)]), 'impossible spacings'), (dict(shapes=[(0, 1, 1)]), 'impossible shapes'),
    (dict(channels=[]), 'no channels'), (dict(shapes=[]), 'no cases'), (dict(size_reductions=[0]), 'impossible size_reductions'),
    (dict(intensities={'0': {'mean': 1}}), 'lacks sd'), (dict(spacings=3), 'malformed'), (dict(labels=['liver']), 'malformed')])
def test_malformed_files_are_refused(tmp_path, change, problem):
    good = Fingerprint([(1, 1, 1)], [(3, 4, 5)], ('CT',), (1,)).to_dict()
    (tmp_path/'f.json').write_text(json.dumps({**good, **change}))
    with pytest.raises(FingerprintError, match=problem) as e: Fingerprint.load(tmp_path/'f.json')
    assert 'f.json' in str(e.value)


def test_faulty_cases_are_named(folders, tmp_path):
    for value, what in ((0, 'only zeros'), (np.nan, 'NaN')):
        copy = Path(shutil.copytree(folders['lower_case'], tmp_path/what))
        with np.load(HERE/'recorded'/'21_fingerprint.npz') as arrays: image = arrays['lower_case/2/image'][0]
        geometry = Geometry(RECORDED['lower_case']['spacings'][2], (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), image.shape)
        write_image(np.full_like(image, value), geometry, copy/'imagesTr'/'case_2_0000.nii.gz')
        for n_workers in (0, 2):
            with pytest.raises(SegnbError, match=f'case_2.*{what}'): extract_fingerprint(Dataset(copy), n_workers)


def test_hippocampus():
    folder = REAL/'Task004_Hippocampus'
    if not folder.is_dir(): pytest.skip(f'no {folder}; set SEGNB_REAL_DATA')
    ours = extract_fingerprint(Dataset(folder))
    target = target_spacing(ours.spacings, ours.shapes)
    assert len(ours.shapes) == 200 and ours.intensities is None and min(ours.size_reductions) > .9
    assert target.tolist() == [1, 1, 1] and median_shape(ours.spacings, ours.shapes, target).tolist() == [36, 50, 35]


def copy_of(folder, tmp_path): return Path(shutil.copytree(folder, tmp_path/folder.name))


class Counting(Dataset):
    def read(self, case): self.seen.append(case); return super().read(case)


def counting(folder):
    dataset = Counting(folder); dataset.seen = []
    return dataset


@pytest.mark.parametrize('n_workers', [0, 2])
def test_a_failed_run_goes_on(folders, tmp_path, n_workers):
    copy, parts = copy_of(folders['two_channels'], tmp_path), tmp_path/'deep'/'parts'
    whole = extract_fingerprint(Dataset(copy), 0)
    label = copy/'labelsTr'/'case_3.nii.gz'
    label.rename(tmp_path/'away')
    with pytest.raises(SegnbError, match='case_3'): extract_fingerprint(Dataset(copy), n_workers, resume=parts)
    (tmp_path/'away').rename(label)
    left = {f.stem for f in parts.iterdir()}
    assert left <= {'case_0', 'case_1', 'case_2'} and (n_workers or len(left) == 3)
    again = counting(copy)
    assert extract_fingerprint(again, 0, resume=parts) == whole and set(again.seen) == {'case_0', 'case_1', 'case_2', 'case_3'} - left
    assert not parts.exists()


def test_stale_and_damaged_parts_are_made_again(folders, tmp_path):
    from segnb.fingerprint import _measure_or_recall
    copy, parts = copy_of(folders['two_channels'], tmp_path), tmp_path/'parts'
    parts.mkdir()
    for case in Dataset(copy).cases: _measure_or_recall(case, Dataset(copy), True, parts)
    (parts/'case_0.npz').write_bytes(b'')
    (parts/'case_1.npz').write_bytes(b'PK' + bytes(50))
    os.utime(copy/'labelsTr'/'case_2.nii.gz', ns=(1, 1))
    (parts/'case_9.npz').write_bytes(b'of another run')
    again = counting(copy)
    assert extract_fingerprint(again, 0, resume=parts) == extract_fingerprint(Dataset(folders['two_channels']), 0)
    assert again.seen == ['case_0', 'case_1', 'case_2']
    assert [f.name for f in parts.iterdir()] == ['case_9.npz']


def test_parts_without_samples_do_not_serve_where_samples_are_wanted(folders, tmp_path):
    from segnb.fingerprint import _measure_or_recall
    data, parts = Dataset(folders['no_ct']), tmp_path/'parts'
    parts.mkdir()
    for case in data.cases: _measure_or_recall(case, data, False, parts)
    assert extract_fingerprint(data, 0, resume=parts, histograms=True).histograms is not None


def test_without_intensities_no_label_is_read_but_each_must_be_there(folders, tmp_path):
    copy = copy_of(folders['no_ct'], tmp_path)
    quick = counting(copy)
    assert same(extract_fingerprint(quick, 0), RECORDED['no_ct']) and quick.seen == []
    label = copy/'labelsTr'/'case_1.nii.gz'
    geometry = Geometry((1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), (3, 4, 5))
    write_label_map(np.zeros((3, 4, 5), np.int16), geometry, label)
    with pytest.raises(SegnbError, match='case_1.*shape'): extract_fingerprint(Dataset(copy), 0)
    label.unlink()
    for n_workers in (0, 2):
        with pytest.raises(SegnbError, match='case_1'): extract_fingerprint(Dataset(copy), n_workers)


def test_ignored_voxels_are_no_foreground(tmp_path):
    rng, folder = np.random.default_rng(5), tmp_path/'task'
    for sub in ('imagesTr', 'labelsTr'): (folder/sub).mkdir(parents=True)
    image, seg = rng.normal(50, 9, (6, 7, 8)).astype(np.float32), rng.choice([0, 3, 7, 9], (6, 7, 8))
    geometry = Geometry((1, 1, 1), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), seg.shape)
    write_image(image, geometry, folder/'imagesTr'/'a_0000.nii.gz')
    write_label_map(seg.astype(np.int16), geometry, folder/'labelsTr'/'a.nii.gz')
    (folder/'dataset.json').write_text(json.dumps({'channel_names': {'0': 'CT'}, 'file_ending': '.nii.gz',
                                                   'labels': {'background': 0, 'liver': 3, 'tumour': 7, 'ignore': 9}}))
    ours = extract_fingerprint(Dataset(folder), 0)
    assert ours.labels == (1, 2)
    assert ours.intensities[0] == intensity_statistics(image[(seg == 3) | (seg == 7)][::10])


@pytest.mark.parametrize('seed', range(6))
def test_slabs_change_nothing(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    data, seg = rng.normal(size=(2, 9, 700, 500)).astype(np.float32), rng.integers(0, 3, (9, 700, 500)) * (rng.random((9, 1, 1)) < .7)
    step = int(rng.integers(1, 14))
    for view in ((data, seg), (data[:, 1:, 3:-2, 5:], seg[1:, 3:-2, 5:])):
        assert np.array_equal(foreground_intensities(*view, step=step), np.stack([c[view[1] > 0][::step] for c in view[0]]))
        assert np.array_equal(foreground_intensities(*view, step=step, ignore=2), np.stack([c[view[1] == 1][::step] for c in view[0]]))


@pytest.mark.parametrize('n', [1, 2, 3, 4, 199, 200, 201, 100_000])
def test_statistics_are_numpys_to_the_last_bit(n):
    pool = np.random.default_rng(n).normal(1000, 300, n).astype(np.float32)
    ours, before = intensity_statistics(pool), pool.copy()
    low, high = np.percentile(pool.astype(np.float64), (.5, 99.5))
    known = pool.mean(), pool.std(), np.median(pool), pool.min(), pool.max(), low, high
    assert [ours[k] for k in STATISTICS] == [float(v) for v in known] and np.array_equal(pool, before)


@pytest.mark.parametrize('pool', [np.zeros(5), np.arange(-1000, 3000), np.random.default_rng(0).normal(0, 1e-3, 5000),
                                  np.r_[np.random.default_rng(1).normal(40, 9, 5000).round(), 3000, -1000]])
def test_histograms_count_every_value_once(pool):
    pool = pool.astype(np.float32)
    s = intensity_statistics(pool)
    h = intensity_histogram(pool, s)
    assert sum(h['counts']) + h['below'] + h['above'] == len(pool) and 1 <= len(h['counts']) <= 200
    end = h['start'] + h['width'] * len(h['counts'])
    assert h['start'] <= s['percentile_00_5'] and end >= s['percentile_99_5'] and h['below'] + h['above'] <= .02 * len(pool)


def test_files_without_histograms_are_read(tmp_path):
    ours = extract_fingerprint(Dataset(HERE.parent/'data_samples'/'Task101_PhantomCT'))
    ours.save(tmp_path/'f.json')
    assert Fingerprint.load(tmp_path/'f.json') == ours and ours.histograms is not None
    older = {k: v for k, v in ours.to_dict().items() if k != 'histograms'}
    assert Fingerprint.from_dict(older).intensities == ours.intensities and Fingerprint.from_dict(older).histograms is None


def test_every_fingerprint_has_a_page():
    drawn = [Fingerprint([(1, 1, 1)], [(3, 4, 5)], ('MR',), (1,)),
             extract_fingerprint(Dataset(HERE.parent/'data_samples'/'Task102_PhantomMR'), histograms=True),
             extract_fingerprint(Dataset(HERE.parent/'data_samples'/'Task101_PhantomCT'))]
    for f in drawn:
        page = fingerprint_page(f)
        page.canvas.draw()
        assert sum(bool(a.get_title()) for a in page.axes) == 4 + len(f.histograms or {})


@pytest.mark.filterwarnings('ignore')
def test_a_resumed_fingerprint_sees_voxels_beside_their_header(tmp_path):
    import SimpleITK as sitk
    from segnb import fingerprint
    old = HERE.parent/'data_samples'/'Task101_PhantomCT'
    told = json.loads((old/'dataset.json').read_text())
    case = Dataset(old).cases[0]
    for part in ('imagesTr', 'labelsTr'):
        (tmp_path/part).mkdir()
        for file in (old/part).glob(f'{case}*.nii.gz'): sitk.WriteImage(sitk.ReadImage(str(file)), str(tmp_path/part/file.name.replace('.nii.gz', '.mhd')))
    (tmp_path/'dataset.json').write_text(json.dumps({k: v for k, v in told.items() if k not in ('training', 'test', 'file_ending')}))
    dataset = Dataset(tmp_path)
    before = fingerprint._source(case, dataset, True)
    voxels = next((tmp_path/'imagesTr').glob('*.*raw'))
    voxels.write_bytes(voxels.read_bytes()[:-1] + b'\1\2')
    assert fingerprint._source(case, dataset, True) != before
