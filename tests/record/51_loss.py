"""Record nnU-Net 1.7.1's losses and their gradients on given logits, for the parity checks of the loss chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/51_loss.py
Writes tests/recorded/51_loss.npz: per input `<name>/logits`, `<name>/target`, and per loss and setting of batch_dice
(0, 1) `<name>/<loss><batch_dice>/value` and `/gradient`; the same for inputs with ignored voxels, with masks of regions
and of two dimensions; `deep/...` for a list of three resolutions; `weights/<n>`, the weights nnUNetTrainerV2 gives n
outputs; `transition/<epoch>`, the weights of cross-entropy and Dice of the trainer that goes from one to the other; and
`odd/...`, values where the original does what nobody would want.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import torch

SEED = 51
OUT = Path(__file__).resolve().parents[1]/'recorded'/'51_loss.npz'


def inputs():
    "(name, logits (B, K, Z, Y, X), target (B, 1, Z, Y, X)): ordinary, confident, and with a class absent from one or all samples"
    rng = np.random.default_rng(SEED)
    def make(batch, k, shape, scale): return rng.normal(0, scale, (batch, k, *shape)).astype(np.float32), rng.integers(0, k, (batch, 1, *shape)).astype(np.float32)
    yield 'ordinary', *make(2, 3, (4, 6, 5), 1)
    yield 'confident', *make(1, 2, (4, 4, 4), 8)
    logits, target = make(2, 4, (4, 4, 6), 2)
    target[0][target[0] == 2] = 0
    target[target == 3] = 0
    yield 'absent_class', logits, target
    logits, target = make(2, 3, (4, 4, 4), 1)
    yield 'only_background', logits, target * 0
    yield 'slices', *make(3, 3, (7, 6), 2)


def losses(b):
    "name: loss as the trainers of the original make it, for one setting of batch_dice"
    from torch import nn
    from nnunet.training.loss_functions.crossentropy import RobustCrossEntropyLoss
    from nnunet.training.loss_functions.dice_loss import (DC_and_CE_loss, DC_and_topk_loss, GDL, GDL_and_CE_loss, MCCLoss, SoftDiceLoss,
                                                          SoftDiceLossSquared, softmax_helper)
    from nnunet.training.loss_functions.focal_loss import FocalLossV2
    from nnunet.training.loss_functions.TopK_loss import TopKLoss
    dice = {'batch_dice': b, 'smooth': 1e-5, 'do_bg': False}
    made = {'dice': SoftDiceLoss(softmax_helper, b, False, 1e-5), 'dice_bg': SoftDiceLoss(softmax_helper, b, True, 1e-5),
            'dice_ce': DC_and_CE_loss(dict(dice), {}), 'dice_ce_unsmoothed': DC_and_CE_loss(dice | {'smooth': 0}, {}),
            'log_dice_ce': DC_and_CE_loss(dict(dice), {}, log_dice=True), 'dice_ce_weights': DC_and_CE_loss(dict(dice), {}, weight_ce=2, weight_dice=.5),
            'dice_squared': SoftDiceLossSquared(softmax_helper, b, False, 1e-5), 'dice_topk': DC_and_topk_loss(dict(dice), {'k': 10}),
            'gdl': GDL(softmax_helper, b, False, 1e-5), 'gdl_square': GDL(softmax_helper, b, False, 1e-5, square_volumes=True),
            'gdl_ce': GDL_and_CE_loss(dict(dice), {}), 'mcc': MCCLoss(softmax_helper, b, True, 0.), 'mcc_foreground': MCCLoss(softmax_helper, b, False, 0.)}
    if not b: made |= {'ce': RobustCrossEntropyLoss(), 'topk': TopKLoss(k=10), 'topk_37': TopKLoss(k=37),
                       'focal': FocalLossV2(nn.Softmax(dim=1), alpha=.5, gamma=2, smooth=1e-5),
                       'focal_other': FocalLossV2(nn.Softmax(dim=1), alpha=.25, gamma=1, smooth=1e-4)}
    return made


def with_ignored(record, arrays):
    "Ignored voxels, and regions"
    from nnunet.training.loss_functions.dice_loss import DC_and_BCE_loss, DC_and_CE_loss
    rng = np.random.default_rng(SEED + 2)
    for name, shape in (('ignored', (4, 5, 6)), ('ignored_slices', (9, 7))):
        logits, target = rng.normal(0, 2, (2, 3, *shape)).astype(np.float32), rng.integers(0, 4, (2, 1, *shape)).astype(np.float32)
        arrays |= {f'{name}/logits': logits, f'{name}/target': target}
        for b in (False, True):
            for kind, log in (('dice_ce', False), ('log_dice_ce', True)):
                y = torch.tensor(target)
                record(f'{name}/{kind}{int(b)}', DC_and_CE_loss({'batch_dice': b, 'smooth': 1e-5, 'do_bg': False}, {}, ignore_label=3, log_dice=log),
                       torch.tensor(logits, requires_grad=True), y)
        arrays[f'odd/{name}_target_afterwards'] = y.numpy()
    for name, shape in (('regions', (4, 5, 6)), ('regions_slices', (9, 7))):
        logits, target = rng.normal(0, 2, (2, 3, *shape)).astype(np.float32), (rng.random((2, 3, *shape)) < .3).astype(np.float32)
        target[1, 2] = 0 # a region that one sample lacks
        arrays |= {f'{name}/logits': logits, f'{name}/target': target}
        for b in (False, True):
            record(f'{name}/dice_bce{int(b)}', DC_and_BCE_loss({}, {'batch_dice': b, 'do_bg': True, 'smooth': 0}),
                   torch.tensor(logits, requires_grad=True), torch.tensor(target))


def transition():
    "{epoch: weights of cross-entropy and Dice} of the trainer that goes from one to the other"
    from nnunet.training.network_training.nnUNet_variants.loss_function.nnUNetTrainerV2_graduallyTransitionFromCEToDice import \
        nnUNetTrainerV2_graduallyTransitionFromCEToDice as Trainer
    t = object.__new__(Trainer)
    t.batch_dice, t.max_num_epochs, t.ds_loss_weights, t.print_to_log_file, found = False, 1000, [1.], lambda *a: None, {}
    for t.epoch in (0, 500, 501, 600, 625, 750, 751, 999):
        t.update_loss()
        found[t.epoch] = np.array([t.loss.loss.weight_ce, t.loss.loss.weight_dice], float)
    return found


def odd():
    "What nobody would want: an absent class, hardly any voxel, nothing judged, a hopeless voxel"
    from nnunet.training.loss_functions.dice_loss import DC_and_CE_loss
    absent, sure = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4)
    sure[:, 1] = -50.
    made = losses(False)
    values = {name: made[name](sure, absent).item() for name in ('dice', 'dice_squared', 'gdl', 'mcc', 'mcc_foreground')}
    values['topk_of_8_voxels'] = made['topk'](sure[..., :2, :2, :2], absent[..., :2, :2, :2]).item()
    values['nothing_judged'] = DC_and_CE_loss({'batch_dice': False, 'smooth': 1e-5, 'do_bg': False}, {}, ignore_label=2)(sure, absent + 2).item()
    hopeless = sure.clone().requires_grad_()
    made['focal'](hopeless, absent + 1).backward()
    return values | {'focal_pull_on_hopeless_voxels': hopeless.grad.abs().max().item()}


def trainer_weights(n):
    "Deep supervision weights as nnUNetTrainerV2.initialize computes them for n outputs, everything else left out"
    from nnunet.network_architecture.neural_network import SegmentationNetwork
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2
    t = object.__new__(nnUNetTrainerV2)
    t.was_initialized, t.output_folder, t.dataset_directory, t.stage = False, tempfile.mkdtemp(), '', 0
    t.plans, t.loss, t.network = {'data_identifier': ''}, None, SegmentationNetwork()
    t.net_num_pool_op_kernel_sizes = [[2, 2, 2]] * n
    for step in ('process_plans', 'setup_DA_params', 'initialize_network', 'initialize_optimizer_and_scheduler'): setattr(t, step, lambda *a: None)
    t.initialize(training=False)
    return np.array(t.ds_loss_weights)


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        from nnunet.training.loss_functions.dice_loss import DC_and_CE_loss
        from nnunet.training.loss_functions.deep_supervision import MultipleOutputLoss2
    arrays = {f'weights/{n}': trainer_weights(n) for n in range(1, 8)}

    def record(key, loss, logits, target):
        logits.grad = None
        value = loss(logits, target)
        value.backward()
        arrays[f'{key}/value'], arrays[f'{key}/gradient'] = value.detach().numpy(), logits.grad.numpy().copy()

    for name, logits, target in inputs():
        arrays |= {f'{name}/logits': logits, f'{name}/target': target}
        x, y = torch.tensor(logits, requires_grad=True), torch.tensor(target)
        for b in (False, True):
            for kind, loss in losses(b).items(): record(f'{name}/{kind}{int(b)}', loss, x, y)
        arrays[f'{name}/ce/value'] = arrays[f'{name}/ce0/value']

    with_ignored(record, arrays)
    arrays |= {f'transition/{epoch}': w for epoch, w in transition().items()} | {f'odd/{k}': np.float64(v) for k, v in odd().items()}
    rng = np.random.default_rng(SEED + 1)
    xs, ys = [], []
    for i, shape in enumerate(((4, 8, 8), (4, 4, 4), (2, 2, 2))):
        arrays[f'deep/logits{i}'] = rng.normal(0, 2, (2, 3, *shape)).astype(np.float32)
        arrays[f'deep/target{i}'] = rng.integers(0, 3, (2, 1, *shape)).astype(np.float32)
        xs.append(torch.tensor(arrays[f'deep/logits{i}'], requires_grad=True)); ys.append(torch.tensor(arrays[f'deep/target{i}']))
    value = MultipleOutputLoss2(DC_and_CE_loss({'batch_dice': False, 'smooth': 1e-5, 'do_bg': False}, {}), arrays['weights/3'])(xs, ys)
    value.backward()
    arrays['deep/value'] = value.detach().numpy()
    arrays |= {f'deep/gradient{i}': x.grad.numpy() for i, x in enumerate(xs) if x.grad is not None}
    about = dict(command='python tests/record/51_loss.py', seed=SEED,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}})
    np.savez_compressed(OUT, **arrays, about=json.dumps(about))
    print(OUT.name, OUT.stat().st_size, 'bytes')


if __name__ == '__main__': main()
