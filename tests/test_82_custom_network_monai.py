"""Networks of MONAI in the standard trainer and predictor; our window attention beside MONAI's. Skipped where MONAI is not installed."""
import importlib.util

import numpy as np
import pytest
import torch

from segnb.custom_network import WindowAttention, build_monai, check_network, split_windows
from segnb.network import NetworkError
from segnb.planning import Plans
from segnb.prediction import Predictor
from segnb.training import Trainer
from balls import make_task
from test_53_training_faults import SMALL

torch.set_num_threads(1)
QUICK = SMALL | dict(epochs=1, iterations=2)
has_monai = pytest.mark.skipif(importlib.util.find_spec('monai') is None, reason='MONAI is not installed (pip install monai)')
DEEP = dict(patch_size=[32]*3, num_pool_per_axis=[3]*3, pool_op_kernel_sizes=[[1, 2, 2], [4, 2, 2], [2, 2, 2]], conv_kernel_sizes=[[1, 3, 3]] + [[3]*3]*3, base_num_features=4)


@pytest.fixture(scope='module')
def task(tmp_path_factory): return make_task(tmp_path_factory.mktemp('pre')/'Balls', **DEEP)


def test_without_monai_it_says_what_to_install(task, monkeypatch):
    import builtins
    true = builtins.__import__
    def without(name, *args, **how):
        if name.split('.')[0] == 'monai': raise ImportError('No module named monai')
        return true(name, *args, **how)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(NetworkError, match='MONAI is not installed.*pip install monai'): check_network(build_monai, Plans.load(task/'plans.json'))


@has_monai
@pytest.mark.parametrize('options, n', [(dict(network='DynUNet'), 3), (dict(network='UNet'), 1), (dict(network='SegResNet', init_filters=8), 1),
                                        (dict(network='SwinUNETR', window_size=2, depths=[1]*4, num_heads=[1]*4, norm_name='batch'), 1)], ids=lambda v: str(v)[:30])
def test_trained_saved_and_found_again(task, tmp_path, options, n):
    t = Trainer(task, tmp_path/'m'/'3d_fullres', network=build_monai, network_options=options, **QUICK)
    assert len(t.criterion.weights) == n
    t.fit()
    p = Predictor.from_folder(tmp_path/'m'/'3d_fullres', device='cpu', mirror=False)
    assert type(p.networks[0]).__name__ == options['network'] == type(t.net).__name__
    x = np.random.default_rng(0).normal(size=(1, 32, 36, 32)).astype(np.float32)
    assert p.predict(x, (1, 1, 1)).shape == (32, 36, 32)
    with torch.no_grad(): a, b = (n.eval()(torch.from_numpy(x[None, :, :, :32])) for n in (t.net, p.networks[0]))
    a = a[0] if isinstance(a, list) else a
    assert torch.allclose(a, b, atol=1e-5)


@has_monai
def test_what_monai_lacks_or_cannot_do_is_said(task):
    plans = Plans.load(task/'plans.json')
    with pytest.raises(NetworkError, match='no such network.*NoNet'): check_network(build_monai, plans, network='NoNet')
    with pytest.raises(NetworkError, match='cannot build'): check_network(build_monai, plans, network='UNet', colour='red')
    import dataclasses
    odd = dataclasses.replace(plans, configurations={'3d_fullres': dataclasses.replace(plans.configuration('3d_fullres'), patch_size=(24, 24, 24))})
    with pytest.raises(NetworkError, match='cannot take a batch of patches.*(24|32)'): check_network(build_monai, odd, network='SwinUNETR')


@has_monai
@pytest.mark.parametrize('window', [(2, 2, 2), (4, 3, 2)])
def test_attention_has_the_numbers_of_monai(window):
    from monai.networks.nets.swin_unetr import WindowAttention as Theirs, window_partition
    torch.manual_seed(0)
    grid = tuple(2 * w for w in window)
    theirs, ours, x = Theirs(12, 3, window, qkv_bias=True), WindowAttention(12, 3, window), torch.randn(2, *grid, 12)
    with torch.no_grad():
        theirs.relative_position_bias_table.normal_()
        ours.load_state_dict({'offsets': theirs.relative_position_bias_table, **{k: v for k, v in theirs.state_dict().items() if k.startswith(('qkv', 'proj'))}})
        parts = window_partition(x, window)
        assert torch.equal(parts, split_windows(x, window))
        assert torch.allclose(split_windows(ours(x), window), theirs(parts, None), atol=1e-5)
