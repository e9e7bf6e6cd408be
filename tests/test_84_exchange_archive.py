"""A model as one file: it arrives as it was sent, and what was forged does not arrive at all."""
import hashlib, io, json, os, pickle, shutil, stat, struct, subprocess, sys, zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from segnb.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from segnb.exchange import ExchangeError, describe_model, export_model, import_model, model_kind
from segnb.labels import Labels
from segnb.network import build_network
from segnb.planning import Configuration, Plans
from segnb.prediction import Predictor
from segnb.workers import read_json, write_json

LABELS = {'background': 0, 'organ': 1, 'lesion': 2}
REGIONS = {'labels': {'background': 0, 'whole': [1, 2, 3], 'core': [2, 3], 'active': 3}, 'regions_class_order': [1, 2, 3]}


def a_plan(name='3d_fullres', dimensions=3, channels=('CT',), labels=(1, 2), previous=None, **fields):
    axes, n = (slice(3 - dimensions, None), dimensions)
    def row(v): return (v,) * n
    known = dict(name=name, patch_size=row(8), batch_size=2, spacing=(3., 2., 2.), median_shape=(12, 16, 16), num_pool_per_axis=row(1), pool_op_kernel_sizes=(row(2),), conv_kernel_sizes=(row(3),) * 2,
                 do_dummy_2d_data_aug=False, base_num_features=4, max_num_features=8, architecture='plain', blocks_per_stage_encoder=None, blocks_per_stage_decoder=None, batch_dice=False, previous_stage=previous)
    return Configuration(**known | fields)


def plans_of(*configurations, channels=('CT',), labels=(1, 2)):
    return Plans(dataset_name='Task900_Tiny', planner='by hand', memory_gb=1, channels=channels, labels=labels, original_spacing_target=(3., 2., 2.), transpose_forward=(0, 1, 2), transpose_backward=(0, 1, 2),
                 normalization_schemes=('nonCT',) * len(channels), use_mask_for_norm=(False,) * len(channels), intensities=None, configurations={c.name: c for c in configurations}, trace={})


def a_model(folder, plans, name, dataset, folds=(0,), seed=0, **more):
    "A model folder with drawn weights: as a training leaves it, without the training"
    folder.mkdir(parents=True, exist_ok=True)
    plans.save(folder/'plans.json')
    write_json(dataset, folder/'dataset.json')
    for fold in folds:
        torch.manual_seed(seed + (fold if isinstance(fold, int) else 99))
        network = build_network(plans.configuration(name), plans.n_inputs(name), Labels.from_dict(dataset).n_outputs)
        for p in network.parameters(): p.data += .05 * torch.randn_like(p)
        (folder/f'fold_{fold}').mkdir(exist_ok=True)
        save_checkpoint({'format': 'segnb checkpoint 1', 'segnb_version': '0', 'configuration': name, 'fold': fold, 'epoch': 7, 'plans_identity': plans.identity(name), 'plans': json.loads(json.dumps(plans.to_dict())),
                         'settings': {'network': 'build_network', 'epochs': 7}, 'train_cases': ['smith', 'jones'], 'val_cases': ['brown'], 'network': network.state_dict(), 'optimizer': {'state': {}},
                         'history': [{'epoch': 0, 'dice': [.5, None]}], 'mirror_axes': [0, 2][:plans.configuration(name).dimensions - 1], **more}, folder/f'fold_{fold}'/'checkpoint_final.pt')
        write_json({'runs': [], 'train_cases': ['smith', 'jones'], 'val_cases': ['brown'], 'transfer': {'source': '/home/secret/models/x'}}, folder/f'fold_{fold}'/'record.json')
    return folder


DATASET = {'name': 'Task900_Tiny', 'labels': LABELS, 'channel_names': {'0': 'CT'}, 'licence': 'CC-BY', 'numTraining': 3, 'source': '/home/secret/raw', 'training': [{'image': './imagesTr/smith.nii.gz'}]}


def answer(model, channels=1, **options):
    image = np.random.default_rng(5).normal(size=(channels, 11, 17, 14)).astype(np.float32)
    return Predictor.from_folder(model, device='cpu', **options).predict(image, (3., 2.2, 2.), return_probabilities=True)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A model, the file made of it, its members"
    base = tmp_path_factory.mktemp('exchange')
    model = a_model(base/'home'/'3d_fullres', plans_of(a_plan()), '3d_fullres', DATASET, folds=(0, 1))
    card = export_model(model, base/'good.segnb', licence='CC0-1.0', description='a test')
    with zipfile.ZipFile(base/'good.segnb') as archive: members = {e.filename: archive.read(e) for e in archive.infolist()}
    return SimpleNamespace(base=base, model=model, card=card, file=base/'good.segnb', members=members)


# --- what is sent arrives

def kinds():
    yield 'plain', plans_of(a_plan()), '3d_fullres', DATASET
    yield '2d', plans_of(a_plan('2d', 2)), '2d', DATASET
    yield 'residual', plans_of(a_plan(architecture='residual', blocks_per_stage_encoder=(1, 2), blocks_per_stage_decoder=(1,))), '3d_fullres', DATASET
    yield 'regions', plans_of(a_plan(), labels=(1, 2, 3)), '3d_fullres', {**DATASET, **REGIONS}
    yield 'channels', plans_of(a_plan(), channels=('T2', 'ADC', 'T1')), '3d_fullres', DATASET
    yield 'gaps', plans_of(a_plan()), '3d_fullres', {**DATASET, 'labels': {'background': 0, 'lesion': 7, 'organ': 4}}


@pytest.mark.parametrize('kind, plans, name, dataset', list(kinds()), ids=[k[0] for k in kinds()])
def test_the_same_bits_are_predicted(tmp_path, kind, plans, name, dataset):
    plans = replace(plans, labels=Labels.from_dict(dataset).foreground)
    model = a_model(tmp_path/'home'/name, plans, name, dataset, folds=(0, 3))
    export_model(model, tmp_path/'m.segnb')
    out = import_model(tmp_path/'m.segnb', tmp_path/'away'/name)
    for one, other in zip(answer(model, len(plans.channels)), answer(out, len(plans.channels))): assert np.array_equal(one, other)
    assert read_json(out/'dataset.json')['labels'] == json.loads(json.dumps(dataset['labels']))
    assert list(read_json(out/'dataset.json')['labels']) == list(dataset['labels'])     # the order of regions is their meaning


def test_the_same_model_gives_the_same_bytes(tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path/'elsewhere'/'3d_fullres')
    export_model(tmp_path/'elsewhere'/'3d_fullres', tmp_path/'m.segnb', licence='CC0-1.0', description='a test')
    assert (tmp_path/'m.segnb').read_bytes() == tiny.file.read_bytes()


def test_a_second_hand_file_holds_the_same(tiny, tmp_path):
    export_model(import_model(tiny.file, tmp_path/'3d_fullres'), tmp_path/'m.segnb')
    with zipfile.ZipFile(tmp_path/'m.segnb') as archive: again = {e.filename: archive.read(e) for e in archive.infolist()}
    assert again.keys() == tiny.members.keys()
    for name in again:
        if name.endswith('safetensors'): assert again[name] == tiny.members[name]
    assert describe_model(tmp_path/'m.segnb').licence == 'CC0-1.0'


@pytest.mark.parametrize('precision', [torch.float32, torch.float64])
def test_special_numbers_keep_their_bits(tiny, tmp_path, precision):
    "Smallest and largest numbers, signed zeros: bits, not values, are carried"
    state = load_checkpoint(tiny.model/'fold_0'/'checkpoint_final.pt')
    w = state['network']['encoder.0.0.conv.weight'].flatten()
    w[:6] = torch.tensor([0., -0., 1e-45, -1e-45, 3.4e38, -3.4e38])
    model = tmp_path/'home'/'3d_fullres'
    shutil.copytree(tiny.model, model)
    save_checkpoint(state, model/'fold_0'/'checkpoint_final.pt')
    export_model(model, tmp_path/'m.segnb', folds=0)
    back = load_checkpoint(import_model(tmp_path/'m.segnb', tmp_path/'3d_fullres')/'fold_0'/'checkpoint_final.pt')['network']['encoder.0.0.conv.weight'].flatten()
    assert back.view(torch.int32)[:6].tolist() == w.view(torch.int32)[:6].tolist()


def test_nothing_private_travels(tiny, tmp_path):
    raw = tiny.file.read_bytes()
    assert b'secret' not in raw and str(tiny.base).encode() not in raw and b'smith' in raw
    card = export_model(tiny.model, tmp_path/'m.segnb', case_names=False)
    raw = (tmp_path/'m.segnb').read_bytes()
    assert not any(name in raw for name in (b'smith', b'jones', b'brown', b'secret')) and card.trained_on['cases'] == 3
    back = load_checkpoint(import_model(tmp_path/'m.segnb', tmp_path/'3d_fullres')/'fold_0'/'checkpoint_final.pt')
    assert back['train_cases'] == ['case_0000', 'case_0001'] and back['val_cases'] == ['case_0002']


def test_what_only_training_needs_stays(tiny, tmp_path):
    state = load_checkpoint(import_model(tiny.file, tmp_path/'3d_fullres')/'fold_1'/'checkpoint_final.pt')
    assert 'optimizer' not in state and state['epoch'] == 7 and state['mirror_axes'] == [0, 2] and state['history'] == [{'epoch': 0, 'dice': [.5, None]}] and state['exported_from'] == 'checkpoint_final.pt'


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    "A task with a cascade, the choice and the rule of an ensemble"
    folder = tmp_path_factory.mktemp('task')/'Task900_Tiny'
    plans = plans_of(a_plan('2d', 2), a_plan('3d_lowres', spacing=(6., 4., 4.)), a_plan('3d_fullres'), a_plan('3d_cascade_fullres', previous='3d_lowres'))
    for i, name in enumerate(plans.configurations): a_model(folder/name, plans, name, DATASET, seed=i)
    for where in ('2d+3d_fullres', '2d+elsewhere'):
        (folder/'ensembles'/where).mkdir(parents=True)
        write_json({'which': [1], 'min_sizes': None, 'scores': None, 'names': None, 'n_cases': 3}, folder/'ensembles'/where/'postprocessing.json')
    write_json({'which': [2], 'min_sizes': None, 'scores': None, 'names': None, 'n_cases': 3}, folder/'2d'/'postprocessing.json')
    write_json({'cases': {'brown': {'1': {'dice': .7}}}, 'fold_of': {'brown': 0}}, folder/'2d'/'cross_validation.json')
    write_json({'chosen': '2d+3d_fullres', 'cases': ['brown'], 'commands': ['segnb predict -m /home/secret/models']}, folder/'selection.json')
    return folder


def test_a_whole_task_travels(task, tmp_path):
    card = export_model(task, tmp_path/'m.segnb')
    assert sorted(card.configurations) == ['2d', '3d_cascade_fullres', '3d_fullres', '3d_lowres'] and card.configurations['3d_cascade_fullres']['needs'] == '3d_lowres'
    out = import_model(tmp_path/'m.segnb', tmp_path/'models'/'Task900_Tiny')
    for name in ('2d', '3d_lowres', '3d_fullres'): assert np.array_equal(answer(task/name)[1], answer(out/name)[1])
    assert read_json(out/'2d'/'postprocessing.json')['which'] == [2] and read_json(out/'ensembles'/'2d+3d_fullres'/'postprocessing.json')['which'] == [1]
    assert not (out/'ensembles'/'2d+elsewhere').exists()                   # its members did not travel
    assert read_json(out/'selection.json') == {'chosen': '2d+3d_fullres', 'cases': ['brown']}
    assert b'secret' not in (tmp_path/'m.segnb').read_bytes()


def test_a_second_stage_takes_the_first_along(task, tmp_path):
    card = export_model(task/'3d_cascade_fullres', tmp_path/'m.segnb')
    assert list(card.configurations) == ['3d_lowres', '3d_cascade_fullres']
    out = import_model(tmp_path/'m.segnb', tmp_path/'Task900_Tiny')
    image, before = np.random.default_rng(1).normal(size=(1, 12, 16, 16)).astype(np.float32), np.zeros((12, 16, 16), np.uint8)
    both = [Predictor.from_folder(f/'3d_cascade_fullres', device='cpu').predict(image, (3, 2, 2), previous=before, return_probabilities=True)[1] for f in (task, out)]
    assert np.array_equal(*both)


def test_case_names_in_scores_are_numbered(task, tmp_path):
    export_model(task, tmp_path/'m.segnb', configurations=['2d'], case_names=False)
    out = import_model(tmp_path/'m.segnb', tmp_path/'t')
    assert b'brown' not in (tmp_path/'m.segnb').read_bytes()
    scores = read_json(out/'2d'/'cross_validation.json')
    assert list(scores['cases']) == list(scores['fold_of']) and list(scores['cases'])[0].startswith('case_')


def test_a_network_of_its_own_is_marked_as_foreign(tmp_path):
    origin = {'kind': 'module', 'name': 'somewhere:build', 'file': None, 'digest': 'ab', 'source': 'def build(): ...', 'package': None, 'options': {}, 'lost': []}
    model = a_model(tmp_path/'home'/'3d_fullres', plans_of(a_plan()), '3d_fullres', DATASET, settings={'network': 'build'}, origin=origin)
    export_model(model, tmp_path/'m.segnb')
    state = load_checkpoint(import_model(tmp_path/'m.segnb', tmp_path/'3d_fullres')/'fold_0'/'checkpoint_final.pt')
    assert state['origin'] == origin | {'foreign': True}


# --- refusals at home

@pytest.mark.parametrize('how, words', [(dict(folds=5), 'expected fold 5'), (dict(checkpoint='best'), 'no checkpoint_best.pt'), (dict(configurations='2d'), 'no such configuration'), (dict(licence=7), 'licence must be a text')])
def test_refuses_to_export(tiny, tmp_path, how, words):
    with pytest.raises(ExchangeError, match=words): export_model(tiny.model, tmp_path/'m.segnb', **how)
    assert not any(tmp_path.iterdir())


def test_an_export_that_fails_leaves_the_old_file(tiny, tmp_path):
    model, file = tmp_path/'3d_fullres', tmp_path/'m.segnb'
    shutil.copytree(tiny.model, model)
    export_model(model, file)
    before = file.read_bytes()
    raw = (model/'fold_1'/'checkpoint_final.pt').read_bytes()
    (model/'fold_1'/'checkpoint_final.pt').write_bytes(raw[:len(raw) // 2])
    with pytest.raises(CheckpointError): export_model(model, file)
    assert file.read_bytes() == before and sorted(f.name for f in tmp_path.iterdir()) == ['3d_fullres', 'm.segnb']


def test_an_import_into_something_else_is_refused(tiny, tmp_path):
    (tmp_path/'home').mkdir()
    (tmp_path/'home'/'thesis.tex').write_text('years of work')
    with pytest.raises(ExchangeError, match='something already'): import_model(tiny.file, tmp_path/'home')
    with pytest.raises(ExchangeError, match='no model, it is not replaced'): import_model(tiny.file, tmp_path/'home', overwrite=True)
    (tmp_path/'link').symlink_to(tmp_path/'home')
    with pytest.raises(ExchangeError, match='not replaced'): import_model(tiny.file, tmp_path/'link', overwrite=True)
    assert (tmp_path/'home'/'thesis.tex').read_text() == 'years of work'


def test_a_replaced_model_is_replaced_whole(tiny, tmp_path):
    out = import_model(tiny.file, tmp_path/'3d_fullres')
    (out/'fold_2').mkdir()
    import_model(tiny.file, out, overwrite=True)
    assert not (out/'fold_2').exists() and [f.name for f in tmp_path.iterdir()] == ['3d_fullres']


def test_the_digest_told_elsewhere_is_compared(tiny, tmp_path):
    with pytest.raises(ExchangeError, match='another model than the one'): import_model(tiny.file, tmp_path/'m', digest='0' * 64)
    assert import_model(tiny.file, tmp_path/'m', digest=tiny.card.digest.upper()).is_dir()


# --- hostile files

class Canary:
    "What would show that a pickle has run"
    def __reduce__(self): return (os.system, ('touch PICKLE_HAS_RUN',))


def packed(members, packing=zipfile.ZIP_STORED, entries=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', packing) as archive:
        for name, raw in members.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = (entries or {}).get(name, 0o100644) << 16
            archive.writestr(entry, raw, packing)
    return buffer.getvalue()


def honest(members, **changes):
    "The members with a manifest that agrees with them, as a clever forger makes it"
    manifest = json.loads(members.get('manifest.json', b'{}'))
    manifest['members'] = {n: {'size': len(b), 'sha256': hashlib.sha256(b).hexdigest()} for n, b in members.items() if n != 'manifest.json'}
    return {**members, 'manifest.json': json.dumps(manifest | changes).encode()}


def edited(members, member, /, **changes): return honest({**members, member: json.dumps(json.loads(members[member]) | changes).encode()})


def with_plan(members, **changes):
    "Another plan, and everything that names it"
    plan = json.loads(members['plans.json'])
    plan['configurations']['3d_fullres'] |= changes
    try: identity = Plans.from_dict(plan).identity('3d_fullres')
    except Exception: identity = '0' * 16
    members = {**members, 'plans.json': json.dumps(plan).encode()}
    for n in members:
        if n.endswith('checkpoint.json'): members[n] = json.dumps(json.loads(members[n]) | {'plans_identity': identity}).encode()
    manifest = json.loads(members['manifest.json'])
    manifest['configurations']['3d_fullres']['plan'] = identity
    return honest({**members, 'manifest.json': json.dumps(manifest).encode()})


def tensor_file(listed, data=b''):
    said = listed if isinstance(listed, bytes) else json.dumps(listed).encode()
    return len(said).to_bytes(8, 'little') + said + data


def weights(change):
    def forge(m):
        from safetensors.torch import load, save
        w = load(m['fold_0/weights.safetensors'])
        change(w)
        return packed(honest({**m, 'fold_0/weights.safetensors': save(w)}))
    return forge


W, KERNEL = 'fold_0/weights.safetensors', 'encoder.0.0.conv.weight'
def added(name, raw=b'{}', **how): return lambda m: packed(honest({**m, name: raw}), **how)
def replaced(name, raw): return lambda m: packed(honest({**m, name: raw}))
def doubled(name):
    def forge(m):
        raw = packed(honest({**m, 'x' * len(name): b'{}'}))
        return raw.replace(b'x' * len(name), name.encode())
    return forge


def at_end(field, value, size=4):
    "Change a number of the list's last record: disk 4, entries 8 and 10, length 12, start 16"
    return lambda m: (lambda b: b[:len(b) - 22 + field] + value.to_bytes(size, 'little') + b[len(b) - 22 + field + size:])(packed(m))


def first_header(offset, value, size):
    "Change a number in front of the first member"
    return lambda m: (lambda b: b[:offset] + value.to_bytes(size, 'little') + b[offset + size:])(packed(m))


def first_listed(offset, value, size):
    "Change a number of the first member in the list at the end"
    def forge(m):
        b = packed(m)
        at = struct.unpack('<I', b[-6:-2])[0] + offset
        return b[:at] + value.to_bytes(size, 'little') + b[at + size:]
    return forge


HOSTILE = {
    # names
    'above': added('../evil.json'), 'far above': added('../../../../tmp/evil.json'), 'absolute': added('/tmp/evil.json'), 'windows drive': added('C:/evil.json'), 'backslash': added('..\\evil.json'),
    'inner dots': added('fold_0/../../plans.json'), 'device name': added('con/plans.json'), 'another case': added('PLANS.json'), 'twice': doubled('plans.json'), 'zero in name': added('plans.json\x00.py'),
    'bidi name': added('fold_0/\u202erecord.json'), 'a program': added('fold_0/run.py', b'raise SystemExit'), 'a checkpoint': added('fold_0/checkpoint_final.pt', pickle.dumps(Canary())),
    'an empty folder': added('fold_0/'), 'very long name': added('a' * 3000 + '/plans.json'), 'too many members': lambda m: packed(honest({**m, **{f'fold_{i}/record.json': b'{}' for i in range(5000)}})),
    # kinds of members
    'symlink': added('fold_0/record.json', b'/etc/passwd', entries={'fold_0/record.json': stat.S_IFLNK | 0o777}), 'device': added('fold_0/record.json', b'', entries={'fold_0/record.json': stat.S_IFCHR | 0o666}),
    # the archive
    'packed': lambda m: packed(m, zipfile.ZIP_DEFLATED), 'bomb': lambda m: packed(honest({**m, 'fold_0/record.json': b' ' * 10**7}), zipfile.ZIP_DEFLATED), 'lzma': lambda m: packed(m, zipfile.ZIP_LZMA),
    'empty': lambda m: b'', 'a text': lambda m: b'hello', 'only an end': lambda m: b'PK\x05\x06' + bytes(18), 'cut in half': lambda m: packed(m)[:len(packed(m)) // 2], 'cut by a byte': lambda m: packed(m)[:-1],
    'in front': lambda m: b'#!/bin/sh\nexit\n' + packed(m), 'behind': lambda m: packed(m) + b'more', 'comment': lambda m: packed(m)[:-2] + b'\x04\x00evil', 'two archives': lambda m: packed(m) + packed(m),
    'many promised': at_end(10, 65535, 2), 'long list': at_end(12, 2**31), 'list elsewhere': at_end(16, 3), 'another disk': at_end(4, 1, 2), 'list of nothing': at_end(10, 0, 2),
    'encrypted': first_listed(8, 1, 2), 'size a gigabyte': first_listed(24, 2**30, 4), 'both sizes a gigabyte': lambda m: first_listed(20, 2**30 + (2**30 << 32), 8)(m), 'overlapping': first_listed(42, 50, 4),
    'another local name': lambda m: packed(m).replace(b'plans.json', b'PLANS.JSON', 1), 'broken magic': first_header(0, 0, 4), 'a flag inside': first_header(26, 65535, 2),
    'a pickle': lambda m: pickle.dumps(Canary()), 'a torch file': lambda m: (lambda b: (torch.save({'network': Canary()}, b), b.getvalue())[1])(io.BytesIO()),
    # checksums and manifest
    'one bit': lambda m: (lambda b, i: b[:i] + bytes([b[i] ^ 1]) + b[i + 1:])(packed(m), packed(m).index(m[W]) + len(m[W]) // 2), 'old checksum': lambda m: packed({**m, 'dataset.json': m['dataset.json'] + b' '}),
    'checksum is a list': lambda m: packed({**m, 'manifest.json': json.dumps(json.loads(m['manifest.json']) | {'members': {n: {'size': len(b), 'sha256': [1]} for n, b in m.items() if n != 'manifest.json'}}).encode()}),
    'unlisted': lambda m: packed({**m, 'selection.json': b'{}'}), 'listed, not there': lambda m: packed({k: v for k, v in m.items() if k != 'fold_0/record.json'}),
    'no manifest': lambda m: packed({k: v for k, v in m.items() if k != 'manifest.json'}), 'other format': lambda m: packed(honest(m, format='segnb model 2')), 'no format': lambda m: packed(honest(m, format=None)),
    'no configuration': lambda m: packed(honest(m, configurations={})), 'configuration is text': lambda m: packed(honest(m, configurations='3d_fullres')), 'a path as folder': lambda m: packed(honest(m, configurations={'3d_fullres': {'folder': '../..', 'folds': ['0', '1']}})),
    'folds are numbers': lambda m: packed(honest(m, configurations={'3d_fullres': {'folder': '', 'folds': [0, 1]}})), 'a fold less': lambda m: packed(honest(m, configurations={'3d_fullres': {**json.loads(m['manifest.json'])['configurations']['3d_fullres'], 'folds': ['0']}})),
    'licence is code': lambda m: packed(honest(m, licence={'__import__': 'os'})), 'members is a list': lambda m: packed({**m, 'manifest.json': json.dumps(json.loads(m['manifest.json']) | {'members': []}).encode()}),
    'a data set above': lambda m: packed(honest(m, trained_on={'dataset': '../../evil'})), 'a data set elsewhere': lambda m: packed(honest(m, trained_on={'dataset': '/etc'})), 'a data set of dots': lambda m: packed(honest(m, trained_on={'dataset': '..'})),
    'a configuration above': lambda m: packed(honest(m, configurations={'../../evil': {'folder': '', 'folds': ['0', '1'], 'plan': '', 'needs': None}})),
    'needs another': lambda m: packed(honest(m, configurations={'3d_fullres': {**json.loads(m['manifest.json'])['configurations']['3d_fullres'], 'needs': '/etc'}})),
    # texts
    'deep': replaced('fold_0/record.json', b'{"a":' + b'[' * 10**5 + b']' * 10**5 + b'}'), 'key twice': replaced('fold_0/record.json', b'{"a":1,"a":2}'), 'no JSON': replaced('dataset.json', b'os.system("ls")'), 'not an object': replaced('plans.json', b'[]'),
    'long number': replaced('fold_0/record.json', b'{"a":' + b'9' * 10**5 + b'}'), 'half a character': replaced('fold_0/record.json', b'{"a":"\\ud800"}'), 'no UTF-8': replaced('dataset.json', b'{"labels":"\xff"}'), 'pickle as text': replaced('plans.json', pickle.dumps(Canary())),
    'labels that are none': lambda m: packed(edited(m, 'dataset.json', labels={'background': 0, 'organ': {}})), 'other labels': lambda m: packed(edited(m, 'dataset.json', labels={'background': 0, 'organ': 1})),
    'another plan': lambda m: packed(edited(m, 'plans.json', normalization_schemes=['noNorm'])), 'half a plan': lambda m: packed(edited(m, 'plans.json', configurations={'3d_fullres': {'name': '3d_fullres'}})),
    'strange scheme': lambda m: packed(edited(m, 'plans.json', transpose_forward=[0, 0, 0])), 'another fold': lambda m: packed(edited(m, 'fold_0/checkpoint.json', fold=1)),
    'mirrors an axis that is not': lambda m: packed(edited(m, 'fold_0/checkpoint.json', mirror_axes=[7])), 'mirrors a text': lambda m: packed(edited(m, 'fold_0/checkpoint.json', mirror_axes='0')), 'epoch is text': lambda m: packed(edited(m, 'fold_0/checkpoint.json', epoch='7')), 'no settings': lambda m: packed(edited(m, 'fold_0/checkpoint.json', settings=None)),
    # weights
    'pickle as weights': replaced(W, pickle.dumps(Canary())), 'nothing as weights': replaced(W, b''), 'endless list': replaced(W, (2**63 - 1).to_bytes(8, 'little') + b'{}'), 'list beyond the file': replaced(W, (100).to_bytes(8, 'little') + b'{}'),
    'list is no JSON': replaced(W, tensor_file(b'not json')), 'terabytes declared': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [10**6, 10**6], 'data_offsets': [0, 4 * 10**12]}})), 'overflow': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [2**62, 4], 'data_offsets': [0, 0]}})),
    'negative shape': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [-1, -4], 'data_offsets': [0, 16]}}, bytes(16))), 'a hole': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [16, 32]}}, bytes(32))),
    'overlap': replaced(W, tensor_file({'a': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}, 'b': {'dtype': 'F32', 'shape': [4], 'data_offsets': [8, 24]}}, bytes(24))), 'unknown kind': replaced(W, tensor_file({KERNEL: {'dtype': 'OBJ', 'shape': [4], 'data_offsets': [0, 16]}}, bytes(16))),
    'backwards': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [16, 0]}}, bytes(16))), 'shape of texts': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': ['4'], 'data_offsets': [0, 16]}}, bytes(16))), 'many axes': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [1] * 10**4, 'data_offsets': [0, 4]}}, bytes(4))),
    'other shape': weights(lambda w: w.update({KERNEL: w[KERNEL][:2].contiguous()})), 'other kind': weights(lambda w: w.update({KERNEL: w[KERNEL].half()})), 'one more': weights(lambda w: w.update(extra=torch.zeros(1))), 'one less': weights(lambda w: w.pop(KERNEL)),
    'nan': weights(lambda w: w[KERNEL].fill_(float('nan'))), 'infinity': weights(lambda w: w[KERNEL].view(-1)[3:4].fill_(float('inf'))), 'numbers of another network': weights(lambda w: w.update({k + '.x': w.pop(k) for k in list(w)})),
    # lists of tensors
    'a tensor twice': replaced(W, tensor_file(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4))),
    'a key of a tensor twice': replaced(W, tensor_file(b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 4]}}', bytes(4))),
    'two tensors of the same bytes': replaced(W, tensor_file({n: {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]} for n in 'ab'}, bytes(16))),
    'negative offsets': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [-16, 0]}}, bytes(16))), 'offsets of 2**64': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [2**64 - 16, 2**64]}}, bytes(16))),
    'fractions as offsets': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [0., 16.]}}, bytes(16))), 'one offset': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [16]}}, bytes(16))),
    'nothing of a huge shape': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [0, 2**62], 'data_offsets': [0, 0]}})), 'a shape of truths': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [True, 4], 'data_offsets': [0, 16]}}, bytes(16))),
    'metadata that is no text': replaced(W, tensor_file({'__metadata__': {'a': [1]}, KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}, bytes(16))), 'only metadata': replaced(W, tensor_file({'__metadata__': {}})),
    'a list of lists': replaced(W, tensor_file(b'[[]]')), 'a tensor that is a text': replaced(W, tensor_file({KERNEL: 'F32'}, bytes(16))), 'bytes behind the tensors': replaced(W, tensor_file({KERNEL: {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}, bytes(20))),
    # two readings of one archive: what stands in front of a member differs from the list
    'another checksum in front': first_header(14, 7, 4), 'another size in front': first_header(22, 7, 4), 'packed in front': first_header(8, 8, 2), 'encrypted in front': first_header(6, 1, 2), 'sizes behind the bytes': first_header(6, 8, 2),
    'a size of 64 bits that is missing': first_header(18, 2**64 - 1, 8), 'another checksum in the list': first_listed(16, 7, 4), 'packed in the list': first_listed(10, 8, 2), 'a comment in the list': first_listed(32, 4, 2),
    'fields in the list that do not end': first_listed(30, 60000, 2), 'another disk in the list': lambda m: first_listed(42, 2**32 - 1, 4)(m),
    'a list in 64 bits that is not there': lambda m: (lambda b: b[:-22] + b'PK\x06\x07' + bytes(16) + b[-22:])(packed(m)),
    'a list in 64 bits that lies': lambda m: (lambda b: b[:-22] + struct.pack('<4sQ2H2I4Q', b'PK\x06\x06', 44, 45, 45, 0, 0, 2**40, 2**40, 2**50, 2**50) + struct.pack('<4sIQI', b'PK\x06\x07', 0, len(b) - 22, 1) + b[-22:])(packed(m)),
    'the good file inside another': lambda m: packed({'model.segnb': packed(m)}), 'the good file as a member': lambda m: packed(honest({**m, 'fold_0/record.json': packed(m)})), 'an archive as weights': replaced(W, packed({'a': b'b'})),
    # names that look like others
    'a Cyrillic letter': added('pl\u0430ns.json'), 'wide letters': added('\uff50lans.json'), 'an accent beside its letter': added('fold_0/re\u0301cord.json'), 'a long s': added('plan\u017f.json'), 'no width': added('plans\u200b.json'), 'a dot at the end': added('plans.json.'),
    'a space at the end': added('plans.json '), 'a stream beside it': added('plans.json:evil'), 'digits of another script': added('fold_\u0661/record.json'),
    # numbers that are none
    'a plan of NaN': lambda m: packed(honest({**m, 'plans.json': m['plans.json'].replace(b'3.0', b'NaN')})), 'a plan of infinity': lambda m: packed(honest({**m, 'plans.json': m['plans.json'].replace(b'3.0', b'1e999')})),
    'a manifest of NaN': lambda m: packed({**m, 'manifest.json': m['manifest.json'].replace(b'{', b'{"cases": NaN,', 1)}), 'a plan of many digits': lambda m: packed(honest({**m, 'plans.json': m['plans.json'].replace(b'3.0', b'9'*4000)})),
    # plans that ask for too much
    'a million features': lambda m: packed(with_plan(m, base_num_features=10**6, max_num_features=10**9)), 'a kernel of a million': lambda m: packed(with_plan(m, conv_kernel_sizes=[[999999] * 3] * 2)),
    'a billion blocks': lambda m: packed(with_plan(m, architecture='residual', blocks_per_stage_encoder=[10**9, 1], blocks_per_stage_decoder=[1])), 'thousand stages': lambda m: packed(with_plan(m, pool_op_kernel_sizes=[[1] * 3] * 1000, conv_kernel_sizes=[[3] * 3] * 1001, base_num_features=1, max_num_features=1)),
    'an even kernel': lambda m: packed(with_plan(m, conv_kernel_sizes=[[2, 2, 2]] * 2)),
}


def everything(folder): return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob('*')}


@pytest.mark.parametrize('kind', HOSTILE)
def test_a_hostile_file_is_refused(tiny, tmp_path, monkeypatch, kind):
    "No hostile file is imported, and nothing is run or written anywhere below or beside"
    (tmp_path/'in'/'deep').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'in'/'deep')
    file = tmp_path/'in'/'deep'/'hostile.segnb'
    file.write_bytes(HOSTILE[kind](tiny.members))
    before = everything(tmp_path)
    with pytest.raises(ExchangeError) as told: import_model(file, 'out')
    assert everything(tmp_path) == before
    assert 'hostile.segnb' in str(told.value) and len(str(told.value)) < 1500


def test_the_forge_can_make_good_files(tiny, tmp_path):
    "What refuses above is what was changed, not the way the files are made"
    for i, raw in enumerate((packed(tiny.members), packed(honest(tiny.members)), packed(with_plan(tiny.members)), weights(lambda w: None)(tiny.members), packed(edited(tiny.members, 'dataset.json', name='x')))):
        (tmp_path/'m.segnb').write_bytes(raw)
        import_model(tmp_path/'m.segnb', tmp_path/str(i))
        assert answer(tmp_path/str(i))[0].shape == (11, 17, 14)


def test_every_byte_matters(tiny, tmp_path):
    "A bit turned anywhere is noticed, or changes nothing that is read"
    raw, rng, good = tiny.file.read_bytes(), np.random.default_rng(0), answer(tiny.model)[1]
    spots = np.concatenate([rng.integers(0, len(raw), 60), rng.integers(len(raw) - 1200, len(raw), 60)])
    for i, at in enumerate(spots.tolist()):
        (tmp_path/'m.segnb').write_bytes(raw[:at] + bytes([raw[at] ^ (1 << i % 8)]) + raw[at + 1:])
        try: out = import_model(tmp_path/'m.segnb', tmp_path/'out')
        except ExchangeError: assert not (tmp_path/'out').exists()
        else:
            for fold in (0, 1):
                one, other = (load_checkpoint(f/f'fold_{fold}'/'checkpoint_final.pt') for f in (tiny.model, out))
                assert all(torch.equal(v, other['network'][k]) for k, v in one['network'].items()) and one['plans'] == other['plans']
            shutil.rmtree(out)


def test_scores_may_be_none(tiny, tmp_path):
    "A score that is not defined is NaN in the texts of results: only texts whose numbers are used must hold numbers"
    (tmp_path/'m.segnb').write_bytes(packed(honest({**tiny.members, 'cross_validation.json': b'{"cases": {"smith": {"1": {"dice": NaN}}}}'})))
    assert np.isnan(read_json(import_model(tmp_path/'m.segnb', tmp_path/'out')/'cross_validation.json')['cases']['smith']['1']['dice'])


def test_a_file_is_known_by_what_is_in_it(tiny, tmp_path):
    shutil.copy(tiny.file, tmp_path/'model.zip')
    assert model_kind(tiny.file) == model_kind(tmp_path/'model.zip') == 'segnb file'
    with pytest.raises(ExchangeError, match='a model folder of segnb; .*use it as it is'): model_kind(tiny.model)
    (tmp_path/'inside.zip').write_bytes(packed({'model.segnb': tiny.file.read_bytes()}))
    with pytest.raises(ExchangeError, match='found model.segnb'): model_kind(tmp_path/'inside.zip')


def test_members_of_many_gigabytes_say_their_size_in_64_bits(tiny, tmp_path, monkeypatch):
    "As zipfile writes them; here the limit is a kilobyte, so that a small model is large"
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 1000)
    export_model(tiny.model, tmp_path/'m.segnb')
    raw = (tmp_path/'m.segnb').read_bytes()
    assert b'\xff'*8 in raw[:100] and np.array_equal(answer(import_model(tmp_path/'m.segnb', tmp_path/'out'))[1], answer(tiny.model)[1])
    at = raw.index(b'\xff'*8) + 8 + 4 + len('plans.json') + 4                                     # what stands in 64 bits in front of the first member
    (tmp_path/'lies.segnb').write_bytes(raw[:at] + struct.pack('<Q', 7) + raw[at + 8:])
    with pytest.raises(ExchangeError, match='another size or checksum'): import_model(tmp_path/'lies.segnb', tmp_path/'lies')


def test_missing_files_are_named(tmp_path):
    for read in (describe_model, lambda f: import_model(f, tmp_path/'out')):
        with pytest.raises(ExchangeError, match='no such file'): read(tmp_path/'none.segnb')
        with pytest.raises(ExchangeError, match='no such file'): read(tmp_path)


def test_a_stranger_cannot_move_the_cursor(tiny, tmp_path):
    (tmp_path/'m.segnb').write_bytes(packed(honest(tiny.members, description='good\x1b[2J\x1b]0;title\x07\n licence: MIT <script>')))
    card = describe_model(tmp_path/'m.segnb')
    assert '\x1b' not in str(card) and '\x07' not in str(card) and '<script>' not in card._repr_html_() and str(card).count('\n') == len(card.rows()) - 1


def test_a_killed_import_leaves_no_model(tiny, tmp_path):
    "Whole or not at all, also when the process dies while it writes"
    code = ('import os, sys, segnb.exchange as e\n'
            'real = e.save_checkpoint\n'
            'def once(state, file):\n'
            '    real(state, file)\n'
            '    os._exit(9)\n'
            'e.save_checkpoint = once\n'
            'e.import_model(*sys.argv[1:])\n')
    done = subprocess.run([sys.executable, '-c', code, str(tiny.file), str(tmp_path/'3d_fullres')], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 9 and not (tmp_path/'3d_fullres').exists()
    assert import_model(tiny.file, tmp_path/'3d_fullres').is_dir()


ORIGIN = dict(kind='module', name='nets_84:build', file=None, digest='ab', source='x', package=None, options={}, lost=[])
STRANGE = {'no kind': {'name': 'nets_84:build'}, 'a kind of its own': ORIGIN | {'kind': 'magic'}, 'a list': [ORIGIN], 'a text': 'nets_84:build', 'no name': ORIGIN | {'name': 3}, 'options that are none': ORIGIN | {'options': [1]},
           'a helper of segnb': ORIGIN | {'kind': 'segnb', 'name': 'segnb.workers:write_json'}, 'a part of a factory': ORIGIN | {'kind': 'segnb', 'name': 'segnb.network:build_network.__class__'},
           'a billion blocks': ORIGIN | {'kind': 'segnb', 'name': 'segnb.custom_network:build_swin_unet', 'options': {'blocks': 10**9}}}

@pytest.mark.parametrize('kind', STRANGE)
def test_strange_origins_are_refused(tiny, tmp_path, monkeypatch, kind):
    "A module that the receiver has is not run because a file names it"
    (tmp_path/'nets_84.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nfrom segnb.network import build_network as build\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = next(n for n in tiny.members if n.endswith('checkpoint.json'))
    told = json.dumps(json.loads(tiny.members[name]) | {'origin': STRANGE[kind]}).encode()
    (tmp_path/'b.segnb').write_bytes(packed(honest({**tiny.members, name: told})))
    with pytest.raises(ExchangeError, match='strangely where its network'): import_model(tmp_path/'b.segnb', tmp_path/'out')
    assert not (tmp_path/'out').exists() and not (tmp_path/'ran').exists()
