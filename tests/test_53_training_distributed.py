"""Several processes train one network: the curve of one process with the same batches, one writer, one error for all."""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from segnb.checkpoints import load_checkpoint
from segnb.training import Trainer
from test_53_training_faults import SMALL, make_task, weights

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='needs torch.distributed with gloo')
LONG = dict(SMALL, iterations=10, val_iterations=2, epochs=2, precision='fp32')

SCRIPT = '''
import json, sys, torch
from segnb.distributed import start_world
from segnb.training import Trainer
torch.set_num_threads(1)
jobs, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
with start_world('cpu') as world:
    for task, model, resume in jobs:
        losses = []
        class Curve:
            def on_batch(self, trainer, batch, loss): losses.append((loss, len(batch['keys'])))
        trainer = Trainer(task, model, callbacks=(Curve(),), **settings)
        if resume and world.main: print('going on', flush=True)
        trainer.resume() if resume else trainer.fit()
        with open(f'{model}_{world.rank}.json', 'w') as f: json.dump({'losses': losses, 'sum': float(sum(w.double().sum() for w in trainer.net.state_dict().values()))}, f)
'''


def torchrun(script, *args, n=2):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', script, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHELASTIC_ERROR_FILE': ''}, timeout=300)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two tasks (batches of 2 and Dice per sample; batches of 3 and Dice of the batch), in two processes and in one; the first one also interrupted"
    folder = tmp_path_factory.mktemp('ddp')
    tasks = {'even': make_task(folder/'pre'/'Even'), 'uneven': make_task(folder/'pre'/'Uneven', batch_size=3, batch_dice=True)}
    (folder/'run.py').write_text(SCRIPT)
    done = torchrun(folder/'run.py', json.dumps([(str(task), str(folder/f'two_{name}'), False) for name, task in tasks.items()]), json.dumps(LONG))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = {}
    for name, task in tasks.items():
        losses = []
        class Curve:
            def on_batch(self, trainer, batch, loss): losses.append(loss)
        alone[name] = Trainer(task, folder/f'one_{name}', callbacks=(Curve(),), **LONG)
        alone[name].fit()
        alone[name].losses = losses
    return folder, alone


@pytest.mark.parametrize('name', ['even', 'uneven'])
def test_two_processes_have_the_curve_of_one(runs, name):
    folder, alone = runs
    ranks = [json.loads((folder/f'two_{name}_{k}.json').read_text()) for k in range(2)]
    assert [size for _, size in ranks[0]['losses']] == [{'even': 1, 'uneven': 2}[name]]*20 and [size for _, size in ranks[1]['losses']] == [1]*20
    for k in range(2): assert [loss for loss, _ in ranks[k]['losses']] == pytest.approx(alone[name].losses, abs=1e-5)
    assert ranks[0]['sum'] == ranks[1]['sum']
    two = load_checkpoint(folder/f'two_{name}'/'fold_0'/'checkpoint_final.pt')
    for a, b in zip(two['network'].values(), weights(alone[name])): assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(two['history'], alone[name].history):
        for key in ('train_loss', 'val_loss', 'mean_dice', 'moving_dice'): assert mine[key] == pytest.approx(theirs[key], abs=2e-3), key


def test_one_process_writes(runs):
    folder, alone = runs
    fold = folder/'two_even'/'fold_0'
    assert sorted(p.name for p in fold.iterdir()) == sorted(p.name for p in alone['even'].folder.iterdir())
    assert len((fold/'log.jsonl').read_text().splitlines()) == 2 and (fold/'log.txt').read_text().count('epoch 0 ') == 1
    assert json.loads((fold/'record.json').read_text())['runs'][0]['settings']['processes'] == 2


def test_the_error_of_one_is_the_error_of_all(tmp_path):
    task = make_task(tmp_path/'Balls')
    script = SCRIPT.replace("losses.append((loss, len(batch['keys'])))", "losses.append((loss, 0)); assert world.main or len(losses) < 3, 'the second process fails'")
    (tmp_path/'run.py').write_text(script)
    done = torchrun(tmp_path/'run.py', json.dumps([(str(task), str(tmp_path/'m'), False)]), json.dumps(LONG))
    assert done.returncode != 0 and 'the second process fails' in done.stderr
    assert not (tmp_path/'m'/'fold_0'/'training.lock').exists()
    assert not (tmp_path/'m'/'fold_0'/'checkpoint_final.pt').exists()


def test_a_batch_that_cannot_be_shared(tmp_path):
    task = make_task(tmp_path/'Balls')
    (tmp_path/'run.py').write_text(SCRIPT)
    done = torchrun(tmp_path/'run.py', json.dumps([(str(task), str(tmp_path/'m'), False)]), json.dumps(LONG), n=3)
    assert done.returncode != 0 and 'the batch cannot be divided' in done.stderr and not (tmp_path/'m').exists()
