"""Data sets beside nnU-Net 1.7.1's integrity check (recorded by tests/record/14_dataset.py), more faults, and real data sets."""
import importlib.util
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segnb.dataset import Dataset, DatasetError, check_dataset, find_cases
from segnb.image import SegnbError

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location('recorder', HERE/'record'/'14_dataset.py')
recorder = importlib.util.module_from_spec(spec); spec.loader.exec_module(recorder)
VERDICTS = json.loads((HERE/'recorded'/'14_dataset.json').read_text())['verdicts']
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.resolve().parents[1]/'shared'/'data'))

# what segnb must say: the file, and a word for the fault
EXPECTED = {
    'missing channel': ('c1_0001.nii.gz', 'is missing'), 'missing label': ('labelsTr/c1.nii.gz', 'label map is missing'),
    'missing test channel': ('c3_0001.nii.gz', 'is missing'), 'image of no case': ('c9_0000.nii.gz', 'belongs to no case'),
    'label of no case': ('c9.nii.gz', 'belongs to no case'), 'shape of a channel': ('c1_0001.nii.gz', 'shape'),
    'shape of the label': ('labelsTr/c1.nii.gz', 'shape'), 'spacing of the label': ('labelsTr/c1.nii.gz', 'spacing'),
    'origin of a channel': ('c1_0001.nii.gz', 'origin'), 'direction of the label': ('labelsTr/c1.nii.gz', 'direction'),
    'undeclared label': ('labelsTr/c1.nii.gz', '3 in 1 voxels'), 'label between whole numbers': ('labelsTr/c1.nii.gz', 'whole numbers'),
    'NaN in a label': ('labelsTr/c1.nii.gz', 'nan'), 'NaN in an image': ('c1_0001.nii.gz', 'NaN'),
    'infinity in an image': ('c1_0001.nii.gz', 'infinite, the first at (z, y, x) = (3, 6, 6)'), 'image of zeros': ('c1_0000.nii.gz', 'zero everywhere'),
    'image cut in half': ('c1_0001.nii.gz', 'cut short'), 'image without its last bytes': ('c1_0001.nii.gz', 'cut short'),
    'no training cases': ('dataset.json', 'no training cases'), 'case listed twice': ('dataset.json', 'listed twice'),
    'gap in the labels': ('labelsTr/c1.nii.gz', 'does not declare; found 2 in'), 'no dataset.json': ('Task001_Small', 'dataset.json is missing'),
    'broken dataset.json': ('dataset.json', 'line 1'), 'no channels declared': ('dataset.json', '"modality" is missing')}


def test_all_recorded_faults_are_expected():
    assert set(VERDICTS) == {'nothing', *EXPECTED} == set(recorder.SPOIL)


def test_a_sound_data_set_passes(tmp_path):
    assert VERDICTS['nothing'] is None
    data = Dataset(recorder.make(tmp_path/'Task001_Small'))
    check_dataset(data)
    assert (data.cases, data.test_cases, data.channels) == (('c0', 'c1', 'c2'), ('c3',), ('T1', 'T2'))
    assert data.read('c1').image.shape == (2, 6, 20, 16) and data.read('c3').label is None
    assert pickle.loads(pickle.dumps(data)).cases == data.cases


@pytest.mark.parametrize('fault', list(EXPECTED))
def test_every_fault_is_named(fault, tmp_path):
    folder = recorder.make(tmp_path/'Task001_Small')
    recorder.SPOIL[fault](folder)
    with pytest.raises(SegnbError) as error: check_dataset(Dataset(folder), n_workers=0)
    for word in EXPECTED[fault]: assert word in str(error.value), str(error.value)
    assert fault == 'gap in the labels' or 'case c0' not in str(error.value), 'a sound case is accused'


def test_all_findings_at_once_with_any_number_of_workers(tmp_path):
    folder = recorder.make(tmp_path/'Task001_Small')
    for fault in ('missing label', 'image of no case'): recorder.SPOIL[fault](folder)
    recorder.changed(folder/'labelsTr/c0.nii.gz', recorder.put(9))
    recorder.changed(folder/'imagesTr/c2_0000.nii.gz', recorder.put(np.nan))
    recorder.cut(folder/'imagesTs/c3_0000.nii.gz', .7)
    seen = []
    for n_workers in (0, 2):
        with pytest.raises(DatasetError) as error: check_dataset(Dataset(folder), n_workers)
        seen.append(error.value.findings)
    assert seen[0] == seen[1] and len(seen[0]) == 5, seen[0]


@pytest.mark.parametrize('ending', ['.nrrd', '.mha', '.nii'])
def test_other_formats(ending, tmp_path):
    folder = recorder.make(tmp_path/'Task001_Small', ending)
    recorder.description(folder, file_ending=ending)
    data = Dataset(folder)
    check_dataset(data, 0)
    recorder.cut(folder/f'imagesTr/c1_0000{ending}', .6)
    with pytest.raises(DatasetError, match=f'c1_0000{ending}'): check_dataset(data, 0)


def picture(file, array): sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(file))


def pictures(folder):
    rng = np.random.default_rng(0)
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True)
    for c in 'ab':
        picture(folder/'imagesTr'/f'{c}_0000.png', rng.integers(1, 255, (12, 9, 3)).astype(np.uint8))
        picture(folder/'labelsTr'/f'{c}.png', rng.integers(0, 2, (12, 9)).astype(np.uint8))
    (folder/'dataset.json').write_text(json.dumps({'channel_names': {'0': 'R', '1': 'G', '2': 'B'}, 'labels': {'background': 0, 'cell': 1}, 'file_ending': '.png', 'numTraining': 2}))
    return folder


def test_colour_pictures(tmp_path):
    data = Dataset(pictures(tmp_path/'Task002_Cells'))
    check_dataset(data, 0)
    assert data.cases == ('a', 'b') and data.read('a').image.shape == (3, 1, 12, 9) and data.read('a').geometry.spacing == (999, 1, 1)
    picture(data.folder/'imagesTr/a_0000.png', np.zeros((12, 9, 4), np.uint8))
    picture(data.folder/'imagesTr/b_0000.png', np.ones((12, 9), np.uint8))
    with pytest.raises(DatasetError) as error: check_dataset(data, 0)
    assert len(error.value.findings) == 2 and 'transparency' in str(error.value) and 'wrong number of channels; found 1; expected 3' in str(error.value)


def test_masks_of_0_and_255_are_explained(tmp_path):
    data = Dataset(pictures(tmp_path/'Task002_Cells'))
    picture(data.folder/'labelsTr/a.png', np.where(np.eye(12, 9), 255, 0).astype(np.uint8))
    with pytest.raises(DatasetError, match=r'a.png.*255 in 9 voxels.*only \[0, 1\]'): check_dataset(data, 0)


def test_folders_for_prediction(tmp_path):
    folder = recorder.make(tmp_path/'Task001_Small')
    assert {c: [f.name for f in files] for c, files in find_cases(folder/'imagesTs', 2).items()} == {'c3': ['c3_0000.nii.gz', 'c3_0001.nii.gz']}
    recorder.SPOIL['missing channel'](folder)
    with pytest.raises(DatasetError, match='case c1: c1_0001.nii.gz is missing') as error: find_cases(folder/'imagesTr', 2)
    assert len(error.value.findings) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason=f'no real data in {REAL} (set SEGNB_REAL_DATA)')
@pytest.mark.parametrize('task', sorted(f.parent.name for f in REAL.glob('Task*/dataset.json')))
def test_real_data_sets_pass(task):
    data = Dataset(REAL/task)
    check_dataset(data, 0)
    case = data.read(data.cases[0])
    assert len(data.cases) == data.json['numTraining'] and case.image.shape[1:] == case.label.shape == case.geometry.shape
