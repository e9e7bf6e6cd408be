"""Validation of a fold on the phantom CT: what is scored, what is refused, what is left behind."""
import dataclasses, json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb import export, validation
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.export import read_probabilities, to_original_grid
from segnb.image import SegnbError, read_label_map, write_label_map
from segnb.metrics import evaluate_case
from segnb.planning import Plans, plan_experiment
from segnb.preprocessing import preprocess_dataset, preprocess_previous_stage, preprocessing_identity
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
        np.testing.assert_equal(scores, evaluate_case(truth, answer, (1, 2, 3), grid.spacing))
    assert set(json.loads((work/'model'/'fold_0'/'validation'/'summary.json').read_text())['cases']) == {'ct_000', 'ct_007'}


def test_cases_come_from_the_checkpoint_and_strangers_are_not_scored(work):
    splits = json.loads((work/'pre'/'splits.json').read_text())
    (work/'pre'/'splits.json').write_text(json.dumps(splits[::-1]))
    (work/'model'/'fold_0'/'validation').mkdir()
    shutil.copy(SAMPLE/'labelsTr'/'ct_001.nii.gz', work/'model'/'fold_0'/'validation')
    assert set(validate_fold(work/'model', 0, work/'pre', checkpoint='best', **QUICK)['cases']) == {'ct_000', 'ct_007'}


def test_a_failing_case_is_named_and_the_others_are_written(work, monkeypatch):
    write = validation.predict_case
    def fails_once(predictor, case, *files):
        if case.case == 'ct_000': raise SegnbError('something is wrong with it')
        write(predictor, case, *files)
    monkeypatch.setattr(validation, 'predict_case', fails_once)
    with pytest.raises(ValidationError, match='1 of 2 cases failed.*ct_000: something is wrong'): validate_fold(work/'model', 0, work/'pre', **QUICK)
    assert sorted(p.name for p in (work/'model'/'fold_0'/'validation').iterdir()) == ['ct_007.nii.gz', 'made_with.json']
    monkeypatch.setattr(validation, 'predict_case', write)
    before = (work/'model'/'fold_0'/'validation'/'ct_007.nii.gz').stat().st_mtime_ns
    assert len(validate_fold(work/'model', 0, work/'pre', overwrite=False, **QUICK)['cases']) == 2
    assert (work/'model'/'fold_0'/'validation'/'ct_007.nii.gz').stat().st_mtime_ns == before


@pytest.mark.parametrize('file, words', [('ct_000_data.npy', 'another size'), ('ct_000.json', 'not valid JSON')])
def test_what_is_left_of_an_earlier_run_does_not_stand_in_for_a_damaged_case(work, file, words):
    validate_fold(work/'model', 0, work/'pre', save_probabilities=True, **QUICK)
    damaged, out = work/'pre'/'3d_fullres'/file, work/'model'/'fold_0'/'validation'
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:300] if file.endswith('npy') else b'{"broken')
    with pytest.raises(ValidationError, match=f'1 of 2 cases failed.*ct_000.*{words}'): validate_fold(work/'model', 0, work/'pre', **QUICK)
    assert sorted(p.name for p in out.iterdir()) == ['ct_007.nii.gz', 'made_with.json']
    damaged.write_bytes(whole)
    assert len(validate_fold(work/'model', 0, work/'pre', overwrite=False, **QUICK)['cases']) == 2


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


# ---- going on, keeping probabilities, other kinds of models, several processes ----

def stamps(folder): return {p.name: p.stat().st_mtime_ns for p in sorted(folder.iterdir())}


def test_going_on_keeps_only_what_this_network_said(work):
    out = work/'model'/'fold_0'/'validation'
    first = validate_fold(work/'model', 0, work/'pre', **QUICK)
    before = stamps(out)
    again = validate_fold(work/'model', 0, work/'pre', overwrite=False, **QUICK)
    assert stamps(out)['ct_000.nii.gz'] == before['ct_000.nii.gz'] and again['cases'] == first['cases'] and again['made_with'] == first['made_with']
    validate_fold(work/'model', 0, work/'pre', overwrite=False, **QUICK | dict(mirror=True))
    asked_otherwise = stamps(out)
    assert asked_otherwise['ct_000.nii.gz'] != before['ct_000.nii.gz']
    file = work/'model'/'fold_0'/'checkpoint_final.pt'
    state = torch.load(file, weights_only=True)
    state['network'] = {k: v + .01 for k, v in state['network'].items()}
    torch.save(state, file)
    validate_fold(work/'model', 0, work/'pre', overwrite=False, **QUICK | dict(mirror=True))
    assert stamps(out)['ct_000.nii.gz'] != asked_otherwise['ct_000.nii.gz']


def test_probabilities_missing_from_an_earlier_run_are_made(work):
    validate_fold(work/'model', 0, work/'pre', **QUICK)
    validate_fold(work/'model', 0, work/'pre', overwrite=False, save_probabilities=True, **QUICK)
    out = work/'model'/'fold_0'/'validation'
    assert {'ct_000.npz', 'ct_007.npz'} <= set(stamps(out))
    probabilities, way_back = read_probabilities(out/'ct_007.npz')
    assert probabilities.dtype == np.float16 and len(probabilities) == 4 and np.allclose(probabilities.sum(0, dtype=np.float32), 1, atol=2e-3)
    labels = Dataset(SAMPLE).labels
    assert (to_original_grid(probabilities, way_back, labels) != read_label_map(out/'ct_007.nii.gz')[0]).mean() < 1e-2 # two steps old, it is hardly ever sure
    assert set(np.load(out/'ct_007.npz', allow_pickle=False).files) == {'probabilities', 'properties'}


def test_a_full_disk_leaves_no_half_file(work, monkeypatch):
    def full(file, *header):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np.lib.format, 'write_array_header_1_0', full)
    with pytest.raises(ValidationError, match='2 of 2 cases failed.*No space left'): validate_fold(work/'model', 0, work/'pre', save_probabilities=True, **QUICK)
    assert sorted(stamps(work/'model'/'fold_0'/'validation')) == ['made_with.json']


def test_memory_that_runs_out_is_explained(work, monkeypatch):
    def none_left(*_): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setattr(validation, 'predict_case', none_left)
    with pytest.raises(ValidationError, match='ct_000: OutOfMemoryError: CUDA out of memory.*predict on the CPU'): validate_fold(work/'model', 0, work/'pre', **QUICK)


def test_writing_in_the_background_writes_the_same(work, monkeypatch):
    out = work/'model'/'fold_0'/'validation'
    here = validate_fold(work/'model', 0, work/'pre', save_probabilities=True, **QUICK)
    files = {p.name: p.read_bytes() for p in out.glob('*.nii.gz')}
    there = validate_fold(work/'model', 0, work/'pre', save_probabilities=True, background=True, **QUICK)
    assert here['cases'] == there['cases'] and files == {p.name: p.read_bytes() for p in out.glob('*.nii.gz')} and len(list(out.glob('*.npz'))) == 2
    save = export.save_label_map
    def fails_once(labels, geometry, file):
        if 'ct_000' in str(file): raise OSError('the network drive is gone')
        save(labels, geometry, file)
    monkeypatch.setattr(export, 'save_label_map', fails_once)
    with pytest.raises(ValidationError, match='1 of 2 cases failed.*ct_000: the network drive is gone'): validate_fold(work/'model', 0, work/'pre', background=True, **QUICK)
    assert (out/'ct_007.nii.gz').exists()


@pytest.mark.parametrize('checkpoint', ['best', 'latest'])
def test_other_checkpoints_have_their_own_folder(work, checkpoint):
    result = validate_fold(work/'model', 0, work/'pre', checkpoint=checkpoint, **QUICK)
    assert (work/'model'/'fold_0'/f'validation_{checkpoint}'/'summary.json').exists() and not (work/'model'/'fold_0'/'validation').exists()
    assert result['made_with']['checkpoint'] == f'checkpoint_{checkpoint}.pt'


SCRIPT = '''
import sys, torch
from pathlib import Path
from segnb.distributed import start_world
from segnb.validation import validate_fold
torch.set_num_threads(1)
with start_world('cpu') as world:
    result = validate_fold(sys.argv[1] + '/model', 0, sys.argv[1] + '/pre', device='cpu', mirror=False, progress=False)
    assert list(result['cases']) == ['ct_000', 'ct_007']
    (Path(sys.argv[1])/f'said_{world.rank}').write_text(repr(result['foreground_mean']['dice'])) # a file each: two prints may run into one line
    file = Path(sys.argv[1])/'pre'/'3d_fullres'/'ct_007_data.npy' # the second of two: the second process has it
    if world.rank == 1: file.write_bytes(file.read_bytes()[:500])
    validate_fold(sys.argv[1] + '/model', 0, sys.argv[1] + '/pre', device='cpu', mirror=False, progress=False)
'''


def torchrun(work):
    (work/'run.py').write_text(SCRIPT)
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(work/'run.py'), str(work)], capture_output=True, text=True,
                          timeout=200, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[1])})


def test_two_processes_share_the_cases_and_a_case_that_fails_in_the_second_is_named(work):
    alone = validate_fold(work/'model', 0, work/'pre', **QUICK)
    shutil.rmtree(work/'model'/'fold_0'/'validation')
    done = torchrun(work)
    said = [float(file.read_text()) for file in sorted(work.glob('said_*'))]
    assert said == [alone['foreground_mean']['dice']]*2, done.stderr[:6000]
    assert done.returncode != 0 and '1 of 2 cases failed' in done.stderr and 'ct_007' in done.stderr
    assert sorted(stamps(work/'model'/'fold_0'/'validation')) == ['ct_000.nii.gz', 'made_with.json']


def variant(tmp_path, source, name, json_changes=None, labels=lambda m: m, **changes):
    "A sample data set with another dataset.json, its label maps changed, planned coarsely, preprocessed and trained for a moment"
    raw = tmp_path/'raw'
    shutil.copytree(source, raw)
    if json_changes: (raw/'dataset.json').write_text(json.dumps(json.loads((raw/'dataset.json').read_text()) | json_changes))
    for file in sorted((raw/'labelsTr').glob('*.nii.gz')):
        array, geometry = read_label_map(file)
        write_label_map(labels(array.copy()), geometry, file)
    dataset = Dataset(raw)
    plans = plan_experiment(extract_fingerprint(dataset, n_workers=0), planner='cpu')
    flat = name == '2d'
    fine, n = plans.configuration(name if flat else '3d_fullres'), 2 if flat else 3
    coarse = dataclasses.replace(fine, spacing=tuple(2.5*s for s in fine.spacing), median_shape=tuple(max(1, round(v/2.5)) for v in fine.median_shape), patch_size=(16, 16)[:n] if flat else (8, 16, 16), batch_size=2,
                                 num_pool_per_axis=(1,)*n, pool_op_kernel_sizes=((2,)*n,), conv_kernel_sizes=((3,)*n,)*2, do_dummy_2d_data_aug=False, base_num_features=2, **changes)
    plans = dataclasses.replace(plans, configurations={coarse.name: coarse}, **({'planner': 'nnunet_v1_residual'} if 'architecture' in changes else {}))
    preprocess_dataset(dataset, plans, tmp_path/'pre', configurations=[coarse.name], n_workers=0)
    Trainer(tmp_path/'pre', tmp_path/'model', coarse.name, epochs=1, iterations=1, val_iterations=1, n_workers=0, device='cpu', progress=False).fit()
    return dataset, validate_fold(tmp_path/'model', 0, tmp_path/'pre', save_probabilities=True, **QUICK)


def answers(tmp_path, dataset, result):
    for case in result['cases']:
        truth, grid = read_label_map(dataset.label_file(case))
        yield case, truth, read_label_map(tmp_path/'model'/'fold_0'/'validation'/f'{case}.nii.gz')[0], grid.spacing


@pytest.mark.parametrize('name, changes', [('2d', {}), ('3d_fullres', dict(architecture='residual', blocks_per_stage_encoder=(1, 1), blocks_per_stage_decoder=(1,)))])
def test_slices_and_residual_networks(tmp_path, name, changes):
    dataset, result = variant(tmp_path, SAMPLE, name, **changes)
    assert list(result['cases']) == ['ct_000', 'ct_007']
    for case, truth, answer, spacing in answers(tmp_path, dataset, result): np.testing.assert_equal(result['cases'][case], evaluate_case(truth, answer, (1, 2, 3), spacing))


def test_regions_are_scored_as_regions(tmp_path):
    wanted = {'labels': {'background': 0, 'whole': [1, 2, 3], 'core': [2, 3]}, 'regions_class_order': [1, 2]}
    dataset, result = variant(tmp_path, SAMPLE, '3d_fullres', wanted, labels=lambda m: np.minimum(m, 2))
    values = {r: [dataset.labels.values[k] for k in ks] for r, ks in dataset.labels.regions.items()}
    for case, truth, answer, spacing in answers(tmp_path, dataset, result):
        for region, v in values.items(): assert result['regions']['cases'][case][region] == pytest.approx(evaluate_case(np.isin(truth, v).astype(int), np.isin(answer, v).astype(int), (1,), spacing)[1], nan_ok=True)
    assert set(result['regions']['mean']) == {'whole', 'core'} and json.loads((tmp_path/'model'/'fold_0'/'validation'/'summary.json').read_text())['regions']['mean']


def test_voxels_without_truth_are_not_scored(tmp_path):
    def unknown(m):
        m[:, :m.shape[1]//2] = 4
        return m
    dataset, result = variant(tmp_path, SAMPLE, '3d_fullres', {'labels': {'background': 0, 'organ': 1, 'lesion': 2, 'other organ': 3, 'ignore': 4}}, labels=unknown)
    blanked = False
    for case, truth, answer, spacing in answers(tmp_path, dataset, result):
        blanked |= bool((answer[truth == 4] > 0).any())
        np.testing.assert_equal({k: v['dice'] for k, v in result['cases'][case].items()}, {k: v['dice'] for k, v in evaluate_case(truth, np.where(truth == 4, 0, answer), (1, 2, 3), spacing).items()})
    assert blanked or all(not (answer > 0).any() for *_, answer, _ in answers(tmp_path, dataset, result)), 'the network answered somewhere without truth'


def test_kept_probabilities_feed_the_second_stage_of_a_cascade(work):
    plans = Plans.load(work/'pre'/'plans.json')
    low = plans.configuration('3d_fullres')
    plans = dataclasses.replace(plans, configurations={'3d_fullres': low, '3d_lowres': dataclasses.replace(low, name='3d_lowres'), '3d_cascade_fullres': dataclasses.replace(low, name='3d_cascade_fullres', previous_stage='3d_lowres')})
    shutil.copytree(work/'pre'/'3d_fullres', work/'pre'/'3d_lowres') # the second stage shares the cases of 3d_fullres
    assert plans.configuration('3d_cascade_fullres').data_configuration == '3d_fullres'
    plans.save(work/'pre'/'plans.json')
    for name in plans.configurations:
        for file in (work/'pre'/plans.configuration(name).data_configuration).glob('ct_*.json'):
            file.write_text(json.dumps(json.loads(file.read_text()) | {'preprocessing': preprocessing_identity(plans, plans.configuration(name).data_configuration)}))
    Trainer(work/'pre', work/'low', '3d_lowres', fold='all', epochs=1, iterations=1, val_iterations=1, n_workers=0, device='cpu', progress=False).fit()
    validate_fold(work/'low', 'all', work/'pre', save_probabilities=True, **QUICK)
    assert len(preprocess_previous_stage(work/'low'/'fold_all'/'validation', work/'pre', plans, n_workers=0)) == 10
    Trainer(work/'pre', work/'high', '3d_cascade_fullres', epochs=1, iterations=1, val_iterations=1, n_workers=0, device='cpu', progress=False).fit()
    result = validate_fold(work/'high', 0, work/'pre', **QUICK)
    assert list(result['cases']) == ['ct_000', 'ct_007']
