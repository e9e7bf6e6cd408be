"""Data sets from elsewhere: beside nnU-Net 1.7.1's conversion, without links, interrupted, in mixed formats, and from real data."""
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import segnb.dataset as module
from segnb.dataset import (Dataset, DatasetError, check_dataset, convert_brats, convert_decathlon, convert_nnunet, convert_pairs, convert_pictures, find_cases)
from segnb.image import SegnbError

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location('recorder', HERE/'record'/'14_dataset.py')
recorder = importlib.util.module_from_spec(spec); spec.loader.exec_module(recorder)
RECORDED = json.loads((HERE/'recorded'/'14_dataset.json').read_text())['decathlon']
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.resolve().parents[1]/'shared'/'data'))


def tree(folder):
    "Names, contents and times of change of all files"
    return {str(f.relative_to(folder)): (f.lstat().st_mtime_ns, hashlib.sha256(f.read_bytes()).hexdigest()) for f in Path(folder).rglob('*') if f.is_file()}


def brats(folder, endings=('.nii.gz', '.nii')):
    "Two patients, the second with the odd name of patient 355"
    rng = np.random.default_rng(0)
    for i, (name, seg) in enumerate((('BraTS20_Training_001', 'BraTS20_Training_001_seg'), ('BraTS20_Training_355', 'W39_1998.09.19_Segm'))):
        (folder/name).mkdir(parents=True)
        for kind in ('Flair', 'T1', 'T1CE', 'T2') if i else ('flair', 't1', 't1ce', 't2'):
            recorder.write(folder/name/f'{name}_{kind}{endings[i]}', rng.normal(100, 9, (6, 7, 8)).astype(np.float32))
        recorder.write(folder/name/f'{seg}{endings[i]}', rng.choice([0, 1, 2, 4], (6, 7, 8)).astype(np.uint8))
    (folder/'name_mapping.csv').write_text('a,b')
    return folder


def test_decathlon_as_the_original(tmp_path):
    source = recorder.decathlon(tmp_path/'Task03_Small')
    before = tree(source)
    made = convert_decathlon(source, tmp_path/'raw')
    assert [made.folder.name] == RECORDED['folder'] and recorder.seen(made.folder) == RECORDED['files']
    assert tree(source) == before and made.json['licence'] == 'none'
    check_dataset(made, 0)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write into read-only folders')
def test_read_only_source(tmp_path):
    source = recorder.decathlon(tmp_path/'Task03_Small')
    for f in [*source.rglob('*'), source]: f.chmod(0o555 if f.is_dir() else 0o444)
    try: check_dataset(convert_decathlon(source, tmp_path/'raw'), 0)
    finally:
        for f in [source, *source.rglob('*')]: f.chmod(0o755)


def refuse(*args, **kw): raise OSError('not on this disk')


@pytest.mark.parametrize('missing', [(), ('symlink',), ('symlink', 'link')])
@pytest.mark.parametrize('regions', [False, True])
def test_the_same_data_set_by_every_kind_of_link(tmp_path, monkeypatch, missing, regions):
    source = brats(tmp_path/'source')
    before = tree(source)
    for name in missing: monkeypatch.setattr(os, name, refuse)
    made = convert_brats(source, tmp_path/'Task082_BraTS', regions=regions)
    check_dataset(made, 0)
    assert made.cases == ('BraTS20_Training_001', 'BraTS20_Training_355') and tree(source) == before
    assert len([f for f in made.folder.rglob('*') if f.is_file()]) == (1 if len(missing) == 2 else 11)
    assert ('dataset' in made.json) == (len(missing) == 2)
    for case in made.cases:
        image = [sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for k in ('t1', 't1ce', 't2', 'flair')
                 for f in (source/case).iterdir() if f.name.lower().split('.')[0].endswith(f'_{k}')]
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(made.label_file(case))))
        read = made.read(case)
        assert np.array_equal(read.image, image) and np.array_equal(made.labels.decode(read.label), label) and set(np.unique(read.label)) == {0, 1, 2, 3}
    assert made.labels.n_outputs == (3 if regions else 4)


def test_a_demanded_link_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'symlink', refuse)
    with pytest.raises(DatasetError, match="takes no symlink.*link='reference'"): convert_brats(brats(tmp_path/'s'), tmp_path/'Task082_X', link='symlink')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['s']


@pytest.mark.parametrize('where', ['parallel_map', 'write_json', '_link'])
def test_interrupted(tmp_path, monkeypatch, where):
    source = recorder.decathlon(tmp_path/'Task03_Small')
    def interrupt(*args, **kw): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, where, interrupt)
        with pytest.raises(KeyboardInterrupt): convert_decathlon(source, tmp_path/'raw')
    assert list((tmp_path/'raw').iterdir()) == []
    assert recorder.seen(convert_decathlon(source, tmp_path/'raw').folder) == RECORDED['files']


def test_killed(tmp_path):
    source = recorder.decathlon(tmp_path/'Task03_Small')
    code = (f"import os, segnb.dataset as d; d.write_json = lambda *a: os._exit(9); d.convert_decathlon({str(source)!r}, {str(tmp_path/'raw')!r}, n_workers=0)")
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert not (tmp_path/'raw'/'Task003_Small').exists()                      # only a hidden folder without dataset.json is left
    assert recorder.seen(convert_decathlon(source, tmp_path/'raw').folder) == RECORDED['files']


def test_targets_that_are_refused(tmp_path):
    source = recorder.decathlon(tmp_path/'Task03_Small')
    (tmp_path/'Task007_Full').mkdir(); (tmp_path/'Task007_Full'/'mine.txt').touch(); (tmp_path/'Task008_File').touch(); (tmp_path/'Task009_Empty').mkdir()
    for out in ('Task007_Full', 'Task008_File'):
        with pytest.raises(DatasetError, match='exists already'): convert_decathlon(source, tmp_path/out)
    assert convert_decathlon(source, tmp_path/'Task009_Empty').cases == ('p_0', 'p_1')
    for out in (source/'Task010_In', source):
        with pytest.raises(DatasetError, match='inside the source|exists already'): convert_decathlon(source, out)
    with pytest.raises(DatasetError, match='inside the source'):
        convert_pairs(tmp_path/'Task009_Empty'/'imagesTr', source/'labelsTr', source/'labelsTr'/'new', channels=('T1', 'T2', 'FLAIR'), n_workers=0)


def series(folder, array):
    "A DICOM series of one slice per file"
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter(); writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(array):
        image = sitk.GetImageFromArray(plane.astype(np.int16)); image.SetSpacing((.8, .8))
        for tag, value in {'0008|0060': 'CT', '0008|0016': '1.2.840.10008.5.1.4.1.1.2', '0008|0018': f'1.2.3.4.5.{z + 1}', '0020|000d': '1.2.3.4', '0020|000e': '1.2.3.4.5',
                           '0020|0013': str(z + 1), '0020|0032': f'1\\2\\{3 + 2.5 * z}', '0020|0037': '1\\0\\0\\0\\1\\0', '0018|0050': '2.5', '0020|0052': '1.2.3.9'}.items(): image.SetMetaData(tag, value)
        writer.SetFileName(str(folder/f'{z:03d}.dcm')); writer.Execute(image)
    return folder


def test_mixed_formats_and_a_dicom_series(tmp_path):
    folder, rng = tmp_path/'Task011_Mixed', np.random.default_rng(1)
    (folder/'imagesTr').mkdir(parents=True); (folder/'labelsTr').mkdir()
    arrays = {c: np.round(rng.normal(100, 20, (6, 20, 16))).astype(np.int16) for c in 'abcd'}
    for c, ending in (('a', '.nii.gz'), ('b', '.nrrd'), ('c', '.mha')): recorder.write(folder/'imagesTr'/f'{c}_0000{ending}', arrays[c])
    series(folder/'imagesTr'/'d_0000', arrays['d'])
    for c, ending in zip('abcd', ('.nrrd', '.nii.gz', '.nii', '.mha')): recorder.write(folder/'labelsTr'/f'{c}{ending}', (arrays[c] > 100).astype(np.uint8))
    (folder/'dataset.json').write_text(json.dumps({'modality': {'0': 'CT'}, 'labels': {'0': 'background', '1': 'organ'}}))
    data = Dataset(folder)
    check_dataset(data, 0)
    assert data.cases == tuple('abcd') and list(find_cases(folder/'imagesTr', 1, None)) == list('abcd')
    for c in 'abcd': assert np.array_equal(data.read(c).image[0], arrays[c]) and np.array_equal(data.read(c).label, arrays[c] > 100)
    again = convert_nnunet(folder, tmp_path/'out')                            # links to files and to the folder
    for c in 'abcd': assert np.array_equal(again.read(c).image[0], arrays[c])
    assert (again.folder/'imagesTr'/'d_0000').is_symlink()
    placed = convert_nnunet(folder, tmp_path/'Task012_Placed', link='reference')
    for c in 'abcd': assert np.array_equal(placed.read(c).image[0], arrays[c]) and np.array_equal(placed.read(c).label, arrays[c] > 100)
    series(tmp_path/'scans'/'p1'/'ct', arrays['d']); recorder.write(tmp_path/'truth.nii.gz', (arrays['d'] > 100).astype(np.uint8))
    (tmp_path/'truth').mkdir(); (tmp_path/'truth.nii.gz').rename(tmp_path/'truth'/'p1.nii.gz')
    paired = convert_pairs(tmp_path/'scans', tmp_path/'truth', tmp_path/'Task013_Pairs', '{case}/ct', channels=('CT',), n_workers=0)  # a folder per series
    assert paired.cases == ('p1',) and np.array_equal(paired.read('p1').image[0], arrays['d'])
    recorder.write(folder/'imagesTr'/'b_0000.mha', arrays['b'])
    with pytest.raises(DatasetError, match='case b.*several files of one name.*b_0000.nrrd, b_0000.mha'): check_dataset(data, 0)


def test_files_anywhere(tmp_path, monkeypatch):
    "v2's key `dataset`: relative to dataset.json, absolute, and by a variable"
    source = recorder.make(tmp_path/'elsewhere')
    monkeypatch.setenv('SCANS', str(source))
    folder = tmp_path/'Dataset012_Placed'; folder.mkdir()
    placed = {'x': {'images': ['../elsewhere/imagesTr/c0_0000.nii.gz', str(source/'imagesTr'/'c0_0001.nii.gz')], 'label': '$SCANS/labelsTr/c0.nii.gz'}}
    (folder/'dataset.json').write_text(json.dumps({'channel_names': {'0': 'T1', '1': 'T2'}, 'labels': {'background': 0, 'organ': 1, 'lesion': 2}, 'file_ending': '.nii.gz',
                                                   'numTraining': 1, 'dataset': placed, 'test': {'y': {'images': [f'../elsewhere/imagesTs/c3_{i:04d}.nii.gz' for i in range(2)]}}}))
    data = Dataset(folder)
    check_dataset(data, 0)
    assert (data.cases, data.test_cases) == (('x',), ('y',)) and data.read('y').label is None
    assert np.array_equal(data.read('x').image, Dataset(source).read('c0').image)
    (source/'labelsTr'/'c0.nii.gz').unlink()
    with pytest.raises(DatasetError, match='label map is missing'): check_dataset(data, 0)


def test_headers_with_their_voxels_beside_them_are_referenced(tmp_path):
    source = recorder.make(tmp_path/'Task013_Pair', '.mhd')
    recorder.description(source, file_ending='.mhd')
    made = convert_nnunet(source, tmp_path/'raw')
    assert np.array_equal(made.read('c1').image, Dataset(source).read('c1').image) and 'dataset' in made.json


def test_regions_ignore_and_gaps_reach_every_reader(tmp_path):
    folder = recorder.make(tmp_path/'Task014_Regions')
    for c in range(3): recorder.changed(folder/f'labelsTr/c{c}.nii.gz', lambda a: np.array([0, 64, 200], np.uint8)[a])
    recorder.changed(folder/'labelsTr/c0.nii.gz', recorder.put(255, (0, 0, 0)))
    recorder.description(folder, labels={'background': 0, 'organ': [64, 200], 'lesion': 200, 'ignore': 255}, regions_class_order=[64, 200])
    data = Dataset(folder)
    check_dataset(data, 0)
    label = data.read('c0').label
    assert set(np.unique(label)) == {0, 1, 2, 3} and label[0, 0, 0] == data.labels.ignore == 3 and data.labels.n_outputs == 2
    recorder.changed(folder/'labelsTr/c0.nii.gz', recorder.put(65, (0, 0, 0)))
    with pytest.raises(SegnbError, match='case c0, file .*c0.nii.gz.*65 in 1 voxels'): data.read('c0')


def test_each_file_is_read_once(tmp_path, monkeypatch):
    data, read = Dataset(recorder.make(tmp_path/'Task015_Once')), []
    for name in ('read_image', 'read_label_map'):
        monkeypatch.setattr(module, name, lambda file, own=getattr(module, name), **kw: (read.append(file), own(file, **kw))[1])
    check_dataset(data, 0)
    assert len(read) == len(set(read)) == 11


def test_numbers_of_pictures_in_colour_and_grey(tmp_path):
    rng = np.random.default_rng(2)
    for d in ('photos', 'masks'): (tmp_path/d).mkdir()
    for c in 'ab':
        sitk.WriteImage(sitk.GetImageFromArray(rng.integers(0, 255, (9, 12)).astype(np.uint8)), str(tmp_path/'photos'/f'{c}.tif'))
        sitk.WriteImage(sitk.GetImageFromArray(rng.integers(0, 3, (9, 12)).astype(np.uint8)), str(tmp_path/'masks'/f'{c}.png'))
    made = convert_pictures(tmp_path/'photos', tmp_path/'masks', tmp_path/'Task016_Grey', n_workers=0)
    assert made.channels == ('grey',) and made.read('b').image.shape == (1, 1, 9, 12) and made.labels.names[2] == 'label 2'
    check_dataset(made, 0)
    for file, array, why in (('photos/b.tif', np.ones((9, 12, 3), np.uint8), 'case b.*3 channel.*most pictures have 1|case a.*1 channel.*most pictures have 3'),
                             ('photos/b.tif', np.ones((9, 12, 4), np.uint8), 'transparen'), ('masks/b.png', np.ones((9, 12, 3), np.uint8), 'case b.*one number per voxel'),
                             ('masks/b.png', np.ones((9, 13), np.uint8), 'differ in size'), ('masks/b.png', np.full((9, 12), 7, np.uint8), 'must be declared; found 0, 1, 2, 7')):
        kept = (tmp_path/file).read_bytes()
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(tmp_path/file))
        with pytest.raises(DatasetError, match=why): convert_pictures(tmp_path/'photos', tmp_path/'masks', tmp_path/'Task017_X', n_workers=0)
        (tmp_path/file).write_bytes(kept)
    assert not (tmp_path/'Task017_X').exists()


def test_a_pattern_that_fits_nothing_and_a_description_that_is_none(tmp_path):
    source = recorder.make(tmp_path/'source')
    with pytest.raises(DatasetError, match=r'no image fits the pattern; found \d+ files, such as .*; expected \{case\}_ct.nii.gz'):
        convert_pairs(source/'imagesTr', source/'labelsTr', tmp_path/'Task018_X', pattern='{case}_ct.nii.gz', channels=('T1',), n_workers=0)
    for text in ('5', 'null', '[]', '"a"'):
        (source/'dataset.json').write_text(text)
        for convert in (convert_decathlon, convert_nnunet):
            with pytest.raises(DatasetError, match='must hold an object'): convert(source, tmp_path/'Task019_X')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


@pytest.mark.parametrize('key, value, why', [('file_ending', 'nii.gz', 'with the dot'), ('header', 'maybe', 'refuse, qform or sform')])
def test_values_that_mean_nothing(key, value, why, tmp_path):
    source = recorder.make(tmp_path/'source')
    (source/'dataset.json').write_text(json.dumps({**json.loads((source/'dataset.json').read_text()), key: value}))
    with pytest.raises(DatasetError, match=f'"{key}" has a value that means nothing; found {value}; expected .*{why}'): Dataset(source)


def test_pairs_that_are_none(tmp_path):
    source = recorder.make(tmp_path/'source')
    images, labels, told = source/'imagesTr', source/'labelsTr', dict(channels=('T1', 'T2'), n_workers=0)
    for name in ('c0_0001', 'c9_0000'): shutil.copy(images/'c0_0000.nii.gz', images/f'{name}.nii.gz')
    (labels/'c1.nii.gz').rename(labels/'c7.nii.gz')
    with pytest.raises(DatasetError) as error: convert_pairs(images, labels, tmp_path/'Task018_X', **told)
    assert error.value.findings == ('case c9: no file for channel 0001 (T2)', 'c7.nii.gz: no image of case c7', 'case c1: no label map that fits {case}.nii.gz',
                                    'case c9: no label map that fits {case}.nii.gz')
    (labels/'c7.nii.gz').rename(labels/'c1.nii.gz')
    plan = convert_pairs(images, labels, tmp_path/'Task018_X', channels={'0000': 'T1'}, unlabelled='test', n_workers=0, dry_run=True)  # one channel of two is wanted
    assert (list(plan.train), list(plan.test)) == (['c0', 'c1', 'c2'], ['c9']) and len(plan.links()) == 7 and '3 files not used' in repr(plan)


@pytest.mark.skipif(not REAL.is_dir(), reason=f'no real data in {REAL} (set SEGNB_REAL_DATA)')
@pytest.mark.parametrize('task', sorted(f.parent.name for f in REAL.glob('Task*/dataset.json')))
def test_real_data_sets_by_links_and_by_references(task, tmp_path):
    source = Dataset(REAL/task)
    by_link, placed = convert_nnunet(REAL/task, tmp_path), convert_nnunet(REAL/task, tmp_path/f'{task}_placed', link='reference')
    case = source.cases[-1]
    truth = source.read(case)
    for made in (by_link, placed):
        read = made.read(case)
        assert made.cases == source.cases and read.geometry == truth.geometry
        assert np.array_equal(read.image, truth.image, equal_nan=True) and np.array_equal(read.label, truth.label)
