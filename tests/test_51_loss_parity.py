"Losses, their gradients and the weights equal nnU-Net 1.7.1's (recorded by tests/record/51_loss.py)."
import numpy as np
import pytest, torch
from segnb.loss import DeepSupervisionLoss, DiceCELoss, SoftDiceLoss, deep_supervision_weights
from segnb.viewer import recorded

ARRAYS = recorded('51_loss.npz')
LOSSES = {f'{name}{int(b)}': make(b) for b in (False, True) for name, make in (
    ('dice', SoftDiceLoss), ('dice_bg', lambda b: SoftDiceLoss(b, do_bg=True)), ('dice_ce', DiceCELoss))}

def relative(a, b): return np.abs(a - b).max()/np.abs(b).max()

@pytest.mark.parametrize('name', ['ordinary', 'confident', 'absent_class', 'only_background'])
@pytest.mark.parametrize('loss', list(LOSSES))
@pytest.mark.parametrize('dtype', [torch.float32, torch.int64, torch.uint8])
def test_value_and_gradient(name, loss, dtype):
    logits = torch.from_numpy(ARRAYS[f'{name}/logits']).requires_grad_()
    value = LOSSES[loss](logits, torch.from_numpy(ARRAYS[f'{name}/target']).to(dtype))
    value.backward()
    assert relative(value.detach().numpy(), ARRAYS[f'{name}/{loss}/value']) <= 1e-5
    assert relative(logits.grad.numpy(), ARRAYS[f'{name}/{loss}/gradient']) <= 1e-5

@pytest.mark.parametrize('n', range(1, 8))
def test_weights(n): assert np.allclose(deep_supervision_weights(n), ARRAYS[f'weights/{n}'], rtol=1e-12, atol=0)

def test_deep_supervision():
    logits = [torch.from_numpy(ARRAYS[f'deep/logits{i}']).requires_grad_() for i in range(3)]
    targets = [torch.from_numpy(ARRAYS[f'deep/target{i}']) for i in range(3)]
    value = DeepSupervisionLoss(DiceCELoss(False), deep_supervision_weights(3))(logits, targets)
    value.backward()
    assert relative(value.detach().numpy(), ARRAYS['deep/value']) <= 1e-5
    for i in range(2): assert relative(logits[i].grad.numpy(), ARRAYS[f'deep/gradient{i}']) <= 1e-5
    assert logits[2].grad is None and 'deep/gradient2' not in ARRAYS
