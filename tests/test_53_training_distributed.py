"""Several processes train one network: the curve of one process with the same batches, one writer, one error for all."""
import functools, json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from segnb.checkpoints import load_checkpoint
from segnb.network import build_network
from segnb.training import Trainer
from balls import make_task
from test_53_training_faults import SMALL, weights

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='needs torch.distributed with gloo')
LONG = dict(SMALL, iterations=10, val_iterations=2, epochs=2, precision='fp32')

SCRIPT = '''
import functools, json, sys, torch
from segnb.distributed import start_world
from segnb.network import build_network
from segnb.training import Trainer
torch.set_num_threads(1)
jobs, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
with start_world('cpu') as world:
    for task, model, activation, seed in jobs:
        losses = []
        class Curve:
            def on_batch(self, trainer, batch, loss): losses.append((loss, len(batch['keys'])))
        trainer = Trainer(task, model, callbacks=(Curve(),), network=functools.partial(build_network, activation=activation), seed=seed, **settings)
        trainer.fit()
        with open(f'{model}_{world.rank}.json', 'w') as f: json.dump({'losses': losses, 'sum': float(sum(w.double().sum() for w in trainer.net.state_dict().values()))}, f)
'''


def torchrun(script, *args, n=2):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', script, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHELASTIC_ERROR_FILE': ''}, timeout=300)


def train_alone(task, model, seed, network=build_network):
    "The same training in one process"
    losses = []
    class Curve:
        def on_batch(self, trainer, batch, loss): losses.append(loss)
    trainer = Trainer(task, model, callbacks=(Curve(),), network=network, seed=seed, **LONG)
    trainer.fit()
    trainer.losses = losses
    return trainer


def share_by_share(first, *args, **options):
    "The default network, which works off a batch in the shares that two processes would have"
    net = build_network(*args, **options)
    whole = net.forward
    def forward(x): return [torch.cat(parts) for parts in zip(whole(x[:first]), whole(x[first:]))]
    net.forward = forward
    return net


TASKS = {'even': dict(), 'uneven': dict(batch_size=3, batch_dice=True)} # batches of 2 and Dice a sample; batches of 3 and Dice of the batch
FIRST = {'even': 1, 'uneven': 2} # samples of the first process
SMOOTH = [('even', 0), ('even', 1), ('uneven', 0), ('uneven', 1)]
KINKED = [('even', 0), ('even', 1), ('even', 2)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "All trainings in two processes, one after the other"
    folder = tmp_path_factory.mktemp('ddp')
    for name, changes in TASKS.items(): make_task(folder/name, **changes)
    (folder/'run.py').write_text(SCRIPT)
    jobs = [(str(folder/name), str(folder/f'{name}_{seed}_{act}'), act, seed) for group, act in ((SMOOTH, 'gelu'), (KINKED, 'leaky_relu')) for name, seed in group]
    done = torchrun(folder/'run.py', json.dumps(jobs), json.dumps(LONG))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read_ranks(model): return [json.loads(Path(f'{model}_{k}.json').read_text()) for k in range(2)]


@pytest.mark.parametrize('name, seed', SMOOTH)
def test_two_processes_have_the_curve_of_one(runs, name, seed):
    "With a smooth activation. LeakyReLU has a kink: where a value lies within rounding of zero, its slope is 1 in the one and 0.01 in the other, and they part"
    alone, model = train_alone(runs/name, runs/f'one_{name}_{seed}', seed, functools.partial(build_network, activation='gelu')), runs/f'{name}_{seed}_gelu'
    ranks = read_ranks(model)
    for k, size in enumerate((FIRST[name], 1)):
        assert [n for _, n in ranks[k]['losses']] == [size]*20
        assert [loss for loss, _ in ranks[k]['losses']] == pytest.approx(alone.losses, abs=1e-5)
    assert ranks[0]['sum'] == ranks[1]['sum']
    two = load_checkpoint(model/'fold_0'/'checkpoint_final.pt')
    for a, b in zip(two['network'].values(), weights(alone)): assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(two['history'], alone.history, strict=True):
        for key in ('train_loss', 'val_loss'): assert mine[key] == pytest.approx(theirs[key], abs=1e-5), key
        for key in ('mean_dice', 'moving_dice'): assert mine[key] == pytest.approx(theirs[key], abs=2e-3), key # a voxel may fall to the other side


@pytest.mark.parametrize('name, seed', KINKED)
def test_two_processes_have_the_curve_of_one_that_computes_in_shares(runs, name, seed):
    "With the default network: where the sums are formed alike, kinks are met alike"
    alone = train_alone(runs/name, runs/f'shares_{name}_{seed}', seed, functools.partial(share_by_share, FIRST[name]))
    assert [loss for loss, _ in read_ranks(runs/f'{name}_{seed}_leaky_relu')[0]['losses']] == pytest.approx(alone.losses, abs=1e-5)


def test_one_process_writes(runs):
    fold = runs/'even_0_leaky_relu'/'fold_0'
    assert sorted(p.name for p in fold.iterdir()) == ['checkpoint_best.pt', 'checkpoint_final.pt', 'checkpoint_latest.pt', 'log.jsonl', 'log.txt', 'progress.png', 'record.json']
    assert len((fold/'log.jsonl').read_text().splitlines()) == 2 and (fold/'log.txt').read_text().count('epoch 0 ') == 1
    assert json.loads((fold/'record.json').read_text())['runs'][0]['settings']['processes'] == 2


def test_the_error_of_one_is_the_error_of_all(tmp_path):
    task = make_task(tmp_path/'Balls')
    script = SCRIPT.replace("losses.append((loss, len(batch['keys'])))", "losses.append((loss, 0)); assert world.main or len(losses) < 3, 'the second process fails'")
    (tmp_path/'run.py').write_text(script)
    done = torchrun(tmp_path/'run.py', json.dumps([(str(task), str(tmp_path/'m'), 'leaky_relu', 0)]), json.dumps(LONG))
    assert done.returncode != 0 and 'the second process fails' in done.stderr
    assert not (tmp_path/'m'/'fold_0'/'training.lock').exists()
    assert not (tmp_path/'m'/'fold_0'/'checkpoint_final.pt').exists()


def test_a_batch_that_cannot_be_shared(tmp_path):
    task = make_task(tmp_path/'Balls')
    (tmp_path/'run.py').write_text(SCRIPT)
    done = torchrun(tmp_path/'run.py', json.dumps([(str(task), str(tmp_path/'m'), 'leaky_relu', 0)]), json.dumps(LONG), n=3)
    assert done.returncode != 0 and 'the batch cannot be divided' in done.stderr and not (tmp_path/'m').exists()
