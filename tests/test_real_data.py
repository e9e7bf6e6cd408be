"""Real acquisitions: the plan of Hippocampus, the way there and back, and the whole chain on CT and on four MR channels.

The data are read where they lie (environment variable SEGNB_REAL_DATA, else ../shared/data) and skipped where they are not.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segnb.dataset import Dataset
from segnb.export import save_label_map, to_original_grid
from segnb.planning import Plans
from segnb.preprocessing import preprocess_case
from segnb.workers import write_json
from conftest import ROOT, files

DATA = Path(os.environ.get('SEGNB_REAL_DATA', ROOT/'..'/'shared'/'data'))


def real(task):
    if not (DATA/task/'dataset.json').exists(): pytest.skip(f'{task} is not in {DATA}; name the folder that holds it in SEGNB_REAL_DATA')
    return DATA/task


def grid(file):
    image = sitk.ReadImage(str(file))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


@pytest.fixture(scope='module')
def hippocampus(tmp_path_factory):
    "Data set, and plans as the command writes them; planning checks all 200 cases first"
    from segnb.cli import plan
    folder = real('Task004_Hippocampus')
    return Dataset(folder), Plans.load(plan(str(folder), tmp_path_factory.mktemp('workspace'), say=lambda _: None)/'plans.json')


def test_hippocampus_is_planned_as_expected(hippocampus):
    dataset, plans = hippocampus
    full = plans.configuration('3d_fullres')
    assert len(dataset.cases) == 200 and list(plans.configurations) == ['2d', '3d_fullres']
    assert tuple(full.spacing) == (1, 1, 1) and tuple(np.round(full.median_shape)) == (36, 50, 35)
    assert tuple(full.patch_size) == (40, 56, 40) and full.batch_size == 7 and tuple(full.num_pool_per_axis) == (3, 3, 3)
    flat = plans.configuration('2d')
    assert tuple(flat.patch_size) == (56, 40) and flat.batch_size == 281


@pytest.mark.parametrize('index', [0, 57, 199])
def test_hippocampus_there_and_back(hippocampus, tmp_path, index):
    dataset, plans = hippocampus
    case = dataset.read(dataset.cases[index])
    _, seg, properties = preprocess_case(case.image, case.label, case.geometry.spacing, plans, '3d_fullres')
    back = to_original_grid(dataset.labels.one_hot(np.maximum(seg, 0)), properties, dataset.labels)
    save_label_map(back, case.geometry, tmp_path/'back.nii.gz')
    assert np.array_equal(back, case.label) and grid(tmp_path/'back.nii.gz') == grid(dataset.label_file(case.identifier))


def linked(task, folder, n):
    "The first cases of a real task as links: nothing is copied"
    dataset = Dataset(real(task))
    for part in ('imagesTr', 'labelsTr', 'in'): (folder/task/part).mkdir(parents=True)
    for i, case in enumerate(dataset.cases[:n]):
        for file in (*dataset.image_files(case), dataset.label_file(case)): (folder/task/file.parent.name/file.name).symlink_to(file.resolve())
        for file in dataset.image_files(case) if i < 2 else (): (folder/task/'in'/file.name).symlink_to(file.resolve())
    write_json({k: v for k, v in dataset.json.items() if k not in ('training', 'test')}, folder/task/'dataset.json')
    return folder/task


@pytest.mark.parametrize('task, n, fold', [('Task010_SarcomaCT', 5, 0), ('Task013_MSLesion', 2, 'all')])
def test_the_whole_chain(segnb, tmp_path, task, n, fold):
    raw, w, out = linked(task, tmp_path/'raw', n), tmp_path/'w', tmp_path/'out'
    for verb, *args in (('plan', raw, '--planner', 'cpu'), ('preprocess', task),
                        ('train', task, fold, '--epochs', 1, '--iterations', 2, '--val-iterations', 1, '-j', 0, '-q', '--no-validation'),
                        ('predict', '-i', raw/'in', '-o', out, '-d', task, '--disable-tta', '--step-size', 1, '-q')):
        said = segnb(verb, *args, '-w', w)
        assert said.returncode == 0, said.stderr
    images = sorted((raw/'in').glob('*_0000.nii.gz'))
    assert files(out) == {f.name.replace('_0000', '') for f in images} | {'made_with.json'} and len(images) == 2
    for file in images: assert grid(out/file.name.replace('_0000', '')) == grid(file)
