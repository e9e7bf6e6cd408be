"Options of the networks: compiled and half precision steps, one-voxel bottlenecks, starting weights of every layer."
from types import SimpleNamespace
import pytest, torch
from torch import nn
from segnb.network import NetworkError, build_network, build_residual_unet, build_unet, find_factory, make_network

def plan(axes=3, levels=3, **more):
    return SimpleNamespace(base_num_features=8, max_num_features=16, pool_op_kernel_sizes=[[2]*axes]*(levels - 1), conv_kernel_sizes=[[3]*axes]*levels, **more)

def build(make, *args, **options): return make(plan(*args), 1, 3, generator=torch.Generator().manual_seed(0), **options)

def step(net, x):
    ys = net(x)
    sum((y.float()**2).mean() for y in ys).backward()
    return [y.detach() for y in ys], [p.grad for p in net.parameters()]

def difference(a, b): return max(float((p - q).abs().max()) for p, q in zip(a, b))/max(float(q.abs().max()) for q in b)

@pytest.mark.parametrize('make', [build_unet, build_residual_unet])
@pytest.mark.parametrize('channels_last', [False, True])
def test_compiled(make, channels_last):
    "Graphs and their gradients as torch.compile takes them, without the C++ at the end"
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    usual, compiled = build(make, 3, 2), build(make, 3, 2, channels_last=channels_last)
    compiled.compile(backend='aot_eager')
    (y, g), (y2, g2) = step(usual, x), step(compiled, x)
    assert difference(y2, y) < 1e-5 and difference(g2, g) < 1e-4
    assert list(compiled.state_dict()) == list(usual.state_dict())

@pytest.mark.parametrize('axes', [2, 3])
@pytest.mark.parametrize('norm', ['instance', 'batch', 'group', 'none'])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('batch', [1, 2])
def test_half_precision_step(axes, norm, channels_last, batch):
    x = torch.randn(batch, 1, *[8]*axes, generator=torch.Generator().manual_seed(1))
    y, g = step(build(build_unet, axes, norm=norm), x)
    with torch.autocast('cpu', torch.bfloat16): y2, g2 = step(build(build_unet, axes, norm=norm, channels_last=channels_last), x)
    assert y2[0].dtype is torch.bfloat16 and all(p.dtype is torch.float32 for p in g2)
    assert difference(y2, y) < .1 and all(torch.isfinite(p).all() for p in g2)

@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('depth', [1, 2, 3, 4])
def test_half_precision_weight_gradients_of_few_slices(depth, channels_last):
    "The bf16 kernel of the CPU library reads memory it has not written where a volume has two slices; poison that memory"
    x = torch.randn(1, 1, depth, 16, 16, generator=torch.Generator().manual_seed(1))
    flat = plan()
    flat.pool_op_kernel_sizes = [[1, 2, 2]]*2
    def gradients(half):
        net = build_unet(flat, 1, 3, norm='none', generator=torch.Generator().manual_seed(0), channels_last=channels_last)
        for size in (64, 1024, 20000, 400000): del_me = [torch.full((size,), float('nan')) for _ in range(4)]; del del_me
        with torch.autocast('cpu', torch.bfloat16, enabled=half): return step(net, x)[1]
    usual = gradients(False)
    for _ in range(5): assert difference(gradients(True), usual) < .1

@pytest.mark.parametrize('channels_last', [False, True])
def test_one_voxel_at_the_bottom(channels_last):
    x = torch.randn(2, 1, 4, 4, 4)
    with pytest.raises(NetworkError, match='a single voxel'): build(build_unet, channels_last=channels_last)(x)
    for norm in ('batch', 'group', 'none'): assert torch.isfinite(build(build_unet, norm=norm, channels_last=channels_last)(x)[0]).all()
    y, g = step(build(build_unet, channels_last=channels_last), torch.randn(1, 1, 4, 4, 8))  # two voxels, a batch of one
    assert all(torch.isfinite(p).all() for p in g)

@pytest.mark.parametrize('make', [build_unet, build_residual_unet])
@pytest.mark.parametrize('axes', [2, 3])
def test_weights_survive_every_option(make, axes):
    "One set of weights loads into the network with any of the speed options, and back"
    state = build(make, axes).state_dict()
    for options in (dict(checkpointing=True), dict(channels_last=True)):
        other = make(plan(axes), 1, 3, **options)
        other.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())

@pytest.mark.parametrize('make', [build_unet, build_residual_unet])
def test_starting_weights_layer_by_layer(make):
    "Every convolution has the spread of He for its inputs (transposed ones: as torch counts them), biases 0"
    wide = plan()
    wide.base_num_features = wide.max_num_features = 48
    for m in make(wide, 1, 3, generator=torch.Generator().manual_seed(0)).modules():
        if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)):
            inputs = m.weight[0].numel()
            expected = (2/(1 + .01**2)/inputs)**.5
            assert abs(float(m.weight.detach().std())/expected - 1) < 5/(2*m.weight.numel())**.5
            assert abs(float(m.weight.detach().mean())) < 5*expected/m.weight.numel()**.5
            assert m.bias is None or not m.bias.any()

def test_architecture_of_the_plan_chooses():
    assert type(build_network(plan(architecture='residual'), 1, 2)).__name__ == 'ResidualUNet'
    assert build_network(plan(), 2, 3, deep_supervision=False)(torch.randn(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


@pytest.mark.parametrize('build, words', [(lambda c, i, n, deep_supervision: torch.nn.LazyConv3d(n, 1), 'no size yet; found weight'),
                                          (lambda c, i, n, deep_supervision: torch.nn.Conv3d(i, n, 1, device='meta'), 'no numbers; found weight on the device meta')])
def test_networks_without_numbers_are_refused(build, words):
    with pytest.raises(NetworkError, match=words): make_network(build, None, 1, 2)


def test_a_file_that_ends_itself_is_refused(tmp_path):
    (tmp_path/'net.py').write_text('import sys\nsys.exit(3)\n')
    with pytest.raises(NetworkError, match='cannot be run; found SystemExit: 3'): find_factory(f'{tmp_path}/net.py:build')
