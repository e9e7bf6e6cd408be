"""The stream of batches: the same for any number of workers, after resumes, and when things fail."""
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from segnb import augmentation as A
from segnb.batches import BatchError, BatchStream
from segnb.loader import PatchLoader
from segnb.preprocessing import load_preprocessed, save_preprocessed
from segnb.workers import WorkerWarning, keyed_rng

SCALES = A.deep_supervision_scales([[1, 2, 2], [2, 2, 2]])


def toy_cases():
    rng, out = np.random.default_rng(0), {}
    for i in range(3):
        seg = np.zeros((14, 20, 18), np.int8)
        seg[4:9, 5:12, 6:11], seg[6, 7:9, 7:9], seg[:2] = 1, 2, -1
        out[f'c{i}'] = SimpleNamespace(data=rng.normal(size=(2, *seg.shape)).astype(np.float32), seg=seg,
                                       class_locations={k: np.argwhere(seg == k) for k in (1, 2)})
    return out


def toy_stream(n_workers, seed=0, cases=None, transforms=None, **options):
    final = (8, 12, 12)
    loader = PatchLoader(cases or toy_cases(), A.AugmentationParameters().loaded_patch_size(final), final, 2)
    transforms = transforms or A.training_transforms(A.AugmentationParameters(), final, SCALES, (True, False))
    return BatchStream(loader, transforms, seed, 4, n_workers, **options)


def digest(batch): return batch['keys'], batch['data'].numpy().tobytes(), [t.numpy().tobytes() for t in batch['target']]


@pytest.fixture(scope='module')
def wanted():
    with toy_stream(0) as stream: return [digest(b) for e in range(3) for b in stream.epoch(e)]


@pytest.mark.parametrize('n_workers', [1, 2, 8])
def test_same_batches_for_any_number_of_workers(n_workers, wanted):
    with toy_stream(n_workers) as stream:
        assert [digest(b) for e in range(3) for b in stream.epoch(e)] == wanted
        assert [digest(b) for b in stream.epoch(1, first=2)] == wanted[6:8] # back, in the middle of an epoch
        pids = [w.process.pid for w in stream._crew.workers]
        thread = stream._crew.thread
    for pid in pids: pytest.raises(ProcessLookupError, os.kill, pid, 0)     # close leaves nobody behind
    assert not thread.is_alive()
    assert [digest(b) for b in stream.epoch(2)] == wanted[8:]               # and a closed stream may start again
    stream.close()


def test_workers_stay_from_epoch_to_epoch_and_through_jumps():
    with toy_stream(1) as stream:
        next(stream.epoch(0))
        first = stream._crew.workers[0].process.pid
        for b in stream.epoch(0, 1): pass
        for b in stream.epoch(5): pass
        assert first == stream._crew.workers[0].process.pid
        assert len(stream._crew.ready) <= 2


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_other_start_methods_give_the_same(method, wanted):
    with toy_stream(1, start_method=method) as stream: assert digest(next(stream.epoch(2))) == wanted[8]


def test_seeds_stages_and_global_states(wanted):
    import torch
    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    states = pickle.dumps((np.random.get_state(), random.getstate(), torch.get_rng_state().numpy(), torch.get_num_threads()))
    others = [digest(b) for s in (toy_stream(0, 1), toy_stream(0, stage='val'), toy_stream(1, 2)) for b in s.epoch(0)]
    assert pickle.dumps((np.random.get_state(), random.getstate(), torch.get_rng_state().numpy(), torch.get_num_threads())) == states
    assert len({d[1] for d in wanted + others}) == 24


def test_positions_are_parts_of_the_whole_batch(wanted):
    import torch
    for n_workers in (0, 2):
        with toy_stream(n_workers, positions=[0]) as a, toy_stream(n_workers, positions=range(1, 2)) as b:
            for x, y, w in zip(a.epoch(1), b.epoch(1), wanted[4:8]):
                both = {k: torch.cat([x[k], y[k]]) if k == 'data' else [torch.cat(t) for t in zip(x[k], y[k])] for k in ('data', 'target')}
                assert digest({**both, 'keys': x['keys'] + y['keys']}) == w
                assert [p[-1] for p in x['places'] + y['places']] == [0, 1]
    for positions in ([], [0, 0], [2], [-1]): pytest.raises(BatchError, toy_stream, 0, positions=positions)


class Fails:
    def __call__(self, **batch):
        if np.random.uniform() < 2: raise KeyError('no such thing')


@pytest.mark.parametrize('n_workers', [0, 2])
def test_a_failing_sample_is_named_and_fails_again_in_replay(n_workers):
    with toy_stream(n_workers, transforms=Fails()) as stream, pytest.raises(BatchError, match='case c[0-2]: .*KeyError') as error:
        next(stream.epoch(0))
    assert error.value.key == (0, 'train', 0, 0, 0) and error.value.case in ('c0', 'c1', 'c2') and 'in __call__' in error.value.traceback
    with pytest.raises(KeyError, match='no such thing'): stream.replay(error.value.key)


@pytest.mark.parametrize('n_workers', [0, 1])
def test_replay_is_what_the_batch_held(n_workers):
    with toy_stream(n_workers) as stream:
        for b in stream.epoch(1):
            for i, place in enumerate(b['places']):
                for key in (place, place[2:]):
                    one = stream.replay(key)
                    assert one.case == b['keys'][i] and one.key == place
                    np.testing.assert_array_equal(one.result['data'][0], b['data'][i].numpy())
                    for level, target in zip(one.result['target'], b['target']): np.testing.assert_array_equal(level[0], target[i].numpy())


def test_cases_of_different_channels_fail_with_a_reason():
    cases = toy_cases()
    cases['c0'].data = cases['c0'].data[:1]
    stream = toy_stream(2, cases=cases, transforms=A.validation_transforms())
    with stream, pytest.raises(BatchError, match="put together.*'c0': .1, 1"):
        for e in range(3):
            for b in stream.epoch(e): pass


def test_a_file_lost_during_training_is_named(tmp_path):
    for name, case in toy_cases().items():
        save_preprocessed(case.data, case.seg.astype(np.int8), {'class_locations': {k: v.astype(np.int32) for k, v in case.class_locations.items()}}, tmp_path, name)
    with toy_stream(2, cases=load_preprocessed(tmp_path)) as stream:
        batches = stream.epoch(0)
        next(batches)
        (tmp_path/'c1_data.npy').unlink()
        with pytest.raises(BatchError, match='case c1: no sample for key .*c1_data.npy.*missing') as error:
            for e in range(9):
                for b in (batches if e == 0 else stream.epoch(e)): pass
        assert error.value.case == 'c1' and len(error.value.key) == 5


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_the_work_of_a_dead_worker_is_done_again(wanted, how):
    with toy_stream(2) as stream, pytest.warns(WorkerWarning, match='stage train: .*Its work is done again'):
        batches = stream.epoch(0)
        found = [digest(next(batches))]
        os.kill(stream._crew.workers[0].process.pid, how)
        found += [digest(b) for b in batches]
        found += [digest(b) for e in (1, 2) for b in stream.epoch(e)]
        for _ in range(200): # the dead one is replaced as soon as it is noticed
            if sum(w.process.is_alive() for w in stream._crew.workers) == 2: break
            next(stream.epoch(3))
        assert sum(w.process.is_alive() for w in stream._crew.workers) == 2
    assert found == wanted


def test_all_workers_may_die_at_once(wanted):
    with toy_stream(3) as stream, warnings.catch_warnings():
        warnings.simplefilter('ignore', WorkerWarning)
        next(stream.epoch(0))
        for worker in stream._crew.workers: os.kill(worker.process.pid, signal.SIGKILL)
        assert [digest(b) for e in range(3) for b in stream.epoch(e)] == wanted


class Deadly:
    def __call__(self, data, seg, rngs):
        if data[0, 0, 0, 0, 0] > 0: os.kill(os.getpid(), signal.SIGKILL)
        return {'data': data, 'target': seg}


def test_a_batch_that_kills_every_worker_is_named():
    with toy_stream(2, transforms=Deadly()) as stream, warnings.catch_warnings():
        warnings.simplefilter('ignore', WorkerWarning)
        with pytest.raises(BatchError, match=r'SIGKILL while it made the batch of epoch \d, iteration \d \(cases c\d, c\d\).*died too'):
            for e in range(9):
                for b in stream.epoch(e): pass
    assert stream._crew is None


class Slow:
    def __call__(self, data, seg):
        time.sleep(600)


def test_ctrl_c_ends_at_once_and_leaves_nobody():
    stream = toy_stream(2, transforms=Slow())
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    signal.setitimer(signal.ITIMER_REAL, .5)
    with pytest.raises(KeyboardInterrupt): next(stream.epoch(0)) # it would be ten minutes
    assert stream._crew is None and not multiprocessing.active_children()


LEAN = textwrap.dedent("""
    from types import SimpleNamespace
    import numpy as np
    from segnb.batches import BatchStream
    from segnb.loader import PatchLoader
    case = SimpleNamespace(data=np.zeros((1, 9, 9, 9), np.float32), seg=np.zeros((9, 9, 9), np.int8), class_locations={})
    def lean(n, **options): return BatchStream(PatchLoader({'c': case}, (4, 4, 4), (4, 4, 4), 2), None, 0, 4, n, **options)
""") # no augmentation: half of the imports


def gone(pids, seconds=60):
    end = time.time() + seconds
    def alive(pid):
        try: os.kill(pid, 0)
        except ProcessLookupError: return False
        try: return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError: return False
    while any(alive(p) for p in pids) and time.time() < end: time.sleep(.05)
    return not any(alive(p) for p in pids)


@pytest.mark.parametrize('end', ['', 'import os, signal; os.kill(os.getpid(), signal.SIGINT)'])
def test_no_worker_outlives_an_interpreter(end):
    code = LEAN + f'stream = lean(2)\nbatches = stream.epoch(0)\nnext(batches)\nprint(*(w.process.pid for w in stream._crew.workers), flush=True)\n{end}\n'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [int(p) for p in process.stdout.readline().split()]
    process.communicate(timeout=300)
    assert len(pids) == 2 and gone(pids)


def _end_with_workers(pipe, how):
    stream = toy_stream(2)
    next(stream.epoch(0))
    pipe.send([w.process.pid for w in stream._crew.workers])
    how()


def _raise(): raise RuntimeError('the training failed')
def _kill(): os.kill(os.getpid(), signal.SIGKILL)
def _leave(): os._exit(3)


@pytest.mark.parametrize('how', [_raise, _kill, _leave])
def test_no_worker_outlives_its_parent(how):
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context('fork').Process(target=_end_with_workers, args=(theirs, how))
    parent.start()
    assert ours.poll(300)
    pids = ours.recv()
    parent.join(300)
    assert len(pids) == 2 and gone(pids)


def test_a_dropped_stream_ends_its_workers():
    stream = toy_stream(1)
    next(stream.epoch(0))
    pids = [w.process.pid for w in stream._crew.workers]
    del stream
    assert gone(pids)


def test_what_cannot_travel_is_refused_under_spawn():
    with toy_stream(1, transforms=lambda data, seg: {'data': data}, start_method='spawn') as stream:
        with pytest.raises(BatchError, match='cannot be sent to a worker.*top level'): next(stream.epoch(0))


class Shift:
    "An engine that works in the parent"
    on_device = 'cpu'
    def __call__(self, data, seg, rngs):
        import torch
        assert torch.is_tensor(data) and torch.is_tensor(seg) and len(rngs) == len(data)
        return {'data': data + torch.tensor([rng.normal() for rng in rngs], dtype=data.dtype).reshape(-1, 1, 1, 1, 1), 'target': seg.clamp(min=0)}


def test_a_device_engine_works_in_the_parent_on_what_workers_cut():
    def stream(n, **options):
        loader = PatchLoader(toy_cases(), (8, 12, 12), (8, 12, 12), 2)
        return BatchStream(loader, options.pop('transforms', Shift()), 0, 4, n, **options)
    with stream(0) as a, stream(2) as b, stream(1, transforms=None, device_transforms=Shift()) as c:
        found = [[digest(x) for e in range(2) for x in s.epoch(e)] for s in (a, b, c)]
        assert found[0] == found[1] == found[2]
        batch = next(a.epoch(0))
        with stream(0, transforms=A.validation_transforms()) as plain: raw = next(plain.epoch(0))
        moved = [keyed_rng(*key, 'transforms').normal() for key in batch['places']]
        np.testing.assert_allclose((batch['data'] - raw['data']).mean(dim=(1, 2, 3, 4)).numpy(), moved, atol=1e-5)
        np.testing.assert_array_equal(a.replay(batch['places'][1]).result['data'][0].numpy(), batch['data'][1].numpy())
        assert a.timings.moving > 0


def test_a_device_engine_that_fails_is_named():
    class Broken(Shift):
        def __call__(self, data, seg, rngs): raise RuntimeError('out of memory')
    loader = PatchLoader(toy_cases(), (8, 12, 12), (8, 12, 12), 2)
    with BatchStream(loader, Broken(), 0, 4, 1) as stream, pytest.raises(BatchError, match='cases c.*on cpu; RuntimeError: out of memory'):
        next(stream.epoch(0))


def test_slices_and_cascades_travel_too():
    cases = toy_cases()
    for case in cases.values(): case.previous = np.maximum(case.seg, 0)
    for size, options, shapes in (((12, 12), dict(n_slices=3), ((2, 6, 12, 12), (2, 1, 12, 12))),
                                  ((6, 12, 12), dict(previous=True), ((2, 2, 6, 12, 12), (2, 2, 6, 12, 12)))):
        loader = PatchLoader(cases, size, size, 2, **options)
        with BatchStream(loader, None, 0, 3, 0) as here, BatchStream(loader, None, 0, 3, 2) as there:
            for a, b in zip(here.epoch(0), there.epoch(0)):
                assert tuple(a['data'].shape) == shapes[0] and tuple(a['seg'].shape) == shapes[1]
                np.testing.assert_array_equal(a['data'].numpy(), b['data'].numpy())
                np.testing.assert_array_equal(a['seg'].numpy(), b['seg'].numpy())


def test_timings():
    with toy_stream(1) as stream:
        for b in stream.epoch(0): pass
        t = stream.timings
        assert t.batches == 4 and min(t.waiting, t.loading, t.transforming, t.moving) > 0
        assert set(t.each()) == {'waiting', 'loading', 'transforming', 'moving'}
        t.reset()
        assert t.batches == t.waiting == 0


def test_import_needs_no_torch():
    code = 'import sys, segnb.batches, segnb.loader; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    (tmp_path/'train.py').write_text(LEAN + 'next(lean(1, start_method="spawn").epoch(0))\n')
    said = subprocess.run([sys.executable, str(tmp_path/'train.py')], capture_output=True, text=True, timeout=300)
    assert said.returncode == 1 and "BatchError: a worker of stage train: it ended before it took a task" in said.stderr
