"""Training beside nnU-Net 1.7.1 (recorded by tests/record/53_training.py)."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segnb.loss import DeepSupervisionLoss, DiceCELoss, deep_supervision_weights
from segnb.network import build_unet, v1_key_map
from segnb.training import PatchDice, make_optimizer, moving_average, poly_lr, training_step

FOLDER = Path(__file__).parent/'recorded'
RECORDED = json.loads((FOLDER/'53_training.json').read_text())
with np.load(FOLDER/'53_training.npz') as file: ARRAYS = {k: file[k] for k in file.files}


def test_learning_rates_are_equal():
    for n, rates in RECORDED['poly_lr'].items():
        assert [poly_lr(e, int(n), 0.01) for e in range(int(n) + 1)] == rates


def test_moving_average_and_best():
    average = best = None
    for epoch, metric in enumerate(RECORDED['average']['metrics']):
        average = moving_average(average, metric)
        assert average == RECORDED['average']['averages'][epoch]
        improved = best is None or average > best
        if improved: best = average
        assert improved == (epoch in RECORDED['average']['best_saved'] or epoch == 0), 'the original never saves the first epoch'


def test_patch_dice():
    dice = PatchDice(4)
    for i, batch in enumerate(RECORDED['patch_dice']['batches']):
        one = PatchDice(4)
        for counter in (one, dice): counter.add(torch.from_numpy(ARRAYS[f'logits{i}']), torch.from_numpy(ARRAYS[f'target{i}']))
        assert one.tp.tolist() == batch['tp'] and one.fp.tolist() == batch['fp'] and one.fn.tolist() == batch['fn']
    assert np.isnan(dice.per_class()[2]), 'the last class never occurs'
    assert dice.mean() == pytest.approx(RECORDED['patch_dice']['mean'], rel=1e-12)


def test_deep_supervision_weights():
    assert deep_supervision_weights(3) == pytest.approx(RECORDED['weights'])


def differences(network, names, step):
    found = {names[k[len(step) + 1:]]: v for k, v in ARRAYS.items() if k.startswith(step + '/')}
    for name, theirs in found.items():
        ours, gap = network.state_dict()[name].numpy(), None
        gap = np.abs(ours - theirs).max()
        if name.endswith('conv.bias'): assert gap < 1e-6, name # their gradient is zero but for noise
        else: assert gap <= 1e-4 * np.abs(theirs).max(), name
    return len(found)


def test_weights_after_one_and_five_steps_and_a_clipped_one():
    plan = SimpleNamespace(**RECORDED['network'])
    network, names = build_unet(plan, 1, 3), v1_key_map(3)
    network.load_state_dict({names[k[3:]]: torch.from_numpy(v) for k, v in ARRAYS.items() if k.startswith('w0/')})
    optimizer = make_optimizer(network)
    assert {k: optimizer.param_groups[0][k] for k in RECORDED['optimizer']} == RECORDED['optimizer']
    loss = DeepSupervisionLoss(DiceCELoss(plan.batch_dice), deep_supervision_weights(3))
    for i, theirs in enumerate(RECORDED['losses']):
        criterion = loss if i < 5 else lambda x, y: 1000 * loss(x, y)
        data, targets = torch.from_numpy(ARRAYS[f'data{i}']).float(), [torch.from_numpy(ARRAYS[f'target{i}_{s}']) for s in range(3)]
        assert training_step(network, criterion, optimizer, data, targets) == pytest.approx(theirs, rel=1e-5)
        if i in (0, 4): assert differences(network, names, f'w{i + 1}') > 40
    assert differences(network, names, 'clipped') == 3
