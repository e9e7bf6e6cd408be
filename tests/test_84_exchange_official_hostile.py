"Files that mean harm, in the shape of official models: each is refused by name, nothing is run, nothing is written"
import io, json, os, pickle, pickletools, re, shutil, struct, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.exchange import ExchangeError, load_nnunet, load_nnunet_v1, load_nnunet_v2, model_kind, read_pickle
from segnb.image import SegnbError

OFFICIAL = Path(__file__).parent/'recorded'/'official'


class Calls:
    "What a pickle makes of it: a call of `function`"
    def __init__(self, function, *arguments): self.function, self.arguments = function, arguments
    def __reduce__(self): return self.function, self.arguments


def word(name): return {o.name: o.code.encode('latin1') for o in pickletools.opcodes}[name]


CANARY = 'canary_of_the_pickle'

def touch(protocol): return pickle.dumps({'plans': Calls(os.system, f'touch {CANARY}')}, protocol=protocol)
def laughs():
    "Thirty lists, each of the one before twice: a billion values in two hundred bytes"
    return b']' + b''.join(b'q%c0](h%ch%ce' % (i, i, i) for i in range(30)) + b'.'
def nested(n): return b'N' + b'\x85' * n + b'.'

PICKLES = {  # name: (bytes, words of the refusal)
    'os.system, protocol 0': (touch(0), 'posix.system|nt.system'), 'os.system, protocol 2': (touch(2), 'posix.system|nt.system'), 'os.system, protocol 4': (touch(4), 'posix.system|nt.system'),
    'eval': (pickle.dumps(Calls(eval, f"open('{CANARY}', 'w')"), protocol=2), 'builtins.eval'), 'exec': (pickle.dumps(Calls(exec, f"open('{CANARY}', 'w')")), 'builtins.exec'),
    'getattr': (pickle.dumps(Calls(getattr, 'x', 'upper')), 'builtins.getattr'), 'import': (pickle.dumps(Calls(__import__, 'antigravity')), 'builtins.__import__'),
    'open': (pickle.dumps(Calls(open, CANARY, 'w'), protocol=2), 'io.open|_io.open'), 'numpy reads a file': (pickle.dumps(Calls(np.fromfile, '/etc/passwd')), 'fromfile'),
    'numpy loads another pickle': (b'cnumpy\nload\n(S"x"\ntR.', 'numpy.load'), 'torch loads another pickle': (pickle.dumps(Calls(torch.load, 'x')), 'torch.serialization.load'),
    'a name inside a name': (b'\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.', 'numpy.ndarray.tofile'),
    'a numpy that is not numpy': (b'cnumpy._core.multiarray_evil\nscalar\n.', 'multiarray_evil'),
    'a class, word INST': (b'(S"touch x"\nios\nsystem\n.', 'os.system'), 'an object, word OBJ': (b'(cos\nsystem\nS"touch x"\no.', 'os.system'),
    'a class of an instance': (b'(icollections\nOrderedDict\n.', 'makes an object'),
    'a registered extension': (word('EXT1') + b'\x01.', 'a word that no model needs'), 'a class with keywords': (b'\x80\x04ccollections\nOrderedDict\n)}\x92.', 'a word that no model needs'),
    'an outside reference': (b'Psomething\n.', 'a word that no model needs'), 'a storage outside torch': (b'(S"storage"\nS"x"\nI1\nI2\nI3\ntQ.', 'a tensor that cannot be understood'),
    'attributes of a class': (b'ccollections\nOrderedDict\n}S"x"\nI1\nsb.', 'makes an object'), 'a function as a value that is called twice': (b'cnumpy\nndarray\n)R.', 'calls what cannot be called'),
    'a text that is called': (b'S"os.system"\n(S"x"\ntR.', 'calls what cannot be called'),
    'objects in an array': (b'cnumpy\ndtype\n(S"O8"\nI00\nI01\ntR.', 'O8'), 'a kind of numbers without end': (b'cnumpy\ndtype\n(S"V99999999999"\nI00\nI01\ntR.', 'V99999999999'),
    'an array larger than its bytes': (b'cnumpy._core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n(S"f8"\ntR(I1000000000000\ntS"C"\ntR.', '4 bytes for an array'),
    'an array of negative size': (b'cnumpy._core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n(S"f8"\ntR(I-1\ntS"C"\ntR.', '0 bytes for an array'),
    'a codec that unpacks': (b'c_codecs\nencode\n(S"x"\nS"bz2"\ntR.', 'bz2'), 'a billion laughs': (laughs(), 'unfolds without end'), 'a list within itself': (b'](h\x00e.'.replace(b'](', b']q\x00('), 'unfolds without end'),
    'a tower of tuples': (nested(300000), 'unfolds without end'), 'a tower of tuples as a key': (b'}' + nested(300000)[:-1] + b'Ns.', 'a tuple as a key'),
    'a list as a key': (b'}](I1\neNs.', 'a list as a key'), 'cut off': (pickle.dumps({'a': list(range(100))})[:40], 'cannot be read'), 'empty': (b'', 'cannot be read'), 'noise': (bytes(range(255, 0, -1)), 'cannot be read'),
    'a text of four gigabytes': (b'\x80\x02X\xff\xff\xff\xfft.', 'cannot be read'), 'bytes of an impossible length': (b'\x80\x04\x8e' + b'\xff'*7 + b'\x7f' + b'.', 'cannot be read'),
    'an empty stack': (b'0R.', 'cannot be read'), 'a memory that is not there': (b'h\x07.', 'cannot be read'), 'more than one value': (b'NN.', 'cannot be read'), 'never a mark': (b'Nt.', 'cannot be read')}


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    "A folder to be in; nothing may be called or appear there"
    monkeypatch.chdir(tmp_path)
    import segnb.exchange as exchange
    monkeypatch.setitem(exchange._ROOM, 'values', 50_000)
    called = []
    for module, name in ((os, 'system'), (os, 'popen'), (pickle, 'loads'), (pickle, 'load'), (torch, 'load')): monkeypatch.setattr(module, name, lambda *a, **k: called.append(a))
    yield tmp_path
    assert not called and not (tmp_path/CANARY).exists()


def refused_pickle(guarded, raw, words):
    "The pickle is refused with these words, and nothing is written"
    (guarded/'plans.pkl').write_bytes(raw)
    with pytest.raises(ExchangeError, match=words): read_pickle(guarded/'plans.pkl')
    assert os.listdir(guarded) == ['plans.pkl']


@pytest.mark.parametrize('name', PICKLES)
def test_hostile_pickles(guarded, name): refused_pickle(guarded, *PICKLES[name])


def test_a_long_pickle(guarded, monkeypatch):
    import segnb.exchange as exchange
    monkeypatch.setitem(exchange._ROOM, 'words', 1000)
    (guarded/'p').write_bytes(b'N0'*2000 + b'N.')
    with pytest.raises(ExchangeError, match='more than 1000 words'): read_pickle(guarded/'p')
    monkeypatch.setitem(exchange.MOST, 'json', 100)
    with pytest.raises(ExchangeError, match='too long'): read_pickle(guarded/'p')


# ---- whole models
@pytest.fixture(scope='module')
def honest(tmp_path_factory):
    "{name: unpacked folder} that every test copies"
    out = {}
    for name in ('v1_2d', 'v2_2d'):
        folder = tmp_path_factory.mktemp(name)
        with zipfile.ZipFile(OFFICIAL/f'{name}.zip') as archive: archive.extractall(folder)
        out[name] = next(folder.rglob('plans.*')).parent
    return out


@pytest.fixture
def model(honest, tmp_path):
    def copy(name): return Path(shutil.copytree(honest[name], tmp_path/'there'/honest[name].name))
    return copy


def refused(folder, words, load=load_nnunet):
    "The model is refused, and no folder appears"
    around = folder.parent.parent
    before = sorted(around.rglob('*'))
    with pytest.raises(SegnbError, match=words) as caught: load(folder, around/'out')
    assert sorted(around.rglob('*')) == before
    return str(caught.value)


def rewritten(file, change, **options):
    "Save a checkpoint of torch again, with something changed"
    state = torch.load(file, weights_only=False)
    key = 'state_dict' if 'state_dict' in state else 'network_weights'
    change(state, state[key])
    torch.save(state, file, **options)


def twins(w):
    "All names of the first tensor"
    return [k for k, v in w.items() if v.data_ptr() == next(iter(w.values())).data_ptr()]
def bad_shape(state, w): w.update(dict.fromkeys(twins(w), torch.zeros(2, 2)))
def other_twin(state, w): w[next(iter(w))] = torch.zeros(2, 2)
def one_nan(state, w): w[next(iter(w))].view(-1)[0] = float('nan')
def infinite(state, w): w[next(iter(w))].view(-1)[0] = float('inf')
def one_more(state, w): w['extra.weight'] = torch.zeros(3)
def one_less(state, w):
    for k in twins(w): del w[k]
def a_list(state, w): w[next(iter(w))] = [1, 2]
def whole_numbers(state, w): w[next(iter(w))] = w[next(iter(w))].to(torch.int64)
def no_weights(state, w): state.pop('state_dict', None), state.pop('network_weights', None)
def a_call(state, w): state['plot'] = Calls(os.system, f'touch {CANARY}')
def a_module(state, w): state['network'] = torch.nn.Linear(2, 2)
def spread(state, w): w[next(iter(w))] = torch.zeros(1).expand(1 << 33)

CHANGES = {bad_shape: 'does not fit the network', other_twin: 'does not fit the network|two names for one tensor', one_nan: 'NaN or infinity', infinite: 'NaN or infinity', one_more: 'a tensor that the network of the plan does not have', one_less: 'does not fit the network',
           a_list: 'a tensor that the network', whole_numbers: 'does not fit the network', no_weights: 'holds no weights|no plan of nnU-Net', a_call: 'posix.system|nt.system', a_module: 'torch.nn.modules.linear.Linear',
           spread: 'more numbers than there are'}


@pytest.mark.parametrize('version', ['v1_2d', 'v2_2d'])
@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize('new', [True, False], ids=['archive', 'old'])
def test_hostile_checkpoints(model, version, change, new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = model(version)
    rewritten(next(folder.glob('fold_0/*.model' if version == 'v1_2d' else 'fold_0/*.pth')), change, _use_new_zipfile_serialization=new)
    refused(folder, CHANGES[change])
    assert not Path(CANARY).exists()


def rezipped(file, change):
    "Write the archive of a checkpoint again; `change(name, bytes)` gives the members in its place"
    with zipfile.ZipFile(file) as archive: members = [(n, archive.read(n)) for n in archive.namelist()]
    with zipfile.ZipFile(file, 'w') as archive:
        for member in [m for one in members for m in change(*one)]: archive.writestr(*member)


def last(n): return n.endswith('/data/0')
ARCHIVES = {
    'packed numbers': (lambda n, b: [(n, b, zipfile.ZIP_DEFLATED)], 'does not pack its numbers'), 'numbers cut short': (lambda n, b: [(n, b[:-4] if last(n) else b)], 'of another length'),
    'numbers missing': (lambda n, b: [] if last(n) else [(n, b)], 'missing or damaged'), 'two pickles': (lambda n, b: [(n, b), ('x/data.pkl', b)] if n.endswith('data.pkl') else [(n, b)], '2 members data.pkl'),
    'no pickle': (lambda n, b: [] if n.endswith('data.pkl') else [(n, b)], '0 members data.pkl'), 'big endian': (lambda n, b: [(n, b'big' if n.endswith('byteorder') else b)], 'another kind of machine'),
    'a pickle of its own': (lambda n, b: [(n, touch(2) if n.endswith('data.pkl') else b)], 'posix.system|nt.system')}


@pytest.mark.parametrize('name', ARCHIVES)
def test_hostile_archives_of_torch(model, name):
    folder, (change, words) = model('v1_2d'), ARCHIVES[name]
    rezipped(folder/'fold_0'/'model_final_checkpoint.model', change)
    refused(folder, words)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_two_members_of_one_name(model):
    folder = model('v1_2d')
    rezipped(folder/'fold_0'/'model_final_checkpoint.model', lambda n, b: [(n, b), (n, b)] if last(n) else [(n, b)])
    refused(folder, 'two members of one name')


@pytest.mark.parametrize('cut', [.1, .5, .9, .999])
@pytest.mark.parametrize('new', [True, False], ids=['archive', 'old'])
def test_checkpoints_that_are_cut_off(model, cut, new):
    folder = model('v1_2d')
    file = folder/'fold_0'/'model_final_checkpoint.model'
    rewritten(file, lambda *_: None, _use_new_zipfile_serialization=new)
    raw = file.read_bytes()
    file.write_bytes(raw[:int(len(raw)*cut)])
    refused(folder, 'damaged|cut off|cannot be read')


def test_old_checkpoints_that_lie(model):
    folder = model('v1_2d')
    file = folder/'fold_0'/'model_final_checkpoint.model'
    rewritten(file, lambda *_: None, _use_new_zipfile_serialization=False)
    raw = file.read_bytes()
    magic, rest = raw[:raw.index(b'.') + 1], raw[raw.index(b'.') + 1:]
    for changed, words in ((touch(2) + rest, 'posix.system|nt.system'), (pickle.dumps(7, 2) + rest, 'no checkpoint of torch'), (magic + pickle.dumps(1002, 2) + rest[rest.index(b'.') + 1:], 'no checkpoint of torch'),
                           (re.sub(rb'(little_endianq.)\x88', lambda m: m[1] + b'\x89', raw, flags=re.S), 'another kind of machine'), (b'\x00'*1000, 'no checkpoint'), (b'', 'no checkpoint|cannot')):
        file.write_bytes(changed)
        refused(folder, words)


def test_a_flipped_bit(model):
    folder = model('v1_2d')
    file = folder/'fold_0'/'model_final_checkpoint.model'
    raw = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive: place = archive.getinfo(next(n for n in archive.namelist() if last(n))).header_offset + 200
    raw[place] ^= 1
    file.write_bytes(raw)
    refused(folder, 'damaged')


# ---- plans
def plans_v1(change):
    def write(folder):
        for file in folder.glob('*/*.model.pkl'):
            info = pickle.loads(file.read_bytes())
            change(info)
            file.write_bytes(pickle.dumps(info))
    return write
def plans_v2(change):
    def write(folder):
        plans = json.loads((folder/'plans.json').read_text())
        change(plans, next(iter(plans['configurations'].values())))
        (folder/'plans.json').write_text(json.dumps(plans))
    return write
def text_of_plans(text): return lambda folder: (folder/'plans.json').write_text(text)

PLANS = {
    'v1: a million features': ('v1_2d', plans_v1(lambda i: i['plans'].update(base_num_features=1_000_000)), 'too few for the network|does not fit'), 'v1: no plans': ('v1_2d', plans_v1(lambda i: i.pop('plans')), 'no plan of nnU-Net v1'),
    'v1: a patch of text': ('v1_2d', plans_v1(lambda i: i['plans']['plans_per_stage'][0].update(patch_size='big')), 'no plan of nnU-Net v1'), 'v1: no stage': ('v1_2d', plans_v1(lambda i: i.update(init=i['init'][:5] + (9,) + i['init'][6:])), 'stage 9'),
    'v1: a billion channels': ('v1_2d', plans_v1(lambda i: i['plans'].update(num_modalities=10**9, modalities={})), 'no plan of nnU-Net v1|channels'), 'v1: a spacing of NaN': ('v1_2d', plans_v1(lambda i: i['plans']['plans_per_stage'][0].update(current_spacing=[float('nan')]*3)), 'spacing'),
    'v1: a thousand million labels': ('v1_2d', plans_v1(lambda i: i['plans'].update(num_classes=10**9)), 'labels|classes'),
    'v1: another call in the plan': ('v1_2d', lambda folder: next(folder.glob('*/*.model.pkl')).write_bytes(touch(4)), 'posix.system|nt.system'),
    'v1: a rule that is no list': ('v1_2d', lambda folder: (folder/'postprocessing.json').write_text('{"for_which_classes": 1, "min_valid_object_sizes": "__import__(\'os\').system(\'x\')"}'), 'post-processing'),
    'v1: a rule of brackets': ('v1_2d', lambda folder: (folder/'postprocessing.json').write_text(json.dumps({'for_which_classes': [], 'min_valid_object_sizes': '('*100000})), 'post-processing'),
    'v2: a million features': ('v2_2d', plans_v2(lambda p, c: c['architecture']['arch_kwargs'].update(features_per_stage=[10**6, 2*10**6, 4*10**6])), 'too few for the network|does not fit'),
    'v2: a thousand million stages': ('v2_2d', plans_v2(lambda p, c: c['architecture']['arch_kwargs'].update(n_conv_per_stage=10**9)), 'too few for the network|does not fit|at least'),
    'v2: deep JSON': ('v2_2d', text_of_plans('['*100000), 'brackets within'), 'v2: a key twice': ('v2_2d', text_of_plans('{"a": 1, "a": 2}'), 'twice'), 'v2: no JSON': ('v2_2d', text_of_plans('nothing'), 'cannot be trusted'),
    'v2: a list': ('v2_2d', text_of_plans('[]'), 'a list at the top'), 'v2: empty': ('v2_2d', text_of_plans('{}'), 'no plan of nnU-Net v2'), 'v2: a number of a thousand digits': ('v2_2d', text_of_plans('{"a": ' + '9'*10000 + '}'), 'cannot be trusted'),
    'v2: no data set': ('v2_2d', lambda folder: (folder/'dataset.json').unlink(), 'dataset.json is missing'), 'v2: labels that are none': ('v2_2d', lambda folder: (folder/'dataset.json').write_text('{"labels": 3, "channel_names": {}}'), 'labels'),
    'v2: the stage before itself': ('v2_2d', plans_v2(lambda p, c: c.update(previous_stage='2d')), 'no plan of nnU-Net v2|previous'),
    'v2: a median of infinity': ('v2_2d', plans_v2(lambda p, c: c.update(median_image_size_in_voxels=[1e400, 1])), 'the number Infinity')}


@pytest.mark.parametrize('name', PLANS)
def test_hostile_plans(model, name):
    version, write, words = PLANS[name]
    folder = model(version)
    write(folder)
    refused(folder, words)


# ---- archives of whole folders
def entry(name, mode=0o100644):
    e = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
    e.external_attr, e.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    return e

def zipped(folder, file, more):
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        for f in sorted(folder.rglob('*')):
            if f.is_file(): archive.write(f, f'model/{f.relative_to(folder)}')
        for name, content in more: archive.writestr(name, content)

MORE = {
    'above the folder': (entry('../plans.pkl'), b'x', 'leads elsewhere'), 'deep above the folder': (entry('model/a/../../../evil.model'), b'x', 'leads elsewhere'), 'from the root': (entry('/tmp/evil.pkl'), b'x', 'leads elsewhere'),
    'with backslashes': (entry('..\\evil.pkl'), b'x', 'leads elsewhere'), 'on a drive': (entry('C:evil.pkl'), b'x', 'leads elsewhere'), 'a link': (entry('model/fold_1', 0o120777), b'/etc', 'a link'),
    'a device': (entry('model/fold_2', 0o020666), b'', 'a link'), 'twice, in capitals': (entry('MODEL/PLANS.PKL'), b'x', 'two members'), 'zeros without end': (entry('model/fold_7/model_best.model'), bytes(30 << 20), 'packed into'),
    'a long plan': (entry('model/fold_7/plans.pkl'), bytes(70 << 20), 'packed into'), 'a dot': (entry('model/./x'), b'x', 'leads elsewhere'), 'a line break': (entry('model/x\ny'), b'x', 'leads elsewhere')}


@pytest.mark.parametrize('name', MORE)
def test_hostile_archives(model, tmp_path, name):
    folder, (e, content, words) = model('v1_2d'), MORE[name]
    zipped(folder, tmp_path/'there'/'x.zip', [(e, content)])
    refused(tmp_path/'there'/'x.zip', words)


@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'PK' + b[2:100], lambda b: b'', lambda b: b.replace(b'model/plans.pkl', b'model/plans.pk\x00'), lambda b: b[:2000] + bytes(200) + b[2200:]],
                         ids=['cut', 'a beginning', 'empty', 'a name with zero', 'overwritten'])
def test_damaged_archives(model, tmp_path, damage):
    zipped(model('v1_2d'), tmp_path/'there'/'x.zip', [])
    file = tmp_path/'there'/'x.zip'
    file.write_bytes(damage(file.read_bytes()))
    refused(file, 'no archive|damaged|leads elsewhere|no model', load_nnunet_v1)


def test_an_encrypted_archive(model, tmp_path):
    zipped(model('v1_2d'), tmp_path/'there'/'x.zip', [])
    file = tmp_path/'there'/'x.zip'
    raw = bytearray(file.read_bytes())
    for at in range(len(raw)):
        if raw[at:at + 4] == b'PK\x01\x02': raw[at + 8] |= 1
    file.write_bytes(raw)
    refused(file, 'encrypted')


def test_the_honest_ones_pass(model, tmp_path):
    "Else the refusals above would say nothing"
    for i, name in enumerate(('v1_2d', 'v2_2d')):
        folder = model(name)
        zipped(folder, tmp_path/f'{i}.zip', [(entry('model/read me.txt'), b'hello')])
        for source in (folder, tmp_path/f'{i}.zip'): assert (load_nnunet(source, tmp_path/f'out{i}', overwrite=True)/'fold_0'/'checkpoint_final.pt').exists()
        for new in (True, False):
            file = next(folder.glob('fold_0/*.model' if i == 0 else 'fold_0/*.pth'))
            rewritten(file, lambda *_: None, _use_new_zipfile_serialization=new)
            load_nnunet(folder, tmp_path/f'out{i}', overwrite=True)


# ---- small files that grow in memory, or while they are talked about
def _text(t): return b'X' + len(t.encode()).to_bytes(4, 'little') + t.encode()
def _long(n): return b'\x8b' + n.to_bytes(4, 'little') + b'\x7f'*n

GROWING = {
    'a device twice as long each time': (_text('x'*1000) + b'q\x00' + b'0ctorch\ndevice\n(h\x00h\x00tRq\x00'*40 + b'.', 'the device'),
    'zeros by their number': (b'c__builtin__\nbytes\n(J\xff\xff\xff\x7ftR.', 'bytes made of'), 'zeros by a long number': (b'c__builtin__\nbytearray\n(\x8a\x05\0\0\0\0\x08tR.', 'bytes made of'),
    'an array of a number': (b'cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S"u1"\ntRJ\xff\xff\xff\x7ftR.', 'bytes made of'),
    'one text, encoded again and again': (_text('é'*100_000) + b'q\x000](' + b'c_codecs\nencode\n(h\x00S"latin1"\ntR'*4000 + b'e.', 'unfolds without end'),
    'one list, a set again and again': (b'(' + b''.join(b'K%c' % i for i in range(256)) + b'lq\x000](' + b'cbuiltins\nset\n(h\x00tR'*20000 + b'e.', 'unfolds without end'),
    'laughs that are called': (laughs() [:-1] + b'(tR.', 'calls what cannot be called'), 'laughs as a tensor': (b'(S"storage"\n' + laughs()[:-1] + b'K\x01K\x01K\x01tQ.', 'cannot be understood'),
    'laughs as a codec': (b'c_codecs\nencode\n(S"x"\n' + laughs()[:-1] + b'tR.', 'the codec'), 'laughs as numbers': (b'cnumpy\ndtype\n(' + laughs()[:-1] + b'tR.', 'numbers of the kind'),
    'laughs as a shape': (b'cnumpy._core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n(S"f8"\ntR' + laughs()[:-1] + b'S"C"\ntR.', '4 bytes for an array'),
    'laughs with a state': (laughs()[:-1] + b'Nb.', 'makes an object'), 'laughs as a module': (laughs()[:-1] + _text('x') + b'\x93.', 'has no name'),
    'a module of a million letters': (_text('a'*1_000_000) + _text('x') + b'\x93.', 'has no name'), 'a shape of millions of digits': (_long(1 << 20)*2 + b'0.', 'bits'),
    'a key of millions of digits': (b'}' + _long(1 << 20) + b'Ns.', 'bits'), 'a key of many values': (b'}(' + b'N'*100 + b'tNs.', 'a tuple as a key'),
    'a buffer from outside': (b'\x80\x05\x97.', 'a word that no model needs'), 'frozen sets in frozen sets': (b'\x80\x04' + b'('*100000 + b'\x91'*100000 + b'.', 'a frozenset as a key')}


@pytest.mark.parametrize('name', GROWING)
def test_small_files_stay_small(guarded, monkeypatch, name):
    import tracemalloc
    import segnb.exchange as exchange
    monkeypatch.setitem(exchange._ROOM, 'made', 8 << 20)
    raw, words = GROWING[name]
    (guarded/'plans.pkl').write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(ExchangeError, match=words): read_pickle(guarded/'plans.pkl')
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally: tracemalloc.stop()


def test_texts_of_many_values(model, monkeypatch):
    import segnb.exchange as exchange
    monkeypatch.setitem(exchange.MOST, 'values', 1000)
    folder = model('v2_2d')
    (folder/'plans.json').write_text(json.dumps({'a': [[]]*2000}))
    refused(folder, 'more than 1000 values')


def test_many_names_for_one_storage(model):
    "Each tensor would be a copy of the one storage"
    folder = model('v1_2d')
    def alike(state, w):
        large = torch.zeros(max(v.numel() for v in w.values())*2)
        for k in w: w[k] = large
    rewritten(folder/'fold_0'/'model_final_checkpoint.model', alike)
    refused(folder, 'more numbers than the file holds')


def test_what_is_no_model_is_not_replaced(model, tmp_path):
    "overwrite=True replaces a model, not the folder of something else, and never the source itself"
    folder = model('v2_2d')
    letters = tmp_path/'letters'
    letters.mkdir()
    (letters/'letter.txt').write_text('dear')
    for out, words in ((letters, 'no model, it is not replaced'), (folder, 'lies in the folder that would be replaced'), (folder.parent, 'would be replaced')):
        with pytest.raises(ExchangeError, match=words): load_nnunet(folder, out, overwrite=True)
    assert (letters/'letter.txt').exists() and (folder/'plans.json').exists()


def test_forced_separate_resampling_is_said(model, tmp_path):
    folder = model('v1_2d')
    plans_v1(lambda i: i['plans'].update(segmentation_export_params={'force_separate_z': True, 'interpolation_order': 1, 'interpolation_order_z': 0}))(folder)
    with pytest.warns(UserWarning, match='force_separate_z=True'): load_nnunet(folder, tmp_path/'out')


# ---- names that look like others, calls of what is allowed with what it does not expect, states of objects
def _call(name, *arguments):
    "A pickle that calls `name`; arguments as pickles without their end"
    module, _, name = name.rpartition('.')
    return f'c{module}\n{name}\n'.encode() + b'(' + b''.join(arguments) + b't'
def _value(v): return pickle.dumps(v, protocol=1)[:-1]

F4 = _call('numpy.dtype', _value('f4')) + b'R'
ARRAY = _call('numpy.core.multiarray._reconstruct', b'cnumpy\nndarray\n', _value((0,)), _value('b')) + b'R'
CALLS = {
    'a Cyrillic letter in a module': (b'\x80\x04' + _text('c\u043ellections') + _text('OrderedDict') + b'\x93.', 'llections.OrderedDict'), 'the same in an old pickle': ('cc\u043ellections\nOrderedDict\n.'.encode(), 'cannot be read'),
    'a Greek letter in a name': (b'\x80\x04' + _text('numpy') + _text('dtyp\u03b5') + b'\x93.', 'numpy.dtyp'), 'wide letters': (b'\x80\x04' + _text('\uff4e\uff55mpy') + _text('dtype') + b'\x93.', 'mpy.dtype'),
    'an accent beside its letter': (b'\x80\x04' + _text('builtins') + _text('se\u0301t') + b'\x93.', 'builtins.se'),
    'a mark that turns the line': (b'\x80\x04' + _text('builtins') + _text('‮tes') + b'\x93.', 'builtins.'), 'a zero behind the name': (b'\x80\x04' + _text('builtins') + _text('set\x00') + b'\x93.', 'builtins.set'),
    'a line break in the name': (b'\x80\x04' + _text('numpy') + _text('dtype\n') + b'\x93.', 'numpy.dtype'), 'a name that the old one hides': (b'c__builtin__s\nset\n.', '__builtin__s|builtinss'),
    'the old name of a module with more': (b'c__builtin__\neval\n.', 'builtins.eval'), 'an empty module': (b'c\ndtype\n.', 'the file asks for .dtype|cannot be read'),
    'pairs that are none': (_call('collections.OrderedDict', b'I7\n') + b'R.', 'cannot be read'), 'pairs of three': (_call('collections.OrderedDict', _value([(1, 2, 3)])) + b'R.', 'cannot be read'),
    'a dictionary with a list as key': (_call('collections.OrderedDict', b'](](I1\ne(I2\ntee'.replace(b'](](', b'](](')) + b'R.', 'as a key|cannot be read|cannot be filled'), 'a set of sets': (_call('builtins.set', b'](](ee') + b'R.', 'a list as a key'),
    'a size of a number': (_call('torch.Size', b'I7\n') + b'R.', 'cannot be read'), 'a device of a list': (_call('torch.device', b']') + b'R.', 'cannot be read'), 'a device of ten thousand letters': (_call('torch.device', _text('a'*10_000)) + b'R.', 'the device'),
    'an array with too few of its state': (ARRAY + b'(K\x01tb.', 'cannot be read'), 'an array with a dictionary as state': (ARRAY + b'}b.', 'cannot be read'), 'an array with slots': (ARRAY + b'(N}U\x01xK\x01stb.', 'cannot be read'),
    'an array of another array': (ARRAY + b'(K\x01(K\x01t' + ARRAY + b'I00\nC\x04abcdtb.', 'cannot be read'), 'an array within itself': (ARRAY + b'q\x01(K\x01(K\x01t' + F4 + b'I00\nh\x01tb.', 'bytes made of'),
    'numbers with parts': (F4 + b'(K\x03U\x01<(U\x01atNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.', 'numbers that have parts'), 'numbers in an order that is none': (F4 + b'(K\x03K\x07NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.', 'cannot be read'),
    'numbers with slots': (F4 + b'(N}U\x04codeU\x01OstbN.', 'cannot be read'), 'a scalar of two numbers': (_call('numpy.core.multiarray.scalar', F4, b'C\x08abcdefgh') + b'R.', '8 bytes for an array'),
    'the state of a tensor': (b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01tQ}b.', 'makes an object'), 'the state of a list': (b']}b.', 'makes an object'), 'the state of a name': (b'cbuiltins\nset\n}b.', 'makes an object'),
    'a tensor of a list': (_call('torch._utils._rebuild_tensor_v2', b']', b'K\x00', b')', b')') + b'R.', 'a tensor without numbers'),
    'a tensor of more axes than strides': (_call('torch._utils._rebuild_tensor_v2', b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01tQ', b'K\x00', b'K\x01\x85', b')') + b'R.', 'impossible shape'),
    'a storage of negative length': (b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ.', 'cannot be understood'), 'a storage of objects': (b'(U\x07storagecnumpy\nndarray\nU\x010U\x03cpuK\x01tQ.', 'cannot be understood'),
    'a view of a storage': (b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x01(U\x01aK\x00K\x01ttQ.', 'lies in another one'), 'a text filled as a list': (b'U\x01aK\x01a.', 'fills what cannot be filled'),
    'a tuple filled as a list': (b')K\x01a.', 'fills what cannot be filled'), 'keys without values': (b'}(K\x01u.', 'cannot be read'), 'a set filled as a dictionary': (b'\x80\x04\x8fK\x01K\x02s.', 'fills what cannot be filled')}


@pytest.mark.parametrize('name', CALLS)
def test_calls_with_what_is_not_expected(guarded, name): refused_pickle(guarded, *CALLS[name])


def test_a_memory_that_is_filled_without_end(guarded, monkeypatch):
    "Two bytes a value that is kept: what can be kept is bounded by the words that are read"
    import tracemalloc
    import segnb.exchange as exchange
    monkeypatch.setitem(exchange._ROOM, 'words', 100_000)
    (guarded/'p').write_bytes(b'\x80\x04' + b'N\x94'*1_000_000 + b'.')
    tracemalloc.start()
    try:
        with pytest.raises(ExchangeError, match='more than 100000 words'): read_pickle(guarded/'p')
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally: tracemalloc.stop()


# ---- archives that lie: lists and headers that differ, members that overlap, archives in archives
def raw_zip(members, listed=None):
    "A zip archive by hand: members are (name, bytes) or (name, bytes, fields of the header in front, fields of the list)"
    out, directory = b'', b''
    for name, content, *lies in members:
        front, back = (dict(lie) for lie in (*lies, {}, {})[:2])
        encoded = name.encode()
        usual = dict(flags=0, method=0, crc=__import__('zlib').crc32(content), packed=len(content), size=len(content), name=encoded, more=b'', at=len(out))
        h, c = usual | front, usual | back
        if not front.get('nothing'): out += struct.pack('<4s5H3I2H', b'PK\x03\x04', 20, h['flags'], h['method'], 0, 33, h['crc'], h['packed'], h['size'], len(h['name']), len(h['more'])) + h['name'] + h['more'] + content
        directory += struct.pack('<4s6H3I5H2I', b'PK\x01\x02', 20, 20, c['flags'], c['method'], 0, 33, c['crc'], c['packed'], c['size'], len(c['name']), len(c['more']), 0, 0, 0, 0o100644 << 16, c['at']) + c['name'] + c['more']
    n = len(members) if listed is None else listed
    return out + directory + struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, n & 0xffff, n & 0xffff, len(directory), len(out), 0)


def zip64(size, packed): return struct.pack('<2H2Q', 1, 16, size, packed)
def members_of(folder): return [(f'model/{f.relative_to(folder).as_posix()}', f.read_bytes()) for f in sorted(folder.rglob('*')) if f.is_file()]
FILL = ('model/fold_3/model_best.model', b'x'*1000)
LYING = {
    'a terabyte in 64 bits': (lambda m: raw_zip([*m, (*FILL, {}, dict(size=0xffffffff, packed=0xffffffff, more=zip64(1 << 40, 1 << 40)))]), 'packed into|of more bytes than'),
    'a terabyte of a thousand bytes': (lambda m: raw_zip([*m, (*FILL, {}, dict(size=0xffffffff, packed=1000, more=struct.pack('<2HQ', 1, 8, 1 << 40)))]), 'packed into'),
    'more in 64 bits than there is': (lambda m: raw_zip([*m, (*FILL, {}, dict(size=0xffffffff, packed=0xffffffff, more=zip64(1 << 63, 1 << 63)))]), 'packed into|of more bytes than|damaged'),
    'half a 64-bit field': (lambda m: raw_zip([*m, (*FILL, {}, dict(size=0xffffffff, packed=0xffffffff, more=b'\x01\x00\x10\x00\x00\x00'))]), 'no archive, or it is damaged'),
    'another name in front': (lambda m: raw_zip([(n, c, dict(name=b'model/plans.PKL')) if n.endswith('/plans.pkl') else (n, c) for n, c in m]), 'no archive, or it is damaged'),
    'a way out in front': (lambda m: raw_zip([(n, c, dict(name=b'../../plans.pkl')) if n.endswith('/plans.pkl') else (n, c) for n, c in m]), 'no archive, or it is damaged'),
    'another checksum in the list': (lambda m: raw_zip([(n, c, {}, dict(crc=7)) if n.endswith('/plans.pkl') else (n, c) for n, c in m]), 'no archive, or it is damaged'),
    'another way of packing in the list': (lambda m: raw_zip([(n, c, {}, dict(method=8)) if n.endswith('/plans.pkl') else (n, c) for n, c in m]), 'no archive, or it is damaged'),
    'one that is read twice': (lambda m: raw_zip([*m, *((f'model/fold_{i}/model_best.model', m[-1][1], dict(nothing=True), dict(at=0)) for i in range(50, 60))]), 'of more bytes than|damaged'),
    'a thousand that overlap': (lambda m: raw_zip([*m, FILL, *((f'model/fold_{i}/model_best.model', FILL[1], dict(nothing=True), dict(at=0)) for i in range(1000))]), 'of more bytes than|damaged'),
    'a member beyond the end': (lambda m: raw_zip([*m, (*FILL, dict(nothing=True), dict(at=1 << 31))]), 'no archive, or it is damaged|of more bytes'),
    'a list that says less': (lambda m: raw_zip(m, 1)[:-12] + struct.pack('<2IH', 10, 0, 0) + b'', 'no archive|damaged|no model'),
    'only an archive inside': (lambda m: raw_zip([('model.zip', raw_zip(m))]), 'no model of nnU-Net'), 'an archive in an archive in an archive': (lambda m: raw_zip([('a.zip', raw_zip([('b.zip', raw_zip(m))]))]), 'no model of nnU-Net'),
    'an archive as a plan': (lambda m: raw_zip([(n, raw_zip([('plans.pkl', c)]) if n.endswith('/plans.pkl') else c) for n, c in m]), ''), # it only marks the place: every checkpoint has its own plan
    'an archive as the plan of a checkpoint': (lambda m: raw_zip([(n, raw_zip([('plans.pkl', c)]) if n.endswith('.model.pkl') else c) for n, c in m]), 'cannot be read'),
    'a folder that is a file': (lambda m: raw_zip([*m, ('model/fold_0', b'x')]), ''), 'a file that is a folder': (lambda m: raw_zip([*m, ('model/plans.pkl/x', b'x')]), '')}


@pytest.mark.parametrize('kind', LYING)
def test_archives_that_lie(model, tmp_path, kind):
    "Refused, or nothing of the lie is read"
    folder, (make, words) = model('v1_2d'), LYING[kind]
    file = tmp_path/'there'/'x.zip'
    file.write_bytes(make(members_of(folder)))
    if words: refused(file, words)
    else: assert (load_nnunet(file, tmp_path/'out')/'fold_0').is_dir()


def test_archives_by_hand_can_be_honest(model, tmp_path):
    file = tmp_path/'there'/'x.zip'
    members = members_of(model('v1_2d'))
    file.write_bytes(raw_zip([*members, (*FILL[:1], FILL[1], {}, dict(size=0xffffffff, packed=0xffffffff, more=zip64(1000, 1000)))]))
    with pytest.raises(ExchangeError, match='no such fold|checkpoint|plans'): load_nnunet(file, tmp_path/'out', folds=[7])
    file.write_bytes(raw_zip(members))
    assert (load_nnunet(file, tmp_path/'out')/'fold_0'/'checkpoint_final.pt').is_file()


def test_a_list_of_a_million_members(tmp_path):
    "Its entries would take a hundred times the memory of the file"
    import tracemalloc
    name, n = b'model/x', 400_000
    one = struct.pack('<4s6H3I5H2I', b'PK\x01\x02', 20, 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    (tmp_path/'x.zip').write_bytes(one*n + struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, 0xffff, 0xffff, len(one)*n, 0, 0))
    tracemalloc.start()
    try:
        for read in (model_kind, load_nnunet_v1):
            with pytest.raises(ExchangeError, match='damaged'): read(tmp_path/'x.zip')
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally: tracemalloc.stop()


# ---- folders
def test_links_that_lead_back(model):
    "A folder with many links to itself is looked at once, and its models are found once"
    folder = model('v1_2d')
    for i in range(30): (folder/f'again_{i}').symlink_to(folder.parent, target_is_directory=True)
    assert model_kind(folder) == 'nnU-Net v1' and (load_nnunet(folder, folder.parent.parent/'out')/'fold_0').is_dir()


@pytest.mark.parametrize('version, name', [('v1_2d', 'plans.pkl'), ('v1_2d', 'fold_0/model_final_checkpoint.model'), ('v1_2d', 'fold_0/model_final_checkpoint.model.pkl'), ('v1_2d', 'postprocessing.json'),
                                           ('v2_2d', 'plans.json'), ('v2_2d', 'dataset.json'), ('v2_2d', 'fold_0/checkpoint_final.pth')])
@pytest.mark.parametrize('kind', ['a device', 'a pipe', 'nowhere', 'itself', 'a folder', 'another file'])
def test_links_and_devices_in_place_of_files(model, version, name, kind, tmp_path):
    "Nothing waits, nothing is read without end; what is no file is as good as missing"
    folder = model(version)
    (folder/name).unlink(missing_ok=True)
    if kind == 'a pipe': os.mkfifo(folder/name)
    elif kind == 'a folder': (folder/name).mkdir()
    else: (folder/name).symlink_to({'a device': '/dev/zero', 'nowhere': tmp_path/'nowhere', 'itself': folder/name, 'another file': '/etc/passwd'}[kind])
    if (name == 'plans.pkl' and kind != 'a folder') or (name == 'postprocessing.json' and kind != 'another file'): # the first only marks the place, the second is no must
        assert (load_nnunet(folder, tmp_path/'out')/'fold_0'/'checkpoint_final.pt').is_file()
        return
    said = refused(folder, 'segnb|nnU-Net|missing|fold|read|file|trusted|checkpoint')
    assert 'root:' not in said, 'the words of a file elsewhere are repeated'


def test_texts_are_measured_before_they_are_read(model):
    folder = model('v2_2d')
    with open(folder/'dataset.json', 'r+b') as f: f.truncate(1 << 40)
    refused(folder, 'dataset.json is too long')


# ---- plans of numbers that are none
def everywhere(value):
    "Each place of the plan that holds a number, with `value` in it: {place: change}"
    with zipfile.ZipFile(OFFICIAL/'v2_2d.zip') as archive: plans = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith('plans.json'))))
    def places(x, way=()):
        if isinstance(x, dict): return [p for k, v in x.items() for p in places(v, (*way, k))]
        if isinstance(x, list): return [p for i, v in enumerate(x) for p in places(v, (*way, i))]
        return [way] if type(x) in (int, float) else []
    return places(plans)


@pytest.mark.parametrize('value', ['NaN', 'Infinity', '-Infinity', '1e999', '9'*4000, '-1', '"7"', 'null', '[[[]]]', '{"a": 1}', 'true', '1e308', '0'])
def test_every_number_of_a_plan(model, value, tmp_path, monkeypatch):
    "Refused, or a model that predicts without an error: never another exception, and numbers that are none always refused"
    import segnb.exchange as exchange
    monkeypatch.setattr(exchange, 'save_checkpoint', lambda state, file: file.touch())                # the weights are checked, not written
    folder, passed = model('v2_2d'), []
    text = (folder/'plans.json').read_text()
    for place in everywhere(value):
        plans = json.loads(text)
        inner = plans
        for key in place[:-1]: inner = inner[key]
        inner[place[-1]] = 'HERE'
        (folder/'plans.json').write_text(json.dumps(plans).replace('"HERE"', value))
        try: load_nnunet(folder, tmp_path/'out', overwrite=True)
        except SegnbError: continue
        passed.append(place)
    if value in ('NaN', 'Infinity', '-Infinity', '1e999'): assert not passed


# ---- checkpoints of before torch 1.6
def old(value, keys, storages=(), magic=0x1950a86a20f9469cfc6c, protocol=1001, info=None):
    "The five pickles and the numbers behind them"
    info = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}} if info is None else info
    return b''.join(p if isinstance(p, bytes) else pickle.dumps(p, 2) for p in (magic, protocol, info, value, keys)) + b''.join(storages)

def of_one(count, size=(4,)):
    "A dictionary with one tensor in the storage '0', which says that it has `count` numbers"
    return (b'\x80\x02}U\nstate_dict}U\x01w' + b'ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu' + pickle.dumps(count, 2)[2:-1] + b'NtQK\x00'
            + pickle.dumps(size, 2)[2:-1] + b'(K\x01tN' + b'Nt' + b'R' + b'ss.')
FOUR = struct.pack('<q', 4) + bytes(16)
OLD = {
    'honest': (old(of_one(4), ['0'], [FOUR]), None), 'a count of a billion': (old(of_one(1 << 30), ['0'], [struct.pack('<q', 1 << 30) + bytes(16)]), 'cut off'), 'a count of 2**39': (old(of_one(1 << 39), ['0'], [struct.pack('<q', 1 << 39)]), 'cut off'),
    'a negative count': (old(of_one(-4), ['0'], [FOUR]), 'cannot be understood'), 'another count in front': (old(of_one(4), ['0'], [struct.pack('<q', 5) + bytes(20)]), 'cut off, or damaged'),
    'no keys': (old(of_one(4), None, [FOUR]), 'no checkpoint, or it is damaged'), 'a number as keys': (old(of_one(4), 7, [FOUR]), 'no checkpoint, or it is damaged'), 'a text as keys': (old(of_one(4), '0', [FOUR]), None),
    'a key twice': (old(of_one(4), ['0', '0'], [FOUR]), 'cut off|damaged'), 'a key of nobody': (old(of_one(4), ['0', '1'], [FOUR, FOUR]), 'nothing asks for'), 'keys of keys': (old(of_one(4), [['0']], [FOUR]), 'nothing asks for'),
    'no numbers': (old(of_one(4), ['0']), 'cut off'), 'keys that are missing': (old(of_one(4), [], [FOUR]), 'missing or damaged'), 'keys that call': (old(of_one(4), touch(2), [FOUR]), 'posix.system|nt.system'),
    'a shape of more': (old(of_one(4, (5,)), ['0'], [FOUR]), 'more numbers than there are'), 'a shape of negative numbers': (old(of_one(4, (-1,)), ['0'], [FOUR]), 'impossible shape'),
    'information that is a list': (old(of_one(4), ['0'], [FOUR], info=[1]), 'no checkpoint of torch'), 'a magic text': (old(of_one(4), ['0'], [FOUR], magic='x'), 'no checkpoint of torch'),
    'another version': (old(of_one(4), ['0'], [FOUR], protocol=1e300), 'no checkpoint of torch'), 'bytes of an impossible length': (b'\x80\x02\x8e' + b'\xff'*6 + b'\x00\x00.', 'cannot be read|damaged')}


@pytest.mark.parametrize('name', OLD)
def test_old_checkpoints_by_hand(tmp_path, name):
    import tracemalloc
    from segnb.exchange import _Weights
    raw, words = OLD[name]
    (tmp_path/'x.model').write_bytes(raw)
    tracemalloc.start()
    try:
        if words is None:
            with _Weights(tmp_path/'x.model') as w: assert torch.equal(w.tensor(w.value['state_dict']['w']), torch.zeros(4))
        else:
            with pytest.raises(ExchangeError, match=words):
                with _Weights(tmp_path/'x.model') as w: w.tensor(w.value['state_dict']['w'])
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally: tracemalloc.stop()


# ---- what is it?
KINDS_OF_FILES = {
    'v1 zip': (lambda t, v1, v2: OFFICIAL/'v1_plain.zip', 'nnU-Net v1'), 'v2 zip': (lambda t, v1, v2: OFFICIAL/'v2_cascade.zip', 'nnU-Net v2'), 'v1 folder': (lambda t, v1, v2: v1, 'nnU-Net v1'), 'v2 folder': (lambda t, v1, v2: v2, 'nnU-Net v2'),
    'above it': (lambda t, v1, v2: v2.parent, 'nnU-Net v2'), 'both': (lambda t, v1, v2: Path(shutil.copytree(v2, v1/'v2')).parent, 'found models of nnU-Net v1 and of v2'), 'nothing': (lambda t, v1, v2: (t/'e').mkdir() or t/'e', 'found nothing'),
    'nowhere': (lambda t, v1, v2: t/'x', 'no such folder or archive'), 'a fold alone': (lambda t, v1, v2: v2/'fold_0', 'checkpoints without a plan'), 'a plan alone': (lambda t, v1, v2: Path(shutil.copy(v2/'plans.json', (t/'p').mkdir() or t/'p')).parent, 'a plan without checkpoints'),
    'a checkpoint alone': (lambda t, v1, v2: next(v2.glob('fold_0/*.pth')), 'one checkpoint of torch, without its plan'), 'a pickle': (lambda t, v1, v2: v1/'plans.pkl', 'no archive'), 'a text': (lambda t, v1, v2: v2/'dataset.json', 'no archive'),
    'an empty file': (lambda t, v1, v2: (t/'e').touch() or t/'e', 'no archive'), 'the folder of segnb': (lambda t, v1, v2: load_nnunet(v2, t/'made'), 'found a model folder of segnb'),
    'the folder of segnb, packed': (lambda t, v1, v2: shutil.make_archive(str(t/'a'), 'zip', load_nnunet(v2, t/'made')), 'a model folder of segnb in an archive'), 'a pipe': (lambda t, v1, v2: os.mkfifo(t/'f') or t/'f', 'no such folder or archive')}


@pytest.mark.parametrize('kind', KINDS_OF_FILES)
def test_what_is_it(model, tmp_path, kind):
    make, wanted = KINDS_OF_FILES[kind]
    path = make(tmp_path, model('v1_2d').rename(tmp_path/'one'), model('v2_2d'))
    if wanted in ('nnU-Net v1', 'nnU-Net v2'): assert model_kind(path) == model_kind(str(path)) == wanted
    else:
        for ask in (model_kind, load_nnunet):
            with pytest.raises(ExchangeError, match=wanted): ask(path)
