"""What the `segnb` command says when data, models or disks are bad: exit status 2 (1 where some cases failed), one message that names what, where and what to do, and nothing half-written."""
import errno, json, multiprocessing, os, shutil, signal, tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from segnb.image import read_image, read_label_map, write_image, write_label_map
from conftest import QUICK, files

CASE = 'ct_002'


def image(raw): return raw/'imagesTr'/f'{CASE}_0000.nii.gz'
def label(raw): return raw/'labelsTr'/f'{CASE}.nii.gz'


def refused(said, *words, status=2):
    "The command failed with this status and a message that holds these words, in any order, and no traceback"
    text = ' '.join(said.stderr.split())
    assert said.returncode == status, f'{said.returncode}: {said.stderr}'
    assert text.startswith('segnb: ') and 'Traceback' not in text
    assert [w for w in words if w.lower() not in text.lower()] == [], text


@pytest.fixture
def raw(ct, tmp_path): return shutil.copytree(ct.raw, tmp_path/'raw'/ct.raw.name)


@pytest.fixture
def own(ct, tmp_path):
    "A copy of the whole workspace, to spoil"
    w = shutil.copytree(ct.workspace, tmp_path/'workspace')
    model = w/'models'/ct.raw.name/'3d_fullres'
    return SimpleNamespace(workspace=w, preprocessed=w/'preprocessed'/ct.raw.name, model=model, fold=model/'fold_0', name=ct.raw.name)


# Raw data ------------------------------------------------------------------------------------------------------------

def other_voxels(file, change):
    array, geometry = read_image(file)
    change(array)
    write_image(array, geometry, file)

def without_a_row(raw):
    array, geometry = read_label_map(label(raw))
    write_label_map(array[:, 1:], type(geometry)(geometry.spacing, geometry.origin, geometry.direction, array[:, 1:].shape), label(raw))

def with_other_spacing(raw):
    array, geometry = read_label_map(label(raw))
    write_label_map(array, type(geometry)((9., 2., 2.), geometry.origin, geometry.direction, geometry.shape), label(raw))

def with_label_7(raw):
    array, geometry = read_label_map(label(raw))
    array[0, 0, :5] = 7
    write_label_map(array, geometry, label(raw))

def cut(file, share=.5): os.truncate(file, int(file.stat().st_size * share))
def zeros(array): array[:] = 0
def with_nan(array): array[0, 3, 4, 5] = np.nan

def edit(raw, **changes):
    known = json.loads((raw/'dataset.json').read_text())
    (raw/'dataset.json').write_text(json.dumps({k: v for k, v in {**known, **changes}.items() if v is not None}))

BAD_DATA = {
    'image missing':              (lambda raw: image(raw).unlink(),                          [CASE, f'{CASE}_0000.nii.gz', 'missing', 'expected channel 0 (CT)']),
    'label missing':              (lambda raw: label(raw).unlink(),                          [CASE, f'{CASE}.nii.gz', 'missing', 'add it']),
    'label of another shape':     (without_a_row,                                            [CASE, f'{CASE}.nii.gz', 'found shape (', 'instead of (', 'resample']),
    'label of other spacing':     (with_other_spacing,                                       [CASE, f'{CASE}.nii.gz', 'found spacing (9.0, 2.0, 2.0)', 'instead of', 'resample']),
    'undeclared label':           (with_label_7,                                             [CASE, f'{CASE}.nii.gz', 'found 7', '5 voxels', 'dataset.json']),
    'nothing but zeros':          (lambda raw: other_voxels(image(raw), zeros),              [CASE, f'{CASE}_0000.nii.gz', 'zero everywhere', 'leave the case out']),
    'NaN':                        (lambda raw: other_voxels(image(raw), with_nan),           [CASE, f'{CASE}_0000.nii.gz', '1 NaN', '(3, 4, 5)', 'expected finite', 'replace']),
    'image cut short':            (lambda raw: cut(image(raw)),                              [CASE, f'{CASE}_0000.nii.gz', 'cut short', 'again']),
    'label cut short':            (lambda raw: cut(label(raw)),                              [CASE, f'{CASE}.nii.gz', 'cut short', 'again']),
    'empty image file':           (lambda raw: cut(image(raw), 0),                           [CASE, f'{CASE}_0000.nii.gz']),
    'dataset.json missing':       (lambda raw: (raw/'dataset.json').unlink(),                ['dataset.json', 'Task201_TinyCT']),
    'dataset.json is no JSON':    (lambda raw: cut(raw/'dataset.json'),                      ['dataset.json', 'not valid JSON', 'line', 'correct']),
    'dataset.json without labels': (lambda raw: edit(raw, labels=None),                      ['dataset.json', 'labels']),
    'dataset.json without channels': (lambda raw: edit(raw, modality=None),                  ['dataset.json', '"modality" is missing', 'add it']),
    'labels with a gap':          (lambda raw: edit(raw, labels={'0': 'background', '2': 'lesion'}), ['dataset.json', 'label']),
    'no cases':                   (lambda raw: edit(raw, training=[]),                       ['dataset.json', 'no training cases']),
}

@pytest.mark.parametrize('fault', BAD_DATA)
def test_bad_data_is_refused_before_planning(segnb, raw, tmp_path, fault):
    spoil, words = BAD_DATA[fault]
    spoil(raw)
    refused(segnb('plan', raw, '-w', tmp_path/'new', '-j', 0), *words)
    assert files(tmp_path/'new') == set()


def test_all_findings_come_at_once(segnb, raw, tmp_path):
    for fault in ('undeclared label', 'image cut short'): BAD_DATA[fault][0](raw)
    (raw/'labelsTr'/'ct_004.nii.gz').unlink()
    refused(segnb('plan', raw, '-w', tmp_path/'new', '-j', 0), '(3 findings)', 'found 7', 'cut short', 'ct_004')


def test_one_missing_channel_of_four(segnb, mr, tmp_path):
    raw = shutil.copytree(mr.raw, tmp_path/mr.raw.name)
    (raw/'imagesTr'/'mr_001_0002.nii.gz').unlink()
    refused(segnb('plan', raw, '-w', tmp_path/'new', '-j', 0), 'mr_001', 'mr_001_0002.nii.gz', 'expected channel 2 (T1c)')


@pytest.mark.parametrize('fault', ['image cut short', 'label of another shape', 'undeclared label', 'image missing'])
def test_data_spoiled_after_planning(segnb, raw, own, fault):
    edited = json.loads((own.preprocessed/'dataset.json').read_text()) | {'source': str(raw)}
    (own.preprocessed/'dataset.json').write_text(json.dumps(edited))
    shutil.rmtree(own.preprocessed/'3d_fullres')
    BAD_DATA[fault][0](raw)
    refused(segnb('preprocess', own.name, '-w', own.workspace, '-j', 0), CASE, CASE + ('.nii.gz' if 'label' in fault else '_0000.nii.gz'))
    assert all(f.startswith(('ct_000', 'ct_001')) for f in files(own.preprocessed/'3d_fullres'))  # what was done is whole and stays


def test_raw_data_that_moved_away(segnb, own):
    edited = json.loads((own.preprocessed/'dataset.json').read_text()) | {'source': '/nowhere/Task201_TinyCT'}
    (own.preprocessed/'dataset.json').write_text(json.dumps(edited))
    refused(segnb('preprocess', own.name, '-w', own.workspace), '/nowhere/Task201_TinyCT', 'which is gone', 'segnb plan')


def test_a_killed_worker_is_named_and_a_second_run_completes(segnb, own, monkeypatch):
    if multiprocessing.get_start_method() != 'fork': pytest.skip('the fault is brought into the worker by fork')
    import segnb.preprocessing as preprocessing
    whole = preprocessing.preprocess_case
    def die(data, seg, spacing, plans, configuration, identifier, *rest):
        if identifier == CASE: os.kill(os.getpid(), signal.SIGKILL)
        return whole(data, seg, spacing, plans, configuration, identifier, *rest)
    shutil.rmtree(own.preprocessed/'3d_fullres')
    monkeypatch.setattr(preprocessing, 'preprocess_case', die)
    refused(segnb('preprocess', own.name, '-w', own.workspace, '-j', 1), 'preprocessing', CASE, 'SIGKILL', 'memory', status=1)
    assert files(own.preprocessed/'3d_fullres') == {f'ct_00{i}{part}' for i in range(5) if f'ct_00{i}' != CASE
                                                     for part in ('.json', '_data.npy', '_seg.npy', '_locations.npy')}  # the others are done
    monkeypatch.undo()
    assert segnb('preprocess', own.name, '-w', own.workspace, '-j', 1).returncode == 0
    assert len(files(own.preprocessed/'3d_fullres')) == 20


# Plans, folds and checkpoints ----------------------------------------------------------------------------------------

def train(segnb, own, *args, fold=0): return segnb('train', own.name, fold, '-w', own.workspace, *QUICK, '-j', 0, *args)
def predict(segnb, own, out, *args, source=None): return segnb('predict', '-i', source or own.raw/'imagesTs', '-o', out, '-m', own.model, '--device', 'cpu', '-q', *args)


@pytest.mark.parametrize('fold', ['5', '-1', 'first'])
def test_a_fold_that_does_not_exist(segnb, own, fold):
    before = files(own.workspace)
    refused(segnb('train', '-w', own.workspace, *QUICK, '--', own.name, fold), f"fold '{fold}'", '0 to 4', "'all'")
    assert files(own.workspace) == before


@pytest.mark.parametrize('args, words', [
    (['-f', '3'], ['fold 3', 'found folds: 0', 'train it']),
    (['-m', 'nowhere'], ['nowhere', 'not a trained model']),
    (['-i', 'nowhere'], ['nowhere', 'no such folder']),
    (['--checkpoint', 'latest', '-f', 'all'], ['fold all', 'checkpoint_latest.pt'])])
def test_models_and_folders_that_are_not_there(segnb, ct, tmp_path, args, words):
    refused(predict(segnb, ct, tmp_path/'out', *args), *words)
    assert files(tmp_path) == set()


@pytest.mark.parametrize('verb, args, words', [
    ('plan', ['-j', -1], ['-1']),
    ('plan', ['--planner', 'huge'], ['huge', 'nnunet_v1', 'cpu']),
    ('plan', ['--memory-gb', 0], ['memory_gb', 'above 0']),
    ('preprocess', ['-c', '3d_lowres'], ['3d_lowres', '3d_fullres']),
    ('train', ['--epochs', 0], ['epochs', 'found 0', 'from 1']),
    ('train', ['--device', 'abacus'], ['abacus', 'cpu']),
    ('train', ['--precision', 'fp16', '--device', 'cpu'], ['fp16', 'bf16']),
    ('predict', ['--step-size', 0], ['step_size', '0', '1']),
    ('predict', ['--precision', 'fp16'], ['fp16', 'bf16']),
    ('evaluate', ['-o', 'nowhere/at/all/summary.json'], ['nowhere'])], ids=lambda x: ' '.join(map(str, x)) if x and isinstance(x, list) and str(x[0]).startswith('-') else None)
def test_options_that_cannot_be_used(segnb, own, ct, tmp_path, monkeypatch, verb, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'nowhere').write_text('')  # a file where a folder is needed
    start = dict(plan=(ct.raw, '-w', tmp_path/'new'), preprocess=(own.name, '-w', own.workspace), train=(own.name, 1, '-w', own.workspace),
                 predict=('-i', ct.raw/'imagesTs', '-o', tmp_path/'out', '-m', own.model, '-q'), evaluate=('-r', ct.raw/'labelsTr', '-p', ct.raw/'labelsTr'))[verb]
    before = files(tmp_path)
    try: said = segnb(verb, *start, *args)
    except SystemExit as error: assert error.code == 2  # argparse has said it
    else: refused(said, *words)
    assert files(tmp_path) == before


def test_a_data_set_without_a_plan_or_without_arrays(segnb, own, ct, tmp_path):
    refused(segnb('train', own.name, 0, '-w', tmp_path/'new'), 'no plan', own.name, 'segnb plan')
    refused(train(segnb, own, '-c', '3d_lowres'), '3d_lowres', '3d_fullres')
    shutil.rmtree(own.preprocessed/'3d_fullres')
    refused(train(segnb, own), '3d_fullres', 'not preprocessed')


@pytest.mark.parametrize('spoil, words', [
    (lambda f: f.write_text('{"channels": ['), ['plans.json', 'not valid JSON']),
    (lambda f: f.write_text('{}'), ['plans.json', 'lacks', 'plan again']),
    (lambda f: f.write_text(f.read_text().replace('"batch_size": 2', '"batch_size": "two"')), ['plans.json', 'batch_size'])], ids=['bad JSON', 'keys missing', 'wrong value'])
def test_a_damaged_plan(segnb, own, spoil, words):
    spoil(own.preprocessed/'plans.json')
    refused(train(segnb, own), *words)


def test_a_checkpoint_of_another_plan(segnb, own, ct, tmp_path):
    plans = own.model/'plans.json'
    plans.write_text(plans.read_text().replace('"batch_size": 2', '"batch_size": 3'))
    own.raw = ct.raw
    refused(predict(segnb, own, tmp_path/'out'), 'checkpoint_final.pt', 'another plan', 'batch_size 2', '3 here', 'train again')
    before = {f: (own.fold/f).read_bytes() for f in files(own.fold)}
    refused(train(segnb, own, '--continue'), 'another plan', 'batch_size', 'another model folder')
    assert {f: (own.fold/f).read_bytes() for f in files(own.fold)} == before and not (tmp_path/'out').exists()


@pytest.mark.parametrize('share', [.7, 0.])
def test_a_damaged_checkpoint(segnb, own, ct, tmp_path, share):
    own.raw = ct.raw
    for file in own.fold.glob('*.pt'): cut(file, share)
    refused(predict(segnb, own, tmp_path/'out'), 'checkpoint_final.pt', 'damaged', 'another checkpoint')
    refused(train(segnb, own, '--continue'), 'no checkpoint can be read', 'start again')
    assert not (tmp_path/'out').exists() and not [f for f in files(own.fold) if 'lock' in f]


def test_a_preprocessed_array_cut_short(segnb, own):
    cut(own.preprocessed/'3d_fullres'/f'{CASE}_data.npy')
    shutil.rmtree(own.model)
    refused(train(segnb, own), CASE, '3d_fullres', 'damaged', 'again')
    assert not own.model.exists()


@pytest.mark.parametrize('workers', [0, 1])
def test_a_preprocessed_array_cut_short_during_training(segnb, own, monkeypatch, workers):
    import segnb.training as training
    shutil.rmtree(own.model)
    def spoil(trainer, row):
        for case in trainer.train_cases: cut(own.preprocessed/'3d_fullres'/f'{case}_data.npy', .1)
    Trainer = training.Trainer
    monkeypatch.setattr(training, 'Trainer', lambda *args, callbacks=(), **options: Trainer(*args, callbacks=(*callbacks, spoil), **options))
    said = train(segnb, own, '--no-validation', '--epochs', 6, '-j', workers)
    refused(said, 'ct_00')
    assert (own.fold/'checkpoint_latest.pt').exists() and not (own.fold/'checkpoint_final.pt').exists() and not (own.fold/'training.lock').exists()


# Prediction and evaluation -------------------------------------------------------------------------------------------

BAD_CASE = {
    'cut short':         (lambda f: cut(f), ['cut short', 'again']),
    'NaN':               (lambda f: other_voxels(f, with_nan), ['1 voxels', 'NaN', 'repair']),
    'nothing but zeros': (lambda f: other_voxels(f, zeros), ['zero']),
    'not an image':      (lambda f: f.write_text('hello'), ['ct_010_0000.nii.gz']),
}

@pytest.mark.parametrize('fault', BAD_CASE)
def test_one_bad_case_does_not_stop_the_others(segnb, ct, tmp_path, fault):
    source = shutil.copytree(ct.raw/'imagesTs', tmp_path/'in')
    spoil, words = BAD_CASE[fault]
    spoil(source/'ct_010_0000.nii.gz')
    refused(predict(segnb, ct, tmp_path/'out', '--disable-tta', source=source), '1 of 2 cases failed', 'ct_010', *words, status=1)
    assert files(tmp_path/'out') == {'ct_011.nii.gz', 'made_with.json'}


def test_a_prediction_folder_with_a_missing_channel(segnb, mr, tmp_path):
    source = shutil.copytree(mr.raw/'imagesTs', tmp_path/'in')
    sorted(source.iterdir())[1].unlink()
    refused(predict(segnb, mr, tmp_path/'out', source=source), 'mr_006', 'mr_006_0001.nii.gz is missing', '4 channel')
    refused(predict(segnb, mr, tmp_path/'out', source=mr.raw/'labelsTr'), 'mr_000.nii.gz', 'mr_000_0000.nii.gz')
    assert not (tmp_path/'out').exists()


def test_an_empty_prediction_folder(segnb, ct, tmp_path):
    (tmp_path/'in').mkdir()
    refused(predict(segnb, ct, tmp_path/'out', source=tmp_path/'in'), 'no files', '.nii.gz', str(tmp_path/'in'))


@pytest.mark.parametrize('spoil, words', [
    (lambda out: (out/'ct_001.nii.gz').unlink(), ['no prediction for ct_001']),
    (lambda out: (out/'ct_001.nii.gz').rename(out/'ct_009.nii.gz'), ['no prediction for ct_001', 'no reference for ct_009']),
    (lambda out: shutil.copy(out/'ct_000.nii.gz', out/'ct_001.nii.gz'), ['ct_001', 'different grids', 'resample']),
    (lambda out: cut(out/'ct_001.nii.gz'), ['ct_001', 'cut short']),
    (lambda out: shutil.rmtree(out), ['out is not there', 'folder of predicted label maps'])], ids=['missing', 'another case', 'another grid', 'cut short', 'no folder'])
def test_folders_that_do_not_match(segnb, ct, tmp_path, spoil, words):
    out = shutil.copytree(ct.raw/'labelsTr', tmp_path/'out')
    spoil(out)
    refused(segnb('evaluate', '-r', ct.raw/'labelsTr', '-p', out), *words)
    assert not (out/'summary.json').exists()


def test_labels_without_names(segnb, ct, tmp_path):
    shutil.copytree(ct.raw/'labelsTr', tmp_path/'reference')
    refused(segnb('evaluate', '-r', tmp_path/'reference', '-p', ct.raw/'labelsTr'), 'dataset.json', '--labels')


# Disks ---------------------------------------------------------------------------------------------------------------

def call(segnb, ct, workspace, verb):
    "Run one verb on the tiny task so that it writes below `workspace`"
    if verb == 'predict': return predict(segnb, ct, workspace/'out', '--disable-tta')
    args = dict(plan=(ct.raw,), preprocess=(ct.raw.name,), train=(ct.raw.name, 0, *QUICK))[verb]
    return segnb(verb, *args, '-w', workspace, '-j', 0)


def before(ct, workspace, verb):
    "Lay down in `workspace` what a verb starts from; all files in it"
    without = dict(preprocess=('3d_fullres', 'gt_segmentations'), train=())
    if verb in without: shutil.copytree(ct.preprocessed, workspace/'preprocessed'/ct.raw.name, ignore=shutil.ignore_patterns(*without[verb]))
    return files(workspace)


@pytest.mark.parametrize('verb', ['plan', 'predict'])
def test_no_folder_can_be_made_below_a_file(segnb, ct, tmp_path, verb):
    (tmp_path/'file').write_text('')
    refused(call(segnb, ct, tmp_path/'file'/'w', verb), str(tmp_path/'file'/'w'), 'cannot be written', 'choose another folder')


@pytest.mark.parametrize('verb', ['plan', 'preprocess', 'train', 'predict'])
def test_no_permission(segnb, ct, tmp_path, monkeypatch, verb):
    def forbidden(*args, dir=None, **kw): raise PermissionError(errno.EACCES, 'Permission denied', str(dir))
    start = before(ct, tmp_path/'w', verb)
    monkeypatch.setattr(tempfile, 'TemporaryFile', forbidden)
    refused(call(segnb, ct, tmp_path/'w', verb), str(tmp_path/'w'), 'Permission denied', 'choose another folder')
    assert files(tmp_path/'w') == start


@pytest.mark.parametrize('verb', ['preprocess', 'train'])
def test_too_little_space_is_seen_before_the_start(segnb, ct, tmp_path, monkeypatch, verb):
    start = before(ct, tmp_path/'w', verb)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(total=10**9, used=10**9 - 10**4, free=10**4))
    refused(call(segnb, ct, tmp_path/'w', verb), str(tmp_path/'w'), 'too little space', 'found 0.00 GB free', 'expected', 'free some')
    assert files(tmp_path/'w') == start


# What fails to be written, and which whole files may stand before it
FULL = {
    'plan': ('pathlib.Path.write_text', set()),
    'preprocess': ('numpy.save', {'gt_segmentations/ct_000.nii.gz'}),
    'train': ('torch.save', {'plans.json', 'dataset.json', 'log.txt', 'log.jsonl', 'record.json', 'inputs.json', 'progress.png'}),
    'predict': ('pathlib.Path.write_bytes', {'out/made_with.json'})}

@pytest.mark.parametrize('verb', FULL)
def test_a_disk_that_fills_up_while_writing(segnb, ct, tmp_path, monkeypatch, verb):
    writer, whole = FULL[verb]
    def full(*args, **kw):
        file = next(a for a in args if isinstance(a, (str, Path)))
        with open(file, 'wb') as f: f.write(b'half of')
        raise OSError(errno.ENOSPC, 'No space left on device', str(file))
    start = before(ct, tmp_path/'w', verb)
    monkeypatch.setattr(writer, full)
    said = call(segnb, ct, tmp_path/'w', verb)
    monkeypatch.undo()
    refused(said, 'No space left on device', status=1 if verb == 'predict' else 2)
    assert all(new.endswith(tuple(whole)) for new in files(tmp_path/'w') - start) if whole else files(tmp_path/'w') == start
