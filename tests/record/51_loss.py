"""Record nnU-Net 1.7.1's losses and their gradients on given logits, for the parity checks of the loss chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/51_loss.py
Writes tests/recorded/51_loss.npz: per input `<name>/logits`, `<name>/target`, and per loss and setting of batch_dice
(0, 1) `<name>/<loss><batch_dice>/value` and `/gradient`; `deep/...` the same for a list of three resolutions; and
`weights/<n>`, the weights nnUNetTrainerV2 gives n outputs.
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
        from nnunet.training.loss_functions.dice_loss import DC_and_CE_loss, SoftDiceLoss, softmax_helper
        from nnunet.training.loss_functions.crossentropy import RobustCrossEntropyLoss
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
            record(f'{name}/dice{int(b)}', SoftDiceLoss(softmax_helper, b, False, 1e-5), x, y)
            record(f'{name}/dice_bg{int(b)}', SoftDiceLoss(softmax_helper, b, True, 1e-5), x, y)
            record(f'{name}/dice_ce{int(b)}', DC_and_CE_loss({'batch_dice': b, 'smooth': 1e-5, 'do_bg': False}, {}), x, y)
        record(f'{name}/ce', RobustCrossEntropyLoss(), x, y)

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
