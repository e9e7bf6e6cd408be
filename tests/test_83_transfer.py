"""Weights of another network: found by name, laid out by channel and class, kept in the record, not loaded twice."""
import copy, json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_task

from segnb.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from segnb.dataset import Dataset
from segnb.fingerprint import Fingerprint, extract_fingerprint
from segnb.labels import Labels
from segnb.network import build_network
from segnb.optimization import TrainingError, make_optimizer
from segnb.planning import Plans, PlansError, plan_experiment
from segnb.preprocessing import preprocess_dataset
from segnb.splits import save_splits
from segnb.training import Trainer
from segnb.transfer import (Pretrained, Source, TransferError, adapt_inputs, begun_with, fine_tuning, input_names, load_pretrained, match_names, misfits, output_names, read_source, transfer_plans)
from segnb.workers import read_json, write_json

FIRST = 'encoder.0.0.conv.weight'
QUICK = dict(epochs=1, iterations=2, val_iterations=1, n_workers=0, device='cpu', progress=False)


def shape(axes=3, levels=2, base=4, residual=False):
    row = (2,) * axes
    return SimpleNamespace(base_num_features=base, max_num_features=64, pool_op_kernel_sizes=(row,) * levels, conv_kernel_sizes=((3,) * axes,) * (levels + 1), architecture='residual' if residual else 'plain',
                           blocks_per_stage_encoder=(1,) * (levels + 1) if residual else None, blocks_per_stage_decoder=(1,) * levels if residual else None)


def net(channels, outputs, seed=0, **kind):
    torch.manual_seed(seed)
    network = build_network(shape(**kind), channels, outputs)
    for p in network.parameters(): p.data += .1 * torch.randn_like(p)
    return network.eval()


@torch.no_grad()
def answer(network, x): return network(x)[0] if isinstance(network(x), list) else network(x)


KINDS = [dict(), dict(axes=2), dict(residual=True), dict(axes=2, residual=True), dict(levels=3)]


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('seed', range(3))
def test_turned_names_turn_the_answer(kind, seed):
    "A network that reads the same channels in another order answers the same, class by class"
    rng = np.random.default_rng(seed)
    channels, classes = [f'c{i}' for i in range(4)], ['background', *(f'k{i}' for i in range(1, 4))]
    there, here = net(4, 4, seed, **kind), net(4, 4, seed + 10, **kind)
    order, into = rng.permutation(4), [0, *(1 + rng.permutation(3))]
    load_pretrained(here, Source(there.state_dict(), channels, classes), channels=[channels[i] for i in order], labels=[classes[i] for i in into])
    x = torch.randn(1, 4, *(16,) * kind.get('axes', 3), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(answer(here, x[:, order]), answer(there, x)[:, into], atol=1e-4)


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_onto_itself_everything_is_taken(kind):
    there, here = net(2, 3, 0, **kind), net(2, 3, 1, **kind)
    told = load_pretrained(here, Source(there.state_dict(), ['a', 'b'], ['background', 'x', 'y']), channels=['A ', 'b'], labels=['background', 'X', 'y'])
    assert {r['fate'] for r in told.rows} == {'taken'} and not told.unused and all(torch.equal(v, here.state_dict()[k]) for k, v in there.state_dict().items())


@pytest.mark.parametrize('theirs, ours, expected', [(['T1'], ['T1', 'T2'], [0, None]), (['a', 'a', 'b'], ['b', 'a', 'a', 'a'], [2, 0, 1, None]), ([], ['x'], [None]), (['CT'], ['ct '], [0])])
def test_names(theirs, ours, expected): assert match_names(ours, theirs) == expected


@pytest.mark.parametrize('residual', [False, True])
def test_fewer_and_more_channels_and_classes(residual):
    there = net(3, 3, 0, residual=residual)
    source = Source(there.state_dict(), ['FLAIR', 'T1', 'T2'], ['background', 'liver', 'tumour'])
    for channels, classes in ((['T2'], ['background', 'tumour']), (['T1', 'PD', 'T2', 'SWI', 'FLAIR'], ['background', 'tumour', 'vessel', 'liver', 'cyst'])):
        here = net(len(channels), len(classes), 1, residual=residual)
        fresh = copy.deepcopy(here.state_dict())
        told = load_pretrained(here, source, channels=channels, labels=classes)
        w, v = here.state_dict(), there.state_dict()
        for c, name in enumerate(channels):
            assert torch.equal(w[FIRST][:, c], v[FIRST][:, source.channels.index(name)]) if name in source.channels else torch.allclose(w[FIRST][:, c], v[FIRST].mean(1))
        for key in [k for k in w if k.startswith('heads')]:
            for k, name in enumerate(classes): assert torch.equal(w[key][k], v[key][source.outputs.index(name)] if name in source.outputs else fresh[key][k])
        assert told.count('left') == 0 and {r['name'] for r in told.rows if r['fate'] == 'adapted'} == {FIRST, *(k for k in w if k.startswith('heads'))}


def test_new_channels_may_be_fresh():
    there, here = net(1, 2), net(2, 2, 1)
    fresh = here.state_dict()[FIRST].clone()
    load_pretrained(here, Source(there.state_dict(), ['CT'], ['background', 'x']), channels=['CT', 'PET'], labels=['background', 'x'], new_channels='new')
    assert torch.equal(here.state_dict()[FIRST][:, 1], fresh[:, 1]) and torch.equal(here.state_dict()[FIRST][:, 0], there.state_dict()[FIRST][:, 0])
    other = net(2, 2, 1)
    told = load_pretrained(other, Source(there.state_dict(), ['MR'], ['background', 'x']), channels=['CT', 'PET'], labels=['background', 'x'], new_channels='new')
    assert torch.equal(other.state_dict()[FIRST], fresh) and next(r for r in told.rows if r['name'] == FIRST)['fate'] == 'left'


def test_regions_match_by_name():
    there, here = net(1, 3), net(1, 2, 1)
    regions = Labels.from_dict({'labels': {'background': 0, 'whole': [1, 2, 3], 'core': [2, 3], 'active': 3}, 'regions_class_order': [1, 2, 3]})
    told = load_pretrained(here, Source(there.state_dict(), ['T1'], output_names(regions)), channels=['T1'], labels=['active', 'whole'])
    assert told.outputs == [('active', 'active'), ('whole', 'whole')] and torch.equal(here.state_dict()['heads.0.weight'], there.state_dict()['heads.0.weight'][[2, 0]])


def test_other_architectures_give_what_fits():
    "Deeper, wider, other kernels: what agrees is taken, the rest is left with a reason"
    there = net(1, 2).state_dict()
    deeper = load_pretrained(net(1, 2, 1, levels=3), there)
    assert deeper.count('taken', 'encoder.0') == sum(v.numel() for k, v in there.items() if k.startswith('encoder.0')) and {r['how'] for r in deeper.rows if r['name'].startswith('encoder.3')} == {'no weight of this name there'}
    with pytest.raises(TransferError, match='no weight of the source fits'): load_pretrained(net(1, 2, 1, base=6), {k: v for k, v in there.items() if v.ndim > 1})
    residual = load_pretrained(net(1, 2, 1, residual=True), there)
    assert residual.unused and residual.count('left')


def test_a_refused_source_changes_nothing():
    here = net(2, 3)
    before = copy.deepcopy(here.state_dict())
    there = net(2, 3, 1).state_dict()
    for bad in ({'x': torch.zeros(3)}, {}, {'epoch': 3}, {**there, FIRST: there[FIRST] * float('inf')}, {**there, FIRST: 3}):
        with pytest.raises(TransferError): load_pretrained(here, bad)
    for wrong in (dict(new_channels='zero'), dict(channels=['a', 'b'], source_channels=['a', 'c'], rename={'b': 'd'})):
        with pytest.raises(TransferError): load_pretrained(here, there, **wrong)
    assert all(torch.equal(v, before[k]) for k, v in here.state_dict().items())


def test_half_precision_comes_as_single():
    there, here = net(1, 2), net(1, 2, 1)
    load_pretrained(here, {k: v.half() for k, v in there.state_dict().items()})
    assert here.state_dict()[FIRST].dtype == torch.float32 and torch.equal(here.state_dict()[FIRST], there.state_dict()[FIRST].half().float())


def test_a_network_of_another_kind():
    "Names are taken where only the number of channels differs; the same number needs to be said"
    def build(n): torch.manual_seed(n); return torch.nn.Sequential(torch.nn.Conv2d(n, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    there, here = build(3), build(2)
    load_pretrained(here, Source(there.state_dict(), ['r', 'g', 'b'], None), channels=['b', 'g'])
    assert torch.equal(here[0].weight[:, 0], there[0].weight[:, 2])
    same = build(3)
    load_pretrained(same, Source(there.state_dict(), ['r', 'g', 'b'], None), channels=['b', 'g', 'r'], inputs='0.weight')
    assert torch.equal(same[0].weight, there[0].weight[:, [2, 1, 0]])


def test_channels_last_keeps_its_layout():
    there, here = net(1, 2), net(1, 2, 1).to(memory_format=torch.channels_last_3d)
    load_pretrained(here, there.state_dict())
    assert here.encoder[1][0].conv.weight.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(here.state_dict()[FIRST], there.state_dict()[FIRST])


def test_the_table_names_every_weight():
    here = net(2, 3, 1)
    told = load_pretrained(here, Source(net(1, 2).state_dict(), ['CT'], ['background', 'x']), channels=['CT', '<PET>'], labels=['background', 'x', 'y'])
    assert [r['name'] for r in told.rows] == list(here.state_dict()) and sum(map(told.count, ('taken', 'adapted', 'left'))) == sum(v.numel() for v in here.state_dict().values())
    listed = sum(int(line[0].split('(')[1].split()[0]) if '(' in line[0] else 1 for line in told.lines())
    assert listed == len(told.rows) and '<PET>' in str(told) and '<PET>' not in told._repr_html_() and json.loads(json.dumps(told.to_dict())) == json.loads(json.dumps(told.to_dict()))


# --- plans

def fingerprint(channels=('CT',), spacing=(5., 1., 1.), size=(30, 200, 200), mean=80., n=5, reductions=1.):
    one = dict(mean=mean, sd=20., median=mean, min=mean - 90, max=mean + 90, percentile_00_5=mean - 60, percentile_99_5=mean + 60)
    return Fingerprint(spacings=[spacing] * n, shapes=[size] * n, channels=channels, labels=(1, 2), size_reductions=[reductions] * n, intensities={i: one for i in range(len(channels))} if 'CT' in channels else None)


def test_a_plan_imposed_on_its_own_data_is_the_same():
    for channels in (('CT',), ('T1', 'T2')):
        data = fingerprint(channels)
        plans = plan_experiment(data, planner='cpu')
        assert transfer_plans(plans, data).identity() == plans.identity() and misfits(plans, data) == []


def test_channels_are_normalised_by_name():
    source = plan_experiment(fingerprint(('CT', 'T2')), planner='cpu')
    data = fingerprint(('T2', 'PET', 'CT'), mean=90.)
    plans = transfer_plans(source, data, dataset_name='Task5_New')
    assert plans.normalization_schemes == ('nonCT', 'nonCT', 'CT') and plans.intensities[2]['mean'] == 80. and plans.intensities[0]['mean'] == 80. and plans.intensities[1]['mean'] == 90.
    assert plans.configurations == source.configurations and any("'PET', is not known there" in note for note in plans.trace['imposed']) and plans.dataset_name == 'Task5_New'
    other = transfer_plans(plan_experiment(fingerprint(('MRI',)), planner='cpu'), fingerprint(('CT',)))
    assert other.normalization_schemes == ('nonCT',)                        # by its place, as it is said
    assert transfer_plans(source, fingerprint(('computed', 'T2')), rename={'computed': 'CT'}).normalization_schemes == ('CT', 'nonCT')


@pytest.mark.parametrize('data, words', [(dict(spacing=(5., .3, .3)), 'detail is lost'), (dict(spacing=(12., 1., 1.)), 'voxels are made up'), (dict(size=(4, 30, 30)), 'larger than a typical case'),
                                         (dict(spacing=(1., 1., 5.), size=(200, 200, 30)), 'slices lie across axis 2'), (dict(mean=900.), 'same kind of image'), (dict(mean=-200.), 'same kind of image')])
def test_what_does_not_suit_is_said(data, words):
    plans = plan_experiment(fingerprint(), planner='cpu')
    said = misfits(plans, fingerprint(**data))
    assert any(words in text for text in said) and all(text in '\n'.join(transfer_plans(plans, fingerprint(**data)).trace['imposed']) for text in said)


def test_a_plan_that_is_none_is_refused(tmp_path):
    (tmp_path/'plans.json').write_text('{}')
    with pytest.raises(PlansError): transfer_plans(tmp_path, fingerprint())
    with pytest.raises(PlansError): transfer_plans(plan_experiment(fingerprint(), planner='cpu'), fingerprint(), 'no good name!')


# --- in a training

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "Two small tasks, the first trained for a moment, its plan imposed on the second"
    base, made = tmp_path_factory.mktemp('transfer'), {}
    torch.set_num_threads(1)
    for name, step in (('Task102_PhantomMR', (4, 4, 4)), ('Task101_PhantomCT', (3, 5, 5))):
        data = Dataset(tiny_task(name, base/'raw'/name, step, n_train=3, n_test=0))
        print_ = extract_fingerprint(data, 0)
        if not made:
            plans = plan_experiment(print_, planner='cpu', dataset_name=name)
            c = plans.configuration('3d_fullres')
            plans = replace(plans, configurations={'3d_fullres': replace(c, base_num_features=4, patch_size=(16, 16, 16), pool_op_kernel_sizes=((2,) * 3,) * 2, conv_kernel_sizes=((3,) * 3,) * 3, num_pool_per_axis=(2,) * 3)})
        else: plans = transfer_plans(base/'model', print_, 'from_mr', name)
        out = base/name
        out.mkdir()
        plans.save(out/'plans.json')
        write_json(data.json, out/'dataset.json')
        preprocess_dataset(data, plans, out, '3d_fullres', n_workers=0)
        save_splits([{'train': data.cases[:2], 'val': data.cases[2:]}], out/'splits.json')
        if not made: Trainer(out, base/'model', fold=0, **QUICK).fit()
        made[name] = out
    return SimpleNamespace(base=base, source=base/'model', target=made['Task101_PhantomCT'], own=made['Task102_PhantomMR'])


def test_a_training_begins_with_the_weights(two, tmp_path):
    seen = {}
    class Look:
        def on_epoch_start(self, t): seen.update({k: v.clone() for k, v in t.net.state_dict().items()})
    begin = Pretrained(two.source, {'source': 'model'})
    Trainer(two.target, tmp_path/'m', fold=0, callbacks=[begin, Look()], **QUICK).fit()
    there = load_checkpoint(two.source/'fold_0'/'checkpoint_final.pt')['network']
    taken = [r['name'] for r in begin.transfer.rows if r['fate'] == 'taken']
    assert len(taken) > 20 and all(torch.equal(seen[k], there[k]) for k in taken)
    assert torch.allclose(seen[FIRST][:, 0], there[FIRST].mean(1), atol=1e-6)     # CT is no sequence of MR
    record = read_json(tmp_path/'m'/'fold_0'/'record.json')['transfer']
    assert record['asked'] == {'source': 'model'} and record['rows'] == begin.transfer.rows and record['digest'] == read_source(two.source).digest
    assert 'taken' in (tmp_path/'m'/'fold_0'/'log.txt').read_text(encoding='utf-8')


def test_a_resumed_training_does_not_load_again(two, tmp_path):
    "The same weights in the end, whether the run is cut in two or not, and wherever the source has gone meanwhile"
    import shutil
    source = tmp_path/'source'
    shutil.copytree(two.source, source)
    def run(model, epochs): return Trainer(two.target, model, fold=0, schedule='constant', **{**QUICK, 'epochs': epochs}, **{k: v for k, v in fine_tuning(source, freeze_encoder=1, lr_encoder=.001, lr_head=.02).items()})
    run(tmp_path/'whole', 2).fit()
    run(tmp_path/'cut', 1).fit()
    second = run(tmp_path/'cut', 2)
    shutil.rmtree(source)
    second.resume()
    one, other = (load_checkpoint(tmp_path/name/'fold_0'/'checkpoint_final.pt') for name in ('whole', 'cut'))
    assert all(torch.equal(v, other['network'][k]) for k, v in one['network'].items())
    assert read_json(tmp_path/'cut'/'fold_0'/'record.json')['transfer']['digest'] == one['callbacks']['Pretrained 0']['digest']


def test_without_its_callbacks_a_run_goes_on_all_the_same(two, tmp_path):
    Trainer(two.target, tmp_path/'m', fold=0, **QUICK, **fine_tuning(two.source, lr_encoder=.001)).fit()
    record = read_json(tmp_path/'m'/'fold_0'/'record.json')['runs'][0]['settings']
    history = Trainer(two.target, tmp_path/'m', fold=0, **{**QUICK, 'epochs': 2}, optimizer=record['optimizer']).resume()
    assert len(history) == 2 and record['optimizer'] == 'sgd encoder=0.1'
    with pytest.raises(CheckpointError): Trainer(two.target, tmp_path/'m', fold=0, **{**QUICK, 'epochs': 3}).resume()   # another optimiser


def test_rates_and_stillness_by_part(two, tmp_path):
    start, options = {}, fine_tuning(two.source, freeze_encoder=1, lr_decoder=0., lr_head=.05)
    class Look:
        def on_epoch_start(self, t): start.update({k: v.clone() for k, v in t.net.state_dict().items()})
    t = Trainer(two.target, tmp_path/'m', fold=0, **QUICK, **options | {'callbacks': [*options['callbacks'], Look()]})
    assert sorted(round(g['lr'], 6) for g in t.optimizer.param_groups) == [0., 0., .01, .05]
    t.fit()
    changed = {k.split('.')[0] for k, v in t.net.state_dict().items() if not torch.equal(v, start[k])}
    assert changed == {'heads'} and all(p.requires_grad for p in t.net.parameters())


def test_a_source_that_does_not_fit_stops_before_the_first_step(two, tmp_path):
    torch.save({'a.weight': torch.zeros(3)}, tmp_path/'w.pt')
    with pytest.raises(TransferError, match='no weight of the source fits'): Trainer(two.target, tmp_path/'m', fold=0, callbacks=[Pretrained(tmp_path/'w.pt')], **QUICK).fit()
    assert not list((tmp_path/'m'/'fold_0').glob('checkpoint*'))


def test_sources(two, tmp_path):
    "Folder, fold, checkpoint, state_dict of torch and of safetensors hold the same weights"
    from safetensors.torch import save_file
    state = load_checkpoint(two.source/'fold_0'/'checkpoint_final.pt')
    torch.save({'state_dict': {f'module.{k}': v for k, v in state['network'].items()}}, tmp_path/'w.pt')
    save_file({k: v.contiguous() for k, v in state['network'].items()}, tmp_path/'w.safetensors')
    save_checkpoint(state, tmp_path/'checkpoint_alone.pt')
    found = [read_source(s) for s in (two.source, two.source/'fold_0', two.source/'fold_0'/'checkpoint_final.pt', tmp_path/'w.pt', tmp_path/'w.safetensors', tmp_path/'checkpoint_alone.pt', state['network'])]
    assert len({f.digest for f in found}) == 1
    assert found[0].outputs == ['background', 'edema', 'necrotic core', 'enhancing'] and found[0].channels == ['FLAIR', 'T1', 'T1c', 'T2'] == found[5].channels and found[3].channels is None and found[5].outputs is None
    with pytest.raises(TransferError, match='of fold 7'): read_source(two.source, fold=7)
    with pytest.raises(TransferError, match='checkpoint_best.pt|folds'): read_source(tmp_path, checkpoint='best')
    with pytest.raises(TransferError, match='no such model'): read_source(tmp_path/'nowhere')


def test_a_pickle_is_not_run(tmp_path):
    import os, pickle
    class Canary:
        def __reduce__(self): return (os.system, (f'touch {tmp_path}/RUN',))
    for raw in (pickle.dumps(Canary()), pickle.dumps({'network': Canary()})):
        (tmp_path/'w.pt').write_bytes(raw)
        with pytest.raises(TransferError, match='cannot be read safely'): read_source(tmp_path/'w.pt')
    torch.save({'network': Canary()}, tmp_path/'t.pt')
    with pytest.raises(TransferError, match='cannot be read safely'): read_source(tmp_path/'t.pt')
    (tmp_path/'w.safetensors').write_bytes((2**60).to_bytes(8, 'little'))
    with pytest.raises(TransferError, match='cannot be read safely'): read_source(tmp_path/'w.safetensors')
    assert not (tmp_path/'RUN').exists()


def test_a_cascade_reads_masks():
    data = Fingerprint(spacings=[(1., 1., 1.)] * 4, shapes=[(400, 400, 400)] * 4, channels=('CT',), labels=(1, 2), size_reductions=[1.] * 4, intensities=fingerprint().intensities)
    plans = plan_experiment(data, planner='cpu')
    labels = Labels.from_dict({'labels': {'background': 0, 'liver': 1, 'tumour': 2}})
    assert input_names(plans, '3d_cascade_fullres', labels) == ['CT', 'mask of liver', 'mask of tumour'] and input_names(plans, '3d_fullres', labels) == ['CT']
    there, here = net(1, 3), net(3, 3, 1)
    told = load_pretrained(here, Source(there.state_dict(), ['CT'], ['background', 'liver', 'tumour']), channels=input_names(plans, '3d_cascade_fullres', labels), labels=labels)
    assert told.channels == [('CT', 'CT'), ('mask of liver', 'zero at first'), ('mask of tumour', 'zero at first')] and torch.equal(here.state_dict()[FIRST][:, 0], there.state_dict()[FIRST][:, 0])
    x = torch.randn(1, 1, 16, 16, 16)                                     # so the second stage begins as the network without masks, whatever they say
    assert torch.allclose(answer(here, torch.cat([x, torch.ones(1, 2, 16, 16, 16)], 1)), answer(there, x), atol=1e-5)


@pytest.mark.parametrize('text, rates', [('sgd', [.01]), ('sgd encoder=.1', [.001, .01]), ('adamw encoder=0 heads=2', [0., .01, .02])])
def test_groups_in_one_text(text, rates):
    optimizer = make_optimizer(net(1, 2), .01, name=text)
    assert sorted(round(g['lr'], 6) for g in optimizer.param_groups) == rates and sum(len(g['params']) for g in optimizer.param_groups) == len(list(net(1, 2).parameters()))


@pytest.mark.parametrize('text', ['sgd encoder', 'sgd encoder=x', 'sgd nothing=1', 'lion encoder=1', 'encoder=1'])
def test_groups_that_cannot_be_read(text):
    with pytest.raises(TrainingError): make_optimizer(net(1, 2), name=text)


def test_a_start_that_cannot_be_is_seen_on_a_copy(two, tmp_path):
    "What a training asks before it removes an earlier one; the network stays as it is"
    torch.save({'another.weight': torch.zeros(3)}, tmp_path/'w.pt')
    trainer = Trainer(two.target, tmp_path/'m', fold=0, **QUICK)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    with pytest.raises(TransferError, match='no weight of the source fits'): Pretrained(tmp_path/'w.pt').check(trainer)
    Pretrained(two.source).check(trainer)
    assert all(torch.equal(v, before[k]) for k, v in trainer.net.state_dict().items())


# --- sources of every kind, as somebody in a hurry gives them

OFFICIAL = ROOT/'tests'/'recorded'/'official'


@pytest.mark.parametrize('name, configuration', [('v1_plain', '3d_fullres'), ('v2_plain', '3d_fullres'), ('v1_residual', '3d_fullres'), ('v2_residual', '3d_fullres'), ('v1_2d', '2d'), ('v2_regions', '3d_fullres')])
def test_official_models_are_sources(two, tmp_path, name, configuration):
    "With the plan of the source imposed, all of the network is its own but what reads other channels and gives other classes"
    from segnb.exchange import load_nnunet
    source = load_nnunet(OFFICIAL/f'{name}.zip', tmp_path/'source')
    data = Dataset(two.base/'raw'/'Task101_PhantomCT')
    plans = transfer_plans(source, extract_fingerprint(data, 0))
    plans.save(tmp_path/'plans.json')
    here = build_network(plans.configuration(configuration), 1, 4)
    told = load_pretrained(here, source, channels=plans.channels, labels=data.labels)
    assert {r['name'].split('.')[0] for r in told.rows if r['fate'] != 'taken'} <= {'heads', 'encoder'}
    assert all(r['name'].startswith(('heads', 'encoder.0.0')) for r in told.rows if r['fate'] != 'taken') and told.count('taken') > 20*(told.count('adapted') + told.count('left'))
    small = net(1, 4)                                                       # another plan: refused with the sizes of both
    with pytest.raises(TransferError, match=r'encoder.0.0.conv.weight of 3×.*expected encoder.0.0.conv.weight of 4×1.*overwrite-plans'): load_pretrained(small, source, channels=['CT'], labels=data.labels)


def test_as_many_features_as_classes_are_no_classes():
    "Three features there and four here, three classes there and four here: only the heads answer"
    there, here = net(1, 3, base=3), net(1, 4, 1, base=4)
    with pytest.raises(TransferError, match='no weight of the source fits'): load_pretrained(here, Source(there.state_dict(), ['CT'], ['background', 'a', 'b']), channels=['CT'], labels=['background', 'a', 'b', 'c'])
    mixed = net(1, 3, base=4)
    told = load_pretrained(here, Source(mixed.state_dict(), ['CT'], ['background', 'a', 'b']), channels=['CT'], labels=['background', 'a', 'b', 'c'])
    assert {r['name'].split('.')[0] for r in told.rows if r['fate'] == 'adapted'} == {'heads'}


def test_what_did_not_come_over_is_not_said_to_have():
    there, here = net(2, 3, axes=2), net(1, 3, 1)
    told = load_pretrained(here, Source(there.state_dict(), ['CT', 'PET'], ['background', 'a', 'b']), channels=['CT'], labels=['background', 'a', 'c'])
    assert told.channels == [('CT', 'new')] and next(r for r in told.rows if r['name'] == FIRST)['fate'] == 'left' and 'most begins anew' in str(told)
    assert {how for _, how in told.outputs} == {'new'}
    assert 'most begins anew' not in str(load_pretrained(net(1, 3), Source(net(1, 3).state_dict(), ['CT'], None)))


def test_more_and_fewer_halvings_share_the_outer_levels():
    deep, flat = net(1, 2, levels=3), net(1, 2, 1, levels=1)
    for there, here in ((deep, flat), (flat, deep)):
        told = load_pretrained(here, there.state_dict())
        fates = {r['name']: r['fate'] for r in told.rows}
        assert fates[FIRST] == fates['encoder.1.1.conv.weight'] == fates['heads.0.weight'] == 'taken' and (bool(told.unused) or told.count('left'))


def test_a_model_in_one_file_is_brought_in_first(two, tmp_path):
    from segnb.exchange import export_model, import_model
    export_model(two.source, tmp_path/'mr.segnb')
    with pytest.raises(TransferError, match='segnb import-model'): read_source(tmp_path/'mr.segnb')
    one, other = read_source(import_model(tmp_path/'mr.segnb', tmp_path/'mr')), read_source(two.source)
    assert (one.digest, one.channels, one.outputs) == (other.digest, other.channels, other.outputs)


def test_a_start_from_the_very_fold_that_is_trained_again(two, tmp_path):
    "With overwrite the source itself is removed; its weights are held before"
    import shutil
    shutil.copytree(two.source, tmp_path/'m')
    before = read_source(tmp_path/'m').digest
    with pytest.raises(TrainingError, match='already holds a training'): Trainer(two.own, tmp_path/'m', fold=0, callbacks=[Pretrained(tmp_path/'m')], **QUICK).fit()
    assert read_source(tmp_path/'m').digest == before
    begin = Pretrained(tmp_path/'m')
    Trainer(two.own, tmp_path/'m', fold=0, callbacks=[begin], **QUICK).fit(overwrite=True)
    assert begin.transfer.digest == before != read_source(tmp_path/'m').digest and begin.held is None and not begin.transfer.count('left')


def test_what_is_no_model_is_named(two, tmp_path):
    import shutil, zipfile
    for strange in (3, None, ['x'], torch.nn.Linear(1, 1)):
        with pytest.raises(TransferError, match=f'a {type(strange).__name__}'): read_source(strange)
    with zipfile.ZipFile(OFFICIAL/'v1_plain.zip') as archive: archive.extractall(tmp_path/'v1')
    with zipfile.ZipFile(OFFICIAL/'v2_plain.zip') as archive: archive.extractall(tmp_path/'v2')
    raw = [OFFICIAL/'v1_plain.zip', *(next((tmp_path/v).rglob('plans.*')).parent for v in ('v1', 'v2')), next((tmp_path/'v1').rglob('*.model')), next((tmp_path/'v2').rglob('*.pth'))]
    for file in raw:
        with pytest.raises(TransferError, match='import-model'): read_source(file)
    shutil.copytree(two.source, tmp_path/'task'/'3d_lowres')
    shutil.copytree(two.source, tmp_path/'task'/'3d_fullres')
    with pytest.raises(TransferError, match='configurations 3d_fullres, 3d_lowres.*name one'): read_source(tmp_path/'task')


def test_damaged_and_bare_folders(two, tmp_path):
    import shutil
    def copy(name): return shutil.copytree(two.source, tmp_path/name)
    for name, change in (('cut', lambda raw: raw[:len(raw)//2]), ('text', lambda raw: b'hello'), ('flipped', lambda raw: raw[:5000] + bytes([raw[5000] ^ 255]) + raw[5001:]), ('empty', lambda raw: b'')):
        file = copy(name)/'fold_0'/'checkpoint_final.pt'
        file.write_bytes(change(file.read_bytes()))
        with pytest.raises(CheckpointError, match='damaged'): read_source(tmp_path/name)
    bare = copy('bare')
    (bare/'fold_0'/'record.json').unlink()
    assert read_source(bare).outputs
    (bare/'dataset.json').unlink()
    told = load_pretrained(build_network(Plans.load(bare/'plans.json').configuration('3d_fullres'), 4, 4), bare, channels=['FLAIR', 'T1', 'T1c', 'T2'], labels=['background', 'a', 'b', 'c'])
    assert {how for _, how in told.outputs} == {'by its place'} and not told.count('left')


def test_a_run_that_was_killed_before_its_first_save_begins_with_the_same_weights(two, tmp_path):
    class Killed:
        def on_epoch_start(self, t): raise KeyboardInterrupt
    options = fine_tuning(two.source, lr_encoder=.001, freeze_encoder=1)
    with pytest.raises(KeyboardInterrupt): Trainer(two.target, tmp_path/'m', fold=0, **QUICK, **options | {'callbacks': [*options['callbacks'], Killed()]}).fit()
    again = begun_with(tmp_path/'m'/'fold_0')
    assert again['optimizer'] == options['optimizer'] and [type(c) for c in again['callbacks']] == [type(c) for c in options['callbacks']]
    Trainer(two.target, tmp_path/'m', fold=0, **QUICK, **again).resume()
    assert again['callbacks'][0].transfer.digest == read_source(two.source).digest and begun_with(tmp_path/'m'/'fold_0') == {}
    assert begun_with(tmp_path/'nothing') == {}


def test_what_the_chapter_says_of_near_and_far_is_in_the_record():
    "Near, every seed from the network ends above every seed from nothing; far, below"
    record = json.loads((ROOT/'tests'/'recorded'/'83_transfer.json').read_text())
    pairs = {p['name']: p for p in record['pairs']}
    assert list(pairs) == ['near', 'far'] and record['made']['command'].endswith('near far') and record['train_cases'] == 2
    ends = {}
    for name, p in pairs.items():
        for arm in ('from nothing', 'pretrained', 'pretrained, gently'):
            runs = [r for r in p['runs'] if r['arm'] == arm]
            assert [r['seed'] for r in runs] == record['made']['seeds'] == [0, 1, 2]
            assert all(len(r['patch_dice']) == record['target']['epochs'] and len(r['dice']) == 4 for r in runs)
            ends[name, arm] = [np.nanmean(np.array(r['dice'], float)) for r in runs]
    assert min(ends['near', 'pretrained']) > max(ends['near', 'from nothing']) and np.mean(ends['near', 'pretrained, gently']) > np.mean(ends['near', 'pretrained'])
    assert max(ends['far', 'pretrained']) < min(ends['far', 'from nothing']) and np.mean(ends['far', 'pretrained, gently']) < np.mean(ends['far', 'from nothing'])
    shared = {name: sum(a == b for a, b in p['channels']) for name, p in pairs.items()}
    fates = pairs['far']['fates']
    assert shared == {'near': 3, 'far': 0} and fates['taken'] > .95*sum(fates.values()) and not pairs['near']['misfits']   # taken says nothing of use
