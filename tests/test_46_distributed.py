"""Processes that work together, on the CPU with gloo: started by torchrun and by `launch`; beside one process, beside the original, and when one of them fails."""
import json, os, subprocess, sys, time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_46_distributed_jobs as jobs

from segnb.distributed import DistributedError, World, _parcels, all_gather, all_sum, check_weights, close_world, copy_weights, from_main, launch, only_main, share_batch, start_world, sum_gradients, wait_for_all

HERE = Path(__file__).parent
RECORDED = json.loads((HERE/'recorded'/'46_distributed.json').read_text())
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')]))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


def torchrun(*words, n=2, timeout=120):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), str(HERE/'test_46_distributed_jobs.py'), *words],
                          capture_output=True, text=True, timeout=timeout)


def test_two_processes_of_torchrun_draw_the_curve_of_one():
    done = torchrun('train')
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for name, size, n in (('equal', 4, 2), ('unequal', 5, 2)):
        alone = jobs.train(size)
        assert len(alone) == 20 and max(abs(a - b) for a, b in zip(alone, found[name])) < 1e-5 and alone[-1] < alone[0] - .1, name


def test_three_processes_in_double_precision_differ_by_rounding_only():
    double = launch(jobs.train, 3, 7, 20, 'double')
    assert double[0] == double[1] == double[2]
    assert max(abs(a - b) for a, b in zip(jobs.train(7, 20, 'double'), double[0])) < 1e-11


def test_gradient_beside_the_original():
    recorded = RECORDED['gradient']
    for gradient, loss in [jobs.slopes(), *launch(jobs.slopes, 2)]:
        assert gradient == pytest.approx(recorded['one'], rel=1e-4) and loss == pytest.approx(recorded['one_loss'], rel=1e-5)
    half = [c + (o - c)/2 for c, o in zip(recorded['cross_entropy'], recorded['one'])]
    assert recorded['two'] == pytest.approx(half, rel=1e-5) and recorded['two'] != pytest.approx(recorded['one'], rel=1e-2)


@pytest.mark.parametrize('key', RECORDED['shares'])
def test_shares_beside_the_original(key):
    batch, size = map(int, key.split(' by '))
    theirs = [n for n, _ in RECORDED['shares'][key]]
    if min(theirs) > 0: assert [len(p) for p in share_batch(batch, size)] == theirs
    else:
        with pytest.raises(DistributedError, match='would get nothing') as error: share_batch(batch, size)
        works = str(error.value).split('expected ')[1].split(' process')[0]
        assert all(len(share_batch(batch, int(n))) == int(n) for n in works.split(', '))


def test_everything_that_processes_share():
    for rank, found in enumerate(launch(jobs.share, 2)):
        assert found['rank'] == rank and found['sum'] == [3, 30] and found['integers'] == 2**40 + 1 and found['gathered'] == [{'rank': 0}, {'rank': 1}] and found['main'] == 'of 0'
        assert found['writer'] == 'written by 0' and found['weights'] == [1., 1.] and found['many'] == [3.]*500 and found['strided'] == [3.]*6 and found['none']
        assert found['drifted'] == 'the processes have drifted apart; found other weights in process 1 than in process 0; resume from the last checkpoint'
        assert found['again'] == 2 and found['waited'] == (rank == 0)


@pytest.mark.parametrize('how, heard, seconds', [
    ('raise', 'process 1.*ValueError: case ct_003 is broken', 20), ('kill', 'process 1 of 2 failed: was killed by SIGKILL', 20),
    ('hang', 'lost the others; found Timed out waiting', 40), ('main', 'process 0.*OSError: no space left', 20),
    ('networks', 'train different networks', 20), ('waiting', 'process 1.*ValueError: case ct_003 is broken', 20)])
def test_a_failure_ends_all_with_its_words(how, heard, seconds):
    began = time.monotonic()
    with pytest.raises(DistributedError, match=heard): launch(jobs.fail, 2, how)
    assert time.monotonic() - began < 2*seconds # generous: fresh processes import torch first


@pytest.mark.parametrize('how', ['raise', 'kill'])
def test_torchrun_ends_all_when_one_fails(how):
    done = torchrun('fail', how)
    assert done.returncode != 0 and 'rank      : 1' in done.stderr
    if how == 'raise': assert 'case ct_003 is broken' in done.stderr


def test_one_alone_talks_to_itself():
    network, x = torch.nn.Linear(2, 2), torch.ones(2, requires_grad=True)
    network(x).sum().backward()
    before = [p.grad.clone() for p in network.parameters()]
    with start_world('cpu') as world:
        assert world == World(device='cpu') and world.main and all_sum(x) is x and all_gather(1) == [1] and from_main(2) == 2 and only_main(lambda: 3)() == 3
        sum_gradients(network); copy_weights(network); check_weights(network); wait_for_all('here')
    assert all(torch.equal(a, p.grad) for a, p in zip(before, network.parameters()))
    with pytest.raises(OSError, match='full'): only_main(jobs.full_disk)()
    close_world()


def test_an_environment_without_the_others(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(DistributedError, match='do not find each other.*torchrun'): start_world('cpu', timeout=1)
    with pytest.raises(DistributedError, match='a device each'): start_world('cuda:1')
    monkeypatch.setenv('LOCAL_RANK', str(torch.cuda.device_count()))
    with pytest.raises(DistributedError, match='more processes than GPUs'): start_world('cuda')


def test_parcels_keep_order_type_and_size():
    tensors = [torch.zeros(n, dtype=t) for n, t in ((10, torch.float32), (10, torch.float32), (10, torch.float64), (1000, torch.float32), (1, torch.float32))]
    parts = list(_parcels(tensors, 100))
    assert [t for part in parts for t in part] == tensors and [len(p) for p in parts] == [2, 1, 1, 1] and not list(_parcels([], 100))


ALONE = '''
import sys, torch
from pathlib import Path
from segnb.distributed import start_world
with start_world('cpu') as world:
    rank = world.rank
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    torch.optim.SGD([p], .1).step()                          # imports what keeps the group, if it comes after it
    torch.distributed.all_reduce(torch.ones(5))
    inside = [f.read_text() for f in Path('/proc/self/task').glob('*/comm')]
after = [f.read_text() for f in Path('/proc/self/task').glob('*/comm')]
(Path(sys.argv[1])/f'{rank}.txt').write_text(f"{any('gloo' in name for name in inside)} {any('gloo' in name for name in after)}")
'''


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='threads are looked up in /proc')
def test_no_thread_of_the_group_outlives_it(tmp_path):
    (tmp_path/'run.py').write_text(ALONE)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(tmp_path/'run.py'), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path/f'{rank}.txt').read_text() for rank in (0, 1)] == ['True False']*2
