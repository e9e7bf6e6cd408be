"""Fingerprints beside nnU-Net 1.7.1 (recorded by tests/record/21_fingerprint.py), and of real data where there is some."""
import json, os
from pathlib import Path

import numpy as np
import pytest

from segnb.dataset import Dataset
from segnb.fingerprint import (STATISTICS, Fingerprint, FingerprintError, collects_intensities, extract_fingerprint,
                               foreground_intensities, intensity_statistics)
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
    import shutil
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
