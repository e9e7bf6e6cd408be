"""Record how nnU-Net 1.7.1 divides a batch among processes and what gradient its two processes get together, for the chapter on several processes.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/46_distributed.py
Writes tests/recorded/46_distributed.json: `shares`, per batch size and number of processes the [samples, share of forced patches] of each process
(nnUNetTrainerV2_DDP.set_batch_size_and_oversample), and `gradient`, of one weight per class on seeded inputs: from one process with
the ordinary loss, from its cross-entropy alone, and from two processes with nnUNetTrainerV2_DDP.compute_loss, averaged as DistributedDataParallel does.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import torch

OUT = Path(__file__).resolve().parents[1]/'recorded'/'46_distributed.json'
BATCHES, SIZES = (2, 3, 4, 5, 6, 8, 9, 10, 12, 16, 24, 50), (1, 2, 3, 4, 8)


def shares(batch, size):
    from nnunet.training.network_training.nnUNetTrainerV2_DDP import nnUNetTrainerV2_DDP
    found = []
    for rank in range(size):
        trainer = nnUNetTrainerV2_DDP.__new__(nnUNetTrainerV2_DDP)
        trainer.batch_size, trainer.oversample_foreground_percent, trainer.distribute_batch_size = batch, .33, True
        with mock.patch('torch.distributed.get_world_size', lambda: size), mock.patch('torch.distributed.get_rank', lambda: rank): trainer.set_batch_size_and_oversample()
        n, percent = int(trainer.batch_size), float(trainer.oversample_foreground_percent)
        found.append([n, n - min(n, round(n * (1 - percent))) if n > 0 else 0])
    return found


def inputs():
    "Four samples of one channel, three classes; the third class is in the last two only"
    draw = np.random.RandomState(0)
    x, y = draw.randn(4, 1, 4, 4, 4), draw.randint(0, 2, (4, 1, 4, 4, 4))
    y[2:, :, :2] = 2
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def logits(x, weight): return torch.cat([x * w for w in weight], 1)


def one_process():
    from nnunet.training.loss_functions.crossentropy import RobustCrossEntropyLoss
    from nnunet.training.loss_functions.dice_loss import DC_and_CE_loss
    x, y = inputs()
    found = {}
    for name, loss in (('one', DC_and_CE_loss({'batch_dice': True, 'smooth': 1e-5, 'do_bg': False}, {})), ('cross_entropy', lambda o, t: RobustCrossEntropyLoss()(o, t[:, 0].long()))):
        weight = torch.tensor([.1, .2, .3], requires_grad=True)
        value = loss(logits(x, weight), y)
        value.backward()
        found[name] = weight.grad.tolist()
        found[f'{name}_loss'] = value.item()
    return found


def one_of_two(rank, port, file):
    import torch.distributed as dist
    from nnunet.training.loss_functions.crossentropy import RobustCrossEntropyLoss
    from nnunet.training.network_training.nnUNetTrainerV2_DDP import nnUNetTrainerV2_DDP
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    trainer = nnUNetTrainerV2_DDP.__new__(nnUNetTrainerV2_DDP)
    trainer.batch_dice, trainer.ce_loss, trainer.ds_loss_weights = True, RobustCrossEntropyLoss(), [1.]
    x, y = inputs()
    weight = torch.tensor([.1, .2, .3], requires_grad=True)
    loss = trainer.compute_loss([logits(x[2*rank:2*rank + 2], weight)], [y[2*rank:2*rank + 2]])
    loss.backward()
    dist.all_reduce(weight.grad)
    if rank == 0: Path(file).write_text(json.dumps((weight.grad / 2).tolist()))
    dist.destroy_process_group()


def main():
    import socket
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    file = Path(tempfile.mkdtemp())/'gradient.json'
    torch.multiprocessing.spawn(one_of_two, (port, str(file)), nprocs=2)
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        found = {'shares': {f'{b} by {s}': shares(b, s) for b in BATCHES for s in SIZES}, 'gradient': one_process() | {'two': json.loads(file.read_text())}}
    about = {'command': 'python tests/record/46_distributed.py', 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch')}}}
    OUT.write_text(json.dumps(about | found) + '\n')
    print(OUT.name, OUT.stat().st_size, 'bytes')


if __name__ == '__main__': main()
