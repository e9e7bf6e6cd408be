"The U-Nets compute what nnU-Net 1.7.1's do with the same weights (recorded by tests/record/50_network.py)."
from types import SimpleNamespace
import numpy as np
import pytest, torch
from segnb.network import build_network, count_parameters, v1_key_map, v1_residual_key_map
from segnb.viewer import recorded

INFO, ARRAYS = recorded('50_network.json'), recorded('50_network.npz')

def relative(a, b): return np.abs(a - b).max()/np.abs(b).max()

def configuration(d): return SimpleNamespace(**{'architecture': 'plain', **d})

def build(d, **kwargs): return build_network(configuration(d), d['in_channels'], d['n_outputs'], **d['options'], **kwargs)

def key_map(d):
    options = {k: v for k, v in d['options'].items() if k != 'activation'}
    if d.get('architecture') == 'residual': return v1_residual_key_map(configuration(d), **options)
    return v1_key_map(len(d['pool_op_kernel_sizes']), **options)

@pytest.fixture(params=list(INFO['networks']))
def case(request):
    "A small network with the recorder's weights, its name, and the tensors in the order of the original"
    d = INFO['networks'][request.param]
    net, names, rng = build(d), key_map(d), np.random.default_rng(INFO['seed'])
    state = {names[k]: torch.from_numpy(rng.normal(0, .3, shape).astype(np.float32)) for k, shape in d['weights'].items()}
    assert set(state) == {k for k, _ in net.named_parameters()} and count_parameters(net) == d['parameters']
    assert set(net.state_dict()) == {names[k] for k in d['names']}  # buffers of batch normalisation too
    net.load_state_dict(net.state_dict() | state)
    return request.param, net, list(state)

def test_outputs_and_gradients(case):
    name, net, order = case
    x = torch.from_numpy(ARRAYS[f'{name}/x']).requires_grad_()
    ours = net(x)
    assert len(ours) == len(net.decoder)
    for i, y in enumerate(ours): assert relative(y.detach().numpy(), ARRAYS[f'{name}/y{i}']) <= 1e-4
    sum((y**2).mean() for y in ours).backward()
    assert relative(x.grad.numpy(), ARRAYS[f'{name}/grad_x']) <= 1e-4
    parameters, rng = dict(net.named_parameters()), np.random.default_rng(INFO['seed'] + 1)
    gradients = [parameters[k].grad.numpy().astype(float) for k in order]
    found = np.array([(np.linalg.norm(g), (g*rng.normal(0, 1, g.shape)).sum()) for g in gradients])
    assert relative(found, ARRAYS[f'{name}/gradients']) <= 1e-4

def test_evaluation(case):
    name, net, _ = case
    x = torch.from_numpy(ARRAYS[f'{name}/x'])
    with torch.no_grad():
        several = net(x)
        net.eval()
        net.deep_supervision = f'{name}/eval0' in ARRAYS
        if net.deep_supervision: # batch normalisation after one training pass
            for i, y in enumerate(net(x)): assert relative(y.numpy(), ARRAYS[f'{name}/eval{i}']) <= 1e-4
        else: assert torch.equal(net(x), several[0])

@pytest.mark.parametrize('name', list(INFO['plans']))
def test_plans_of_real_data(name):
    d = INFO['plans'][name]
    net, names = build(d, generator=torch.Generator().manual_seed(50)), key_map(d)
    assert count_parameters(net) == d['parameters']
    ours = net.state_dict()
    assert set(names) == set(d['names']) and set(ours) == set(names.values())
    assert {names[k]: tuple(v['shape']) for k, v in d['tensors'].items()} == {k: tuple(v.shape) for k, v in ours.items()}
    for key, theirs in d['tensors'].items():
        tensor = ours[names[key]]
        if 'values' in theirs: assert sorted(set(tensor.tolist())) == theirs['values']  # biases 0, norms 1 and 0
        else: assert abs(float(tensor.std())/theirs['sd'] - 1) < 8/tensor.numel()**.5  # the spread of a random draw
