"The U-Net computes what nnU-Net 1.7.1's does with the same weights (recorded by tests/record/50_network.py)."
from types import SimpleNamespace
import numpy as np
import pytest, torch
from segnb.network import build_unet, count_parameters, v1_key_map
from segnb.viewer import recorded

INFO, ARRAYS = recorded('50_network.json'), recorded('50_network.npz')

def relative(a, b): return np.abs(a - b).max()/np.abs(b).max()

def build(d, **kwargs): return build_unet(SimpleNamespace(**d), d['in_channels'], d['n_outputs'], **kwargs)

@pytest.fixture(params=list(INFO['networks']))
def case(request):
    "A small network with the recorder's weights, and its name"
    d = INFO['networks'][request.param]
    net, names, rng = build(d), v1_key_map(len(d['pool_op_kernel_sizes'])), np.random.default_rng(INFO['seed'])
    assert set(names) == set(d['weights']) and count_parameters(net) == d['parameters']
    net.load_state_dict({names[k]: torch.from_numpy(rng.normal(0, .3, shape).astype(np.float32)) for k, shape in d['weights'].items()})
    return request.param, net

def test_outputs(case):
    name, net = case
    with torch.no_grad(): ours = net(torch.from_numpy(ARRAYS[f'{name}/x']))
    assert len(ours) == len(net.decoder)
    for i, y in enumerate(ours): assert relative(y.numpy(), ARRAYS[f'{name}/y{i}']) <= 1e-4
    net.deep_supervision = False
    with torch.no_grad(): assert torch.equal(net(torch.from_numpy(ARRAYS[f'{name}/x'])), ours[0])

def test_input_gradient(case):
    name, net = case
    x = torch.from_numpy(ARRAYS[f'{name}/x']).requires_grad_()
    sum((y**2).mean() for y in net(x)).backward()
    assert relative(x.grad.numpy(), ARRAYS[f'{name}/grad_x']) <= 1e-4

@pytest.mark.parametrize('name', list(INFO['plans']))
def test_plans_of_real_data(name):
    d = INFO['plans'][name]
    net, names = build(d, generator=torch.Generator().manual_seed(50)), v1_key_map(len(d['pool_op_kernel_sizes']))
    assert count_parameters(net) == d['parameters']
    ours = net.state_dict()
    assert {names[k]: tuple(v['shape']) for k, v in d['tensors'].items()} == {k: tuple(v.shape) for k, v in ours.items()}
    for key, theirs in d['tensors'].items():
        tensor = ours[names[key]]
        if 'values' in theirs: assert sorted(set(tensor.tolist())) == theirs['values']  # biases 0, norms 1 and 0
        else: assert abs(float(tensor.std())/theirs['sd'] - 1) < 8/tensor.numel()**.5  # the spread of a random draw
