"""The worker map in the hands of a Dask cluster: the same results, killed workers, errors, memory; data sets preprocessed and predicted there."""
import contextlib, filecmp, logging, os, shutil, signal, sys, threading, time, warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_64_prediction as predicting
from conftest import tiny_task

from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import ImageError, SegnbError, read_label_map
from segnb.planning import plan_experiment
from segnb.prediction import PredictionError, Predictor
from segnb.preprocessing import preprocess_dataset, verify_preprocessed
from segnb.workers import Estimate, ResourceError, WorkerError, WorkerWarning, cluster_map, cluster_room, parallel_map, preflight, use_executor

distributed = pytest.importorskip('distributed', reason='Dask is not installed: pip install "dask[distributed]"')
import dask
HERE = str(Path(__file__).parent)


@pytest.fixture(scope='module')
def clusters():
    "A place for a cluster; what was started there last is closed at the end"
    logging.getLogger('distributed').setLevel(logging.CRITICAL)
    before, held = os.environ.get('PYTHONPATH'), contextlib.ExitStack()
    os.environ['PYTHONPATH'] = os.pathsep.join([HERE, str(Path(HERE).parent), before or '']) # workers import this module
    dask.config.set({'distributed.scheduler.allowed-failures': 1}) # the second death is one too many
    with held: yield SimpleNamespace(held=held, client=None)
    os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def client(clusters):
    "A client of two workers: tests kill some, and Dask does not always start others in their place"
    with contextlib.suppress(Exception):
        if clusters.client is not None: clusters.client.wait_for_workers(2, 10)
        if clusters.client is not None and len(clusters.client.run(os.getpid)) == 2: return clusters.client
    clusters.held.close()
    cluster = clusters.held.enter_context(distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address='127.0.0.1:0', silence_logs=logging.CRITICAL))
    clusters.client = clusters.held.enter_context(distributed.Client(cluster))
    clusters.client.wait_for_workers(2, 120)
    return clusters.client



def draw(task, rng): return task, float(rng.normal())

def who(_):
    time.sleep(.2)
    return os.getpid()

def hold(folder):
    "Note the process, then wait until one of them was killed"
    (Path(folder)/f'pid_{os.getpid()}').touch()
    end = time.monotonic() + 120
    while not (Path(folder)/'killed').exists() and time.monotonic() < end: time.sleep(.05)
    return os.getpid()

def kill_one(folder, killed):
    "Kill a process that has noted itself in `folder`"
    end = time.monotonic() + 120
    while not (notes := list(Path(folder).glob('pid_*'))) and time.monotonic() < end: time.sleep(.05)
    time.sleep(1.5) # a worker that dies while its nanny still starts it is not started again
    killed.append(int(notes[0].name[4:]))
    os.kill(killed[0], signal.SIGKILL)
    (Path(folder)/'killed').touch()

def die(task):
    "Kill the worker as often as the file says, after it was seen to work"
    file, times = task
    if not times: return 'never asked'
    deaths = Path(file).read_text().count('x') if Path(file).exists() else 0
    if deaths >= times: return f'done after {deaths} deaths'
    with open(file, 'a') as f: f.write('x')
    time.sleep(1.5) # a worker that dies while its nanny still starts it is not started again
    os.kill(os.getpid(), signal.SIGKILL)

def stumble(task):
    if task == 2: raise KeyError('no such organ')
    return task

def threads(_):
    import threadpoolctl
    return [t['num_threads'] for t in threadpoolctl.threadpool_info() if t['user_api'] == 'blas']

def product(seed):
    a = np.random.default_rng(seed).normal(size=(301, 203)).astype(np.float32)
    return a @ a.T


def test_results_order_and_random_numbers_are_those_of_this_process(client):
    with use_executor(client):
        assert parallel_map(draw, range(30), seed=5, names=[f'c{i}' for i in range(30)]) == parallel_map(draw, range(30), 0, seed=5, names=[f'c{i}' for i in range(30)])
        assert len(set(parallel_map(who, range(6)))) == 2, 'one worker did all'
        assert parallel_map(who, [0], 0) == [os.getpid()]
        for a, b in zip(parallel_map(product, range(3)), parallel_map(product, range(3), 0)): assert np.array_equal(a, b)
        assert all(n == 1 for ns in parallel_map(threads, range(2)) for n in ns)
        assert parallel_map(lambda x: x + 1, [1, 2]) == [2, 3], 'Dask carries functions of a notebook, too'


def test_a_killed_workers_task_is_done_again_and_told(client, tmp_path):
    tasks = [(str(tmp_path/'deaths'), 1), ('', 0), ('', 0), ('', 0), ('', 0)]
    with pytest.warns(WorkerWarning, match='cropping: ct_000: its worker tcp.* died; it is done again'):
        found = parallel_map(die, tasks, names=[f'ct_{i:03d}' for i in range(5)], step='cropping', executor=client)
    assert found == ['done after 1 deaths'] + ['never asked'] * 4


def test_a_worker_killed_from_outside_in_the_middle_of_a_case(client, tmp_path):
    killed = []
    thread = threading.Thread(target=kill_one, args=(tmp_path, killed), daemon=True); thread.start()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        found = parallel_map(hold, [str(tmp_path)]*6, names=[f'ct_{i}' for i in range(6)], executor=client)
    thread.join()
    assert len(found) == 6 and not set(killed) & set(found) and any(w.category is WorkerWarning for w in told)


def test_a_task_that_kills_every_worker_is_named_and_its_neighbour_is_not_blamed(client, tmp_path):
    tasks = [(str(tmp_path/'deaths'), 99), ('', 0)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', WorkerWarning)
        found = {i: (kind, value) for i, kind, value, _ in cluster_map(client, die, tasks, ['bad', 'good'], 'cropping')}
        assert found[1] == ('done', 'never asked') and found[0][0] == 'failed' and 'KilledWorker' in found[0][1]
        assert (tmp_path/'deaths').read_text().count('x') == 4, 'two workers, and two more when tried alone'


def test_errors_keep_case_and_traceback(client):
    with pytest.raises(WorkerError, match="reading: ct_2 failed: KeyError: 'no such organ'") as error:
        parallel_map(stumble, range(5), names=[f'ct_{i}' for i in range(5)], step='reading', executor=client)
    assert error.value.task == 'ct_2' and 'in stumble' in error.value.traceback and 'ct_2' in error.value.unfinished
    with pytest.raises(ImageError, match='reading: ct_9: .*no such file') as error:
        parallel_map(read_label_map, ['nowhere.nii.gz'], names=['ct_9'], step='reading', executor=client)
    assert 'Traceback of the worker' in error.value.__notes__[0]
    assert parallel_map(abs, [-1], executor=client) == [1], 'the cluster is well afterwards'


def test_what_no_worker_can_hold_is_refused_first(client):
    client.wait_for_workers(1, 60) # the test before has killed some; how soon they come back is Dask's affair
    slots, room = cluster_room(client)
    assert slots in (1, 2) and room > 1e8
    with pytest.raises(ResourceError, match='ct_1.*worker of the cluster'): parallel_map(abs, [1, 2], names=['ct_0', 'ct_1'], memory=[1, 1e15], executor=client)
    with use_executor(client):
        assert preflight({f'c{i}': Estimate(1) for i in range(9)}) in (1, 2)
        with pytest.raises(ResourceError): preflight({'c': Estimate(10**15)})


def test_a_folder_that_workers_do_not_see(client, tmp_path, monkeypatch):
    gone = tmp_path/'gone'
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir() # as if it were on this machine's disk only; getcwd is asked before
    monkeypatch.setattr(os, 'getcwd', lambda: str(gone))
    with pytest.raises(SegnbError, match='does not see the folder.*share a file system'): parallel_map(stumble, [1], executor=client)


def test_another_executor_of_pythons_own(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', HERE)
    import multiprocessing
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('spawn')) as pool:
        assert parallel_map(stumble, [0, 1, 3], executor=pool) == [0, 1, 3]
        with pytest.raises(WorkerError, match='no such organ'): parallel_map(stumble, range(5), executor=pool)
        with pytest.raises(WorkerError, match='BrokenProcessPool'): parallel_map(die, [(str(tmp_path/'d'), 9)], executor=pool)


def same(a, b, pattern):
    "Equal files; what a killed worker had half written lies hidden beside them and does not count"
    names, others = (sorted(f.relative_to(folder) for f in folder.rglob(pattern) if not f.name.startswith('.')) for folder in (a, b))
    assert names and names == others
    return all(filecmp.cmp(a/n, b/n, shallow=False) for n in names)


def test_a_data_set_preprocessed_there_is_the_same_bit_for_bit(client, tmp_path, monkeypatch):
    data = Dataset(tiny_task('Task101_PhantomCT', tmp_path/'Task201_Tiny', (2, 3, 3)))
    here = extract_fingerprint(data, n_workers=0)
    with use_executor(client): assert extract_fingerprint(data, n_workers=2).to_dict() == here.to_dict()
    plans = plan_experiment(here, planner='cpu')
    done = preprocess_dataset(data, plans, tmp_path/'here', n_workers=0, say=str)
    monkeypatch.chdir(tmp_path) # a relative folder means the same on every worker
    said = []
    assert preprocess_dataset(data, plans, 'there', executor=client, say=said.append) == done
    assert same(tmp_path/'here', tmp_path/'there', '*.npy') and same(tmp_path/'here', tmp_path/'there', '*.json') and '2 workers' in said[0]
    assert not verify_preprocessed(tmp_path/'there'/'3d_fullres')
    assert preprocess_dataset(data, plans, 'there', executor=client, say=said.append) == ()


def test_preprocessing_goes_on_when_workers_are_killed(client, tmp_path):
    data = Dataset(tiny_task('Task101_PhantomCT', tmp_path/'Task201_Tiny', (2, 3, 3)))
    plans = plan_experiment(extract_fingerprint(data, n_workers=0), planner='cpu')
    preprocess_dataset(data, plans, tmp_path/'here', n_workers=0, say=str)
    stop = threading.Event()
    def kill():
        while not stop.wait(.02):
            if any((tmp_path/'there').glob('.case_*.lock')):
                os.kill(list(client.run(os.getpid).values())[0], signal.SIGKILL)
                return
    thread = threading.Thread(target=kill); thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        preprocess_dataset(data, plans, tmp_path/'there', executor=client, say=str)
    stop.set(); thread.join()
    assert same(tmp_path/'here', tmp_path/'there', '*.npy')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    data = Dataset(predicting.SAMPLE)
    plans = plan_experiment(extract_fingerprint(data, n_workers=0), planner='cpu')
    plans = replace(plans, configurations={'3d_fullres': predicting.coarse(plans)})
    return data, plans, predicting.save_model(tmp_path_factory.mktemp('model'), data, plans, folds=(0, 1, 2))


def test_a_folder_predicted_there_is_the_same(client, small, tmp_path):
    torch.set_num_threads(1)
    source = predicting.SAMPLE/'imagesTs'
    predictor = Predictor.from_folder(small[2], folds=[0, 1], device='cpu', mirror=[2], step_size=.6)
    here = predictor.predict_folder(source, tmp_path/'here', n_workers=0, save_probabilities=True)
    there = predictor.predict_folder(source, tmp_path/'there', executor=client, save_probabilities=True)
    assert [f.name for f in here] == [f.name for f in there] and len(here) >= 2
    assert same(tmp_path/'here', tmp_path/'there', '*.nii.gz') and same(tmp_path/'here', tmp_path/'there', 'made_with.json')
    before = {f: f.stat().st_mtime_ns for f in there}
    with use_executor(client): predictor.predict_folder(source, tmp_path/'there', save_probabilities=True)
    assert before == {f: f.stat().st_mtime_ns for f in there}, 'what is done is left'


def test_a_network_in_memory_travels(client, small, tmp_path):
    _, plans, model = small
    loaded = Predictor.from_folder(model, folds=0, device='cpu', mirror=False)
    predictor = Predictor([loaded.networks[0]], plans, '3d_fullres', loaded.labels, 'cpu', mirror=False)
    here = predictor.predict_folder(predicting.SAMPLE/'imagesTs', tmp_path/'here', n_workers=0)
    predictor.predict_folder(predicting.SAMPLE/'imagesTs', tmp_path/'there', executor=client)
    assert here and same(tmp_path/'here', tmp_path/'there', '*.nii.gz')


def test_a_case_that_fails_there_is_named_and_the_others_go_on(client, small, tmp_path):
    source = tmp_path/'in'
    shutil.copytree(predicting.SAMPLE/'imagesTs', source)
    bad = sorted(source.iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:300])
    predictor = Predictor.from_folder(small[2], folds=0, device='cpu', mirror=False)
    with pytest.raises(PredictionError, match='1 of .* cases failed') as error: predictor.predict_folder(source, tmp_path/'out', executor=client)
    assert list(error.value.failed) == [bad.name.removesuffix('_0000.nii.gz')] and len(error.value.written) == len(list(source.iterdir())) - 1
    assert all(f.exists() for f in error.value.written)


def test_a_model_that_changed_behind_the_workers_back_is_refused(client, small, tmp_path):
    model = Path(shutil.copytree(small[2], tmp_path/'model'))
    predictor = Predictor.from_folder(model, folds=0, device='cpu', mirror=False)
    shutil.copy(model/'fold_1'/'checkpoint_final.pt', model/'fold_0'/'checkpoint_final.pt')
    with pytest.raises(PredictionError, match='finds another model') as error: predictor.predict_folder(predicting.SAMPLE/'imagesTs', tmp_path/'out', executor=client)
    assert not list((tmp_path/'out').glob('*.nii.gz'))


def test_prediction_goes_on_when_a_worker_is_killed(client, small, tmp_path):
    torch.set_num_threads(1)
    predictor = Predictor.from_folder(small[2], folds=[0, 1, 2], device='cpu', step_size=.3)
    predictor.predict_folder(predicting.SAMPLE/'imagesTs', tmp_path/'here', n_workers=0)
    def kill():
        time.sleep(.5)
        os.kill(list(client.run(os.getpid).values())[0], signal.SIGKILL)
    thread = threading.Thread(target=kill); thread.start()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        predictor.predict_folder(predicting.SAMPLE/'imagesTs', tmp_path/'there', executor=client)
    thread.join()
    assert same(tmp_path/'here', tmp_path/'there', '*.nii.gz')
