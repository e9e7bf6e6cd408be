"Windows, weights and probabilities equal what nnU-Net 1.7.1 computed (recorded by tests/record/62_sliding_window.py)."
from types import SimpleNamespace
import numpy as np
import pytest, torch
from segnb.network import build_unet, v1_key_map
from segnb.sliding_window import gaussian_importance, predict_sliding_window, sliding_steps, sliding_window_slabs
from segnb.viewer import recorded

INFO, ARRAYS = recorded('62_sliding_window.json'), recorded('62_sliding_window.npz')

def relative(a, b): return np.abs(a - b).max()/np.abs(b).max()

def build(dims):
    "The plain U-Net with the weights that the recorder drew"
    configuration = SimpleNamespace(base_num_features=INFO['base_num_features'], max_num_features=320, num_pool_per_axis=(1, 2, 2)[-dims:],
                                    pool_op_kernel_sizes=[p[-dims:] for p in INFO['pools']], conv_kernel_sizes=[k[-dims:] for k in INFO['kernels']])
    net = build_unet(configuration, 2, 3, deep_supervision=False)
    rng, names = np.random.default_rng(INFO['seed']), v1_key_map(len(INFO['pools']))
    drawn = {k: torch.from_numpy(rng.normal(0, .3, shape).astype(np.float32)) for k, shape in INFO['weights'][str(dims)].items()}
    net.load_state_dict({names[k]: v for k, v in drawn.items()})
    return net.eval()

@pytest.fixture(scope='module')
def networks(): return {dims: build(dims) for dims in (2, 3)}

def asked(name):
    "Image, patch and options of a recorded prediction"
    how = INFO['images'][name]
    image = np.random.default_rng([INFO['seed'], len(name)]).normal(0, 1, how['shape']).astype(np.float32)
    dims = 2 if '2d' in how['how'] else 3
    return dims, image, tuple(INFO['patch'][-dims:]), dict(step_size=how['step_size'], mirror_axes=tuple(how['mirror_axes']),
                                                           regions='regions' in how['how'], whole_image='whole' in how['how'])

def test_1000_window_grids():
    "Integers are equal"
    starts, sizes = iter(ARRAYS['steps_starts'].tolist()), ARRAYS['steps_asked']
    assert len(sizes) == 1000
    for case, counts in zip(sizes, ARRAYS['steps_counts']):
        patch, image = case[:3].astype(int), case[3:6].astype(int)
        assert sliding_steps(tuple(image), tuple(patch), case[6]) == [[next(starts) for _ in range(n)] for n in counts], case
    assert next(starts, None) is None

@pytest.mark.parametrize('name', [k for k in ARRAYS if k.startswith('gaussian_')])
def test_gaussian(name):
    theirs = ARRAYS[name]
    ours = gaussian_importance(theirs.shape)
    assert ours.dtype == theirs.dtype == np.float32
    assert relative(ours, theirs) <= 1e-7 and np.all(ours > 0) and np.allclose(ours, theirs, rtol=1e-5, atol=0)

@pytest.mark.parametrize('name', list(INFO['images']))
def test_tiled_prediction(networks, name):
    (dims, image, patch, options), theirs = asked(name), ARRAYS['probabilities_' + name]
    ours = predict_sliding_window(networks[dims], image, patch, 3, **options)
    assert ours.shape == theirs.shape and relative(ours, theirs) <= 1e-4

@pytest.mark.parametrize('name', list(INFO['images']))
def test_slabs(networks, name):
    "In order, every plane once, and what the original says; the batch does not matter"
    (dims, image, patch, options), theirs = asked(name), ARRAYS['probabilities_' + name]
    end = 0
    for start, p in sliding_window_slabs(networks[dims], image, patch, 3, batch_size=3, **options):
        assert start == end and p.dtype == np.float32 and p.shape[2:] == theirs.shape[2:]
        end += p.shape[1]
        assert np.abs(p - theirs[:, start:end]).max() <= 1e-4*theirs.max()
    assert end == image.shape[1]
