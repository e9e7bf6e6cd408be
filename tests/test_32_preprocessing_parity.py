"""Whole preprocessing beside nnU-Net 1.7.1 (recorded by tests/record/32_preprocessing.py); interruption, workers, refusals."""
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import Geometry, SegnbError, write_image, write_label_map
from segnb.planning import plan_experiment
from segnb.preprocessing import PreprocessedCase, PreprocessingError, load_preprocessed, preprocess_case, preprocess_dataset
from segnb.workers import read_json, write_json

HERE = Path(__file__).parent


def recorded(name):
    with np.load(HERE/'recorded'/f'32_preprocessing_{name}.npz') as file: return {k: file[k] for k in file.files}


def write_task(folder, r):
    "The recorded inputs as a raw data set"
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True)
    (folder/'dataset.json').write_text(str(r['dataset.json']))
    for case in ('c0', 'c1', 'c2'):
        geometry = Geometry(r[f'{case}/spacing'], (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), r[f'{case}/seg'].shape)
        for c, channel in enumerate(r[f'{case}/data']): write_image(channel[None].astype(np.float32), geometry, folder/'imagesTr'/f'{case}_{c:04d}.nii.gz')
        write_label_map(r[f'{case}/seg'], geometry, folder/'labelsTr'/f'{case}.nii.gz')
    return Dataset(folder)


def planned(dataset): return plan_experiment(extract_fingerprint(dataset, 0))


@pytest.mark.parametrize('name', ['ct', 'mr', 'thick'])
def test_a_task_from_raw_files_to_stored_arrays(name, tmp_path):
    r = recorded(name)
    dataset = write_task(tmp_path/'raw', r)
    plans = planned(dataset)
    assert np.allclose(plans.configuration('3d_fullres').spacing, r['spacing']) and list(plans.transpose_forward) == list(r['transpose_forward'])
    assert list(plans.normalization_schemes) == list(r['schemes']) and list(plans.use_mask_for_norm) == list(r['use_mask'])
    assert preprocess_dataset(dataset, plans, tmp_path/'out', n_workers=0) == dataset.cases
    for case, stored in load_preprocessed(tmp_path/'out'/'3d_fullres').items():
        theirs = r[f'{case}/new_data']
        assert stored.data.dtype == np.float32 and stored.data.shape == theirs.shape
        assert np.abs(stored.data - theirs).max() <= 1e-5 * np.abs(theirs).max(), case
        assert np.array_equal(stored.seg, r[f'{case}/new_seg']), case
        assert [list(b) for b in stored.properties['bbox']] == r[f'{case}/bbox'].tolist()
        assert list(stored.class_locations) == list(dataset.labels.foreground)
        for label, voxels in stored.class_locations.items(): assert np.array_equal(voxels, r[f'{case}/locations_{label}']), (case, label)


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    dataset = write_task(tmp_path_factory.mktemp('task')/'raw', recorded('mr'))
    return dataset, planned(dataset)


def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_any_number_of_workers_writes_the_same_bytes(task, tmp_path):
    for n in (0, 1, 2): preprocess_dataset(*task, tmp_path/str(n), n_workers=n)
    assert contents(tmp_path/'0') == contents(tmp_path/'1') == contents(tmp_path/'2')


def test_a_killed_run_resumes_and_leaves_no_half_files(task, tmp_path):
    dataset, plans = task
    plans.save(tmp_path/'p.json')
    code = ('import sys, time, segnb.preprocessing as p; from segnb.dataset import Dataset; from segnb.planning import Plans; save = p.save_preprocessed\n'
            'def slow(*a):\n    done = save(*a); print("stored", flush=True); time.sleep(60)\n    return done\n'
            'p.save_preprocessed = slow; p.preprocess_dataset(Dataset(sys.argv[1]), Plans.load(sys.argv[2]), sys.argv[3], n_workers=0)')
    run = subprocess.Popen([sys.executable, '-c', code, str(dataset.folder), str(tmp_path/'p.json'), str(tmp_path/'out')], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == 'stored\n'
    run.send_signal(signal.SIGKILL); run.wait()
    first = tmp_path/'out'/'3d_fullres'/'c0_data.npy'
    made = first.stat().st_mtime_ns
    (tmp_path/'out'/'3d_fullres'/'c1_data.npy').write_bytes(b'half a file')            # arrays without their JSON do not count
    half = tmp_path/'out'/'3d_fullres'/'.0123456789ab.c1.json'; half.write_text('{')                  # left by a kill while JSON is written
    assert list(load_preprocessed(tmp_path/'out'/'3d_fullres')) == ['c0']
    assert preprocess_dataset(dataset, plans, tmp_path/'out', n_workers=0) == ('c1', 'c2')
    assert first.stat().st_mtime_ns == made and preprocess_dataset(dataset, plans, tmp_path/'out', n_workers=0) == ()
    assert not half.exists() and not list((tmp_path/'out').rglob('.*'))             # what the killed run left is swept away
    preprocess_dataset(dataset, plans, tmp_path/'whole', n_workers=0)
    assert contents(tmp_path/'out') == contents(tmp_path/'whole')


def test_other_plans_and_other_cases_are_refused(task, tmp_path):
    dataset, plans = task
    preprocess_dataset(dataset, plans, tmp_path/'out', n_workers=0)
    full = plans.configuration('3d_fullres')
    coarser = replace(plans, configurations={'3d_fullres': replace(full, spacing=(3., 2., 2.))})
    with pytest.raises(PreprocessingError, match='other plans'): preprocess_dataset(dataset, coarser, tmp_path/'out')
    smaller_batch = replace(plans, configurations={'3d_fullres': replace(full, batch_size=full.batch_size + 3)})
    assert preprocess_dataset(dataset, smaller_batch, tmp_path/'out') == ()                  # a batch size changes no voxel
    (tmp_path/'out'/'3d_fullres'/'stranger.json').write_text('{}')
    with pytest.raises(PreprocessingError, match='stranger'): preprocess_dataset(dataset, plans, tmp_path/'out')
    with pytest.raises(PreprocessingError, match='other data'): preprocess_dataset(dataset, replace(plans, channels=('T2', 'T1')), tmp_path/'new')
    with pytest.raises(SegnbError, match='3d_fullres'): preprocess_dataset(dataset, plans, tmp_path/'new', ['3d_lowres'])


def test_a_repaired_file_is_done_again_and_a_damaged_one_is_named(task, tmp_path):
    dataset = Dataset(shutil.copytree(task[0].folder, tmp_path/'raw'))
    preprocess_dataset(dataset, task[1], tmp_path/'out', n_workers=0)
    image = tmp_path/'raw'/'imagesTr'/'c1_0000.nii.gz'
    os.utime(image, ns=(1, 1))
    assert preprocess_dataset(dataset, task[1], tmp_path/'out', n_workers=0) == ('c1',)
    image.write_bytes(image.read_bytes()[:400])
    for n in (0, 2):
        with pytest.raises(SegnbError, match='c1'): preprocess_dataset(dataset, task[1], tmp_path/'out', n_workers=n)


def test_notes_that_planning_left_in_dataset_json_stay(task, tmp_path):
    (tmp_path/'out').mkdir()
    write_json({'source': 'somewhere', 'name': 'old'}, tmp_path/'out'/'dataset.json')
    preprocess_dataset(*task, tmp_path/'out', n_workers=0)
    assert read_json(tmp_path/'out'/'dataset.json') == {'source': 'somewhere', **task[0].json}
    truth = tmp_path/'out'/'gt_segmentations'
    assert sorted(p.name for p in truth.iterdir()) == ['c0.nii.gz', 'c1.nii.gz', 'c2.nii.gz']
    assert (truth/'c0.nii.gz').read_bytes() == task[0].label_file('c0').read_bytes()


def test_one_case_inputs_unchanged_nan_and_what_is_refused(task):
    dataset, plans = task
    case = dataset.read('c0')
    image, label = case.image.copy(), case.label.copy()
    data, seg, properties = preprocess_case(image, label, case.geometry.spacing, plans, '3d_fullres')
    assert np.array_equal(image, case.image) and np.array_equal(label, case.label)
    json.dumps({k: v for k, v in properties.items() if k != 'class_locations'})
    inside = tuple(int(i) for i in np.argwhere(label == 1)[0])
    image[(0, *inside)] = np.nan
    holed = preprocess_case(image, label, case.geometry.spacing, plans, '3d_fullres')[0]
    image[(0, *inside)] = 0
    assert np.array_equal(holed, preprocess_case(image, label, case.geometry.spacing, plans, '3d_fullres')[0])     # NaN becomes 0
    unlabelled, area, properties = preprocess_case(case.image, None, case.geometry.spacing, plans, plans.configuration('3d_fullres'))
    assert 'class_locations' not in properties and np.array_equal(area < 0, seg < 0) and np.allclose(unlabelled, data, atol=1e-6)
    image[(0, *inside)] = np.inf
    for bad, spacing, word in ((image, (1, 1, 1), 'infinite'), (image[:1], (1, 1, 1), 'channels'), (case.image, (1, 0, 1), 'spacing'),
                               (case.image * 0, (1, 1, 1), 'empty'), (case.image, (.01, 1, 1), 'resampling')):
        with pytest.raises(SegnbError, match=word): preprocess_case(bad, None, spacing, plans, '3d_fullres', identifier='c0')


def test_a_case_travels_to_a_worker_without_its_arrays(task, tmp_path):
    import pickle
    preprocess_dataset(*task, tmp_path/'out', n_workers=0)
    case = load_preprocessed(tmp_path/'out'/'3d_fullres')['c0']
    case.data, case.properties
    assert len(pickle.dumps(PreprocessedCase(case.folder, case.case))) < 500
    assert isinstance(case.data, np.memmap) and isinstance(case.seg, np.memmap)
    with pytest.raises(PreprocessingError, match='no such folder'): load_preprocessed(tmp_path/'nowhere')
