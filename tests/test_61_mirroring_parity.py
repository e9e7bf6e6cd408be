"Mean probabilities over mirror images equal nnU-Net 1.7.1's (recorded by tests/record/61_mirroring.py)."
import json
from types import SimpleNamespace
import numpy as np
import pytest, torch
from segnb.mirroring import mirror_combinations, predict_mirrored
from segnb.network import build_unet, v1_key_map
from segnb.viewer import recorded

ARRAYS = recorded('61_mirroring.npz')
SETTINGS = json.loads(str(ARRAYS['settings']))

@pytest.fixture(scope='module')
def network():
    "The small network with the recorded weights; it returns a list, as in training"
    net, names = build_unet(SimpleNamespace(**SETTINGS), SETTINGS['in_channels'], SETTINGS['n_outputs']), v1_key_map(2)
    net.load_state_dict({names[k[2:]]: torch.from_numpy(v) for k, v in ARRAYS.items() if k.startswith('w/')})
    return net.eval()

@pytest.mark.parametrize('name', [k[2:] for k in ARRAYS if k.startswith('p/')])
def test_probabilities_and_calls(network, name):
    axes, calls = () if name == 'none' else tuple(map(int, name)), []
    hook = network.register_forward_hook(lambda *a: calls.append(1))
    ours = predict_mirrored(network, torch.from_numpy(ARRAYS['x']), axes).numpy()
    hook.remove()
    theirs = ARRAYS[f'p/{name}']
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.max()
    assert len(calls) == len(mirror_combinations(axes)) == int(ARRAYS[f'calls/{name}'])
