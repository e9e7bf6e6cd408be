"""Sample data: the stored files are what the code makes, and the original read them as we do."""
import filecmp, json, time
from pathlib import Path

import numpy as np
import pytest

from segnb.dataset import Dataset, check_dataset
from segnb.samples import CONTRAST, TASKS, make_case, make_samples, phantom_ct
from segnb.image import read_image, read_label_map

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT/'data_samples'


def test_a_process_more_changes_no_byte(tmp_path):
    folders = [make_samples(tmp_path/str(n), 'Task103_PhantomCells', seed=5, n_workers=n)[0] for n in (0, 2)]
    names = [str(p.relative_to(folders[0])) for p in sorted(folders[0].rglob('*')) if p.is_file()]
    assert filecmp.cmpfiles(*folders, names, shallow=False) == (names, [], []) and len(names) == 25
    other, = make_samples(tmp_path/'other', 'Task103_PhantomCells', seed=6, n_workers=0)
    assert not filecmp.cmp(folders[0]/'imagesTr'/'cells_000_0000.png', other/'imagesTr'/'cells_000_0000.png', shallow=False)


@pytest.mark.parametrize('task', TASKS)
def test_stored_files_are_what_the_code_makes(task):
    dataset, (prefix, n_train, n_test, *_) = Dataset(STORED/task), TASKS[task]
    check_dataset(dataset, 0)
    assert dataset.json['licence'] == 'CC0-1.0' and (len(dataset.cases), len(dataset.test_cases)) == (n_train, n_test)
    for number in (0, n_train - 1, n_train):
        made, name = make_case(task, number), f'{prefix}_{number:03d}'
        part = 'Tr' if number < n_train else 'Ts'
        image, geometry = read_image(dataset.image_files(name))
        labels, _ = read_label_map(STORED/task/f'labels{part}'/f'{name}{dataset.file_ending}')
        assert geometry.differences(made.geometry) == []
        # sines may differ in the last bit between processors
        assert np.abs(image - made.image).max() <= 1 and (image != made.image).mean() < 1e-3 and (labels != made.label).mean() < 1e-4
    assert not list((STORED/task/'labelsTr').glob(f'*{n_train:03d}*')), 'the truth of a test case lies beside the training labels'


def test_all_is_small():
    assert sum(p.stat().st_size for p in STORED.rglob('*') if p.is_file()) < 20e6


def test_the_original_reads_what_we_read():
    recorded = json.loads((ROOT/'tests'/'recorded'/'16_samples.json').read_text())['tasks']
    for task, seen in recorded.items():
        dataset = Dataset(STORED/task)
        assert seen['accepted'] and seen['channels'] == list(dataset.channels) and sorted(seen['cases']) == list(dataset.cases)
        for name, values in seen['cases'].items():
            case = dataset.read(name)
            assert list(case.image.shape) == values['shape'] and np.bincount(case.label.ravel(), minlength=4).tolist() == values['voxels']
            assert np.allclose(case.geometry.spacing, values['spacing'], atol=1e-5)
            assert np.allclose(case.image.mean((1, 2, 3), dtype=np.float64), values['means'], atol=1e-3)


@pytest.mark.parametrize('phase', CONTRAST)
def test_labels_lie_where_the_image_changes(phase):
    for seed in range(2):
        case = phantom_ct(np.random.default_rng(seed), thickness=4., phase=phase)
        image, label = case.image[0], case.label
        for number, value in zip((1, 2, 3), CONTRAST[phase]):
            assert (label == number).sum() > 150 and abs(np.median(image[label == number]) - value) < 30
        assert image.min() >= -1024 and np.array_equal(image, np.round(image))


def test_one_ct_takes_seconds():
    start = time.process_time()
    make_case('Task101_PhantomCT', 2)
    assert time.process_time() - start < 3
