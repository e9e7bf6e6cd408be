"The window: slabs against a naive loop over random sizes, memory, folds, short memory, 2D, refusals."
import itertools, warnings
import numpy as np
import pytest, torch
from segnb.image import SegnbError
from segnb.mirroring import predict_mirrored
from segnb.sliding_window import (SlidingWindowError, SlidingWindowWarning, _Passes, _Ring, _Windows, gaussian_importance, pad_to_patch,
                                  predict_sliding_window, sliding_steps, sliding_window_slabs)

def network(n_outputs=3, dims=3, seed=0):
    "One convolution: depends on the neighbours, quick"
    torch.manual_seed(seed)
    net = (torch.nn.Conv2d, torch.nn.Conv3d)[dims - 2](1, n_outputs, 3, padding=1)
    return torch.nn.Sequential(net).eval()

def naive(net, image, patch, n_outputs, step=.5, axes=(), regions=False, sigma=1/8):
    image, back = pad_to_patch(image, patch)
    corners = list(itertools.product(*sliding_steps(image.shape[1:], patch, step)))
    weight = gaussian_importance(patch, sigma) if len(corners) > 1 and sigma else np.ones(patch, np.float32)
    total, norm = np.zeros((n_outputs, *image.shape[1:])), np.zeros(image.shape[1:])
    for corner in corners:
        at = tuple(slice(s, s + p) for s, p in zip(corner, patch))
        p = predict_mirrored(net, torch.from_numpy(image[(slice(None), *at)].copy())[None], axes, regions)[0].numpy()
        total[(slice(None), *at)] += weight*p
        norm[at] += weight
    return (total/norm)[(slice(None), *back)]

def joined(slabs, length):
    "Slabs put together; they must be in order, without gaps, independent of each other"
    slabs, end = list(slabs), 0
    for start, p in slabs:
        assert start == end and p.flags.owndata or start == end and p.base is not None
        end += p.shape[1]
    assert end == length
    return np.concatenate([p for _, p in slabs], axis=1)

@pytest.mark.parametrize('seed', range(12))
def test_slabs_equal_the_naive_loop(seed):
    rng = np.random.default_rng(seed)
    patch = tuple(int(n) for n in rng.integers(2, 9, 3))
    shape = tuple(int(max(1, p + d)) for p, d in zip(patch, rng.integers(-2, 14, 3)))
    step, regions = float(rng.choice([.25, .5, .7, 1.])), bool(rng.integers(2))
    axes = tuple(int(a) for a in np.flatnonzero(rng.integers(0, 2, 3)))
    sigma, batch = (1/8, None)[int(rng.integers(2))], (None, 1, 2, 5)[int(rng.integers(4))]
    image, net = rng.normal(0, 1, (1, *shape)).astype(np.float32), network()
    expected = naive(net, image, patch, 3, step, axes, regions, sigma)
    options = dict(step_size=step, mirror_axes=axes, regions=regions, sigma_scale=sigma, batch_size=batch)
    assert np.abs(joined(sliding_window_slabs(net, image, patch, 3, **options), shape[0]) - expected).max() < 5e-6
    assert np.abs(predict_sliding_window(net, image, patch, 3, **options) - expected).max() < 5e-6

@pytest.mark.parametrize('seed', range(4))
def test_2d_is_slice_by_slice(seed):
    rng = np.random.default_rng(seed)
    image, net = rng.normal(0, 1, (1, 11, 13, 17)).astype(np.float32), network(dims=2)
    whole = joined(sliding_window_slabs(net, image, (8, 6), 3, mirror_axes=(0, 1)[:seed % 3], batch_size=(None, 3)[seed % 2]), 11)
    for z in (0, 5, 10): # a slice alone
        alone = predict_sliding_window(net, image[:, z:z + 1], (8, 6), 3, mirror_axes=(0, 1)[:seed % 3])
        assert np.abs(whole[:, z:z + 1] - alone).max() < 1e-6

def test_slabs_are_not_overwritten():
    image, net = np.random.default_rng(0).normal(0, 1, (1, 40, 9, 9)).astype(np.float32), network()
    kept = [(start, p, p.copy()) for start, p in sliding_window_slabs(net, image, (6, 6, 6), 3)]
    assert len(kept) > 5
    for _, p, copy in kept: assert np.array_equal(p, copy)

def test_the_ring_does_not_grow_with_the_image():
    rings = [_Ring(_Windows((length, 20, 20), (8, 10, 10), .5, 1/8), 5, False, 'cpu') for length in (20, 100, 1000)]
    assert {r.total.numel() for r in rings} == {5*8*400} and {r.inverse.numel() for r in rings} == {8*400}

def test_rows_of_one_window_wait_for_each_other():
    w = _Windows((100, 10, 10), (8, 10, 10), .5, 1/8, together=2)
    assert all(len(g) >= 2 for g in w.groups) and w.depth <= 8 + 2*4
    assert [s for g in w.groups for s in g] == w.starts[0]

def test_thick_slabs_are_cut(monkeypatch):
    monkeypatch.setattr(_Ring, 'SLAB', 3*9*9*4*2)
    image, net = np.random.default_rng(0).normal(0, 1, (1, 30, 9, 9)).astype(np.float32), network()
    slabs = list(sliding_window_slabs(net, image, (12, 9, 9), 3))
    assert max(p.shape[1] for _, p in slabs) == 2
    assert np.abs(joined(slabs, 30) - naive(net, image, (12, 9, 9), 3)).max() < 5e-6

class Folds:
    "Networks that come one after the other"
    def __init__(self, *networks): self.networks, self.turns = networks, 0
    def __len__(self): return len(self.networks)
    def __iter__(self):
        self.turns += 1
        return iter(self.networks)

def test_folds_are_averaged_row_by_row():
    nets, image = [network(seed=s) for s in range(3)], np.random.default_rng(0).normal(0, 1, (1, 20, 12, 12)).astype(np.float32)
    expected = np.mean([naive(n, image, (8, 8, 8), 3, axes=(0, 2)) for n in nets], axis=0)
    for several in (nets, tuple(nets), torch.nn.ModuleList(nets), Folds(*nets)):
        assert np.abs(predict_sliding_window(several, image, (8, 8, 8), 3, mirror_axes=(0, 2)) - expected).max() < 5e-6
    assert several.turns == 1 + len(sliding_steps((20,), (8,))[0])

def test_out_is_filled(tmp_path):
    image, net = np.random.default_rng(0).normal(0, 1, (1, 20, 12, 5)).astype(np.float32), network()
    out = np.lib.format.open_memmap(tmp_path/'p.npy', 'w+', np.float16, (3, 20, 12, 5))
    assert predict_sliding_window(net, image, (8, 8, 8), 3, out=out) is out
    assert np.abs(out - naive(net, image, (8, 8, 8), 3)).max() < 1e-3
    with pytest.raises(SlidingWindowError, match='another shape'): predict_sliding_window(net, image, (8, 8, 8), 3, out=np.zeros((3, 20, 12, 6)))

def test_an_image_from_disk_is_read_as_it_is(tmp_path):
    image, net = np.random.default_rng(0).normal(0, 1, (1, 20, 12, 12)).astype(np.float32), network()
    np.save(tmp_path/'x.npy', image)
    with warnings.catch_warnings():
        warnings.simplefilter('error') # a memory map may not be written to; nobody does
        mapped = predict_sliding_window(net, np.load(tmp_path/'x.npy', mmap_mode='r'), (8, 8, 8), 3, mirror_axes=(1,))
    assert np.array_equal(mapped, predict_sliding_window(net, image, (8, 8, 8), 3, mirror_axes=(1,)))

@pytest.mark.parametrize('threads', (1, 2, 3))
def test_threads_change_nothing(threads):
    image, net, before = np.random.default_rng(0).normal(0, 1, (1, 20, 12, 12)).astype(np.float32), network(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = predict_sliding_window(net, image, (16, 8, 8), 3)
    finally: torch.set_num_threads(before)
    assert np.abs(ours - naive(net, image, (16, 8, 8), 3)).max() < 5e-6

def test_sums_on_a_device_are_the_same():
    "The way of a graphics card, walked on the CPU"
    image, net, w = np.random.default_rng(0).normal(0, 1, (1, 20, 12, 12)).astype(np.float32), network(), None
    class There(_Ring):
        def add(self, logits, jobs, pool=None): self.add_on_device(logits, jobs)
    import segnb.sliding_window as module
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, '_Ring', There)
        ours = joined(sliding_window_slabs(net, image, (8, 8, 8), 3, mirror_axes=(0, 1, 2), batch_size=3), 20)
    assert np.abs(ours - naive(net, image, (8, 8, 8), 3, axes=(0, 1, 2))).max() < 5e-6

def test_short_memory_halves_the_batch():
    net, image, seen = network(), np.random.default_rng(0).normal(0, 1, (1, 20, 12, 12)).astype(np.float32), []
    def small(x):
        seen.append(len(x))
        if len(x) > 1: raise torch.cuda.OutOfMemoryError('small')
        return net(x)
    with pytest.warns(SlidingWindowWarning, match='1 at a time') as said:
        ours = predict_sliding_window(small, image, (8, 8, 8), 3, mirror_axes=(0,), batch_size=4)
    assert np.abs(ours - naive(net, image, (8, 8, 8), 3, axes=(0,))).max() < 5e-6
    assert seen[:3] == [4, 2, 1] and set(seen[2:]) == {1} and len(said) == 2

def test_short_memory_moves_the_sums():
    "One window does not fit beside the sums, but without them"
    passes, moved = _Passes(torch.device('cpu'), 'fp32', 1, False, 3), []
    class Elsewhere:
        total = torch.empty(1, device='meta')
        def to_cpu(self): moved.append(True)
    with pytest.warns(SlidingWindowWarning, match='sums move to the memory of the CPU'): passes.shrink(Elsewhere(), RuntimeError('full'))
    assert moved

def test_no_memory_at_all_is_refused():
    def none(x): raise torch.cuda.OutOfMemoryError('no memory')
    with pytest.raises(SlidingWindowError, match='does not fit'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        predict_sliding_window(none, np.zeros((1, 9, 9, 9), np.float32), (8, 8, 8), 3)

@pytest.mark.parametrize('regions', (False, True))
def test_extreme_logits(regions):
    "Sure answers stay probabilities; numbers that are not finite are refused"
    image = np.random.default_rng(0).normal(0, 1, (1, 9, 9, 9)).astype(np.float32)
    p = predict_sliding_window(lambda x: torch.cat([x*1e4, -x*1e4, x*0], 1), image, (8, 8, 8), 3, regions=regions)
    assert np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 + 1e-6
    for bad in (float('nan'), float('inf')):
        with pytest.raises(SlidingWindowError, match='not finite'):
            predict_sliding_window(lambda x: torch.cat([x*0, x*0 + bad if not regions else x*float('nan'), x*0], 1), image, (8, 8, 8), 3, regions=regions)

def test_whole_image_is_padded_to_what_the_network_divides():
    sizes = []
    class Picky(torch.nn.Module):
        divisor = (2, 4, 8)
        def forward(self, x):
            sizes.append(tuple(x.shape[2:]))
            return torch.cat([x, -x], 1)
    image = np.random.default_rng(0).normal(0, 1, (1, 5, 9, 17)).astype(np.float32)
    p = predict_sliding_window(Picky(), image, (4, 4, 8), 2, whole_image=True)
    assert sizes == [(6, 12, 24)] and p.shape == (2, 5, 9, 17)
    assert np.abs(p - torch.from_numpy(np.concatenate([image, -image])).softmax(0).numpy()).max() < 1e-6

@pytest.mark.parametrize('change, words', [
    (dict(image=np.zeros((4, 4, 4), np.float32)), 'expected (C, Z, Y, X)'), (dict(patch_size=(4,)), 'two axes or three'), (dict(n_outputs=4), 'expected 4'),
    (dict(step_size=0.), 'step_size'), (dict(mirror_axes=(3,)), 'cannot be mirrored'), (dict(precision='fp8'), 'unknown precision'),
    (dict(batch_size=0), 'batch_size'), (dict(accumulate='disk'), 'unknown accumulate'), (dict(networks=[]), 'no network')])
def test_refusals_come_before_the_work(change, words):
    given = dict(networks=network(), image=np.zeros((1, 8, 8, 8), np.float32), patch_size=(4, 4, 4), n_outputs=3) | change
    with pytest.raises((SegnbError, ValueError)) as e:
        slabs = sliding_window_slabs(**given)
        if 'n_outputs' in change: next(slabs)
    assert words in str(e.value)

@pytest.mark.parametrize('change, words', [(dict(step_size=0), 'step_size cannot be used; found 0'), (dict(step_size=1.5), 'step_size cannot be used'),
    (dict(patch_size=(0, 4, 4)), 'of one voxel or more'), (dict(out=np.zeros((3, 6, 6, 6), np.uint8)), 'cannot hold probabilities; found uint8')])
def test_settings_that_cannot_be_meant_are_refused_at_once(change, words):
    with pytest.raises(SlidingWindowError, match=words): predict_sliding_window(None, np.zeros((1, 6, 6, 6), np.float32), **{'patch_size': (4, 4, 4), 'n_outputs': 3, **change})

def test_a_hole_in_the_image_is_asked_for_first():
    image = np.zeros((1, 6, 6, 6), np.float32)
    image[0, 3, 3, 3] = np.nan
    with pytest.raises(SlidingWindowError, match='not finite.*look for NaN in the image'): predict_sliding_window(network(), image, (4, 4, 4), 3)
