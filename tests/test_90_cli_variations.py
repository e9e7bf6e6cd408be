"""The variations by the command: models from one file to the next, a training that begins with another model, downloads, the look at a cascade."""
import json, shutil

import numpy as np
import pytest
import torch

from conftest import ROOT, files
from segnb.image import read_label_map

FEW = ('--device', 'cpu', '-q', '-j', 0)
SHORT = ('--epochs', 1, '--iterations', 2, '--val-iterations', 1, '--no-validation', *FEW)


def succeeded(said):
    assert said.returncode == 0 and 'Traceback' not in said.stderr, said.stdout + said.stderr
    return said.stdout


def refused(said, *words):
    assert said.returncode == 2 and 'Traceback' not in said.stderr, said.stdout + said.stderr
    assert all(w in said.stderr for w in words), said.stderr


def test_a_model_comes_back_from_its_file_and_predicts_the_same(ct, segnb, tmp_path):
    file = tmp_path/'organ.segnb'
    said = succeeded(segnb('export-model', ct.raw.name, '-w', ct.workspace, '-c', '3d_fullres', '-o', file, '--licence', 'CC0-1.0', '--description',
                           'two organs'))
    assert str(file) in said and 'CC0-1.0' in said
    described = json.loads(succeeded(segnb('import-model', file, '--describe', '--json', '-')))['description']
    assert described['licence'] == 'CC0-1.0' and not (tmp_path/'workspace').exists()
    made = json.loads(succeeded(segnb('import-model', file, '-w', tmp_path/'workspace', '--json', '-')))['model']
    assert made == str(tmp_path/'workspace'/'models'/ct.raw.name/'3d_fullres')
    refused(segnb('import-model', file, '-w', tmp_path/'workspace'), 'already')
    succeeded(segnb('import-model', file, '-w', tmp_path/'workspace', '--overwrite'))
    succeeded(segnb('predict', '-i', ct.raw/'imagesTs', '-o', tmp_path/'out', '-m', made, *FEW))
    for f in sorted(ct.predictions.glob('*.nii.gz')): assert np.array_equal(read_label_map(f)[0], read_label_map(tmp_path/'out'/f.name)[0])


def test_a_model_folder_and_a_task_travel(ct, segnb, tmp_path):
    succeeded(segnb('export-model', ct.model, '-o', tmp_path/'one.segnb'))
    succeeded(segnb('export-model', ct.model.parent, '-o', tmp_path/'all.segnb'))
    made = json.loads(succeeded(segnb('import-model', tmp_path/'one.segnb', '-o', tmp_path/'mine', '--json', '-')))['model']
    assert made == str(tmp_path/'mine') and {'plans.json', 'dataset.json'} <= set(files(tmp_path/'mine'))


@pytest.mark.parametrize('content', [b'', b'no model', b'PK\x03\x04 and no more'])
def test_what_is_no_model_is_refused(content, segnb, tmp_path):
    (tmp_path/'model.segnb').write_bytes(content)
    refused(segnb('import-model', tmp_path/'model.segnb', '-w', tmp_path/'workspace'), 'model.segnb')
    assert not (tmp_path/'workspace').exists()


def test_a_missing_model_is_named(segnb, tmp_path):
    refused(segnb('import-model', tmp_path/'nothing.zip'), 'nothing.zip')
    refused(segnb('export-model', 'Task077_Nothing', '-w', tmp_path), 'Task077_Nothing')


def test_a_training_begins_with_another_model_and_says_what_was_taken(ct, segnb, tmp_path):
    work = tmp_path/'work'
    succeeded(segnb('plan', ct.raw, '-w', work, '--overwrite-plans', ct.model/'plans.json', '-j', 0))
    succeeded(segnb('preprocess', ct.raw.name, '-w', work, '-c', '3d_fullres', '-j', 0))
    succeeded(segnb('train', ct.raw.name, 0, '-w', work, '--from', ct.model, '--lr-encoder', .001, '--freeze-encoder', 1, *SHORT))
    folder = work/'models'/ct.raw.name/'3d_fullres'/'fold_0'
    transfer = json.loads((folder/'record.json').read_text(encoding='utf-8'))['transfer']
    assert {row['fate'] for row in transfer['rows']} == {'taken'} and len(transfer['rows']) > 10
    assert 'taken' in (folder/'log.txt').read_text(encoding='utf-8')
    succeeded(segnb('train', ct.raw.name, 0, '-w', work, '--continue', '--epochs', 2, '--no-validation', *FEW))   # goes on by itself
    refused(segnb('train', ct.raw.name, 0, '-w', work, '--continue', '--from', ct.model, *SHORT), '--from')
    for file in folder.glob('checkpoint_*.pt'): file.unlink()                                          # as if killed before its first save
    before = (folder/'log.txt').read_text(encoding='utf-8').count('taken')
    succeeded(segnb('train', ct.raw.name, 0, '-w', work, '--continue', '--epochs', 1, '--no-validation', *FEW))
    assert (folder/'log.txt').read_text(encoding='utf-8').count('taken') == 2*before > 0
    assert json.loads((folder/'record.json').read_text(encoding='utf-8'))['transfer']['asked']['freeze_encoder'] == 1


def test_options_of_a_start_need_a_start(ct, segnb):
    refused(segnb('train', ct.raw.name, 0, '-w', ct.workspace, '--lr-encoder', .001, *SHORT), '--from')
    before = files(ct.model)
    refused(segnb('train', ct.raw.name, 0, '-w', ct.workspace, '--from', '/nowhere', '--overwrite', *SHORT), '/nowhere')
    assert files(ct.model) == before   # nothing was removed for a start that cannot be


def test_a_plan_without_a_cascade_says_so(ct, segnb):
    refused(segnb('cascade', ct.raw.name, '-w', ct.workspace, '--dry-run'), '3d_cascade_fullres')


def test_downloads_are_listed_and_strange_names_refused(segnb, tmp_path):
    assert 'Task04_Hippocampus' in succeeded(segnb('download'))
    refused(segnb('download', 'Task77_Nothing', tmp_path/'raw'), 'Task77_Nothing', 'Task04_Hippocampus')
    refused(segnb('download', 'Task94_Toy', tmp_path/'raw', '--url', 'http://127.0.0.1:9/Task94_Toy.tar', '--md5', '0'*32, '-q'), 'cannot be fetched')


def test_jobs_are_written_shown_and_run_here(ct, segnb, tmp_path):
    out, maps = tmp_path/'jobs', tmp_path/'maps'
    answer = succeeded(segnb('jobs', 'predict', '-i', ct.raw/'imagesTs', '-l', maps, '-m', ct.model, '-n', 2, '-o', out, '--', *FEW, '--disable-tta',
                             '--step-size', 1))
    assert '2 jobs' in answer and {'jobs.json', 'submit.sh'} <= set(files(out))
    assert '2 ready' in succeeded(segnb('jobs', 'show', out))
    succeeded(segnb('jobs', 'run', out, '-q'))
    assert '2 done' in succeeded(segnb('jobs', 'show', out)) and len(list(maps.glob('*.nii.gz'))) == 2


def test_jobs_of_a_cross_validation_wait_for_each_other(ct, segnb, tmp_path):
    succeeded(segnb('jobs', 'train', ct.raw.name, '-w', ct.workspace, '-c', '2d', '3d_fullres', '-f', 0, 1, '-o', tmp_path/'jobs', '--at-once', 2,
                    '--sbatch=--partition=gpu', '--', '--epochs', 3))
    jobs = json.loads((tmp_path/'jobs'/'jobs.json').read_text(encoding='utf-8'))['jobs']
    trained = [j for j in jobs if j['name'].startswith('train-')]
    assert len(trained) == 4 and all(j['command'][-2:] == ['--epochs', '3'] for j in trained)
    assert set(jobs[-1]['after']) == {j['name'] for j in trained}


def test_cases_go_to_a_dask_cluster(ct, segnb, tmp_path):
    pytest.importorskip('distributed')
    succeeded(segnb('evaluate', '-r', ct.raw/'labelsTr', '-p', ct.raw/'labelsTr', '-l', ct.raw/'dataset.json', '--dask', 'local:1', '-q'))
    refused(segnb('evaluate', '-r', ct.raw/'labelsTr', '-p', ct.raw/'labelsTr', '-l', ct.raw/'dataset.json', '--dask', 'nowhere.json', '-q'), 'Dask')


def test_a_network_goes_to_onnx_and_answers_alike(ct, segnb, tmp_path):
    pytest.importorskip('onnx')
    out = tmp_path/'onnx'
    succeeded(segnb('export-onnx', ct.model, '-o', out))
    assert {'pipeline.json', 'run.py', 'fold_0.onnx'} <= set(files(out))
    refused(segnb('export-onnx', ct.model, '-o', out), 'onnx')


NETWORK = '''
from segnb.network import build_unet
def build(configuration, in_channels, n_outputs, deep_supervision=True, activation='leaky_relu'):
    return build_unet(configuration, in_channels, n_outputs, deep_supervision=deep_supervision, activation=activation)
'''

def test_a_network_of_ones_own_is_trained_found_again_and_refused_politely(ct, segnb, tmp_path):
    work, file = tmp_path/'work', tmp_path/'mine.py'
    shutil.copytree(ct.workspace/'preprocessed', work/'preprocessed')
    file.write_text(NETWORK, encoding='utf-8')
    refused(segnb('train', ct.raw.name, 0, '-w', work, '--network', f'{file}:nothing', *SHORT), 'nothing')
    with pytest.raises(SystemExit): segnb('train', ct.raw.name, 0, '-w', work, '--network', f'{file}:build', '--network-options', '[1]', *SHORT)
    succeeded(segnb('train', ct.raw.name, 0, '-w', work, '--network', f'{file}:build', '--network-options', '{"activation": "gelu"}', *SHORT))
    model = work/'models'/ct.raw.name/'3d_fullres'
    succeeded(segnb('train', ct.raw.name, 0, '-w', work, '--continue', '--epochs', 2, '--no-validation', *FEW))
    succeeded(segnb('predict', '-i', ct.raw/'imagesTs', '-o', tmp_path/'out', '-m', model, *FEW, '--disable-tta'))
    moved = file.rename(tmp_path/'elsewhere.py')
    refused(segnb('predict', '-i', ct.raw/'imagesTs', '-o', tmp_path/'out2', '-m', model, *FEW), 'mine.py')
    succeeded(segnb('predict', '-i', ct.raw/'imagesTs', '-o', tmp_path/'out2', '-m', model, *FEW, '--disable-tta', '--network', f'{moved}:build'))
    for f in sorted((tmp_path/'out').glob('*.nii.gz')): assert np.array_equal(read_label_map(f)[0], read_label_map(tmp_path/'out2'/f.name)[0])


@pytest.mark.parametrize('kind, folders', [('v1_plain', ['3d_fullres']), ('v2_cascade', ['3d_cascade_fullres', '3d_lowres'])])
def test_official_models_come_in(kind, folders, segnb, tmp_path):
    source = ROOT/'tests'/'recorded'/'official'/f'{kind}.zip'
    made = json.loads(succeeded(segnb('import-model', source, '-w', tmp_path, '--json', '-')))['model']
    assert {f.parent.name for f in (tmp_path/'models').rglob('plans.json')} >= set(folders), made
    refused(segnb('import-model', source, '-w', tmp_path), 'already')
    refused(segnb('import-model', source, '-w', tmp_path, '--describe'), 'export-model')
    if kind.startswith('v2'): refused(segnb('import-model', source, '-o', tmp_path/'x', '--repair'), 'v1')


def test_a_start_that_does_not_fit_loses_nothing(ct, segnb, tmp_path):
    import torch
    torch.save({'nothing.of.ours': torch.zeros(3)}, tmp_path/'weights.pt')
    before = files(ct.model)
    refused(segnb('train', ct.raw.name, 0, '-w', ct.workspace, '--from', tmp_path/'weights.pt', '--overwrite', *SHORT))
    assert files(ct.model) == before
