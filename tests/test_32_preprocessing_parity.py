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
from segnb.labels import Labels
from segnb.preprocessing import (PreprocessedCase, PreprocessingError, estimate_case, load_preprocessed, preprocess_case, preprocess_dataset,
                                 preprocess_previous_stage, preprocessing_identity, previous_from_probabilities, previous_on_grid,
                                 save_preprocessed, verify_preprocessed)
from segnb.resampling import resample_label_map
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


@pytest.mark.parametrize('configuration', ['3d_fullres', '2d'])
@pytest.mark.parametrize('name', ['ct', 'mr', 'thick', 'aniso', 'many'])
def test_a_task_from_raw_files_to_stored_arrays(name, configuration, tmp_path):
    r = recorded(name)
    dataset = write_task(tmp_path/'raw', r)
    plans = planned(dataset)
    if configuration == '2d': r = recorded(f'2d_{name}')
    compared = slice(1, 3) if configuration == '2d' else slice(0, 3)                   # in 2D a case keeps its own distance between slices
    assert np.allclose(plans.configuration(configuration).spacing[compared], r['spacing'][compared]) and list(plans.transpose_forward) == list(r['transpose_forward'])
    assert list(plans.normalization_schemes) == list(r['schemes']) and list(plans.use_mask_for_norm) == list(r['use_mask'])
    assert preprocess_dataset(dataset, plans, tmp_path/'out', configuration, n_workers=0) == dataset.cases
    for case, stored in load_preprocessed(tmp_path/'out'/configuration).items():
        theirs = r[f'{case}/new_data']
        assert np.allclose(stored.properties['spacing_after_resampling'][compared], r[f'{case}/new_spacing'][compared])
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


# 2D, the stage before, regions ------------------------------------------------------------------------------------------

def two_d(plans, **changes):
    "The plans with a 2D configuration of these values"
    return replace(plans, configurations={'2d': replace(plans.configuration('2d'), **changes)})


def test_in_2d_nan_goes_and_the_callers_spacing_stays(task):
    r, plans = recorded('defects'), replace(task[1], channels=('MRI',), normalization_schemes=('noNorm',), use_mask_for_norm=(False,),
                                            transpose_forward=(0, 1, 2), transpose_backward=(0, 1, 2))
    plans = two_d(plans, spacing=(4., .8, .8))
    assert r['nan_after'].sum() > 1                                                   # one voxel in, a slice of the original's output lost
    spacing = [3., 1., 1.]
    data, seg, properties = preprocess_case(r['nan_data'], r['nan_seg'], spacing, plans, '2d')
    assert np.isfinite(data).all() and data.shape[1:] == r['nan_after'].shape[1:]
    other = preprocess_case(r['nan_data'], r['nan_seg'], (5., 1., 1.), plans, '2d')[2]
    assert properties['spacing_after_resampling'] == (3., .8, .8) and other['spacing_after_resampling'] == (5., .8, .8)
    assert r['spacing_of_the_first'][0] == 5.                                         # the original's first case was told the second's
    assert spacing == [3., 1., 1.] and plans.configuration('2d').spacing == (4., .8, .8)


def test_the_identity_in_2d_leaves_the_slices_out(task):
    plans = task[1]
    two = plans.configuration('2d')
    assert preprocessing_identity(plans, '2d') == preprocessing_identity(two_d(plans, spacing=(9., *two.spacing[1:])), '2d')
    assert preprocessing_identity(plans, '2d') != preprocessing_identity(two_d(plans, spacing=(*two.spacing[:2], 9.)), '2d')
    assert preprocessing_identity(plans, '2d') != preprocessing_identity(plans, '3d_fullres')


def test_the_stage_before_lies_on_the_voxels_of_the_image():
    r = recorded('defects')
    properties = dict(bbox=r['box'], transpose_forward=(0, 1, 2), shape_after_resampling=r['in_the_box'].shape)
    ours = previous_on_grid(r['raw'], properties)
    assert np.array_equal(ours, r['in_the_box']) and ours.dtype == np.uint8
    assert not np.array_equal(ours, r['at_test_time'])                                 # the original resizes the whole map
    assert np.array_equal(resample_label_map(r['raw'], r['at_test_time'].shape), r['at_test_time'])   # and does so exactly like this
    axes = (2, 0, 1)
    turned = dict(properties, transpose_forward=axes, shape_after_resampling=tuple(ours.shape[a] for a in axes))
    assert np.array_equal(previous_on_grid(r['raw'], turned), ours.transpose(axes))
    with pytest.raises(PreprocessingError, match='negative'): previous_on_grid(r['raw'].astype(int) - 1, properties)


def test_probabilities_of_the_stage_before_are_resampled_as_the_original_does():
    r = recorded('defects')
    ours = previous_from_probabilities(r['low'], r['from_low'].shape)
    assert np.array_equal(ours, r['from_low']) and ours.dtype == np.uint8 and len(np.unique(ours)) == 3
    assert np.array_equal(previous_from_probabilities(r['low'], r['low'].shape[1:]), r['low'].argmax(0))


def test_previous_maps_of_a_data_set(task, tmp_path):
    dataset, plans = task
    preprocess_dataset(dataset, plans, tmp_path/'out', n_workers=0)
    cases = load_preprocessed(tmp_path/'out'/'3d_fullres')
    assert cases['c0'].previous is None
    maps, expected = tmp_path/'maps', {}
    maps.mkdir()
    for c in ('c0', 'c1'):                                                             # label maps on the grid of the files
        one = dataset.read(c)
        write_label_map(one.label, one.geometry, maps/f'{c}.nii.gz')
        expected[c] = preprocess_case(one.image, one.label, one.geometry.spacing, plans, '3d_fullres', previous=one.label)[2]['previous']
    with pytest.raises(PreprocessingError, match='c2'): preprocess_previous_stage(maps, tmp_path/'out', plans, '3d_fullres')
    shape = cases['c2'].seg.shape
    probabilities = np.random.default_rng(0).random((3, *shape)).astype(np.float32)
    np.savez(maps/'c2.npz', probabilities=probabilities)                               # or probabilities on the preprocessed grid
    expected['c2'] = probabilities.argmax(0)
    assert preprocess_previous_stage(maps, tmp_path/'out', plans, '3d_fullres', n_workers=0) == ('c0', 'c1', 'c2')
    for c, one in load_preprocessed(tmp_path/'out'/'3d_fullres').items():
        assert np.array_equal(one.previous, expected[c]) and one.previous.shape == one.seg.shape, c
    assert verify_preprocessed(tmp_path/'out'/'3d_fullres') == ()
    assert preprocess_previous_stage(maps, tmp_path/'out', plans, '3d_fullres') == ()   # nothing left to do
    assert preprocess_dataset(dataset, plans, tmp_path/'out') == ()
    (tmp_path/'out'/'3d_fullres'/'c1_previous.npy').write_bytes(b'short')
    assert preprocess_previous_stage(maps, tmp_path/'out', plans, '3d_fullres') == ('c1',)
    np.savez(maps/'c2.npz', probabilities=probabilities[:, :-1])
    with pytest.raises(PreprocessingError, match='c2'): preprocess_previous_stage(maps, tmp_path/'out', plans, '3d_fullres')


def test_a_previous_map_at_test_time_of_another_grid_is_refused(task):
    case = task[0].read('c0')
    with pytest.raises(PreprocessingError, match='stage before'):
        preprocess_case(case.image, None, case.geometry.spacing, task[1], '3d_fullres', previous=case.label[1:])


def test_regions_and_the_ignore_label(task, tmp_path):
    case = task[0].read('c0')
    label = case.label.copy()
    label[label == 2] = 3                                                              # an ignore label, index K + 1
    image = np.concatenate([case.image])
    plain = preprocess_case(image, case.label, case.geometry.spacing, task[1], '3d_fullres')[2]
    data, seg, properties = preprocess_case(image, label, case.geometry.spacing, task[1], '3d_fullres', regions={'both': (1, 2), 'core': (2,)})
    assert 3 in seg and list(properties['class_locations']) == [1, 2] and len(properties['class_locations'][2]) == 0
    assert np.array_equal(properties['class_locations'][1], plain['class_locations'][1])
    assert len(properties['region_locations']['core']) == 0 and len(properties['region_locations']['both']) == len(properties['class_locations'][1])
    stored = save_preprocessed(data, seg, properties, tmp_path, 'c0')
    for name, voxels in properties['region_locations'].items(): assert np.array_equal(stored.region_locations[name], voxels)
    for name, voxels in properties['class_locations'].items(): assert np.array_equal(stored.class_locations[name], voxels)


# Damage, locks, two runs ------------------------------------------------------------------------------------------------

def spoil(folder, how):
    file = folder/'c1_data.npy'
    data = bytearray(file.read_bytes())
    if how == 'cut short': file.write_bytes(data[:-10])
    elif how == 'a bit flipped': data[-1000] ^= 1; file.write_bytes(data)
    elif how == 'deleted': file.unlink()
    elif how == 'JSON cut short': (folder/'c1.json').write_text((folder/'c1.json').read_text()[:40])


@pytest.mark.parametrize('how', ['cut short', 'a bit flipped', 'deleted', 'JSON cut short'])
def test_a_damaged_file_is_found_named_and_remade(task, tmp_path, how):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    folder, whole = tmp_path/'3d_fullres', contents(tmp_path)
    assert verify_preprocessed(folder) == ()
    spoil(folder, how)
    [damage] = verify_preprocessed(folder)
    assert damage.case == 'c1' and damage.file.name in ('c1_data.npy', 'c1.json') and 'c1' in str(damage)
    assert len(verify_preprocessed(folder, contents=False)) == (how != 'a bit flipped')
    if how in ('cut short', 'deleted'):
        with pytest.raises(PreprocessingError, match='c1_data.npy'): load_preprocessed(folder)['c1'].data
    with pytest.warns(UserWarning, match='c1'): assert preprocess_dataset(*task, tmp_path, n_workers=0) == ('c1',)
    assert contents(tmp_path) == whole


def test_a_file_that_goes_while_it_is_opened_is_missing(task, tmp_path, monkeypatch):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    case, load = load_preprocessed(tmp_path/'3d_fullres')['c1'], np.load
    def late(file, *args, **keywords):
        file.unlink() # its size was looked at a moment ago
        return load(file, *args, **keywords)
    monkeypatch.setattr(np, 'load', late)
    with pytest.raises(PreprocessingError, match='case c1, file .*c1_data.npy: a preprocessed file is missing; expected .* bytes; preprocess again'):
        case.data


RUN = ('import sys, segnb.preprocessing as p; from segnb.dataset import Dataset; from segnb.planning import Plans; import time\n'
       'one = p.preprocess_case\n'
       'def slow(*a): time.sleep(.4); return one(*a)\n'
       'p.preprocess_case = slow; print("began", flush=True)\n'
       'print(*p.preprocess_dataset(Dataset(sys.argv[1]), Plans.load(sys.argv[2]), sys.argv[3], n_workers=int(sys.argv[4])))')


def start(task, plans_file, out, n=0):
    return subprocess.Popen([sys.executable, '-c', RUN, str(task[0].folder), str(plans_file), str(out), str(n)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('n', [0, 2])
def test_two_runs_at_once_share_the_work(task, tmp_path, n):
    task[1].save(tmp_path/'p.json')
    runs = [start(task, tmp_path/'p.json', tmp_path/'out', n) for _ in range(2)]
    for run in runs:
        out, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
    assert verify_preprocessed(tmp_path/'out'/'3d_fullres') == () and not list((tmp_path/'out').rglob('.*'))
    preprocess_dataset(*task, tmp_path/'alone', n_workers=0)
    assert contents(tmp_path/'out') == contents(tmp_path/'alone')


def test_two_runs_at_once_with_other_plans(task, tmp_path):
    dataset, plans = task
    full = plans.configuration('3d_fullres')
    coarser = replace(plans, configurations={'3d_fullres': replace(full, spacing=(3., 2., 2.))})
    plans.save(tmp_path/'p.json'); coarser.save(tmp_path/'q.json')
    runs = [start(task, tmp_path/f, tmp_path/'out') for f in ('p.json', 'q.json')]
    ends = [run.communicate(timeout=120) for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], ends
    refused = next(end[1] for run, end in zip(runs, ends) if run.returncode)
    assert 'other plans' in refused
    identities = {case.properties['preprocessing'] for case in load_preprocessed(tmp_path/'out'/'3d_fullres').values()}
    assert len(identities) == 1 and len(load_preprocessed(tmp_path/'out'/'3d_fullres')) == 3


def test_a_folder_without_cases_may_follow_new_plans(task, tmp_path):
    dataset, plans = task
    image = Dataset(shutil.copytree(dataset.folder, tmp_path/'raw'))
    first = image.image_files('c0')[0]
    whole = Path(first).read_bytes()
    Path(first).write_bytes(whole[:100])
    with pytest.raises(SegnbError, match='c0'): preprocess_dataset(image, plans, tmp_path/'out', n_workers=0)
    Path(first).write_bytes(whole)
    coarser = replace(plans, configurations={'3d_fullres': replace(plans.configuration('3d_fullres'), spacing=(3., 2., 2.))})
    assert len(preprocess_dataset(image, coarser, tmp_path/'out', n_workers=0)) == 3


def test_what_cannot_fit_is_refused_before_the_first_case(task, tmp_path, monkeypatch):
    import segnb.preprocessing as p
    from segnb.workers import Estimate
    monkeypatch.setattr(p, 'estimate_case', lambda *a: Estimate(10**15))
    with pytest.raises(SegnbError, match='memory'): preprocess_dataset(*task, tmp_path)
    monkeypatch.setattr(p, 'estimate_case', lambda *a: Estimate(1, disk=10**17))
    with pytest.raises(SegnbError, match='space'): preprocess_dataset(*task, tmp_path)
    assert not load_preprocessed(tmp_path/'3d_fullres')


def test_the_disk_estimate_bounds_what_is_written(task, tmp_path):
    dataset, plans = task
    preprocess_dataset(dataset, plans, tmp_path, ['2d', '3d_fullres'], n_workers=0)
    for c in dataset.cases:
        one = dataset.read(c)
        written = sum(f.stat().st_size for name in ('2d', '3d_fullres') for f in (tmp_path/name).glob(f'{c}[._]*'))
        expected = estimate_case(one.label.shape, one.geometry.spacing, plans, ('2d', '3d_fullres'))
        assert written <= expected.disk and expected.memory > one.image.nbytes and expected.seconds > 0


def test_the_cascade_reads_the_files_of_full_resolution(task, tmp_path):
    dataset, plans = task
    full = plans.configuration('3d_fullres')
    low = replace(full, name='3d_lowres', spacing=tuple(1.5 * mm for mm in full.spacing))
    cascade = replace(full, name='3d_cascade_fullres', previous_stage='3d_lowres')
    plans = replace(plans, configurations={'3d_lowres': low, '3d_fullres': full, '3d_cascade_fullres': cascade})
    assert preprocess_dataset(dataset, plans, tmp_path, list(plans.configurations), n_workers=0) == dataset.cases
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ['3d_fullres', '3d_lowres', 'gt_segmentations']
    assert preprocessing_identity(plans, '3d_cascade_fullres') == preprocessing_identity(plans, '3d_fullres')
    out = tmp_path/'low'
    out.mkdir()
    rng = np.random.default_rng(1)
    for c, one in load_preprocessed(tmp_path/'3d_lowres').items(): np.save(out/f'{c}.npy', rng.random((3, *one.seg.shape)).astype(np.float32))
    assert preprocess_previous_stage(out, tmp_path, plans) == dataset.cases
    for one in load_preprocessed(tmp_path/'3d_fullres').values(): assert one.previous.shape == one.seg.shape


@pytest.mark.parametrize('text', ['[]', 'null', '{}', '{"files": {"c1_data.npy": 3}}', '{"files": []}', '{"files": {}}', 'of another case'])
def test_a_description_that_describes_nothing_is_damage(task, tmp_path, text):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    whole, file = contents(tmp_path), tmp_path/'3d_fullres'/'c1.json'
    file.write_text((tmp_path/'3d_fullres'/'c0.json').read_text() if text == 'of another case' else text)
    [damage] = verify_preprocessed(tmp_path/'3d_fullres')
    assert (damage.case, damage.file) == ('c1', file)
    with pytest.warns(UserWarning, match='c1.*is preprocessed again'): assert preprocess_dataset(*task, tmp_path, n_workers=0) == ('c1',)
    assert contents(tmp_path) == whole


def test_a_damaged_note_of_the_plans_is_made_again_from_the_cases(task, tmp_path):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    whole, (dataset, plans) = contents(tmp_path), task
    other = plans.edit('3d_fullres', spacing=(2., 2., 2.)) if hasattr(plans, 'edit') else None
    for text in ('{"3d_fullres": "0', '[]'):
        (tmp_path/'preprocessing.json').write_text(text)
        if other is not None:
            with pytest.raises(PreprocessingError, match='other plans'): preprocess_dataset(dataset, other, tmp_path, n_workers=0)
        assert preprocess_dataset(*task, tmp_path, n_workers=0) == () and contents(tmp_path) == whole


@pytest.mark.parametrize('how', ['missing', 'cut short', 'a bit flipped'])
def test_a_damaged_label_map_beside_the_cases_is_put_there_again(task, tmp_path, how):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    whole, file = contents(tmp_path), tmp_path/'gt_segmentations'/'c1.nii.gz'
    data = bytearray(file.read_bytes()); file.unlink()               # it was a link: the source stays as it is
    data[len(data)//2] ^= 1
    if how != 'missing': file.write_bytes(data[:-9] if how == 'cut short' else data)
    with pytest.warns(UserWarning, match='c1: its label map'): assert preprocess_dataset(*task, tmp_path, n_workers=0) == ()
    assert contents(tmp_path) == whole


def test_a_change_of_how_the_files_are_read_makes_the_cases_again(task, tmp_path):
    shutil.copytree(task[0].folder, tmp_path/'raw')
    told = json.loads((tmp_path/'raw'/'dataset.json').read_text())
    def run(**what):
        (tmp_path/'raw'/'dataset.json').write_text(json.dumps({**told, **what}))
        return preprocess_dataset(Dataset(tmp_path/'raw'), task[1], tmp_path/'out', n_workers=0)
    assert len(run()) == 3 and run() == () and run(description='another') == ()
    assert len(run(header='qform')) == 3
    assert len(run(labels={'background': 0, 'both': [1, 2], 'inner': 2}, regions_class_order=[1, 2])) == 3
    assert set(load_preprocessed(tmp_path/'out'/'3d_fullres')['c0'].region_locations) == {'both', 'inner'}


@pytest.mark.filterwarnings('ignore')
def test_voxels_that_lie_beside_their_header_count(task, tmp_path):
    import SimpleITK as sitk
    for file in sorted(task[0].folder.rglob('*.nii.gz')):
        to = tmp_path/'raw'/file.parent.name/file.name.replace('.nii.gz', '.mhd')
        to.parent.mkdir(parents=True, exist_ok=True)
        picture = sitk.ReadImage(str(file))
        for key in picture.GetMetaDataKeys(): picture.EraseMetaData(key)
        sitk.WriteImage(picture, str(to))
    (tmp_path/'raw'/'dataset.json').write_text((task[0].folder/'dataset.json').read_text())
    dataset = Dataset(tmp_path/'raw')
    assert len(preprocess_dataset(dataset, task[1], tmp_path/'out', n_workers=0)) == 3
    assert preprocess_dataset(dataset, task[1], tmp_path/'out', n_workers=0) == ()
    voxels = next((tmp_path/'raw'/'imagesTr').glob('c1_0000.*raw'))
    data = bytearray(voxels.read_bytes()); data[len(data)//2] ^= 1; voxels.write_bytes(data)
    assert preprocess_dataset(dataset, task[1], tmp_path/'out', n_workers=0) == ('c1',)


def test_half_files_beside_the_folders_are_swept_too(task, tmp_path):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    whole, long_ago = contents(tmp_path), time.time() - 60
    for name in ('.0123456789ab.plans.json', '.0123456789ab.preprocessing.json', '3d_fullres/.0123456789ab.c1_data.npy', '.case_c1.lock'):
        (tmp_path/name).write_bytes(b'half'); os.utime(tmp_path/name, (long_ago, long_ago))
    assert preprocess_dataset(*task, tmp_path, n_workers=0) == () and contents(tmp_path) == whole


def test_a_case_that_is_made_again_is_not_declared_finished_meanwhile(task, tmp_path, monkeypatch):
    preprocess_dataset(*task, tmp_path, n_workers=0)
    one = load_preprocessed(tmp_path/'3d_fullres')['c1']
    properties = {**one.properties, 'class_locations': dict(one.class_locations)}
    monkeypatch.setattr('segnb.preprocessing.np.save', lambda *a: (_ for _ in ()).throw(OSError('killed here')))
    with pytest.raises(OSError): save_preprocessed(np.array(one.data), np.array(one.seg), properties, tmp_path/'3d_fullres', 'c1')
    assert 'c1' not in load_preprocessed(tmp_path/'3d_fullres')
