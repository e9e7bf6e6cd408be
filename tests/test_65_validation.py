"""Validation of a fold on the phantom CT: what is scored, what is refused, what is left behind."""
import dataclasses, json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb import validation
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import SegnbError, read_label_map
from segnb.metrics import evaluate_case
from segnb.planning import plan_experiment
from segnb.preprocessing import preprocess_dataset
from segnb.training import Trainer
from segnb.validation import ValidationError, validate_fold

torch.set_num_threads(1)
SAMPLE = Path(__file__).resolve().parents[1]/'data_samples'/'Task101_PhantomCT'
QUICK = dict(device='cpu', mirror=False, progress=False)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    work, dataset = tmp_path_factory.mktemp('validation'), Dataset(SAMPLE)
    plans = plan_experiment(extract_fingerprint(dataset, n_workers=0), planner='cpu')
    coarse = dataclasses.replace(plans.configuration('3d_fullres'), spacing=(5, 6.4, 6.4), median_shape=(20, 15, 15), patch_size=(8, 16, 16), num_pool_per_axis=(1, 1, 1),
                                 pool_op_kernel_sizes=((2, 2, 2),), conv_kernel_sizes=((3, 3, 3),)*2, do_dummy_2d_data_aug=False, base_num_features=2)
    preprocess_dataset(dataset, dataclasses.replace(plans, configurations={'3d_fullres': coarse}), work/'pre', n_workers=0)
    Trainer(work/'pre', work/'model', epochs=2, iterations=2, val_iterations=1, n_workers=0, device='cpu', progress=False).fit()
    return work


@pytest.fixture
def work(trained, tmp_path): return Path(shutil.copytree(trained, tmp_path/'work'))


def test_the_summary_is_what_the_files_say(work):
    result = validate_fold(work/'model', 0, work/'pre', **QUICK)
    assert list(result['cases']) == ['ct_000', 'ct_007'] and result['held_back']
    for case, scores in result['cases'].items():
        truth, grid = read_label_map(SAMPLE/'labelsTr'/f'{case}.nii.gz')
        answer, other = read_label_map(work/'model'/'fold_0'/'validation'/f'{case}.nii.gz')
        assert not other.differences(grid)
        np.testing.assert_equal(scores, evaluate_case(truth, answer, (1, 2, 3)))
    assert set(json.loads((work/'model'/'fold_0'/'validation'/'summary.json').read_text())['cases']) == {'ct_000', 'ct_007'}


def test_cases_come_from_the_checkpoint_and_strangers_are_not_scored(work):
    splits = json.loads((work/'pre'/'splits.json').read_text())
    (work/'pre'/'splits.json').write_text(json.dumps(splits[::-1]))
    (work/'model'/'fold_0'/'validation').mkdir()
    shutil.copy(SAMPLE/'labelsTr'/'ct_001.nii.gz', work/'model'/'fold_0'/'validation')
    assert set(validate_fold(work/'model', 0, work/'pre', checkpoint='best', **QUICK)['cases']) == {'ct_000', 'ct_007'}


def test_a_failing_case_is_named_and_the_others_are_written(work, monkeypatch):
    write = validation.predict_case
    def fails_once(predictor, case, file):
        if case.case == 'ct_000': raise SegnbError('something is wrong with it')
        write(predictor, case, file)
    monkeypatch.setattr(validation, 'predict_case', fails_once)
    with pytest.raises(ValidationError, match='1 of 2 cases failed.*ct_000: something is wrong'): validate_fold(work/'model', 0, work/'pre', **QUICK)
    assert sorted(p.name for p in (work/'model'/'fold_0'/'validation').iterdir()) == ['ct_007.nii.gz']
    monkeypatch.setattr(validation, 'predict_case', write)
    before = (work/'model'/'fold_0'/'validation'/'ct_007.nii.gz').stat().st_mtime_ns
    assert len(validate_fold(work/'model', 0, work/'pre', overwrite=False, **QUICK)['cases']) == 2
    assert (work/'model'/'fold_0'/'validation'/'ct_007.nii.gz').stat().st_mtime_ns == before


def test_cases_preprocessed_by_another_plan_are_refused(work):
    file = work/'pre'/'3d_fullres'/'ct_007.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'preprocessing': 'other'}))
    with pytest.raises(ValidationError, match='case ct_007.*another plan'): validate_fold(work/'model', 0, work/'pre', **QUICK)


def test_an_old_summary_does_not_outlive_its_predictions(work, monkeypatch):
    validate_fold(work/'model', 0, work/'pre', **QUICK)
    def cut(*_): raise KeyboardInterrupt
    monkeypatch.setattr(validation, 'predict_case', cut)
    with pytest.raises(KeyboardInterrupt): validate_fold(work/'model', 0, work/'pre', **QUICK)
    assert not (work/'model'/'fold_0'/'validation'/'summary.json').exists()


def test_what_is_missing_is_named(work):
    with pytest.raises(SegnbError, match='fold 4'): validate_fold(work/'model', 4, work/'pre', **QUICK)
    (work/'pre'/'gt_segmentations'/'ct_000.nii.gz').unlink()
    with pytest.raises(ValidationError, match='case ct_000.*reference label map is missing'): validate_fold(work/'model', 0, work/'pre', **QUICK)
