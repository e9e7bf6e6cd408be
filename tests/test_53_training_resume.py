"""A training that is killed, again and again and at every moment, ends in the same bits as one that was not."""
import functools, json, os, random, signal, time, traceback
from pathlib import Path

import pytest
import torch

from segnb.checkpoints import load_checkpoint, newest_checkpoint
from segnb.network import build_network
from segnb.optimization import Plateau
from segnb.training import Trainer
from balls import make_task
from test_53_training_faults import SMALL

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills processes that it forks')


class Memory:
    "A callback that remembers everything it was told, and whose memory decides something"
    def __init__(self): self.total, self.epochs, self.seen = 0., [], 0
    def on_batch(self, trainer, batch, loss): self.total, self.seen = self.total + loss, self.seen + len(batch['keys'])
    def on_epoch(self, trainer, row):
        self.epochs.append(row['epoch'])
        row['total'] = self.total
        for group in trainer.optimizer.param_groups: group['weight_decay'] = 1e-4 * (1 + abs(self.total) % 1)
    def state_dict(self): return {'total': self.total, 'epochs': self.epochs, 'seen': self.seen}
    def load_state_dict(self, state): self.__dict__.update(state)


def make(task, model, epochs=5, **changes):
    settings = dict(epochs=epochs, callbacks=(Memory(),), schedule=Plateau(patience=0, threshold=.05, factor=.7), warmup=2, network=functools.partial(build_network, dropout=.3))
    return Trainer(task, model, **SMALL | settings | changes)


@pytest.fixture(scope='module')
def task(tmp_path_factory): return make_task(tmp_path_factory.mktemp('pre')/'Balls')


@pytest.fixture(scope='module')
def straight(task, tmp_path_factory):
    trainer = make(task, tmp_path_factory.mktemp('m')/'straight')
    trainer.fit()
    return load_checkpoint(trainer.folder/'checkpoint_final.pt')


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare(mine, straight):
    for part in ('network', 'optimizer', 'callbacks', 'schedule', 'moving_dice', 'best_dice', 'epoch'): assert same(mine[part], straight[part]), part
    timeless = [[{k: v for k, v in row.items() if k not in ('seconds', 'elapsed')} for row in s['history']] for s in (mine, straight)]
    assert timeless[0] == timeless[1]


def in_a_process(task, model, die=lambda: None, callbacks=()):
    "Fork a process that trains, or goes on"
    child = os.fork()
    if not child:
        try:
            trainer = make(task, model, callbacks=(Memory(), *callbacks))
            die()
            trainer.resume() if list(Path(model).glob('fold_0/*.pt')) else trainer.fit()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def end_of(child):
    "Exit code of a process, or minus the signal that ended it"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Leash:
    "Let a process make so many batches; at the next it waits for its end"
    def __init__(self, batches): self.left = batches
    def on_batch(self, trainer, batch, loss):
        if not self.left: signal.pause()
        self.left -= 1


def test_a_process_killed_at_random_moments(task, straight, tmp_path):
    "While it starts, trains, validates, saves, or waits at a batch; the leash keeps a fast machine from being done before it is killed"
    rng = random.Random(53)
    for batches in (2, 4, 0, 5, 3, 4):
        child = in_a_process(task, tmp_path/'m', callbacks=(Leash(batches),))
        time.sleep(rng.uniform(.05, .6))
        os.kill(child, signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
    assert end_of(in_a_process(task, tmp_path/'m')) == 0
    fold = tmp_path/'m'/'fold_0'
    compare(load_checkpoint(fold/'checkpoint_final.pt'), straight)
    assert [json.loads(line)['epoch'] for line in (fold/'log.jsonl').read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert not [p.name for p in fold.iterdir() if p.name[0] == '.' or 'lock' in p.name or 'previous' in p.name]


def test_a_process_killed_before_its_first_save(task, straight, tmp_path):
    def cut(trainer, batch, loss): raise KeyboardInterrupt
    class Cut: on_batch = staticmethod(cut)
    with pytest.raises(KeyboardInterrupt): make(task, tmp_path/'m', callbacks=(Cut(),)).fit()
    again = make(task, tmp_path/'m')
    again.resume()
    compare(load_checkpoint(again.folder/'checkpoint_final.pt'), straight)
    assert 'before its first save' in (again.folder/'log.txt').read_text()


OPERATIONS = ('link', 'replace', 'fsync', 'unlink')

def at_operation(number):
    "In the child: die before the file operation of this number, counted over all of them"
    count = [0]
    def watched(operation):
        def act(*args, **options):
            count[0] += 1
            if count[0] == number: os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **options)
        return act
    for name in OPERATIONS: setattr(os, name, watched(getattr(os, name)))
    save = torch.save
    def half(state, file):
        save(state, file)
        count[0] += 1
        if count[0] == number:
            os.truncate(file, os.path.getsize(file)//2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half


def test_a_process_killed_within_its_saves(task, straight, tmp_path):
    "One process after the other, each killed one file operation later than the one before; none loses more than an epoch, and the last one ends as if nothing had been"
    epoch, code, number = 0, None, 0
    while code != 0 and number < 80:
        number += 3
        code = end_of(in_a_process(task, tmp_path/'m', lambda: at_operation(number)))
        assert code in (0, -signal.SIGKILL)
        if list((tmp_path/'m'/'fold_0').glob('*.pt')):
            state, file, problems = newest_checkpoint(tmp_path/'m'/'fold_0')
            assert problems == [] and state['epoch'] >= epoch
            epoch = state['epoch']
    assert code == 0
    compare(load_checkpoint(tmp_path/'m'/'fold_0'/'checkpoint_final.pt'), straight)
    best = load_checkpoint(tmp_path/'m'/'fold_0'/'checkpoint_best.pt')
    assert best['epoch'] == 1 + max(row['epoch'] for row in straight['history'] if row['best'])


def test_the_best_checkpoint_is_made_good_when_its_copy_was_cut_off(task, tmp_path):
    trainer = make(task, tmp_path/'m', epochs=1)
    trainer.fit()
    (trainer.folder/'checkpoint_best.pt').unlink()
    make(task, tmp_path/'m', epochs=1).resume()
    assert load_checkpoint(trainer.folder/'checkpoint_best.pt')['epoch'] == 1


def test_more_epochs_restate_the_schedule(task, tmp_path):
    settings = dict(schedule='poly', warmup=0, callbacks=())
    make(task, tmp_path/'m', epochs=2, **settings).fit()
    longer = make(task, tmp_path/'m', epochs=4, **settings)
    history = longer.resume()
    assert [r['lr'] for r in history] == pytest.approx([.01, .01 * .5**.9, .01 * .5**.9, .01 * .25**.9])
    assert 'epochs 2 -> 4' in (longer.folder/'log.txt').read_text()
    assert load_checkpoint(longer.folder/'checkpoint_final.pt')['epoch'] == 4
    assert make(task, tmp_path/'m', epochs=3, **settings).resume() == history, 'already done'


def test_other_momentum_on_resume_is_used(task, tmp_path):
    make(task, tmp_path/'m', epochs=1, callbacks=()).fit()
    again = make(task, tmp_path/'m', epochs=2, callbacks=(), momentum=.9)
    again.resume()
    assert again.optimizer.param_groups[0]['momentum'] == .9 and 'momentum 0.99 -> 0.9' in (again.folder/'log.txt').read_text()


def test_callbacks_in_order_and_a_stop(task, tmp_path):
    told = []
    class Diary:
        def __getattr__(self, name):
            if not name.startswith('on_'): raise AttributeError(name)
            return lambda trainer, *news: (told.append(name), trainer.stop('enough') if name == 'on_epoch' and news[0]['epoch'] == 1 else None)
    def plain(trainer, row): told.append((row['epoch'], (trainer.folder/'checkpoint_latest.pt').exists()))
    trainer = make(task, tmp_path/'m', callbacks=(Diary(), plain))
    assert len(trainer.fit()) == 2
    epoch = ['on_epoch_start', 'on_batch', 'on_batch', 'on_batch', 'on_epoch']
    assert told == ['on_start', *epoch, (0, True), *epoch, (1, True), 'on_end']
    assert 'stopped after epoch 2: enough' in (trainer.folder/'log.txt').read_text()
    assert len(make(task, tmp_path/'m', callbacks=()).resume()) == 2, 'a stop outlives an interruption'
    assert len(make(task, tmp_path/'m', callbacks=(), epochs=6).resume()) == 6, 'asked for more, it goes on'


def test_patience_counts_on_after_an_interruption(task, tmp_path):
    settings = dict(callbacks=(), initial_lr=1e-12, warmup=0, schedule='constant', epochs=30, patience=3)
    whole = make(task, tmp_path/'whole', **settings).fit()
    assert len(whole) < 30 and not any(r['best'] for r in whole[-3:])
    class Stop(Exception): pass
    def cut(trainer, row):
        if row['epoch'] == len(whole) - 3: raise Stop
    with pytest.raises(Stop): make(task, tmp_path/'cut', **settings | {'callbacks': (cut,)}).fit()
    assert len(make(task, tmp_path/'cut', **settings).resume()) == len(whole)


def test_what_a_callback_cannot_keep_is_refused_at_the_first_save(task, tmp_path):
    import numpy as np
    class Hoarder:
        def on_epoch(self, trainer, row): pass
        def state_dict(self): return {'pages': np.zeros(3)}
    with pytest.raises(ValueError, match="'callbacks.Hoarder 0.pages' cannot be kept in a checkpoint"): make(task, tmp_path/'m', callbacks=(Hoarder(),)).fit()
    with pytest.raises(ValueError, match='this is no callback'): make(task, tmp_path/'m', callbacks=('TensorBoard',))


def test_names_that_are_not_known(task, tmp_path):
    for setting, words in ((dict(optimizer='lion'), 'optimizer'), (dict(schedule='zigzag'), 'schedule'), (dict(loss='hinge'), 'loss'), (dict(warmup=-1), 'warmup')):
        with pytest.raises(ValueError, match=words): make(task, tmp_path/'m', **setting)
