"""Callbacks in real trainings of every kind: pages of patches, exact resumption, nothing changed by looking."""
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from balls import REGIONS, make_task
from segnb.callbacks import EarlyStopping, ExamplePages, FreezeEncoder, TensorBoard, TrainingWarning, TrainingWarnings, _answer, _label_map, _telling_slice
from segnb.optimization import TrainingError
from segnb.training import Trainer

torch.set_num_threads(1)
SMALL = dict(iterations=1, val_iterations=2, n_workers=0, progress=False, device='cpu', precision='fp32')


@pytest.fixture(scope='module')
def task(tmp_path_factory): return make_task(tmp_path_factory.mktemp('pre')/'Balls')


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True))


class PowerCut(Exception): pass


class Cut:
    def __init__(self, epoch): self.epoch = epoch
    def on_batch(self, trainer, batch, loss):
        if trainer.epoch == self.epoch: raise PowerCut


def test_looking_changes_nothing(task, tmp_path):
    quiet, watched = Trainer(task, tmp_path/'a', epochs=2, **SMALL), Trainer(task, tmp_path/'b', epochs=2, callbacks=(ExamplePages(every=1, n_patches=1), TrainingWarnings()), **SMALL)
    quiet.fit(); watched.fit()
    assert same(quiet, watched) and [r['val_loss'] for r in quiet.history] == [r['val_loss'] for r in watched.history]


def test_everything_is_resumed_exactly(task, tmp_path):
    def callbacks(): return ExamplePages(every=2, n_patches=1), EarlyStopping(9), TrainingWarnings(flat_epochs=2, flat_below=9., zero_epochs=2), FreezeEncoder(3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TrainingWarning)
        through = callbacks()
        whole = Trainer(task, tmp_path/'whole', epochs=4, callbacks=through, **SMALL)
        whole.fit()
        for epoch in (0, 3):
            with pytest.raises(PowerCut): Trainer(task, tmp_path/f'cut{epoch}', epochs=4, callbacks=(*callbacks(), Cut(epoch)), **SMALL).fit()
            again = callbacks()
            resumed = Trainer(task, tmp_path/f'cut{epoch}', epochs=4, callbacks=again, **SMALL)
            resumed.fit(overwrite=True) if epoch == 0 else resumed.resume()
            assert same(whole, resumed)
            for a, b in zip(through[:3], again[:3]): assert a.state_dict() == b.state_dict()
            pages = sorted(p.name for p in (whole.folder/'examples').iterdir())
            assert pages == ['epoch_0001.png', 'epoch_0002.png', 'epoch_0004.png'] == sorted(p.name for p in (resumed.folder/'examples').iterdir())
            assert all((whole.folder/'examples'/p).read_bytes() == (resumed.folder/'examples'/p).read_bytes() for p in pages)


def test_pages_of_slices(tmp_path):
    task = make_task(tmp_path/'flat', flat=True)
    trainer = Trainer(task, tmp_path/'m', '2d', epochs=1, callbacks=(ExamplePages(n_patches=1),), **SMALL)
    trainer.fit()
    assert (trainer.folder/'examples'/'epoch_0001.png').stat().st_size > 5000


def test_pages_of_regions_leave_out_what_has_no_truth(tmp_path):
    trainer = Trainer(make_task(tmp_path/'Regions', said=REGIONS), tmp_path/'m', epochs=1, callbacks=(pages := ExamplePages(n_patches=1),), **SMALL)
    trainer.fit()
    assert (trainer.folder/'examples'/'epoch_0001.png').stat().st_size > 5000
    sample = trainer.val_stream.replay(tuple(pages.keys[0]))
    _, reference, answer = _answer(trainer, sample)
    ignored = np.asarray(sample.result['target'][0])[0, -1] > .5
    assert ignored.any() and not ignored.all() and ((reference == -1) == ignored).all() and answer.min() >= 0


def test_an_overwritten_training_leaves_no_pages_and_no_warnings(task, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', TrainingWarning)
        first = Trainer(task, tmp_path/'m', epochs=3, callbacks=(ExamplePages(every=1, n_patches=1), TrainingWarnings(flat_epochs=2, flat_below=9.)), **SMALL)
        first.fit()
    assert (first.folder/'warnings.txt').exists()
    Trainer(task, tmp_path/'m', epochs=1, callbacks=(ExamplePages(every=1, n_patches=1), TrainingWarnings()), **SMALL).fit(overwrite=True)
    assert not (first.folder/'warnings.txt').exists() and [p.name for p in (first.folder/'examples').iterdir()] == ['epoch_0001.png']


def test_patches_are_of_different_cases_first(task, tmp_path):
    trainer = Trainer(task, tmp_path/'m', epochs=1, callbacks=(pages := ExamplePages(n_patches=2),), **(SMALL | dict(val_iterations=6)))
    trainer.fit()
    assert len({trainer.val_stream.replay(tuple(k)).case for k in pages.keys}) == min(2, len(trainer.val_cases))


def test_slices_and_regions_of_a_page():
    stack = np.zeros((3, 4, 4), int)
    stack[1, 0] = 1
    stack[2, 0, 0], stack[2, 1, 0] = 1, 2
    assert _telling_slice(stack) == 2
    assert _label_map(np.array([[1., 1, 0], [0, 1, 0]])).tolist() == [1, 2, 0]


def test_freezing_and_stopping_together(task, tmp_path):
    trainer = Trainer(task, tmp_path/'m', epochs=20, initial_lr=1e-12, callbacks=(FreezeEncoder(1), EarlyStopping(2)), **SMALL)
    trainer.fit()
    assert len(trainer.history) < 20 and 'has not improved' in trainer.stopped
    assert all(p.requires_grad for p in trainer.net.parameters())
    with pytest.raises(TrainingError, match='no part of the network'): Trainer(task, tmp_path/'n', epochs=1, callbacks=(FreezeEncoder(1, 'head'),), **SMALL).fit()


def test_a_resumed_run_leaves_one_curve(task, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with pytest.raises(PowerCut): Trainer(task, tmp_path/'m', epochs=4, callbacks=(TensorBoard(batches=True), Cut(2)), **SMALL).fit()
    trainer = Trainer(task, tmp_path/'m', epochs=4, callbacks=(TensorBoard(batches=True),), **SMALL)
    trainer.resume()
    def steps(folder, tag):
        events = EventAccumulator(str(folder))
        events.Reload()
        return [e.step for e in events.Scalars(tag)]
    assert steps(trainer.folder/'tensorboard', 'loss/train') == [0, 1, 2, 3]
    assert steps(trainer.folder/'tensorboard'/'batches', 'loss/batch') == list(range(4))
    Trainer(task, tmp_path/'m', epochs=2, callbacks=(TensorBoard(),), **SMALL).fit(overwrite=True)
    assert steps(trainer.folder/'tensorboard', 'loss/train') == [0, 1]


def test_wrong_settings_are_refused():
    for make, words in ((lambda: ExamplePages(0), 'no page'), (lambda: ExamplePages(n_patches=0), 'no page'), (lambda: EarlyStopping(0), 'patience cannot be used')):
        with pytest.raises(TrainingError, match=words): make()
    with pytest.raises(TrainingError, match="no such number; found 'dice'; expected lr"): EarlyStopping(1, watch='dice').on_epoch(SimpleNamespace(), {'lr': .1, 'dice': [.1, .2]})
    with pytest.raises(TrainingError, match='no such number'): EarlyStopping(1, watch='dice_of_the_moon').on_epoch(SimpleNamespace(), {'lr': .1})
