"""Pooling, kernels and memory estimate beside nnU-Net 1.7.1 (recorded by tests/record/23_topology.py)."""
from pathlib import Path

import numpy as np
import pytest

from segnb.topology import TopologyError, batch_size_3d, feature_map_voxels, fit_patch, initial_patch, pool_and_kernels

with np.load(Path(__file__).parent/'recorded'/'23_topology.npz') as file: RECORDED = {k: file[k] for k in file.files}


def rows(table): return [r.tolist() for r in table if r.any()]


def test_every_network_is_the_same():
    for i, (spacing, size) in enumerate(zip(RECORDED['spacing'], RECORDED['size'])):
        number, pools, kernels, padded, divisor = pool_and_kernels(spacing, size)
        where = f'network {i}: spacing {spacing}, patch {size}'
        assert number == RECORDED['number'][i].tolist() and divisor == RECORDED['divisor'][i].tolist(), where
        assert pools == rows(RECORDED['pools'][i]) and kernels == rows(RECORDED['kernels'][i]), where
        assert padded == RECORDED['padded'][i].tolist(), where


def test_every_memory_estimate_is_the_same():
    for i, padded in enumerate(RECORDED['padded']):
        ours = feature_map_voxels(padded, rows(RECORDED['pools'][i]), int(RECORDED['channels'][i]), int(RECORDED['outputs'][i]), int(RECORDED['features'][i]))
        assert ours == RECORDED['memory'][i], f'network {i}'


@pytest.mark.parametrize('seed', range(10))
def test_what_always_holds(seed):
    rng = np.random.default_rng(seed)
    spacing, size = rng.uniform(.3, 6, 3), rng.integers(2, 300, 3)
    number, pools, kernels, padded, divisor = pool_and_kernels(spacing, size)
    assert len(kernels) == len(pools) + 1 and kernels[-1] == [3, 3, 3]
    assert np.prod(pools, axis=0).tolist() == divisor == [2**n for n in number] if pools else divisor == [1, 1, 1]
    assert all(p % d == 0 and 0 <= p - s < d for p, s, d in zip(padded, size, divisor))
    assert all(p // d >= 4 for p, d, n in zip(padded, divisor, number) if n), 'no halved axis gets narrower than 4'
    assert pool_and_kernels(spacing * 8, size) == pool_and_kernels(spacing, size), 'only ratios of spacings count'
    order = rng.permutation(3)
    assert [pool_and_kernels(spacing[order], size[order])[i] for i in (0, 3, 4)] == [[v[a] for a in order] for v in (number, padded, divisor)]


def test_it_works_in_two_dimensions(): assert pool_and_kernels((1, 1), (56, 40))[0] == [3, 3]


def test_more_memory_never_means_less_patch():
    for median in [(96, 512, 512), (482, 512, 512), (138, 169, 138)]:
        voxels = [np.prod(fit_patch((2.5, .8, .8), median, 1, 3, reference=gb*520e6*32/30/8).patch_size) for gb in (1, 2, 4, 8, 16, 32, 64)]
        assert voxels == sorted(voxels)


def test_limits_are_kept():
    found = fit_patch((1, 1, 1), (138, 169, 138), 4, 4, base_num_features=16, max_patch_voxels=40*56*40)
    assert np.prod(found.patch_size) <= 89600 and found.steps[-1].memory == found.memory
    assert all(np.prod(s.patch_size) > 89600 for s in found.steps[:-1])
    assert batch_size_3d(1, 1e9, (8, 8, 8), (8, 8, 8), 10)[0] == 2, 'never more than a twentieth of the data set, but two'
    assert batch_size_3d(1e6, 1e9, (8, 8, 8), (64, 64, 64), 100, max_batch=2)[0] == 2


def test_refusals():
    with pytest.raises(TopologyError, match='as many positive numbers'): pool_and_kernels((1, 1), (5, 5, 5))
    with pytest.raises(TopologyError, match='as many positive numbers'): pool_and_kernels((1, 0, 1), (5, 5, 5))
    with pytest.raises(TopologyError, match='allow more memory'): fit_patch((1, 1, 1), (32, 32, 32), 1, 3, reference=10)
    assert initial_patch((1, 1, 1), (28, 48, 43)) == [28, 48, 43]
