"""Record nnU-Net 1.7.1's optimisers, steps and learning rates, for the parity checks of the optimisation chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/45_optimization.py
Writes tests/recorded/45_optimization.npz: a network of two convolutions (`NETWORK`, made by `torch.nn.Sequential`) before
(`w0/`) and after one, five and six calls of nnUNetTrainerV2.run_iteration (`sgd1/`, `sgd5/`, `sgd6/`; the sixth with the
loss times 1000, so that the gradient is clipped), the same for the optimiser of nnUNetTrainerV2_Adam (`adam1/` ...), and
the batches. tests/recorded/45_optimization.json: the losses, the settings of both optimisers, and `rates`: per schedule
the learning rate with which every epoch runs (`poly`, `fixed`, `warmup`, `plateau` with the losses it was told).
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import torch

SEED, STEPS, EPOCHS = 45, 6, 1000
OUT = Path(__file__).resolve().parents[1]/'recorded'


def trainer(kind, epochs=EPOCHS):
    "A trainer without plans or data"
    t = kind.__new__(kind)
    t.print_to_log_file = lambda *a, **k: None
    t.network, t.initial_lr, t.weight_decay, t.fp16, t.epoch, t.max_num_epochs = network(), 1e-2, 3e-5, False, 0, epochs
    t.lr_scheduler_eps, t.lr_scheduler_patience, t.train_loss_MA, t.train_loss_MA_alpha, t.all_tr_losses = 1e-3, 30, None, .93, []
    t.initialize_optimizer_and_scheduler()
    return t


def network():
    torch.manual_seed(SEED)
    return torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.LeakyReLU(.01), torch.nn.Conv3d(4, 3, 1))


def batches():
    rng = np.random.default_rng(SEED)
    for _ in range(STEPS):
        target = np.kron(rng.integers(0, 3, (2, 2, 2, 2)), np.ones((1, 4, 4, 4), int)).astype(np.uint8)
        yield (target[:, None] + rng.normal(0, .5, (2, 1, 8, 8, 8))).astype(np.float16), target


def steps(kind, name, arrays):
    "Weights after one, five and six steps"
    t, losses = trainer(kind), []
    for i, (data, target) in enumerate(batches()):
        factor = 1000 if i == STEPS - 1 else 1
        t.loss = lambda x, y: factor * torch.nn.functional.cross_entropy(x, y.long())
        losses.append(float(t.run_iteration(iter([{'data': data.astype(np.float32), 'target': target}]), True, False)))
        if i in (0, 4, 5): arrays |= {f'{name}{i + 1}/{k}': v.numpy().copy() for k, v in t.network.state_dict().items()}
    known = ('lr', 'momentum', 'weight_decay', 'nesterov', 'dampening', 'betas', 'eps', 'amsgrad')
    return {'losses': losses, 'settings': {k: v for k, v in t.optimizer.param_groups[0].items() if k in known}}


def rates(t, told=None):
    "The rate every epoch runs with, as run_training asks for it: before the first epoch, and at the end of each for the next"
    found = []
    if told is None: t.maybe_update_lr(0)
    for t.epoch in range(t.max_num_epochs):
        found.append(t.optimizer.param_groups[0]['lr'])
        if told is not None:
            t.all_tr_losses.append(told[t.epoch])
            t.update_train_loss_MA()
        t.maybe_update_lr()
    return found


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2
        import nnunet.training.network_training.nnUNet_variants.optimizer_and_lr as variants
        from importlib import import_module
        variant = lambda name: getattr(import_module(f'{variants.__name__}.{name}'), name)
        plateau = variant('nnUNetTrainerV2_SGD_ReduceOnPlateau')
        reduce = torch.optim.lr_scheduler.ReduceLROnPlateau
        import torch.optim.lr_scheduler as module
        module.ReduceLROnPlateau = type('ReduceLROnPlateau', (reduce,), {'__init__': lambda self, *a, verbose=None, **k: reduce.__init__(self, *a, **k)})
        rng, arrays = np.random.default_rng(SEED), {}
        told = (np.maximum(-.6, np.exp(-np.arange(300)/40) - .9) + rng.normal(0, .02, 300)).round(4).tolist()
        values = {'sgd': steps(nnUNetTrainerV2, 'sgd', arrays), 'adam': steps(variant('nnUNetTrainerV2_Adam'), 'adam', arrays),
                  'rates': {'poly': rates(trainer(nnUNetTrainerV2)), 'fixed': rates(trainer(variant('nnUNetTrainerV2_SGD_fixedSchedule'))),
                            'warmup': rates(trainer(variant('nnUNetTrainerV2_warmup'), 1050)), 'plateau': rates(trainer(plateau, 300), told), 'plateau_told': told}}
    for i, (data, target) in enumerate(batches()): arrays |= {f'data{i}': data, f'target{i}': target}
    arrays |= {f'w0/{k}': v.numpy() for k, v in network().state_dict().items()}
    about = {'command': 'python tests/record/45_optimization.py', 'seed': SEED, 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}}}
    np.savez_compressed(OUT/'45_optimization.npz', **arrays, about=json.dumps(about))
    (OUT/'45_optimization.json').write_text(json.dumps(about | values) + '\n')
    for f in ('45_optimization.npz', '45_optimization.json'): print(f, (OUT/f).stat().st_size, 'bytes')


if __name__ == '__main__': main()
