"""Shared by all tests: tiny raw tasks cut from the sample data, and the `segnb` command run on them once a session."""
import locale, os, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from segnb.dataset import Dataset
from segnb.image import write_image, write_label_map
from segnb.workers import write_json

ROOT = Path(__file__).resolve().parent.parent
SEGNB = shutil.which('segnb', path=str(Path(sys.executable).parent))
QUICK = ('--epochs', 2, '--iterations', 3, '--val-iterations', 1, '--device', 'cpu', '-q')  # a training of seconds


def command(*args, program=(SEGNB,), cwd=None):
    "Run the segnb command in a process of its own, with one thread"
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([*program, *map(str, args)], capture_output=True, encoding='utf-8', env=env, cwd=cwd or ROOT)


def files(folder):
    "All files below a folder, hidden ones too"
    return {str(f.relative_to(folder)) for f in Path(folder).rglob('*') if f.is_file()}


def turned(degrees, flip=False):
    "Direction of a patient who lies obliquely, or head first instead of feet first"
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    tilt, roll = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return tuple((tilt @ roll @ np.diag([1, 1, -1 if flip else 1])).ravel())


def shrink(case, step, direction):
    "Every n-th voxel of a case, laid down in another direction"
    image, label = (a if a is None else a[..., ::step[0], ::step[1], ::step[2]] for a in (case.image, case.label))
    geometry = replace(case.geometry, spacing=np.multiply(case.geometry.spacing, step), shape=image.shape[1:], direction=direction, origin=(-31.5, 12.25, 700.1))
    return image, label, geometry


def tiny_task(sample, folder, step, n_train=5, n_test=2):
    "A raw data set of small cases; every second one lies obliquely"
    data = Dataset(ROOT/'data_samples'/sample)
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (folder/part).mkdir(parents=True)
    train, test = data.cases[:n_train], data.test_cases[:n_test]
    for i, case in enumerate(train + test):
        image, label, geometry = shrink(data.read(case), step, turned(20 + i, flip=i % 4 == 1) if i % 2 else turned(0))
        for c, channel in enumerate(image): write_image(channel, geometry, folder/('imagesTr' if case in train else 'imagesTs')/f'{case}_{c:04d}.nii.gz')
        if case in train: write_label_map(label, geometry, folder/'labelsTr'/f'{case}.nii.gz')
    listed = [dict(image=f'./imagesTr/{c}.nii.gz', label=f'./labelsTr/{c}.nii.gz') for c in train]
    write_json({**data.json, 'training': listed, 'test': [f'./imagesTs/{c}.nii.gz' for c in test]}, folder/'dataset.json')
    return folder


def chain(raw, workspace, *, train=()):
    "The whole pipeline by six commands; what each of them answered is in `said`"
    model, predictions = workspace/'models'/raw.name/'3d_fullres', workspace/'predictions'
    said = {}
    for verb, args in dict(plan=(raw, '--planner', 'cpu'), preprocess=(raw.name,), train=(raw.name, 0, *QUICK, *train),
                           predict=('-i', raw/'imagesTs', '-o', predictions, '-d', raw.name, '--device', 'cpu', '-q')).items():
        said[verb] = command(verb, *args, '-w', workspace)
        assert said[verb].returncode == 0, f'segnb {verb}: {said[verb].stderr}'
    return SimpleNamespace(raw=raw, workspace=workspace, preprocessed=workspace/'preprocessed'/raw.name, model=model, fold=model/'fold_0', predictions=predictions, said=said)


@pytest.fixture(autouse=True)
def same_locale():
    "Put the locale back: GDCM sets it to C when a test writes DICOM files"
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def segnb(capsys):
    "Run the segnb command in this process, for what needs no process of its own"
    def run(*args):
        import torch
        from segnb.cli import main
        torch.set_num_threads(1)
        capsys.readouterr()
        code = main([str(a) for a in args])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)
    return run


@pytest.fixture(scope='session')
def ct(tmp_path_factory):
    "A CT task of about 16 x 40 x 40 voxels: raw data, plan, trained model, predictions"
    base = tmp_path_factory.mktemp('ct')
    return chain(tiny_task('Task101_PhantomCT', base/'raw'/'Task201_TinyCT', (2, 3, 3)), base/'workspace')


@pytest.fixture(scope='session')
def mr(tmp_path_factory):
    "The same for four MR channels of about 24 cubed voxels"
    base = tmp_path_factory.mktemp('mr')
    return chain(tiny_task('Task102_PhantomMR', base/'raw'/'Task202_TinyMR', (3, 3, 3)), base/'workspace', train=('--no-validation', '--epochs', 1))
