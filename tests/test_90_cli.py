"""The `segnb` command from end to end: every verb by the real program, interruption, the demo, and geometry that survives."""
import json, os, re, shutil, signal, subprocess, sys, time

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import QUICK, SEGNB, command, files
from segnb.cli import main

VERBS = ('convert', 'doctor', 'plan', 'preprocess', 'split', 'train', 'predict', 'evaluate', 'postprocess', 'ensemble', 'select', 'report', 'overlay', 'demo',
         'v1', 'completion')


def grid(file):
    "What a label map must share with its image, exactly"
    image = sitk.ReadImage(str(file))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def weights(file): return torch.load(file, weights_only=True)['network']


def test_version_and_help():
    assert re.fullmatch(r'segnb \d+\.\d+\.\d+\n', command('--version').stdout)
    said = command('--help')
    assert said.returncode == 0 and all(re.search(rf'^ +{verb}\b', said.stdout, re.M) for verb in VERBS) and 'Exit status' in said.stdout


@pytest.mark.parametrize('verb', VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop: main([verb, '--help'])
    said = capsys.readouterr()
    assert stop.value.code == 0 and f'Example: segnb {verb}' in re.sub(r'\s+', ' ', said.out) and not said.err


@pytest.mark.parametrize('args', [(), ('segment',), ('train', '1'), ('train', '1', '0', '--epochs', 'many'), ('predict', '-i', '.')])
def test_wrong_use_exits_with_2_and_says_how(args, capsys):
    with pytest.raises(SystemExit) as stop: main(list(args))
    assert stop.value.code == 2 and 'usage: segnb' in capsys.readouterr().err


def test_an_unknown_data_set_lists_the_known_ones(ct, segnb):
    said = segnb('preprocess', 'Task999', '-w', ct.workspace)
    assert said.returncode == 2 and 'Task201_TinyCT' in said.stderr and 'segnb plan Task999' in said.stderr


def test_the_plan_explains_itself(ct):
    assert {'plans.json', 'fingerprint.json', 'dataset.json'} <= files(ct.preprocessed)
    assert 'patch' in ct.said['plan'].stdout and 'plans.json' in ct.said['plan'].stdout


@pytest.mark.parametrize('name', ['Task201_TinyCT', '201'])
def test_preprocessing_again_finds_all_done(ct, segnb, name):
    before = {f: (ct.preprocessed/f).stat().st_mtime_ns for f in files(ct.preprocessed) if f.endswith('.npy')}
    assert len(before) == 30 and segnb('preprocess', name, '-w', ct.workspace, '-j', 0).returncode == 0
    assert before == {f: (ct.preprocessed/f).stat().st_mtime_ns for f in before}


def test_training_ends_with_scores_of_whole_images(ct):
    assert {'checkpoint_final.pt', 'checkpoint_best.pt', 'checkpoint_latest.pt', 'log.jsonl', 'progress.png', 'record.json',
            'validation/summary.json'} <= files(ct.fold)
    [case] = [f[len('validation/'):-len('.nii.gz')] for f in files(ct.fold) if f.endswith('.nii.gz')]
    assert case in ct.said['train'].stdout and 'foreground mean' in ct.said['train'].stdout
    assert grid(ct.fold/'validation'/f'{case}.nii.gz') == grid(ct.raw/'imagesTr'/f'{case}_0000.nii.gz')


@pytest.mark.parametrize('task', ['ct', 'mr'])
def test_label_maps_have_exactly_the_grid_of_their_image(task, request):
    task = request.getfixturevalue(task)
    maps = sorted(task.predictions.glob('*.nii.gz'))
    assert len(maps) == 2 and files(task.predictions) == {m.name for m in maps} | {'made_with.json'}
    grids = [grid(m) for m in maps]
    assert grids == [grid(task.raw/'imagesTs'/m.name.replace('.nii.gz', '_0000.nii.gz')) for m in maps]
    assert any(min(abs(g[3][1]), abs(g[3][5])) > .05 for g in grids)  # one of them lies obliquely
    for m in maps: assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(m))))) <= {0, 1, 2, 3}


def test_prediction_leaves_what_is_there_unless_told(ct, segnb, tmp_path):
    out = shutil.copytree(ct.predictions, tmp_path/'out')
    first, second = sorted(out.glob('*.nii.gz'))
    first.unlink()
    second.write_bytes(b'mine')
    args = ('predict', '-i', ct.raw/'imagesTs', '-o', out, '-m', ct.model, '--device', 'cpu', '-q')
    assert segnb(*args).returncode == 0 and second.read_bytes() == b'mine'
    assert first.read_bytes() == (ct.predictions/first.name).read_bytes()  # and by path of the model: the same label map
    assert segnb(*args, '--overwrite').returncode == 0
    assert second.read_bytes() == (ct.predictions/second.name).read_bytes()


def test_evaluation_writes_the_table_and_the_numbers(ct, segnb, tmp_path):
    said = segnb('evaluate', '-q', '-j', 0, '-r', ct.raw/'labelsTr', '-p', ct.raw/'labelsTr', '-o', tmp_path/'summary.json')
    assert said.returncode == 0 and 'foreground mean 1.0000' in said.stdout and 'lesion' in said.stdout
    assert json.loads((tmp_path/'summary.json').read_text())['foreground_mean']['dice'] == 1
    assert files(ct.raw/'labelsTr') == {f'ct_{i:03d}.nii.gz' for i in range(5)}


# A process that kills itself as kill -9 would: after the first epoch, or with half of the second checkpoint written
KILLED = '''
import os, signal, sys, torch, segnb.cli, segnb.training as training
Trainer, save, written = training.Trainer, torch.save, []
def die(): os.kill(os.getpid(), signal.SIGKILL)
def after_epoch(trainer, row):
    if sys.argv[1] == 'between the epochs': die()
def save_or_die(state, file):
    save(state, file)
    written.append(file)
    if len(written) == 2: os.truncate(file, os.path.getsize(file) // 2); die()
training.Trainer, torch.save = lambda *args, **options: Trainer(*args, **options | {'callbacks': (after_epoch,)}), save_or_die
segnb.cli.main(sys.argv[2:])
'''


@pytest.mark.parametrize('when', ['between the epochs', 'within the second checkpoint'])
def test_a_killed_training_continues_to_the_same_weights(ct, segnb, tmp_path, when):
    shutil.copytree(ct.preprocessed, tmp_path/'preprocessed'/ct.raw.name)
    train = ('train', ct.raw.name, 0, '-w', tmp_path, *QUICK, '-j', 0, '--no-validation')
    assert command(when, *train, program=(sys.executable, '-c', KILLED)).returncode == -signal.SIGKILL
    fold = tmp_path/'models'/ct.raw.name/'3d_fullres'/'fold_0'
    assert not (fold/'checkpoint_final.pt').exists()
    said = segnb(*train, '--continue')
    assert said.returncode == 0, said.stderr
    mine, straight = (weights(f/'checkpoint_final.pt') for f in (fold, ct.fold))
    assert all(torch.equal(mine[k], straight[k]) for k in straight) and len(mine) == len(straight)
    assert [json.loads(line)['epoch'] for line in (fold/'log.jsonl').read_text().splitlines()] == [0, 1]


def test_a_continued_training_keeps_the_options_that_are_not_given_again(ct, segnb, tmp_path):
    shutil.copytree(ct.workspace, tmp_path, dirs_exist_ok=True)
    said = segnb('train', ct.raw.name, 0, '-w', tmp_path, '--continue', '--epochs', 3, '--no-validation', '-q', '-j', 0, '--device', 'cpu')
    rows = [json.loads(line) for line in (tmp_path/'models'/ct.raw.name/'3d_fullres'/'fold_0'/'log.jsonl').read_text().splitlines()]
    assert said.returncode == 0 and [r['iterations'] for r in rows] == [3, 3, 3]


def test_ctrl_c_says_so_and_leaves_the_fold_free(ct, tmp_path):
    shutil.copytree(ct.preprocessed, tmp_path/'preprocessed'/ct.raw.name)
    train, fold = ['train', ct.raw.name, '0', '-w', str(tmp_path), *map(str, QUICK)], tmp_path/'models'/ct.raw.name/'3d_fullres'/'fold_0'
    run = subprocess.Popen([SEGNB, *train, '--epochs', '1000'], stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while run.poll() is None and not (fold/'checkpoint_latest.pt').exists(): time.sleep(.05)
    run.send_signal(signal.SIGINT)
    assert 'segnb: interrupted' in run.communicate()[1] and run.returncode == 130
    assert (fold/'checkpoint_latest.pt').exists() and not (fold/'training.lock').exists() and not [f for f in files(fold) if f.startswith('.')]


def test_validation_alone_and_training_twice(ct, segnb, tmp_path):
    shutil.copytree(ct.workspace, tmp_path, dirs_exist_ok=True)
    fold = tmp_path/'models'/ct.raw.name/'3d_fullres'/'fold_0'
    shutil.rmtree(fold/'validation')
    said = segnb('train', ct.raw.name, 0, '-w', tmp_path, '--validation-only', '--device', 'cpu', '-q')
    assert said.returncode == 0 and (fold/'validation'/'summary.json').read_text() == (ct.fold/'validation'/'summary.json').read_text()
    said = segnb('train', ct.raw.name, 0, '-w', tmp_path, *QUICK)  # an earlier training is not lost by accident
    assert said.returncode == 2 and 'already holds a training' in said.stderr


def test_the_demo_leaves_scores_curves_and_pictures(ct, segnb, tmp_path, monkeypatch):
    samples = tmp_path/'samples'/'Task101_PhantomCT'
    shutil.copytree(ct.raw, samples)
    shutil.copytree(ct.predictions, samples/'labelsTs')  # a stand-in for the truth: the demo only scores against it
    monkeypatch.chdir(tmp_path)
    for run in range(2):  # a demo may be run again
        said = segnb('demo', '-o', tmp_path/'demo', '--samples', tmp_path/'samples', '--minutes', .02, '--device', 'cpu', '-q')
        assert said.returncode == 0, said.stderr
    cases = [f.name[:-len('.nii.gz')] for f in ct.predictions.glob('*.nii.gz')]
    assert files(tmp_path/'demo'/'results') == {'progress.png', 'dice.txt', 'label_maps/summary.json',
                                                'label_maps/made_with.json'} | {f'label_maps/{c}.nii.gz' for c in cases} | {f'overlays/{c}.png' for c in cases}
    assert (tmp_path/'demo'/'results'/'dice.txt').read_text() in said.stdout
