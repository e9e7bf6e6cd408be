"Windows, weights and probabilities equal what nnU-Net 1.7.1 computed (recorded by tests/record/62_sliding_window.py)."
from types import SimpleNamespace
import numpy as np
import pytest, torch
from segnb.network import build_unet, v1_key_map
from segnb.sliding_window import gaussian_importance, predict_sliding_window, sliding_steps
from segnb.viewer import recorded

INFO, ARRAYS = recorded('62_sliding_window.json'), recorded('62_sliding_window.npz')

def relative(a, b): return np.abs(a - b).max()/np.abs(b).max()

@pytest.fixture(scope='module')
def network():
    "The plain U-Net with the weights that the recorder drew"
    configuration = SimpleNamespace(base_num_features=INFO['base_num_features'], max_num_features=320, num_pool_per_axis=(1, 2, 2),
                                    pool_op_kernel_sizes=INFO['pools'], conv_kernel_sizes=INFO['kernels'])
    net = build_unet(configuration, 2, 3, deep_supervision=False)
    rng, names = np.random.default_rng(INFO['seed']), v1_key_map(len(INFO['pools']))
    drawn = {k: torch.from_numpy(rng.normal(0, .3, shape).astype(np.float32)) for k, shape in INFO['weights'].items()}
    net.load_state_dict({names[k]: v for k, v in drawn.items()})
    return net.eval()

def test_400_window_grids():
    assert len(INFO['steps']) == 400
    for case in INFO['steps']: assert sliding_steps(case['image_size'], case['patch_size'], case['step_size']) == case['steps'], case

@pytest.mark.parametrize('name', [k for k in ARRAYS if k.startswith('gaussian_')])
def test_gaussian(name):
    theirs = ARRAYS[name]
    ours = gaussian_importance(theirs.shape)
    assert ours.dtype == theirs.dtype == np.float32
    assert relative(ours, theirs) <= 1e-7 and np.all(ours > 0) and np.allclose(ours, theirs, rtol=1e-5, atol=0)

@pytest.mark.parametrize('name', list(INFO['images']))
def test_tiled_prediction(network, name):
    how, theirs = INFO['images'][name], ARRAYS['probabilities_' + name]
    ours = predict_sliding_window(network, ARRAYS['image_' + name], tuple(INFO['patch']), 3, how['step_size'], tuple(how['mirror_axes']))
    assert ours.shape == theirs.shape and relative(ours, theirs) <= 1e-4
