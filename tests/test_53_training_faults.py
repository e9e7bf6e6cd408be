"""What can go wrong in a training, and what the user is told: interruption, damage, other plans, full disks, bad data."""
import json, os, shutil, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch

from balls import make_task
from segnb.planning import Plans
from segnb.batches import BatchError
from segnb.checkpoints import CheckpointError, fold_lock, load_checkpoint
from segnb.training import PatchDice, TimeBudget, Trainer, TrainingError, moving_average, training_step

torch.set_num_threads(1)
SMALL = dict(iterations=3, val_iterations=1, n_workers=0, progress=False, device='cpu')


@pytest.fixture(scope='module')
def task(tmp_path_factory): return make_task(tmp_path_factory.mktemp('pre')/'Balls')


def weights(trainer): return list(trainer.net.state_dict().values())
def same(a, b): return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


class PowerCut(Exception): pass


def cut_after(epoch):
    def callback(trainer, row):
        if row['epoch'] == epoch: raise PowerCut
    return callback


@pytest.fixture(scope='module')
def straight(task, tmp_path_factory):
    trainer = Trainer(task, tmp_path_factory.mktemp('m')/'straight', epochs=3, **SMALL)
    trainer.fit()
    return trainer


def interrupted(task, model, epoch=1, **settings):
    with pytest.raises(PowerCut): Trainer(task, model, epochs=3, callbacks=(cut_after(epoch),), **SMALL | settings).fit()
    return model


@pytest.mark.parametrize('n_workers', [0, 1, 2])
def test_an_interrupted_run_ends_in_the_same_weights(task, straight, tmp_path, n_workers):
    interrupted(task, tmp_path/'m', epoch=0)
    again = Trainer(task, tmp_path/'m', epochs=3, **SMALL | {'n_workers': n_workers})
    history = again.resume()
    assert same(straight, again) and [r['epoch'] for r in history] == [0, 1, 2]
    assert [r['train_loss'] for r in history] == [r['train_loss'] for r in straight.history]
    for a, b in zip(straight.optimizer.state.values(), again.optimizer.state.values(), strict=True): assert torch.equal(a['momentum_buffer'], b['momentum_buffer'])


def test_a_cut_within_an_epoch_loses_that_epoch_only(task, straight, tmp_path):
    trainer, calls = Trainer(task, tmp_path/'m', epochs=3, **SMALL), []
    criterion = trainer.criterion
    def loss(x, y):
        calls.append(1)
        if len(calls) == 7: raise KeyboardInterrupt
        return criterion(x, y)
    trainer.criterion = loss
    with pytest.raises(KeyboardInterrupt): trainer.fit()
    assert 'interrupted in epoch 1' in (tmp_path/'m'/'fold_0'/'log.txt').read_text() and not (tmp_path/'m'/'fold_0'/'training.lock').exists()
    again = Trainer(task, tmp_path/'m', epochs=3, **SMALL)
    again.resume()
    assert same(straight, again)


def test_what_a_run_leaves_behind(task, straight):
    folder = straight.folder
    assert sorted(p.name for p in folder.iterdir()) == ['checkpoint_best.pt', 'checkpoint_final.pt', 'checkpoint_latest.pt', 'log.jsonl', 'log.txt', 'progress.png', 'record.json']
    assert {p.name for p in straight.model.iterdir()} == {'fold_0', 'plans.json', 'dataset.json'}
    state = load_checkpoint(folder/'checkpoint_final.pt', straight.plans)
    assert state['epoch'] == 3 and all(torch.equal(a, b) for a, b in zip(state['network'].values(), weights(straight)))
    rows = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    assert rows == straight.history and rows[0]['best'] and 'patch Dice (estimate) ball' in (folder/'log.txt').read_text()
    record = json.loads((folder/'record.json').read_text())
    assert record['training_batches'] == 9 and record['runs'][0]['settings']['seed'] == 0 and sorted(record['train_cases'] + record['val_cases']) == [f'c{i}' for i in range(6)]


def test_a_damaged_latest_checkpoint_is_passed_over(task, straight, tmp_path):
    interrupted(task, tmp_path/'m')
    latest = tmp_path/'m'/'fold_0'/'checkpoint_latest.pt'
    whole = latest.read_bytes()
    latest.write_bytes(whole[:len(whole)//2])
    with pytest.raises(CheckpointError, match='damaged'): load_checkpoint(latest)
    again = Trainer(task, tmp_path/'m', epochs=3, **SMALL)
    again.resume()
    assert same(straight, again), 'the newest whole one was used'
    log = (tmp_path/'m'/'fold_0'/'log.txt').read_text()
    assert 'passed over' in log and 'resuming from checkpoint_best.pt after epoch 2' in log
    load_checkpoint(tmp_path/'m'/'fold_0'/'checkpoint_latest.pt')


def test_nothing_that_can_be_read(task, tmp_path):
    interrupted(task, tmp_path/'m')
    for file in (tmp_path/'m'/'fold_0').glob('*.pt'): file.write_bytes(b'')
    with pytest.raises(CheckpointError, match='no checkpoint can be read.*overwrite=True'): Trainer(task, tmp_path/'m', epochs=3, **SMALL).resume()
    with pytest.raises(CheckpointError, match='nothing to resume'): Trainer(task, tmp_path/'empty', epochs=3, **SMALL).resume()


def test_a_checkpoint_of_another_plan(task, straight, tmp_path):
    other = make_task(tmp_path/'Other', batch_size=3)
    with pytest.raises(CheckpointError, match='batch_size 2 in the checkpoint, 3 here'): load_checkpoint(straight.folder/'checkpoint_final.pt', Plans.load(other/'plans.json'))
    with pytest.raises(TrainingError, match='another plan.*batch_size'): Trainer(other, straight.model, epochs=4, **SMALL).resume()


def test_a_split_that_changed_meanwhile(tmp_path):
    task = make_task(tmp_path/'Balls')
    interrupted(task, tmp_path/'m')
    splits = json.loads((task/'splits.json').read_text())
    (task/'splits.json').write_text(json.dumps(splits[1:] + splits[:1]))
    with pytest.raises(CheckpointError, match='other cases'): Trainer(task, tmp_path/'m', epochs=3, **SMALL).resume()


def test_an_earlier_training_is_not_overwritten_by_accident(task, tmp_path):
    interrupted(task, tmp_path/'m')
    with pytest.raises(TrainingError, match='already holds a training'): Trainer(task, tmp_path/'m', epochs=1, **SMALL).fit()
    assert len(Trainer(task, tmp_path/'m', epochs=1, **SMALL).fit(overwrite=True)) == 1


def test_two_trainings_in_one_folder(task, tmp_path):
    (tmp_path/'m'/'fold_0').mkdir(parents=True)
    with fold_lock(tmp_path/'m'/'fold_0'):
        with pytest.raises(CheckpointError, match=f'another training.*process {os.getpid()}'): Trainer(task, tmp_path/'m', epochs=1, **SMALL).fit()


def test_nan_in_the_data_names_the_case(tmp_path):
    task = make_task(tmp_path/'Balls')
    sick = task/'3d_fullres'/'c1_data.npy'
    data = np.load(sick)
    np.save(sick, data * np.nan)
    trainer = Trainer(task, tmp_path/'m', fold='all', epochs=5, **SMALL)
    with pytest.raises(BatchError, match='c1.*no finite numbers.*repair the image') as told: trainer.fit()
    assert told.value.case == 'c1' and told.value.key[:3] == (0, 'train', 0)
    assert all(torch.isfinite(w).all() for w in weights(trainer)), 'the weights were not touched'


def test_a_loss_that_runs_away(task, tmp_path):
    with pytest.raises(TrainingError, match='epoch 0, iteration 0.*smaller initial_lr'):
        Trainer(task, tmp_path/'m', epochs=1, loss=lambda x, y: x.sum() * float('inf'), **SMALL).fit()


@pytest.mark.parametrize('part', ['data', 'seg', 'locations'])
def test_missing_and_damaged_files_are_found_before_the_start(tmp_path, part):
    task = make_task(tmp_path/'Balls')
    file = task/'3d_fullres'/f'c2_{part}.npy'
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole)//2])
    with pytest.raises(TrainingError, match='case c2.*missing or damaged'): Trainer(task, tmp_path/'m', **SMALL)
    file.unlink()
    with pytest.raises(TrainingError, match='case c2.*missing or damaged'): Trainer(task, tmp_path/'m', **SMALL)
    (task/'3d_fullres'/'c2.json').unlink()
    with pytest.raises(TrainingError, match='1 of 6 training cases are not preprocessed.*c2'): Trainer(task, tmp_path/'m', **SMALL)


def test_a_full_disk(task, tmp_path, monkeypatch):
    interrupted(task, tmp_path/'m')
    before = (tmp_path/'m'/'fold_0'/'checkpoint_latest.pt').read_bytes()
    def full(state, file):
        Path(file).write_bytes(b'half')
        raise RuntimeError('[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(CheckpointError, match='could not be written, earlier ones are untouched'): Trainer(task, tmp_path/'m', epochs=3, **SMALL).resume()
    assert (tmp_path/'m'/'fold_0'/'checkpoint_latest.pt').read_bytes() == before
    assert not [p for p in (tmp_path/'m'/'fold_0').iterdir() if p.name.startswith('.')]


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_log_that_cannot_be_written(task, tmp_path):
    (tmp_path/'m'/'fold_0').mkdir(parents=True)
    (tmp_path/'m'/'fold_0'/'log.jsonl').symlink_to('/dev/full')
    trainer = Trainer(task, tmp_path/'m', epochs=1, **SMALL)
    from segnb import training
    trainer.history = [{'epoch': 0, 'iterations': 1}]
    with pytest.raises(TrainingError, match='cannot be written.*No space left'):
        with training._guarded(trainer): training._write_record(trainer)


@pytest.mark.parametrize('setting, problem', [(dict(epochs=0), 'epochs'), (dict(iterations=2.5), 'iterations'), (dict(initial_lr=-1), 'initial_lr'), (dict(momentum=1), 'momentum'),
                                              (dict(minutes=0), 'minutes'), (dict(precision='half'), 'precision'), (dict(precision='fp16'), 'fp16'), (dict(device='tpu'), 'device'),
                                              (dict(configuration='2d'), '2d'), (dict(fold=-1), 'fold -1'), (dict(n_workers=-1), 'n_workers')])
def test_settings_that_cannot_be_used(task, tmp_path, setting, problem):
    with pytest.raises(ValueError, match=problem): Trainer(task, tmp_path/'m', **SMALL | setting)
    assert not (tmp_path/'m').exists()


def test_too_few_cases(tmp_path):
    task = make_task(tmp_path/'Balls', n=3)
    with pytest.raises(ValueError, match='3 cases cannot make 5 folds'): Trainer(task, tmp_path/'m', **SMALL)
    assert len(Trainer(task, tmp_path/'m', n_folds=3, **SMALL).val_cases) == 1
    assert len(Trainer(task, tmp_path/'m', fold='all', **SMALL).train_cases) == 3


def test_bf16_learns_too(task, straight, tmp_path):
    trainer = Trainer(task, tmp_path/'m', epochs=1, precision='bf16', **SMALL)
    trainer.fit()
    assert all(w.dtype == torch.float32 for w in weights(trainer))
    assert trainer.history[0]['train_loss'] == pytest.approx(straight.history[0]['train_loss'], abs=.05)


class Watch:
    "A clock that moves only when told"
    def __init__(self): self.now = 0.
    def __call__(self): return self.now


def test_a_time_budget_with_a_clock_that_moves_when_told():
    watch = Watch()
    budget = TimeBudget(100, clock=watch)
    assert budget.has_room() and budget.lr(.01) == .01
    budget.pace |= {'step': 2., 'closing': 10.}
    watch.now = 87.
    assert budget.has_room() and not budget.has_room(2) and budget.lr(.01) == pytest.approx(.01 * (3/90)**.9)
    watch.now = 95.
    assert not budget.has_room() and budget.lr(.01) == 0
    later = TimeBudget(100, elapsed=60, pace=budget.pace, clock=watch)
    assert later.elapsed == 60 and later.training_left == 30
    assert TimeBudget(clock=watch).has_room(10**9)


def test_minutes_end_in_time_and_go_on_after_a_break(task, tmp_path, monkeypatch):
    "Nine seconds in epochs of twenty steps, of a quarter of a second each on a clock that batches move: a whole epoch, a break, and what then fits"
    from segnb import training
    watch = Watch()
    monkeypatch.setattr(training, '_budget', lambda t, **spent: TimeBudget(60 * t.minutes, clock=watch, **spent))
    class Tick:
        def on_batch(self, trainer, batch, loss): watch.now += .25
    settings = SMALL | dict(iterations=20, val_iterations=2, minutes=.15)
    with pytest.raises(PowerCut): Trainer(task, tmp_path/'m', callbacks=(Tick(), cut_after(0)), **settings).fit()
    assert load_checkpoint(tmp_path/'m'/'fold_0'/'checkpoint_latest.pt')['elapsed'] == 5
    watch.now += 100
    trainer = Trainer(task, tmp_path/'m', callbacks=(Tick(),), **settings)
    history = trainer.resume()
    assert history[0]['elapsed'] == 5 and history[-1]['elapsed'] == 9 and sum(r['iterations'] for r in history) == 36, 'the break does not count'
    rates = [r['lr'] for r in history]
    assert rates == sorted(rates, reverse=True) and trainer.optimizer.param_groups[0]['lr'] < rates[1]


def test_momentum_is_lowered_when_nothing_was_learned(task, tmp_path):
    from segnb import training
    trainer = Trainer(task, tmp_path/'m', epochs=200, **SMALL)
    trainer.folder.mkdir(parents=True)
    before = [w.clone() for w in weights(trainer)]
    for trainer.epoch, dice in ((99, 0), (100, 1e-9), (100, float('nan')), (101, 0)):
        training._rescue(trainer, dice)
        assert trainer.optimizer.param_groups[0]['momentum'] == .99 and all(torch.equal(a, b) for a, b in zip(before, weights(trainer)))
    trainer.epoch = 100
    training._rescue(trainer, 0)
    assert trainer.optimizer.param_groups[0]['momentum'] == .95
    assert not torch.equal(before[0], weights(trainer)[0]) and trainer.optimizer.param_groups[0]['params'][0] is next(trainer.net.parameters())


def test_averages_and_counts_without_a_value():
    assert moving_average(None, float('nan')) is None and moving_average(.5, float('nan')) == .5
    assert np.isnan(PatchDice(3).mean())
    network = torch.nn.Conv3d(1, 2, 1)
    optimizer = torch.optim.SGD(network.parameters(), .1)
    before = network.weight.detach().clone()
    found = training_step(network, lambda x, y: x.sum() * float('nan'), optimizer, torch.ones(1, 1, 2, 2, 2), [])
    assert np.isnan(found) and torch.equal(network.weight, before)


def test_a_plan_that_gained_a_configuration_still_fits_its_models(task, straight, tmp_path):
    plans = Plans.load(task/'plans.json')
    more = Plans.from_dict({**plans.to_dict(), 'configurations': {**plans.to_dict()['configurations'], '3d_lowres': {**plans.configuration('3d_fullres').to_dict(), 'name': '3d_lowres'}}})
    assert more.identity() != plans.identity()
    state = load_checkpoint(straight.folder/'checkpoint_final.pt', more)
    assert state['plans_identity'] == more.identity('3d_fullres')


def test_a_model_of_other_labels_is_not_trained_over(straight, task, tmp_path):
    copy, model = shutil.copytree(task, tmp_path/'Balls'), shutil.copytree(straight.model, tmp_path/'model')
    about = json.loads((copy/'dataset.json').read_text(encoding='utf-8'))
    numbers = {str(k): v for k, v in about['labels'].items()}
    (copy/'dataset.json').write_text(json.dumps(about | {'labels': {k: f'{v} (renamed)' if k not in ('0', 'background') and not isinstance(v, int) else v for k, v in numbers.items()}}), encoding='utf-8')
    Trainer(copy, model, **SMALL)                                       # another name is no other label
    regions = {'background': 0, 'whole': [1, 2], 'core': 2} if len(numbers) > 2 else {'background': 0, 'ball': [1]}
    (copy/'dataset.json').write_text(json.dumps(about | {'labels': regions, 'regions_class_order': list(range(1, len(regions)))}), encoding='utf-8')
    with pytest.raises(TrainingError, match='other labels'): Trainer(copy, model, **SMALL).fit(overwrite=True)
    assert sorted(f.name for f in (model/'fold_0').iterdir()) == sorted(f.name for f in (straight.model/'fold_0').iterdir())
