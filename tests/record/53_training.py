"""Record what nnU-Net 1.7.1's trainer does with given numbers and batches, for the parity checks of the training chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/53_training.py
Writes tests/recorded/53_training.json: `poly_lr` (per length of a run, the rate of every epoch), `average` (metrics of
epochs, their moving average, the epochs whose checkpoint was saved as best), `patch_dice` (counts and Dice of batches),
`weights` (of deep supervision), and the losses of five steps. tests/recorded/53_training.npz: the network's weights
before (`w0/`), after one (`w1/`) and five (`w5/`) calls of nnUNetTrainerV2.run_iteration, after one more whose loss is
multiplied by 1000 so that the gradient is clipped (`clipped/`, three tensors), and the batches and logits they had.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import torch

SEED = 53
OUT = Path(__file__).resolve().parents[1]/'recorded'
NETWORK = dict(in_channels=1, n_outputs=3, base_num_features=2, max_num_features=8, batch_dice=False,
               pool_op_kernel_sizes=[[1, 2, 2], [2, 2, 2], [2, 2, 2]], conv_kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]])
SHAPE, STEPS = (8, 16, 16), 5
CLIPPED = ('conv_blocks_context.0.blocks.0.conv.weight', 'conv_blocks_context.3.1.blocks.0.conv.weight', 'seg_outputs.2.weight')


def bare_trainer():
    "A trainer without plans or data, for the methods that need neither"
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2
    t = nnUNetTrainerV2.__new__(nnUNetTrainerV2)
    t.print_to_log_file = lambda *a, **k: None
    t.online_eval_foreground_dc, t.online_eval_tp, t.online_eval_fp, t.online_eval_fn, t.all_val_eval_metrics = [], [], [], [], []
    return t


def average(metrics):
    "Moving average of the metric, and when it is called best"
    t, saved, averages = bare_trainer(), [], []
    t.val_eval_criterion_MA, t.val_eval_criterion_alpha, t.best_val_eval_criterion_MA = None, .9, None
    t.patience, t.train_loss_MA, t.best_MA_tr_loss_for_patience, t.best_epoch_based_on_MA_tr_loss, t.train_loss_MA_eps = None, 0, None, None, 5e-4
    t.patience, t.save_best_checkpoint, t.output_folder = 50, True, ''
    t.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], .01)
    t.save_checkpoint = lambda *a, **k: saved.append(t.epoch)
    for t.epoch, metric in enumerate(metrics):
        t.all_val_eval_metrics.append(metric)
        t.update_eval_criterion_MA()
        t.manage_patience()
        averages.append(float(t.val_eval_criterion_MA))
    return {'metrics': list(metrics), 'averages': averages, 'best_saved': saved}


def patch_dice(rng):
    "Counts of three batches; the last class never occurs"
    t, batches = bare_trainer(), []
    t.online_eval_foreground_dc, arrays = [], {}
    for i in range(3):
        logits = rng.normal(size=(2, 4, 3, 4, 5)).astype(np.float32)
        logits[:, 3] -= 100
        target = rng.integers(0, 3, (2, 1, 3, 4, 5)).astype(np.float32)
        arrays |= {f'logits{i}': logits, f'target{i}': target.astype(np.uint8)}
        t.run_online_evaluation([torch.from_numpy(logits)], [torch.from_numpy(target)])
        batches.append({k: [float(v) for v in getattr(t, f'online_eval_{k}')[-1]] for k in ('tp', 'fp', 'fn')})
    with np.errstate(invalid='ignore'): t.finish_online_evaluation()
    return {'batches': batches, 'mean': float(t.all_val_eval_metrics[-1])}, arrays


def trainer_of_steps():
    "A trainer with the network, optimiser and loss that nnUNetTrainerV2 makes for this configuration"
    from nnunet.training.loss_functions.deep_supervision import MultipleOutputLoss2
    from nnunet.training.loss_functions.dice_loss import DC_and_CE_loss
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    Generic_UNet.MAX_NUM_FILTERS_3D = NETWORK['max_num_features'] # small files
    t = bare_trainer()
    t.threeD, t.num_input_channels, t.base_num_features, t.num_classes = True, NETWORK['in_channels'], NETWORK['base_num_features'], NETWORK['n_outputs']
    t.net_num_pool_op_kernel_sizes, t.net_conv_kernel_sizes, t.conv_per_stage = NETWORK['pool_op_kernel_sizes'], NETWORK['conv_kernel_sizes'], 2
    t.fp16, t.initial_lr, t.weight_decay = False, 1e-2, 3e-5
    t.initialize_network()
    t.initialize_optimizer_and_scheduler()
    n = len(NETWORK['pool_op_kernel_sizes'])
    weights = np.array([1 / 2**i for i in range(n)]) * [i == 0 or i < n - 1 for i in range(n)]
    t.ds_loss_weights = weights / weights.sum()
    t.loss = MultipleOutputLoss2(DC_and_CE_loss({'batch_dice': NETWORK['batch_dice'], 'smooth': 1e-5, 'do_bg': False}, {}), t.ds_loss_weights)
    return t


def batches(rng):
    "Batches whose labels can be seen in the image, with targets at every resolution"
    for _ in range(STEPS + 1):
        target = np.kron(rng.integers(0, 3, (2, 1, 2, 4, 4)), np.ones((1, 1, 4, 4, 4), int)).astype(np.uint8)
        data = (target + rng.normal(0, .5, target.shape)).astype(np.float16)
        yield data, [target, target[..., ::2, ::2], target[..., ::2, ::4, ::4]]


def main():
    rng = np.random.default_rng(SEED)
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        from nnunet.training.learning_rate.poly_lr import poly_lr
        metrics = np.concatenate([[0, 0], np.clip(np.linspace(.1, .8, 12) + rng.normal(0, .1, 12), 0, 1), [.8]*3, np.linspace(.7, .2, 4)])
        dice, arrays = patch_dice(rng)
        torch.manual_seed(SEED)
        t, losses = trainer_of_steps(), []
        arrays |= {f'w0/{k}': v.numpy().copy() for k, v in t.network.state_dict().items()}
        for i, (data, targets) in enumerate(batches(rng)):
            arrays |= {f'data{i}': data, **{f'target{i}_{s}': y for s, y in enumerate(targets)}}
            if i == STEPS:
                plain = t.loss
                t.loss = lambda x, y: 1000 * plain(x, y)
            batch = {'data': data.astype(np.float32), 'target': [y.astype(np.float32) for y in targets]}
            losses.append(float(t.run_iteration(iter([batch]), True, False)))
            if i in (0, STEPS - 1): arrays |= {f'w{i + 1}/{k}': v.numpy().copy() for k, v in t.network.state_dict().items()}
        arrays |= {f'clipped/{k}': t.network.state_dict()[k].numpy() for k in CLIPPED}
    group = {k: v for k, v in t.optimizer.param_groups[0].items() if k in ('lr', 'momentum', 'weight_decay', 'nesterov', 'dampening')}
    about = {'command': 'python tests/record/53_training.py', 'seed': SEED, 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}}}
    np.savez_compressed(OUT/'53_training.npz', **arrays, about=json.dumps(about))
    values = {'poly_lr': {str(n): [poly_lr(e, n, 1e-2, .9) for e in range(n + 1)] for n in (7, 50, 1000)}, 'average': average([float(m) for m in metrics]),
              'patch_dice': dice, 'weights': t.ds_loss_weights.tolist(), 'losses': losses, 'optimizer': group, 'network': NETWORK}
    (OUT/'53_training.json').write_text(json.dumps(about | values) + '\n')
    for f in ('53_training.npz', '53_training.json'): print(f, (OUT/f).stat().st_size, 'bytes')


if __name__ == '__main__': main()
