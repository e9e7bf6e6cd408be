"""The networks of nnU-Net v2 with its weights, against what it answers."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segnb.network import build_network, v2_key_map

recorded = np.load(Path(__file__).parent/'recorded'/'v2_network.npz')
about = json.loads(str(recorded['about']))


def configuration(d):
    return SimpleNamespace(pool_op_kernel_sizes=d['pools'], conv_kernel_sizes=d['kernels'], base_num_features=4, max_num_features=d.get('cap', 12),
                           architecture='residual_v2' if d.get('residual') else 'plain_v2', blocks_per_stage_encoder=d['down'],
                           blocks_per_stage_decoder=d['up'], network_options={'bias': d.get('bias', True), 'norm': d.get('norm', 'instance')})


@pytest.mark.parametrize('name', about['networks'])
def test_same_logits(name):
    d, rng = about['networks'][name], np.random.default_rng(about['seed'])
    c = configuration(d)
    network, names = build_network(c, 2, 3).eval(), v2_key_map(c)
    assert set(names) == set(d['names']), set(names) ^ set(d['names'])
    assert sum(p.numel() for p in network.parameters()) == d['parameters']
    state = network.state_dict()
    for key, shape in d['weights'].items():
        drawn = rng.normal(0, .3, shape).astype(np.float32)
        assert list(state[names[key]].shape) == shape, key
        state[names[key]] = torch.from_numpy(np.abs(drawn) + .5 if key.endswith('running_var') else drawn)
    network.load_state_dict(state)
    x = np.random.default_rng(1).normal(size=(2, 2, *d['shape'])).astype(np.float32)
    with torch.inference_mode(): ys = network(torch.from_numpy(x))
    for i, y in enumerate(ys):
        theirs = recorded[f'{name}/y{i}']
        np.testing.assert_allclose(y.numpy(), theirs, atol=2e-5 * np.abs(theirs).max())


def test_starts_like_v2():
    "every residual block starts as the way past it, and a new start makes it so again"
    from segnb.network import PooledBlock, initialize
    network = build_network(configuration(about['networks']['residual']), 2, 3)
    for _ in range(2):
        blocks = [m for m in network.modules() if isinstance(m, PooledBlock)]
        assert blocks and all(float(b.second.norm.weight.detach().abs().max()) == 0 for b in blocks)
        torch.nn.init.ones_(blocks[0].second.norm.weight)
        initialize(network)
