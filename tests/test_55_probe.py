"""The probe on small trainings: it leaves no trace, and its arithmetic is right."""
import copy, json
from types import SimpleNamespace

import pytest
import torch

from segnb.optimization import TrainingError
from segnb.probe import Probe, iteration_time, probe
from segnb.training import Trainer
from balls import make_task
from test_54_callbacks import SMALL

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def task(tmp_path_factory): return make_task(tmp_path_factory.mktemp('pre')/'Balls')


@pytest.mark.parametrize('settings', [{}, {'precision': 'bf16', 'optimizer': 'adamw', 'n_workers': 1}])
def test_a_training_after_a_probe_is_the_training_without(task, tmp_path, settings):
    plain, probed = (Trainer(task, tmp_path/name, epochs=2, **(SMALL | settings)) for name in 'ab')
    found = probe(probed, 2, warm_up=1)
    assert all(not s.get('momentum_buffer', torch.zeros(1)).any() for s in probed.optimizer.state.values())
    plain.fit(); probed.fit()
    assert all(torch.equal(a, b) for a, b in zip(plain.net.state_dict().values(), probed.net.state_dict().values()))
    assert found.iteration == pytest.approx(found.waiting + sum(found.parts.values())) and found.n_workers == settings.get('n_workers', 0)


def test_the_weights_are_put_back_after_an_error(task, tmp_path):
    trainer = Trainer(task, tmp_path/'m', epochs=1, **SMALL)
    before, inner, calls = copy.deepcopy(trainer.net.state_dict()), trainer.criterion, []
    def breaks(*args):
        calls.append(1)
        return inner(*args) * (float('nan') if len(calls) > 2 else 1)
    trainer.criterion = breaks
    with pytest.raises(TrainingError, match='loss is nan'): probe(trainer, 4)
    assert all(torch.equal(v, trainer.net.state_dict()[k]) for k, v in before.items())
    with pytest.raises(TrainingError, match='cannot be made'): probe(trainer, 0)
    trainer.world = SimpleNamespace(size=2)
    with pytest.raises(TrainingError, match='one process'): probe(trainer)


def test_the_record_is_json_and_the_text_has_every_part(task, tmp_path):
    found = probe(Trainer(task, tmp_path/'m', epochs=1, **SMALL), 2, warm_up=1)
    found.save(tmp_path/'probe.json')
    record = json.loads((tmp_path/'probe.json').read_text())
    assert record['bottleneck'] == found.bottleneck and set(record['parts']) == {'copy', 'forward', 'loss', 'backward', 'step'} and record['precisions'].keys() == {'fp32', 'bf16'}
    assert all(word in str(found) for word in ('waiting', 'copy', 'forward', 'loss', 'backward', 'step', 'disk', 'augmentation', 'bottleneck'))
    found.figure()


def made(n_workers, waiting, disk, augmentation, **more):
    return Probe(dict(copy=0., forward=.03, loss=.0, backward=.06, step=.01), waiting, {'disk': disk, 'augmentation': augmentation, 'handing over': 0.}, n_workers, **({'cores': 8} | more))


@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('disk, augmentation', [(.4, .1), (.1, .4)])
def test_advice_follows_the_arithmetic(n, disk, augmentation):
    making = disk + augmentation
    p = made(n, iteration_time(making, .1, n) - .1, disk, augmentation)
    assert p.bottleneck == ('disk' if disk > augmentation else 'augmentation')
    best = p.advice()[0]
    assert best['now_ms'] == pytest.approx(1000 * iteration_time(making, .1, n)) and best['then_ms'] == pytest.approx(1000 * iteration_time(making, .1, 5))


def test_nothing_is_advised_where_nothing_would_help():
    assert made(1, 0., .01, .01, precision='bf16', precisions={'fp32': .2, 'bf16': .1}, threads=7).advice() == []
    assert 'nothing that is known here would help' in str(made(1, 0., .01, .01, threads=8))


def test_a_starved_network_on_a_full_machine_is_told_so():
    p = made(2, .4, .1, .9, cores=2, threads=2)
    assert 'more cores' in p.advice()[0]['change']
