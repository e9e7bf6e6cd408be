"""The stream of batches: the same for any number of workers, after resumes, and when things fail."""
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from segnb import augmentation as A
from segnb.batches import BatchError, BatchStream
from segnb.loader import PatchLoader

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
def wanted(): return [digest(b) for e in range(3) for b in toy_stream(0).epoch(e)]


@pytest.mark.parametrize('n_workers', [1, 2, 3])
def test_same_batches_for_any_number_of_workers(n_workers, wanted):
    with toy_stream(n_workers) as stream:
        assert [digest(b) for e in range(3) for b in stream.epoch(e)] == wanted
        pids = [w.pid for w in stream._iterator._workers]
        assert [digest(b) for b in stream.epoch(1, first=2)] == wanted[6:8] # back, in the middle of an epoch
        assert pids != [w.pid for w in stream._iterator._workers]
    for pid in pids: pytest.raises(ProcessLookupError, os.kill, pid, 0)     # close leaves nobody behind


def test_workers_stay_from_epoch_to_epoch():
    with toy_stream(1) as stream:
        first = [next(iter(stream.epoch(0))) and stream._iterator._workers[0].pid]
        for b in stream.epoch(0, 1): pass
        for b in stream.epoch(1): pass
        assert first == [stream._iterator._workers[0].pid]


def test_spawn_gives_the_same(wanted):
    with toy_stream(1, start_method='spawn') as stream: assert digest(next(stream.epoch(2))) == wanted[8]


def test_seeds_stages_and_global_states(wanted):
    import torch
    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    states = pickle.dumps((np.random.get_state(), random.getstate(), torch.get_rng_state().numpy()))
    others = [digest(b) for s in (toy_stream(0, 1), toy_stream(0, stage='val'), toy_stream(1, 2)) for b in s.epoch(0)]
    assert pickle.dumps((np.random.get_state(), random.getstate(), torch.get_rng_state().numpy())) == states
    assert len({d[1] for d in wanted + others}) == 24


class Fails:
    def __call__(self, **batch):
        if np.random.uniform() < 2: raise KeyError('no such thing')


@pytest.mark.parametrize('n_workers', [0, 2])
def test_a_failing_sample_is_named(n_workers):
    with toy_stream(n_workers, transforms=Fails()) as stream, pytest.raises(BatchError, match='case c[0-2]: .*KeyError') as error:
        next(stream.epoch(0))
    assert error.value.key == (0, 'train', 0, 0, 0) and error.value.case in ('c0', 'c1', 'c2') and 'in __call__' in error.value.traceback


def test_cases_of_different_channels_fail_with_a_reason():
    cases = toy_cases()
    cases['c0'].data = cases['c0'].data[:1]
    stream = toy_stream(2, cases=cases, transforms=A.validation_transforms())
    with stream, pytest.raises(BatchError, match='put together'):
        for b in stream.epoch(0): pass
        for b in stream.epoch(1): pass


def test_a_killed_worker_is_noticed_quickly():
    stream = toy_stream(2)
    batches = stream.epoch(0)
    next(batches)
    os.kill(stream._iterator._workers[0].pid, signal.SIGKILL)
    start = time.time()
    with pytest.raises(BatchError, match='worker of stage train is gone'):
        for e in range(50):
            for b in (batches if e == 0 else stream.epoch(e)): pass
    assert time.time() - start < 20
    stream.close()


def test_import_needs_no_torch():
    code = 'import sys, segnb.batches, segnb.loader; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)
