"""Networks of one's own: through the trainer, prediction, validation and ensembles; their origin kept, found again, changed, lost, hostile."""
import dataclasses, functools, json, os, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segnb.callbacks import ExamplePages
from segnb.checkpoints import CheckpointError, load_checkpoint
from segnb.custom_network import SwinUNet, WindowAttention, build_swin_unet, check_network, stored_source
from segnb.ensembling import ensemble_probabilities
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.network import NetworkError, NetworkWarning, build_network, find_factory, network_from_origin, network_origin, output_shapes
from segnb.planning import Plans, plan_experiment
from segnb.prediction import PredictionError, Predictor
from segnb.preprocessing import preprocess_dataset
from segnb.probe import probe
from segnb.training import Trainer
from segnb.validation import validate_fold
from balls import REGIONS, make_task
from test_53_training_faults import SMALL

torch.set_num_threads(1)
QUICK = SMALL | dict(epochs=1, iterations=2)
SWIN = 'segnb.custom_network:build_swin_unet'
NET = """from segnb.network import build_unet
def build(configuration, in_channels, n_outputs, deep_supervision=True, activation='gelu'):
    return build_unet(configuration, in_channels, n_outputs, deep_supervision, activation=activation)
"""


def wide(task, name='3d_fullres', **changes):
    "Features that can be shared by heads"
    d = Plans.load(task/'plans.json').to_dict()
    d['configurations'][name] |= dict(base_num_features=8) | changes
    Plans.from_dict(d).save(task/'plans.json')
    return task


@pytest.fixture(scope='module')
def phantom(tmp_path_factory):
    "The phantom CT on a coarse grid"
    work, dataset = tmp_path_factory.mktemp('phantom'), Dataset(Path(__file__).resolve().parents[1]/'data_samples'/'Task101_PhantomCT')
    plans = plan_experiment(extract_fingerprint(dataset, n_workers=0), planner='cpu')
    coarse = dataclasses.replace(plans.configuration('3d_fullres'), spacing=(5, 6.4, 6.4), median_shape=(20, 15, 15), patch_size=(8, 16, 16), num_pool_per_axis=(1, 2, 2),
                                 pool_op_kernel_sizes=((1, 2, 2), (2, 2, 2)), conv_kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)), do_dummy_2d_data_aug=False, base_num_features=8)
    preprocess_dataset(dataset, dataclasses.replace(plans, configurations={'3d_fullres': coarse}), work/'Task101', n_workers=0)
    return work/'Task101'


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    return wide(make_task(tmp_path_factory.mktemp('pre')/'Balls'))


def train(task, model, configuration='3d_fullres', **how):
    t = Trainer(task, model, configuration, **QUICK | how)
    assert all(np.isfinite(row['train_loss']) for row in t.fit())
    return t


def answers(model, shape=(1, 24, 24, 24), **how):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).float()
    p = Predictor.from_folder(model, device='cpu', mirror=False, **how)
    with torch.no_grad(): return p, p.networks[0](x[None, ..., :16, :16, :16] if len(shape) == 4 else x[None, ..., :16, :16])


# Training ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('pools', [[[2, 2, 2]]*2, [[1, 2, 2], [2, 2, 2]], [[1, 2, 4], [2, 2, 1]], [[4, 1, 1], [1, 4, 4]]])
def test_swin_of_unequal_strides_trains_and_predicts(tmp_path, pools):
    halvings = [int(np.log2(n)) for n in np.prod(pools, axis=0)]
    task = wide(make_task(tmp_path/'Balls'), pool_op_kernel_sizes=pools, num_pool_per_axis=halvings)
    t = train(task, tmp_path/'m'/'3d_fullres', network=SWIN)
    assert isinstance(t.net, SwinUNet) and len(t.criterion.weights) == 2
    p, y = answers(tmp_path/'m'/'3d_fullres')
    assert isinstance(p.networks[0], SwinUNet) and y.shape == (1, 3, 16, 16, 16)
    assert p.predict(np.random.default_rng(0).normal(size=(1, 24, 24, 24)).astype(np.float32), (1, 1, 1)).shape == (24, 24, 24)


def test_swin_of_slices_and_of_regions(tmp_path):
    flat = dict(patch_size=[16, 16], batch_size=4)
    task = wide(make_task(tmp_path/'Flat', flat=True), '2d', **flat)
    train(task, tmp_path/'m'/'2d', '2d', network=SWIN)
    assert answers(tmp_path/'m'/'2d', (1, 24, 24))[1].shape == (1, 3, 16, 16)
    task = wide(make_task(tmp_path/'Regions', said=REGIONS))
    train(task, tmp_path/'r'/'3d_fullres', network=SWIN)
    assert answers(tmp_path/'r'/'3d_fullres')[1].shape == (1, 2, 16, 16, 16)


class Answers(nn.Module):
    def __init__(self, i, n, strides, stacked=False, only_finest_in_eval=False):
        super().__init__()
        self.stem, self.stacked, self.only = nn.Conv3d(i, 4, 3, padding=1), stacked, only_finest_in_eval
        self.heads = nn.ModuleList(nn.Conv3d(4, n, s, s) for s in strides)
    def forward(self, x):
        out = [head(self.stem(x)) for head in self.heads]
        if self.only and not self.training: return out[0]
        return torch.stack(out, 1) if self.stacked else out if len(out) > 1 else out[0]


@pytest.mark.parametrize('strides, how, weights', [([1], {}, (1,)), ([1, 2], {}, (1, 0)), ([1, 2, 4, 8], {}, (8/15, 4/15, 2/15, 1/15)), ([1, (1, 2, 4)], {}, (2/3, 1/3)), ([1, 1], dict(stacked=True), (2/3, 1/3)),
                                                   ([1, 4], dict(only_finest_in_eval=True), (2/3, 1/3))])
def test_outputs_as_they_come(task, tmp_path, strides, how, weights):
    build = lambda c, i, n: Answers(i, n, strides, **how)
    t = train(task, tmp_path/'m'/'3d_fullres', network=build, epochs=2)
    assert t.criterion.weights == pytest.approx(weights)
    with t.train_stream: batch = next(iter(t.train_stream.epoch(0)))
    assert [tuple(y.shape[2:]) for y in batch['target']] == output_shapes(t.net, 1, 3, (16, 16, 16))
    assert all(np.isfinite(row['val_loss']) for row in t.history)
    _, y = answers(tmp_path/'m'/'3d_fullres', network=build)
    y = y[0] if isinstance(y, list) else y
    assert y.shape[-3:] == (16, 16, 16)


def test_one_output_is_learned_by_the_inner_loss_alone(task, tmp_path):
    "The loss of a single tensor is that of the loss function itself, not a share of it"
    t = Trainer(task, tmp_path/'m', network=lambda c, i, n: Answers(i, n, [1]), **QUICK)
    with t.train_stream: batch = next(iter(t.train_stream.epoch(0)))
    with torch.no_grad():
        outputs = t.net(batch['data'])
        assert float(t.criterion(outputs, batch['target'])) == pytest.approx(float(t.loss_function(outputs[0], batch['target'][0])))


def test_the_plans_own_network_trains_as_before(task, tmp_path):
    "Given by name, as a function or not at all: the same weights, bit by bit"
    one, two, three = (train(task, tmp_path/n, **how) for n, how in (('a', {}), ('b', dict(network='segnb.network:build_network')), ('c', dict(network=build_network))))
    for k, v in one.net.state_dict().items(): assert torch.equal(v, two.net.state_dict()[k]) and torch.equal(v, three.net.state_dict()[k])
    assert one.origin['name'] == 'segnb.network:build_network' and 'built_by' not in Predictor.from_folder(tmp_path/'a', device='cpu').made_with()


@pytest.mark.parametrize('build, words', [(lambda c, i, n: nn.Conv3d(i, n + 1, 1), 'does not fit'), (lambda c, i, n: None, 'does not give a network'), (lambda c: nn.Identity(), 'TypeError'),
                                          (lambda c, i, n: nn.Conv3d(i, n, 3), 'not the size of the patch'), (lambda c, i, n: nn.Conv2d(i, n, 1), 'cannot take a batch'), ('nothing', 'does not name'),
                                          ('no_such_package_here:build', 'cannot be imported'), ('no/such/file.py:build', 'not there'), ('segnb.network:no_such_function', 'has no')])
def test_what_is_no_network_is_refused_before_work_starts(task, tmp_path, build, words):
    with pytest.raises(NetworkError, match=words): Trainer(task, tmp_path/'m', network=build, **QUICK)
    assert not (tmp_path/'m').exists()


def test_an_option_that_a_factory_does_not_know_is_refused(task, tmp_path):
    for how in (dict(network_options={'colour': 'red'}), dict(checkpointing=True)):
        with pytest.raises(NetworkError, match='colour|checkpointing'): Trainer(task, tmp_path/'m', network=SWIN, **QUICK, **how)


def test_what_looks_on_sees_lists(task, tmp_path):
    "Pages of examples, the probe of speed and the search for a learning rate ask the network itself"
    t = train(task, tmp_path/'m', network=lambda c, i, n: Answers(i, n, [1]), callbacks=(ExamplePages(every=1, n_patches=1),))
    assert list((t.folder/'examples').glob('*.png'))
    assert probe(Trainer(task, tmp_path/'p', network=lambda c, i, n: Answers(i, n, [1, 4]), **QUICK), 2, warm_up=0, compare=False).iterations == 2


# Ensembles and validation -------------------------------------------------------------------------------------------------------

def test_validated_and_averaged_with_the_unet(phantom, tmp_path):
    for name, how in (('unet', {}), ('swin', dict(network=SWIN, network_options={'window': 2}))):
        train(phantom, tmp_path/name/'3d_fullres', **how)
        result = validate_fold(tmp_path/name/'3d_fullres', 0, phantom, save_probabilities=True, device='cpu', mirror=False, progress=False)
        assert len(result['cases']) == 2 and result['made_with'].get('built_by', {}).get('options') == ({'window': 2} if how else None)
    folders = [tmp_path/name/'3d_fullres'/'fold_0'/'validation' for name in ('unet', 'swin')]
    done = ensemble_probabilities(folders, tmp_path/'both', n_workers=0, progress=False)
    assert sorted(done) == sorted(f.stem for f in folders[0].glob('*.npz')) and all(f.exists() for f in done.values())


def test_folds_of_different_networks_are_not_averaged_in_one_predictor(task, tmp_path):
    train(task, tmp_path/'m', network=SWIN)
    train(task, tmp_path/'m', fold=1)
    with pytest.raises(PredictionError, match='different networks.*build_swin_unet'): Predictor.from_folder(tmp_path/'m', device='cpu')
    assert len(Predictor.from_folder(tmp_path/'m', folds=0, device='cpu').networks) == 1


# Where it came from -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def mine(task, tmp_path):
    (tmp_path/'code').mkdir()
    file = tmp_path/'code'/'my_net.py'
    file.write_text(NET)
    train(task, tmp_path/'models'/'Task'/'3d_fullres', network=f'{file}:build', network_options={'activation': 'mish'})
    return file, tmp_path/'models'/'Task'/'3d_fullres'


def is_mish(model, **how):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return any(isinstance(m, nn.Mish) for m in Predictor.from_folder(model, device='cpu', **how).networks[0].modules())


def test_found_again_in_another_process(mine):
    file, model = mine
    code = f"from segnb.prediction import Predictor; print([type(m).__name__ for m in Predictor.from_folder({str(model)!r}, device='cpu').networks[0].modules()].count('Mish'))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, cwd=model, env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[1])})
    assert out.returncode == 0 and int(out.stdout) > 4, out.stderr


def test_the_record_and_the_checkpoint_keep_it(mine):
    file, model = mine
    state, record = load_checkpoint(model/'fold_0'/'checkpoint_final.pt'), json.loads((model/'fold_0'/'record.json').read_text())
    assert state['origin'] == record['network'] and state['origin']['source'] == NET and state['origin']['options'] == {'activation': 'mish'}
    assert state['settings']['network'] == 'build' and stored_source(model) == NET


def test_resumed_without_saying_it_again(task, mine):
    file, model = mine
    t = Trainer(task, model, **QUICK | dict(epochs=3))
    assert len(t.resume()) == 3 and any(isinstance(m, nn.Mish) for m in t.net.modules())
    straight = Trainer(task, model.parent/'straight', network=f'{file}:build', network_options={'activation': 'mish'}, **QUICK | dict(epochs=3))
    cut = Trainer(task, model.parent/'cut', network=f'{file}:build', network_options={'activation': 'mish'}, callbacks=(stop_at_once,), **QUICK | dict(epochs=3))
    with pytest.raises(KeyboardInterrupt): cut.fit()
    again = Trainer(task, model.parent/'cut', **QUICK | dict(epochs=3))
    a, b = straight.fit(), again.resume()
    assert [r['train_loss'] for r in a] == [r['train_loss'] for r in b]


def stop_at_once(trainer, row): raise KeyboardInterrupt


def test_changed_lost_and_handed_in(task, mine, tmp_path):
    file, model = mine
    file.write_text(NET + '# tidied\n')
    with pytest.warns(NetworkWarning, match='source has changed'): Predictor.from_folder(model, device='cpu')
    file.write_text(NET.replace('activation=activation', 'dropout=.5'))
    with pytest.warns(NetworkWarning): Predictor.from_folder(model, device='cpu')
    file.write_text('def build(:\n')
    with pytest.raises(NetworkError, match='SyntaxError'): Predictor.from_folder(model, device='cpu')
    file.write_text('x = 1\n')
    with pytest.raises(NetworkError, match='has no build'): Predictor.from_folder(model, device='cpu')
    file.unlink()
    with pytest.raises(NetworkError, match='my_net.py.*not there.*stored_source.*network=') as refusal: Predictor.from_folder(model, device='cpu')
    assert refusal.value.origin['source'] == NET
    with pytest.raises(NetworkError, match='cannot be built again'): Trainer(task, model, **QUICK | dict(epochs=2)).resume()
    other = tmp_path/'other.py'
    other.write_text(NET)
    assert is_mish(model, network=f'{other}:build') and is_mish(model, network=find_factory(f'{other}:build'))
    assert is_mish(model, network=functools.partial(find_factory(f'{other}:build'), activation='mish'))
    assert len(Trainer(task, model, network=f'{other}:build', network_options={'activation': 'mish'}, **QUICK | dict(epochs=2)).resume()) == 2
    with pytest.warns(NetworkWarning), pytest.raises(PredictionError, match='weights do not fit.*encoder'): Predictor.from_folder(model, device='cpu', network=SWIN)
    with pytest.warns(NetworkWarning), pytest.raises(CheckpointError, match='does not fit'): Trainer(task, model, network=SWIN, **QUICK | dict(epochs=3)).resume()


def test_sessions_and_lost_options(task, tmp_path):
    def inner(*args, **options): return build_network(*args, **options)
    train(task, tmp_path/'a', network=inner)
    with pytest.raises(NetworkError, match='inside a session or another function'): Predictor.from_folder(tmp_path/'a', device='cpu')
    assert len(Predictor.from_folder(tmp_path/'a', device='cpu', network=inner).networks) == 1
    train(task, tmp_path/'b', network=functools.partial(build_network, norm=lambda channels, axes: nn.Identity()))
    with pytest.raises(NetworkError, match='norm could not be kept'): Predictor.from_folder(tmp_path/'b', device='cpu')


def test_a_partial_is_built_with_its_options(task, tmp_path):
    "It used to be built without them, and to answer wrongly without a word"
    train(task, tmp_path/'m', network=functools.partial(build_network, activation='gelu'))
    assert any(isinstance(m, nn.GELU) for m in Predictor.from_folder(tmp_path/'m', device='cpu').networks[0].modules())


def test_a_model_without_an_origin_is_the_plans_network(task, tmp_path):
    train(task, tmp_path/'m')
    file = tmp_path/'m'/'fold_0'/'checkpoint_final.pt'
    state = load_checkpoint(file)
    del state['origin']
    torch.save(state, file)
    assert len(Predictor.from_folder(tmp_path/'m', device='cpu').networks) == 1
    with pytest.raises(NetworkError, match='keeps no source'): stored_source(tmp_path/'m')


def test_a_module_on_the_path_and_beside_it(task, tmp_path, monkeypatch):
    (tmp_path/'lib').mkdir()
    (tmp_path/'lib'/'helper_82.py').write_text("ACTIVATION = 'mish'\n")
    (tmp_path/'lib'/'nets_82.py').write_text(NET.replace('def build', 'from helper_82 import ACTIVATION\ndef build').replace("'gelu'", 'ACTIVATION'))
    monkeypatch.syspath_prepend(tmp_path/'lib')
    train(task, tmp_path/'m'/'x', network='nets_82:build')
    assert load_checkpoint(tmp_path/'m'/'x'/'fold_0'/'checkpoint_final.pt')['origin']['kind'] == 'module' and is_mish(tmp_path/'m'/'x')
    monkeypatch.undo()
    for name in ('nets_82', 'helper_82'): sys.modules.pop(name, None)
    assert is_mish(tmp_path/'m'/'x'), 'a single file is found where it lay, with its neighbours'
    sys.modules.pop('helper_82', None)


# Hostile texts ----------------------------------------------------------------------------------------------------------------

HOSTILE = [dict(kind='module', name='os:system'), dict(kind='module', name='subprocess:run', options={'shell': True}), dict(kind='module', name='builtins:exec'), dict(kind='segnb', name='os:system'),
           dict(kind='segnb', name='segnb.workers:write_json'), dict(kind='segnb', name='segnb.workers:build_'), dict(kind='segnb', name='segnb.network:build_network.__globals__'),
           dict(kind='session', name='__main__:exit'), dict(kind='session', name='os:system'), dict(kind='file', name='nothing'), dict(kind=None, name=None), dict(), dict(kind='magic', name='a:b'), dict(kind=None, name='json:loads'), dict(kind='magic', name='json:loads'),
           dict(kind='segnb', name='segnb.network:build_unet', options={'activation': {'torch.nn': 'Module.__init__'}}), dict(kind='segnb', name='segnb.network:build_unet', options={'norm': {'torch.nn': 'init'}})]

@pytest.mark.parametrize('origin', HOSTILE, ids=lambda o: f"{o.get('kind')}-{o.get('name')}")
def test_hostile_origins_are_refused(origin):
    with pytest.raises(NetworkError): network_from_origin({'options': {}, 'lost': []} | origin)


def test_code_that_came_with_the_model_is_not_run(mine, tmp_path):
    file, model = mine
    proof = tmp_path/'ran'
    evil = model.parent/'my_net.py'
    evil.write_text(f'open({str(proof)!r}, "w")\n' + NET)
    for name in model.glob('fold_0/checkpoint_*.pt'):
        state = load_checkpoint(name)
        state['origin'] |= {'name': f'{evil}:build', 'file': str(evil)}
        torch.save(state, name)
    with pytest.raises(NetworkError, match='came with the model.*your word'): Predictor.from_folder(model, device='cpu')
    assert not proof.exists()
    with pytest.warns(NetworkWarning): Predictor.from_folder(model, device='cpu', network=f'{evil}:build')
    assert proof.exists(), 'at the word of the reader it is run'


def test_foreign_models_get_segnbs_own_networks_only(mine):
    file, model = mine
    origin = load_checkpoint(model/'fold_0'/'checkpoint_final.pt')['origin']
    with pytest.raises(NetworkError, match='your word'): network_from_origin(origin | {'foreign': True})
    assert network_from_origin(network_origin(build_swin_unet) | {'foreign': True}) is build_swin_unet


# The network and the probe ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('grid, window', [((5, 7), (2, 3)), ((4, 4, 4), (2, 2, 2)), ((3, 6, 5), (2, 4, 4)), ((1, 5, 5), (1, 4, 4)), ((2, 2, 2), (4, 4, 4))])
@pytest.mark.parametrize('moved', [False, True])
def test_attention_equals_a_table_over_all_voxels(grid, window, moved):
    torch.manual_seed(0)
    a, x = WindowAttention(8, 2, window, moved), torch.randn(2, *grid, 8)
    with torch.no_grad():
        a.offsets.normal_()
        places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing='ij'), -1).reshape(-1, len(grid))
        shift, w = torch.tensor([n // 2 if moved else 0 for n in window]), torch.tensor(window)
        same = (((places + shift) // w)[:, None] == ((places + shift) // w)[None]).all(-1)
        inside = (places + shift) % w
        number = torch.zeros(len(places), dtype=torch.long)
        for axis, n in enumerate(window): number = number * n + inside[:, axis]
        q, k, v = a.qkv(x.reshape(2, -1, 8)).reshape(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        table = q @ k.transpose(-1, -2) / 2 + a.offsets[a.index][number][:, number].permute(2, 0, 1)
        slow = a.proj((table.masked_fill(~same, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(2, -1, 8)).reshape(x.shape)
        assert torch.allclose(a(x), slow, atol=1e-5)


def test_the_probe_leaves_the_callers_numbers_alone(task):
    plans = Plans.load(task/'plans.json')
    torch.manual_seed(3)
    before = torch.rand(1); torch.manual_seed(3)
    check_network(SWIN, plans)
    assert torch.equal(torch.rand(1), before)


def test_the_probe_names_the_sizes_and_memory(task):
    plans = Plans.load(task/'plans.json')
    one = check_network(build_swin_unet, plans)
    assert one.divisor == (4, 4, 4) and one.losses[-1] < one.losses[0] and one.step_bytes > 0 and not one.problems and 'part of segnb' in repr(one)
    wider = check_network(build_swin_unet, plans, blocks=4)
    assert wider.parameters > one.parameters and wider.step_bytes > one.step_bytes
    fixed = check_network(lambda c, i, n: nn.Sequential(nn.Conv3d(i, n, 1), nn.LayerNorm((16, 16, 16))), plans)
    assert fixed.divisor == (0, 0, 0) and 'the patch only' in repr(fixed) and 'handed in' in repr(fixed)


def test_the_probe_refuses_weights_that_would_not_load(task):
    def build(c, i, n, deep_supervision=True): return nn.Sequential(nn.Conv3d(i, n, 1), *([] if deep_supervision is None else [nn.Conv3d(n, n, 1 + 2 * next(sizes), padding='same')]))
    sizes = iter(range(9))
    with pytest.raises(NetworkError, match='would not load.*found 1.weight'): check_network(build, Plans.load(task/'plans.json'))


# Networks and files of people in a hurry -----------------------------------------------------------------------------------------
class Careless(nn.Module):
    "One convolution, and a slip"
    def __init__(self, i, n, slip):
        super().__init__()
        self.conv, self.slip, self.asked = nn.Conv3d(i, n, 3, padding=1), slip, 0
    def forward(self, x):
        y = self.conv(x)
        self.asked += 1
        if self.slip == 'NaN': return y * float('nan')
        if self.slip == 'dropout': return nn.functional.dropout(y, .5)
        if self.slip == 'counts': return y * (1 + .01*self.asked)
        if self.slip == 'softmax': return y.softmax(1)
        if self.slip == 'sigmoid': return y.sigmoid()
        return y


@pytest.mark.parametrize('slip, words', [('NaN', ['NaN or infinite']), ('dropout', ['asked twice']), ('counts', ['asked twice']), ('softmax', ['between 0 and 1']), ('sigmoid', ['between 0 and 1']), (None, [])])
def test_the_probe_says_what_a_slip_is_and_nothing_that_only_follows(task, slip, words):
    found = check_network(lambda c, i, n: Careless(i, n, slip), Plans.load(task/'plans.json')).problems
    assert len(found) == len(words) and all(w in p for w, p in zip(words, found)), found


def test_the_probe_names_a_module_that_is_handed_out_again(task):
    one = {}
    def build(c, i, n): return one.setdefault('it', Careless(i, n, None))
    assert ['same module each time' in p for p in check_network(build, Plans.load(task/'plans.json')).problems] == [True]


class Lazy(nn.Module):
    def __init__(self, n): super().__init__(); self.conv = nn.LazyConv3d(n, 1)
    def forward(self, x): return self.conv(x)


@pytest.mark.parametrize('build, words', [(lambda c, i, n: Lazy(n), 'no size yet; found conv.weight'), (lambda c, i, n: nn.Conv3d(i, n, 1, device='meta'), 'no numbers; found weight on the device meta'),
                                          (lambda c, i, n: nn.Conv3d(i, n, 1).requires_grad_(False), 'can be trained; found 2 parameters'), (lambda c, i, n: nn.Softmax(1), 'can be trained; found 0 parameters'),
                                          (lambda c, i, n: nn.Conv3d(i, n, 1).double(), 'cannot take a batch'), (lambda c, i, n: nn.Conv3d(i, n, 2, 2), 'not the size of the patch'),
                                          (lambda c, i, n: nn.Conv3d(i, n + 1, 1), 'does not fit'), (Careless, 'cannot build'), (Careless(1, 2, None), 'cannot build')], ids=range(9))
def test_the_probe_refuses_what_cannot_be_trained(task, build, words):
    with pytest.raises(NetworkError, match=words): check_network(build, Plans.load(task/'plans.json'))


@pytest.mark.parametrize('text, words', [('def build(:\n', 'cannot be run; found SyntaxError'), ('import nothing_of_the_kind\n' + NET, 'ModuleNotFoundError.*nothing_of_the_kind'), ('raise ValueError("no")\n', 'ValueError: no'),
                                         ('\0', 'cannot be run'), ('build = 3\n', 'no function'), ('def bild(): pass\n', 'has no build; expected bild')])
def test_files_that_cannot_be_used(task, tmp_path, text, words):
    (tmp_path/'net.py').write_text(text)
    with pytest.raises(NetworkError, match=words): check_network(f"{tmp_path/'net.py'}:build", Plans.load(task/'plans.json'))


@pytest.mark.parametrize('name', ['json.py', 'torch.py', 'segnb.py', 'random.py', 'my net (2).py'])
def test_files_with_the_names_of_others(task, tmp_path, name):
    "A file is itself, whatever module is called so, and hides none of them"
    import json as before, random
    (tmp_path/name).write_text('import json, random\nassert json.dumps and random.random\n' + NET)
    found = check_network(f'{tmp_path/name}:build', Plans.load(task/'plans.json'))
    assert found.origin['kind'] == 'file' and sys.modules['json'] is before and sys.modules['random'] is random and not found.problems
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize('options, lost', [({'activation': lambda: nn.Mish()}, ['activation']), ({'norm': lambda channels, axes: nn.Identity()}, ['norm']), ({'activation': 'mish'}, []), ({'dropout': np.float64(.1)}, [])], ids=range(4))
def test_options_that_json_cannot_hold_are_said(task, options, lost):
    found = check_network('segnb.network:build_unet', Plans.load(task/'plans.json'), **options)
    assert found.origin['lost'] == lost and [p for p in found.problems if 'cannot be kept' in p] == [f"these options cannot be kept: {', '.join(lost)}"] * bool(lost)
    json.dumps(found.origin)
