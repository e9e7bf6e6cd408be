"""Every kind of plan trains: slices, residual networks, regions, an ignore label, a cascade; every engine and option; data at the edges."""
import dataclasses, functools, json, shutil, warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.augmentation import AugmentationParameters
from segnb.batches import BatchError
from segnb.network import ResidualUNet, build_network
from segnb.planning import Plans
from segnb.preprocessing import class_locations, load_preprocessed, region_locations, save_preprocessed
from segnb.training import ENGINES, PatchDice, Trainer, TrainingError
from balls import make_task
from test_53_training_faults import SMALL, same, weights

torch.set_num_threads(1)
FLAT = dict(patch_size=[16, 16], batch_size=4, num_pool_per_axis=[2, 2], pool_op_kernel_sizes=[[2, 2]]*2, conv_kernel_sizes=[[3, 3]]*3)
QUICK = SMALL | dict(epochs=2)


def add(task, name, source='3d_fullres', folder=None, planner='hand', **changes):
    "Give a task one more configuration, and its preprocessed cases under that name"
    d = Plans.load(task/'plans.json').to_dict()
    d['planner'] = planner
    d['configurations'][name] = d['configurations'][source] | dict(name=name) | changes
    Plans.from_dict(d).save(task/'plans.json')
    if folder: shutil.copytree(task/source, task/folder, dirs_exist_ok=True)
    return task


def declare(task, **changes):
    d = json.loads((task/'dataset.json').read_text())
    (task/'dataset.json').write_text(json.dumps({**d, **changes}))
    return task


def rewrite(task, change, config='3d_fullres'):
    "Save every case again with a changed label map, or more"
    for name, case in load_preprocessed(task/config).items():
        data, seg, properties = np.array(case.data), np.array(case.seg), {k: v for k, v in case.properties.items() if k not in ('files', 'n_locations', 'n_region_locations')}
        data, seg, more = change(data, seg)
        save_preprocessed(data, seg, properties | {'class_locations': class_locations(np.maximum(seg, 0), (1, 2))} | more, task/config, name)
    return task


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    task = make_task(tmp_path_factory.mktemp('pre')/'Balls')
    add(task, '2d', folder='2d', **FLAT)
    add(task, 'residual', folder='residual', architecture='residual', blocks_per_stage_encoder=[1, 1, 2], blocks_per_stage_decoder=[1, 1], planner='nnunet_v1_residual')
    return task


def learns(trainer):
    history = trainer.fit()
    assert all(np.isfinite(row['train_loss']) for row in history) and len(history) == trainer.epochs
    return history


def test_slices(task, tmp_path):
    trainer = Trainer(task, tmp_path/'m', '2d', **QUICK)
    learns(trainer)
    batch = next(iter(trainer.train_stream.epoch(0)))
    assert tuple(batch['data'].shape) == (4, 1, 16, 16) and [tuple(t.shape) for t in batch['target']] == [(4, 1, 16, 16), (4, 1, 8, 8)]
    assert any(isinstance(m, torch.nn.Conv2d) for m in trainer.net.modules())


def test_a_residual_network_keeps_the_lowest_output_of_the_original(task, tmp_path):
    trainer = Trainer(task, tmp_path/'m', 'residual', **QUICK)
    learns(trainer)
    assert isinstance(trainer.net, ResidualUNet) and trainer.criterion.weights == pytest.approx((2/3, 1/3))


@pytest.fixture(scope='module')
def regions(tmp_path_factory):
    task = declare(make_task(tmp_path_factory.mktemp('regions')/'Balls'), labels={'background': 0, 'whole': [1, 2], 'core': 2, 'ignore': 3}, regions_class_order=[1, 2])
    def change(data, seg):
        seg[:3] = 3 # nobody judged these slices
        return data, seg, {'region_locations': region_locations(np.where(seg == 3, 0, seg), {'whole': (1, 2), 'core': (2,)})}
    return rewrite(task, change)


def test_regions_and_an_ignore_label(regions, tmp_path):
    trainer = Trainer(regions, tmp_path/'m', **QUICK)
    history = learns(trainer)
    batch = next(iter(trainer.train_stream.epoch(0)))
    assert trainer.class_names == ['whole', 'core'] and len(history[0]['dice']) == 2
    assert tuple(batch['target'][0].shape) == (2, 3, 16, 16, 16) and set(torch.unique(batch['target'][0]).tolist()) <= {0., 1.}
    whole, core, ignored = batch['target'][0].unbind(1)
    assert (core <= whole).all() and ((whole + ignored) <= 1).all()
    assert 'patch Dice (estimate) whole' in (trainer.folder/'log.txt').read_text()


@pytest.mark.parametrize('lost', ['one', 'all'])
def test_cases_of_which_nobody_judged_a_voxel(task, tmp_path, lost):
    "A loss over no voxels looks excellent: what teaches nothing is said, and where it is everything nothing is trained"
    copy = shutil.copytree(task, tmp_path/'Balls')
    declare(copy, labels={'background': 0, 'ball': 1, 'core': 2, 'ignore': 3})
    first = Trainer(copy, tmp_path/'m', **QUICK).train_cases[0]
    def change(data, seg):
        gone = lost == 'all' or np.array_equal(data, np.array(load_preprocessed(task/'3d_fullres')[first].data))
        if gone: seg[:] = 3
        return data, seg, {'judged_voxels': [100, 0 if gone else 99]}
    rewrite(copy, change)
    if lost == 'all':
        with pytest.raises(TrainingError, match='nobody has judged a voxel of any training case.*--edit'): Trainer(copy, tmp_path/'m', **QUICK)
    else:
        trainer = Trainer(copy, tmp_path/'m', **QUICK)
        learns(trainer)
        assert f'of {len(trainer.train_cases)} training cases have no judged voxel and teach nothing: {first}' in (trainer.folder/'log.txt').read_text()


def test_an_ignore_label_alone(task, tmp_path):
    copy = shutil.copytree(task, tmp_path/'Balls')
    declare(copy, labels={'background': 0, 'ball': 1, 'core': 2, 'ignore': 3})
    def change(data, seg):
        seg[:, :12] = 3
        return data, seg, {}
    rewrite(copy, change)
    trainer = Trainer(copy, tmp_path/'m', **QUICK)
    learns(trainer)
    seen = torch.cat([b['target'][0].flatten() for b in trainer.train_stream.epoch(0)])
    assert (seen == 3).any() and trainer.loss_function.ignore == 3
    data, targets = next(iter(trainer.train_stream.epoch(0))), None
    x = data['data'].clone().requires_grad_()
    outputs = [torch.zeros(2, 3, *t.shape[2:], requires_grad=True) for t in data['target']]
    trainer.criterion(outputs, data['target']).backward()
    assert not outputs[0].grad[(data['target'][0] == 3).expand_as(outputs[0])].any(), 'no gradient where nobody judged'


def test_a_cascade(task, tmp_path):
    copy = shutil.copytree(task, tmp_path/'Balls')
    add(copy, '3d_lowres')
    add(copy, '3d_cascade_fullres', previous_stage='3d_lowres')
    with pytest.raises(TrainingError, match='no prediction of 3d_lowres.*segnb cascade'): Trainer(copy, tmp_path/'m', '3d_cascade_fullres', **QUICK)
    rewrite(copy, lambda data, seg: (data, seg, {'previous': np.roll(seg, 1, 0).astype(np.uint8)}))
    trainer = Trainer(copy, tmp_path/'m', '3d_cascade_fullres', **QUICK)
    learns(trainer)
    assert trainer.net.in_channels == 3
    train, val = next(iter(trainer.train_stream.epoch(0))), next(iter(trainer.val_stream.epoch(0)))
    for batch in (train, val):
        assert tuple(batch['data'].shape) == (2, 3, 16, 16, 16) and set(torch.unique(batch['data'][:, 1:]).tolist()) <= {0., 1.} and [tuple(t.shape[1:2]) for t in batch['target']] == [(1,), (1,)]
    one_hot = val['data'][:, 1:]
    assert (one_hot.sum(1) <= 1).all() and one_hot.any()


@pytest.mark.parametrize('engine', ENGINES)
def test_engines(task, tmp_path, engine):
    one, two = (Trainer(task, tmp_path/f'm{n}', **QUICK | dict(engine=engine, n_workers=n)) for n in (0, 1))
    learns(one), learns(two)
    assert same(one, two), 'the same batches, whoever makes them'


def test_an_unknown_engine_and_preset(task, tmp_path):
    with pytest.raises(ValueError, match='there is no such engine'): Trainer(task, tmp_path/'m', **QUICK, engine='slow')
    with pytest.raises(ValueError, match='no such preset'): Trainer(task, tmp_path/'m', **QUICK, augmentation='DA9')


def test_augmentation_and_mirroring_are_arguments(task, tmp_path):
    settings = QUICK | dict(epochs=1)
    none = Trainer(task, tmp_path/'none', **settings, augmentation='none')
    assert none.train_stream.loader.patch_size == (16, 16, 16)
    table = Trainer(task, tmp_path/'table', **settings, augmentation=AugmentationParameters(noise=(0, 5)))
    assert table.parameters.noise == (0, 5)
    for axes in ((), (0, 2)):
        trainer = Trainer(task, tmp_path/f'axes{len(axes)}', **settings, mirror_axes=axes)
        learns(trainer)
        assert trainer.parameters.mirror_axes == axes
        from segnb.checkpoints import load_checkpoint
        assert load_checkpoint(trainer.folder/'checkpoint_final.pt')['mirror_axes'] == list(axes)


def test_mirroring_by_name(task, tmp_path):
    copy = shutil.copytree(task, tmp_path/'Balls')
    geometry = dict(spacing=[1, 1, 1], origin=[0, 0, 0], direction=[1, 0, 0, 0, 1, 0, 0, 0, 1], shape=[24, 24, 24])
    for file in (copy/'3d_fullres').glob('*.json'): file.write_text(json.dumps(json.loads(file.read_text()) | {'geometry': geometry}))
    assert Trainer(copy, tmp_path/'m', **QUICK, mirror_axes=('left-right',)).parameters.mirror_axes == (2,)
    with pytest.raises(ValueError, match='no such axis to mirror'): Trainer(copy, tmp_path/'m', **QUICK, mirror_axes=('upwards',))


@pytest.mark.parametrize('setting', [dict(channels_last=True), dict(checkpointing=True), dict(deterministic=True)])
def test_options_that_change_only_how(task, tmp_path, setting):
    straight = Trainer(task, tmp_path/'straight', **QUICK)
    other = Trainer(task, tmp_path/'other', **QUICK, **setting)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a, b = learns(straight), learns(other)
    assert [r['train_loss'] for r in b] == pytest.approx([r['train_loss'] for r in a], abs=1e-3)


@pytest.mark.parametrize('setting', [dict(optimizer='adam', initial_lr=3e-4), dict(optimizer='adamw', schedule='cosine', warmup=1), dict(schedule='plateau'), dict(schedule='step', warmup=.5),
                                     dict(loss='dice_topk'), dict(loss='ce_to_dice'), dict(sampling='probability', oversample=.5), dict(optimizer=lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr/10))])
def test_settings_by_name(task, tmp_path, setting):
    history = learns(Trainer(task, tmp_path/'m', **QUICK | dict(epochs=3, iterations=2) | setting))
    again = Trainer(task, tmp_path/'again', **QUICK | dict(epochs=3, iterations=2) | setting)
    class Cut(Exception): pass
    def cut(trainer, row): raise Cut
    with pytest.raises(Cut): Trainer(task, tmp_path/'again', **QUICK | dict(epochs=3, iterations=2, callbacks=(cut,)) | setting).fit()
    assert [r['train_loss'] for r in again.resume()] == [r['train_loss'] for r in history]


def test_a_patch_larger_than_every_image(task, tmp_path):
    copy = add(shutil.copytree(task, tmp_path/'Balls'), 'large', folder='large', patch_size=[32, 32, 40])
    trainer = Trainer(copy, tmp_path/'m', 'large', **QUICK)
    learns(trainer)
    assert tuple(next(iter(trainer.val_stream.epoch(0)))['data'].shape) == (2, 1, 32, 32, 40)


def test_a_class_without_voxels_in_this_fold(task, tmp_path):
    copy = shutil.copytree(task, tmp_path/'Balls')
    rewrite(copy, lambda data, seg: (data, np.minimum(seg, 1), {}))
    trainer = Trainer(copy, tmp_path/'m', **QUICK)
    history = learns(trainer)
    log = (trainer.folder/'log.txt').read_text()
    assert 'warning: core has no voxel in the training cases: it cannot be learned' in log and "core has no voxel in the validation cases" in log and 'ball has no voxel' not in log
    assert history[-1]['dice'][1] in (None, 0)


def test_labels_outside_the_classes(task, tmp_path):
    copy = shutil.copytree(task, tmp_path/'Balls')
    def change(data, seg):
        seg[12:14, 12:14, 12:14] = 7
        return data, seg, {}
    rewrite(copy, change)
    with pytest.raises(BatchError, match='c[0-5].*no class.*found 7'): Trainer(copy, tmp_path/'m', **QUICK, augmentation='none').fit()


def test_a_device_without_memory(task, tmp_path):
    trainer = Trainer(task, tmp_path/'m', **QUICK)
    def full(logits, target): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
    trainer.criterion = full
    with pytest.raises(TrainingError, match=r'memory of cpu is full; found CUDA out of memory.*batches of 2 patches of \(16, 16, 16\).*checkpointing=True.*smaller batches'): trainer.fit()
    trainer = Trainer(task, tmp_path/'m2', **QUICK)
    trainer.criterion = lambda o, t: torch.empty(2**60)
    with pytest.raises(TrainingError, match='memory of cpu is full'): trainer.fit()


def test_a_killed_worker_is_replaced(task, tmp_path):
    import os, signal
    import psutil
    straight = Trainer(task, tmp_path/'straight', **QUICK | dict(n_workers=1))
    learns(straight)
    def kill(trainer, row):
        for child in psutil.Process().children():
            if row['epoch'] == 0: child.send_signal(signal.SIGKILL)
    trainer = Trainer(task, tmp_path/'m', **QUICK | dict(n_workers=1, callbacks=(kill,)))
    with pytest.warns(UserWarning, match='killed'): learns(trainer)
    assert same(straight, trainer)


@pytest.mark.parametrize('how', ['cut', 'gone'])
def test_a_preprocessed_file_spoilt_during_training(task, tmp_path, how):
    copy = shutil.copytree(task, tmp_path/'Balls')
    def spoil(trainer, row):
        for file in (copy/'3d_fullres').glob('*_data.npy'): file.unlink() if how == 'gone' else file.write_bytes(file.read_bytes()[:1000])
    trainer = Trainer(copy, tmp_path/'m', callbacks=(spoil,), **QUICK)
    with pytest.raises(BatchError, match='c[0-5].*_data.npy.*preprocess'): trainer.fit()
    assert (trainer.folder/'checkpoint_latest.pt').exists() and not (trainer.folder/'training.lock').exists()
    shutil.rmtree(copy); shutil.copytree(task, copy)
    assert len(Trainer(copy, tmp_path/'m', **QUICK).resume()) == 2, 'nothing was lost'


def test_labels_listed_in_another_order_keep_their_names(task, tmp_path):
    copy = declare(shutil.copytree(task, tmp_path/'Balls'), labels={'0': 'background', '2': 'core', '1': 'ball'})
    trainer = Trainer(copy, tmp_path/'m', **QUICK)
    assert trainer.class_names == ['ball', 'core']


def test_patch_dice_of_regions_is_that_of_each_mask():
    rng = np.random.default_rng(0)
    logits, masks = torch.from_numpy(rng.normal(size=(2, 3, 4, 5))), torch.from_numpy(rng.integers(0, 2, (2, 4, 4, 5)))
    dice = PatchDice(3, regions=True)
    dice.add(logits, masks)
    judged = (masks[:, 3] == 0).numpy()
    for r in range(3):
        found, true = (logits[:, r] > 0).numpy()[judged], (masks[:, r] == 1).numpy()[judged]
        assert dice.per_class()[r] == pytest.approx(2*(found & true).sum()/(found.sum() + true.sum()))
