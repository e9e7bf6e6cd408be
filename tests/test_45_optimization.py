"""The optimiser beside nnU-Net 1.7.1 on many settings, its refusals, and what a process's memory does."""
import copy, json, os, platform, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segnb.optimization import (SCHEDULES, Deterministic, Plateau, TrainingError, WarmUp, choose_device, choose_precision, find_learning_rate, make_optimizer, make_schedule,
                                poly_lr, set_learning_rate, step_lr, training_step)

FOLDER = Path(__file__).parent/'recorded'
RECORDED = json.loads((FOLDER/'45_optimization.json').read_text())
with np.load(FOLDER/'45_optimization.npz') as file: ARRAYS = {k: file[k] for k in file.files}


def recorded_network():
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.LeakyReLU(.01), nn.Conv3d(4, 3, 1))
    net.load_state_dict({k[3:]: torch.from_numpy(v) for k, v in ARRAYS.items() if k.startswith('w0/')})
    return net


@pytest.mark.parametrize('name', ['sgd', 'adam'])
def test_steps_are_the_originals(name):
    net = recorded_network()
    optimizer = make_optimizer(net, name=name)
    for i, theirs in enumerate(RECORDED[name]['losses']):
        factor = 1000 if i == 5 else 1
        loss = lambda x, y: factor * nn.functional.cross_entropy(x, y)
        assert training_step(net, loss, optimizer, torch.from_numpy(ARRAYS[f'data{i}']).float(), torch.from_numpy(ARRAYS[f'target{i}']).long()) == pytest.approx(theirs, rel=1e-5)
        for key, weights in ARRAYS.items():
            if key.startswith(f'{name}{i + 1}/'): assert np.abs(net.state_dict()[key.split('/')[1]].numpy() - weights).max() <= 1e-4 * np.abs(weights).max(), key


def test_rates_are_the_originals():
    rates, plateau, watched = RECORDED['rates'], Plateau(), []
    assert [poly_lr(e, 1000, .01) for e in range(1000)] == rates['poly']
    assert [step_lr(e, 1000, .01) for e in range(1000)] == pytest.approx(rates['fixed'], rel=1e-12)
    for loss in rates['plateau_told']:
        watched.append(plateau(0, 300, .01))
        plateau.update(loss)
    assert watched == pytest.approx(rates['plateau'], rel=1e-12)


def test_plateau_is_torchs_scheduler_on_many_losses():
    for seed in range(20):
        losses = np.random.default_rng(seed).normal(0, 1, 200).cumsum() * .02
        ours, weight = Plateau(patience=5, factor=.5, threshold=.01, keep=0), nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], 1.)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=.5, patience=5, threshold=.01, threshold_mode='abs')
        for loss in losses.tolist():
            assert ours(0, 0, 1.) == optimizer.param_groups[0]['lr']
            ours.update(loss)
            theirs.step(loss)
            if ours.drops > 20: break # torch stops below 1e-8


@pytest.mark.parametrize('name', SCHEDULES)
def test_every_schedule_starts_at_the_top_and_never_rises(name):
    schedule = make_schedule(name)
    rates = [schedule(e, 100, .01) for e in range(101)]
    assert rates[0] == .01 and all(a >= b for a, b in zip(rates, rates[1:])) and min(rates) >= 0


@pytest.mark.parametrize('epochs, length', [(1000, 50), (10, 3), (10, 10), (5, 20), (1, 1), (600., .1)])
def test_a_warm_up_rises_to_the_top_and_meets_the_schedule(epochs, length):
    warm = WarmUp(poly_lr, length)
    rates = [warm(e, epochs, 1.) for e in np.linspace(0, epochs, 61)]
    top = int(np.argmax(rates))
    assert max(rates) <= 1 and all(a <= b + 1e-12 for a, b in zip(rates[:top], rates[1:top + 1])) and all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1:]))


def test_a_plateau_behind_a_warm_up_is_resumed():
    def fresh(): return WarmUp(Plateau(patience=2, keep=.5), 3)
    losses = np.random.default_rng(0).normal(0, .1, 40).tolist()
    whole, rates = fresh(), []
    for e, loss in enumerate(losses):
        rates.append(whole(e, 40, .01)); whole.update(loss)
    cut = fresh()
    for loss in losses[:17]: cut.update(loss)
    again = fresh()
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    for e in range(17, 40):
        assert again(e, 40, .01) == rates[e]
        again.update(losses[e])


def small(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.LeakyReLU(.01), nn.Conv2d(4, 2, 1))


def batch(seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 8, 8, generator=random), torch.randint(0, 2, (2, 8, 8), generator=random)


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw'])
def test_a_saved_optimizer_goes_on_in_the_same_bits(name):
    def run(net, optimizer, seeds):
        for seed in seeds: training_step(net, nn.functional.cross_entropy, optimizer, *batch(seed))
    torch.manual_seed(0)
    straight = small()
    begun, resumed = copy.deepcopy(straight), small()
    run(straight, make_optimizer(straight, name=name, groups={'3': .1}), range(6))
    optimizer = make_optimizer(begun, name=name, groups={'3': .1})
    run(begun, optimizer, range(3))
    resumed.load_state_dict(begun.state_dict())
    after = make_optimizer(resumed, name=name, groups={'3': .1})
    after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, after, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    set_learning_rate(after, 1.)
    assert sorted(g['lr'] for g in after.param_groups) == [.1, 1.]


def test_a_factor_of_zero_holds_a_part_still():
    net = small()
    optimizer, before = make_optimizer(net, groups={'0': 0}), copy.deepcopy(net.state_dict())
    for seed in range(3): training_step(net, nn.functional.cross_entropy, optimizer, *batch(seed))
    assert torch.equal(net[0].weight, before['0.weight']) and not torch.equal(net[3].weight, before['3.weight'])


def test_what_is_refused():
    net = small()
    for call, words in ((lambda: make_optimizer(net, name='lion'), 'unknown optimizer'), (lambda: make_optimizer(net, groups={'decoder': 2}), 'no parameter is left'),
                        (lambda: make_schedule('linear'), 'unknown schedule'), (lambda: make_schedule(3), 'cannot be called'), (lambda: make_schedule('poly', -1), 'warmup cannot be used'),
                        (lambda: choose_device('tpu'), 'device cannot be used'), (lambda: choose_precision('fp8', torch.device('cpu')), 'unknown precision'),
                        (lambda: choose_precision('fp16', torch.device('cpu')), 'no use on a CPU')):
        with pytest.raises(TrainingError, match=words): call()


def test_the_search_for_a_rate_leaves_no_trace_even_when_it_fails():
    net = small()
    optimizer = make_optimizer(net)
    training_step(net, nn.functional.cross_entropy, optimizer, *batch(0))
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    def same(): return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before[0].values())) and \
        all(torch.equal(a['momentum_buffer'], before[1]['state'][k]['momentum_buffer']) for k, a in optimizer.state_dict()['state'].items())
    find_learning_rate(net, nn.functional.cross_entropy, optimizer, (batch(i) for i in range(200)), steps=40)
    assert same()
    def breaks():
        breaks.n += 1
        if breaks.n > 5: raise RuntimeError('the loader died')
        return batch(breaks.n)
    breaks.n = 0
    with pytest.raises(RuntimeError, match='the loader died'): find_learning_rate(net, nn.functional.cross_entropy, optimizer, breaks)
    assert same()
    with pytest.raises(TrainingError, match='no learning rate can be told'): find_learning_rate(net, nn.functional.cross_entropy, optimizer, [batch(0)]*3)
    assert same()


def test_deterministic_puts_everything_back_after_an_error():
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, os.environ.get('CUBLAS_WORKSPACE_CONFIG')
    with pytest.raises(KeyError):
        with Deterministic(3): raise KeyError
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, os.environ.get('CUBLAS_WORKSPACE_CONFIG'))


MEMORY = """
import torch
from segnb.optimization import keep_memory
def size(): return int(open('/proc/self/statm').read().split()[0]) * 4096 // 2**20
def given_back():
    blocks = [torch.ones(2**24), torch.ones(2**24)] # twice 64 MiB
    before = size()
    del blocks
    return before - size()
print(given_back(), keep_memory(), given_back(), given_back())
"""

@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='the switch is one of glibc')
def test_kept_memory_is_not_given_back():
    before, on, *kept = subprocess.run([sys.executable, '-c', MEMORY], capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}).stdout.split()
    assert int(before) >= 120 and on == 'True' and kept == ['0', '0']


@pytest.mark.parametrize('length', [2, .2])
def test_no_epoch_of_a_warm_up_has_rate_zero(length):
    assert [WarmUp(poly_lr, length)(e, 10, 1.) for e in range(3)] == [.5, 1., 1.]
    assert WarmUp(poly_lr, .2)(0., 600., 1.) == 0


@pytest.mark.parametrize('wrong', [dict(low=0), dict(low=1., high=.1), dict(steps=5), dict(low=-1.), dict(high=float('inf'))])
def test_rates_that_cannot_be_tried(wrong):
    net = small()
    with pytest.raises(TrainingError, match='no rates can be tried'): find_learning_rate(net, nn.functional.cross_entropy, make_optimizer(net), [batch(0)], **wrong)
