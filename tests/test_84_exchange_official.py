"Official models of nnU-Net v1 and v2: the same masks, the same numbers as Python's own reader, every variety of folder"
import json, pickle, shutil, warnings, zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.checkpoints import load_checkpoint
from segnb.exchange import ExchangeError, ExchangeWarning, _V1_KNOWN, _Weights, _v1_labels, load_nnunet, load_nnunet_v1, load_nnunet_v2, read_pickle
from segnb.labels import Labels
from segnb.planning import Plans
from segnb.postprocessing import Postprocessing
from segnb.prediction import Predictor

RECORDED = Path(__file__).parent/'recorded'
OFFICIAL = RECORDED/'official'
TRUTH = {v: dict(np.load(RECORDED/f'84_official_{v}.npz')) for v in ('v1', 'v2')}
KINDS = [(v, n) for v, names in (('v1', 'plain 2d residual regions cascade'), ('v2', 'plain 2d residual regions cascade torchres')) for n in names.split()]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    "{(version, name): model folder}"
    out = tmp_path_factory.mktemp('models')
    return {(v, n): load_nnunet(OFFICIAL/f'{v}_{n}.zip', out/f'{v}_{n}') for v, n in KINDS}


@pytest.fixture
def folders(tmp_path):
    "Unpack an official archive; gives its model folders by configuration"
    def unpack(name, to='official'):
        with zipfile.ZipFile(OFFICIAL/f'{name}.zip') as archive: archive.extractall(tmp_path/to)
        return sorted(p.parent for p in (tmp_path/to).rglob('plans.*'))
    return unpack


# ---- the same masks
@pytest.mark.parametrize('version, name', KINDS)
def test_masks_are_those_of_nnunet(converted, version, name):
    model, r, before = converted[version, name], TRUTH[version], {}
    for c in ('3d_lowres', '3d_cascade_fullres') if name == 'cascade' else (None,):
        p = Predictor.from_folder(model/c if c else model, device='cpu')
        mask = p.predict(r[f'{name}/data'].astype(np.float32), tuple(r[f'{name}/spacing']), **before)
        theirs, close = (r[f'{name}/{p.configuration.name}/{k}'] for k in ('mask', 'close'))
        different = mask != theirs
        assert not (different & ~close).any(), f'{different.sum()} voxels differ, {(different & ~close).sum()} of them no tie'
        assert different.sum() <= (0 if version == 'v1' else 3)
        before = {'previous': theirs}


def test_recorded_masks_hold_labels():
    "The comparison above would be empty with masks of background"
    for v, n in KINDS:
        mask = list(m for k, m in TRUTH[v].items() if k.startswith(f'{n}/') and k.endswith('/mask'))[-1]
        assert (mask > 0).mean() > .005, (v, n)


def test_a_cascade_can_be_repaired(tmp_path):
    "nnU-Net v1 squeezes the first map whole into the cropped image; asked to, segnb lays it where it belongs"
    r = TRUTH['v1']
    image, spacing = r['cascade/data'].astype(np.float32), tuple(r['cascade/spacing'])
    masks = [Predictor.from_folder(load_nnunet_v1(OFFICIAL/'v1_cascade.zip', tmp_path/str(repair), repair=repair)/'3d_cascade_fullres', device='cpu')
             .predict(image, spacing, previous=r['cascade/3d_lowres/mask']) for repair in (False, True)]
    assert (masks[0] == r['cascade/3d_cascade_fullres/mask']).all() and (masks[1] != masks[0]).any()


def test_both_stages_in_one_call(converted):
    from segnb.cascade import CascadePredictor
    r = TRUTH['v1']
    p = CascadePredictor.from_folder(converted['v1', 'cascade']/'3d_cascade_fullres', device='cpu')
    mask = p.predict(r['cascade/data'].astype(np.float32), tuple(r['cascade/spacing']))
    assert (mask == r['cascade/3d_cascade_fullres/mask']).all()


# ---- the folder
def test_the_folder_is_an_ordinary_one(converted):
    model = converted['v1', 'plain']
    names = sorted(p.relative_to(model).as_posix() for p in model.rglob('*') if p.is_file())
    assert names == ['dataset.json', 'fold_0/checkpoint_final.pt', 'fold_0/record.json', 'fold_1/checkpoint_final.pt', 'fold_1/record.json', 'plans.json', 'postprocessing.json']
    plans = Plans.load(model/'plans.json')
    state = load_checkpoint(model/'fold_1'/'checkpoint_final.pt', plans)
    assert state['fold'] == 1 and state['epoch'] == 2 and state['mirror_axes'] == [0, 1, 2] and len(state['history']) == 2
    record = json.loads((model/'fold_0'/'record.json').read_text())
    assert record['official']['system'] == 'nnU-Net v1' and record['official']['trainer'] == 'nnUNetTrainerV2'
    assert all(len(f['sha256']) == 64 for f in record['official']['files'].values())
    assert isinstance(Postprocessing.load(model/'postprocessing.json'), Postprocessing)
    assert 'nnU-Net v1' in plans.explain()


def test_plans_say_the_same(converted, folders):
    [folder] = folders('v1_plain')
    theirs, plans = pickle.loads((folder/'plans.pkl').read_bytes()), Plans.load(converted['v1', 'plain']/'plans.json')
    stage, c = theirs['plans_per_stage'][0], plans.configuration('3d_fullres')
    assert c.patch_size == tuple(stage['patch_size']) and c.spacing == tuple(stage['current_spacing']) and c.batch_size == 2
    assert c.pool_op_kernel_sizes == tuple(map(tuple, stage['pool_op_kernel_sizes'])) and plans.normalization_schemes == ('CT',)
    mine, ours = theirs['dataset_properties']['intensityproperties'][0], plans.intensities[0]
    assert ours['mean'] == float(mine['mean']) and ours['sd'] == float(mine['sd']) and ours['percentile_99_5'] == mine['percentile_99_5'] and ours['min'] == mine['mn']
    residual = Plans.load(converted['v1', 'residual']/'plans.json')
    assert residual.transpose_forward == (2, 0, 1) and residual.configuration('3d_fullres').blocks_per_stage_encoder == (1, 2, 2)


def test_cascades_share_their_plan(converted):
    for v in ('v1', 'v2'):
        a, b = (Plans.load(converted[v, 'cascade']/c/'plans.json') for c in ('3d_lowres', '3d_cascade_fullres'))
        assert a.identity() == b.identity() and b.configuration('3d_cascade_fullres').previous_stage == '3d_lowres'


def test_regions_come_with_the_trainer(converted, folders, tmp_path):
    labels = Labels.from_dict(json.loads((converted['v1', 'regions']/'dataset.json').read_text()))
    assert list(labels.regions) == ['whole tumor', 'tumor core', 'enhancing tumor'] and labels.region_order == (1, 2, 3)
    [folder] = folders('v1_regions')
    other = load_nnunet_v1(folder, tmp_path/'named', regions={'all': (1, 2, 3), 'inner': (2, 3), 'core': (3,)})
    assert list(Labels.from_dict(json.loads((other/'dataset.json').read_text())).regions) == ['all', 'inner', 'core']
    with pytest.raises(ExchangeError, match='does not fit the network'): load_nnunet_v1(folder, tmp_path/'two', regions={'all': (1, 2, 3), 'inner': (2, 3)})
    v2 = Labels.from_dict(json.loads((converted['v2', 'regions']/'dataset.json').read_text()))
    assert v2.ignore == 4 and list(v2.regions) == ['whole', 'core', 'enhancing']


def test_names_of_labels_can_be_given(folders, tmp_path):
    [folder] = folders('v1_plain')
    named = {'labels': {'0': 'background', '1': 'liver', '2': 'tumour'}, 'licence': 'CC-BY', 'training': ['private']}
    about = json.loads((load_nnunet_v1(folder, tmp_path/'a', dataset=named)/'dataset.json').read_text())
    assert about['labels']['2'] == 'tumour' and about['licence'] == 'CC-BY' and 'training' not in about
    with pytest.raises(ExchangeError, match='does not fit'): load_nnunet_v1(folder, tmp_path/'b', dataset={'labels': {'0': 'background', '1': 'liver'}})


def test_folders_archives_and_defaults(folders, tmp_path):
    [folder] = folders('v2_2d')
    made = load_nnunet(folder)
    assert made == folder.with_name(folder.name + '_segnb') and (made/'plans.json').exists()
    again = load_nnunet_v2(tmp_path/'official', tmp_path/'above') if not shutil.rmtree(made) else None
    assert (again/'fold_0'/'checkpoint_final.pt').exists()
    with pytest.raises(ExchangeError, match='something already'): load_nnunet_v2(folder, tmp_path/'above')
    assert load_nnunet_v2(folder, tmp_path/'above', overwrite=True, folds=0) == tmp_path/'above'
    with pytest.raises(ExchangeError, match='no such fold'): load_nnunet_v2(folder, tmp_path/'x', folds=[3])
    with pytest.raises(ExchangeError, match='no such checkpoint'): load_nnunet_v2(folder, tmp_path/'x', checkpoints='best')
    shutil.copy(folder/'fold_0'/'checkpoint_final.pth', folder/'fold_0'/'checkpoint_best.pth')
    assert sorted(p.name for p in load_nnunet_v2(folder, tmp_path/'y').rglob('*.pt')) == ['checkpoint_best.pt', 'checkpoint_final.pt']
    with pytest.raises(ExchangeError, match='no model of nnU-Net'): load_nnunet_v1(folder, tmp_path/'z')
    with pytest.raises(ExchangeError, match='no such folder'): load_nnunet(tmp_path/'nowhere.zip', tmp_path/'z')
    assert not (tmp_path/'x').exists() and not list(tmp_path.glob('.*'))


def test_a_place_among_the_models(tmp_path):
    assert load_nnunet(OFFICIAL/'v2_2d.zip', models=tmp_path/'models') == tmp_path/'models'/'Dataset084_Official'/'2d'
    assert load_nnunet(OFFICIAL/'v1_cascade.zip', models=tmp_path/'models') == tmp_path/'models'/'Task084_cascade'
    assert sorted(p.name for p in (tmp_path/'models'/'Task084_cascade').iterdir()) == ['3d_cascade_fullres', '3d_lowres']
    with pytest.raises(ExchangeError, match='something already'): load_nnunet(OFFICIAL/'v2_2d.zip', models=tmp_path/'models')


def test_the_folder_all_and_two_of_a_kind(folders, tmp_path):
    low, high = folders('v1_cascade')[::-1] if 'cascade' in str(folders('v1_cascade')[0]) else folders('v1_cascade')
    made = load_nnunet_v1(low, tmp_path/'low')
    assert (made/'fold_all').is_dir() and load_checkpoint(made/'fold_all'/'checkpoint_final.pt')['fold'] == 'all'
    shutil.copytree(low, low.with_name('nnUNetTrainerV2__second'))
    with pytest.raises(ExchangeError, match='several models of 3d_lowres'): load_nnunet_v1(tmp_path/'official', tmp_path/'x')


# ---- v1: what older and rarer folders hold
def edited(folder, change):
    "Change what a fold's .model.pkl says"
    for file in folder.glob('*/*.model.pkl'):
        info = pickle.loads(file.read_bytes())
        change(info)
        file.write_bytes(pickle.dumps(info, protocol=2))


def test_oldest_plans_lack_kernels(folders, tmp_path):
    [folder] = folders('v1_2d')
    def older(info):
        for stage in info['plans']['plans_per_stage'].values(): del stage['pool_op_kernel_sizes'], stage['conv_kernel_sizes']
        for key in ('transpose_forward', 'transpose_backward', 'conv_per_stage'): info['plans'].pop(key, None)
    edited(folder, older)
    c = Plans.load(load_nnunet_v1(folder, tmp_path/'m')/'plans.json').configuration('2d')
    assert c.pool_op_kernel_sizes == ((2, 2), (2, 2)) and c.conv_kernel_sizes == ((3, 3),)*3


@pytest.mark.parametrize('trainer, axes, options', [('nnUNetTrainerV2_noMirroring', [], None), ('nnUNetTrainerV2_ReLU', [0, 1], {'activation': 'relu'}), ('nnUNetTrainerV2_insaneDA', [0, 1], None)])
def test_what_trainers_decide(folders, tmp_path, trainer, axes, options):
    [folder] = folders('v1_2d')
    edited(folder, lambda info: info.update(name=trainer))
    made = load_nnunet_v1(folder, tmp_path/'m')
    assert load_checkpoint(made/'fold_0'/'checkpoint_final.pt')['mirror_axes'] == axes
    assert Plans.load(made/'plans.json').configuration('2d').network_options == options
    assert Predictor.from_folder(made, device='cpu').mirror_axes == tuple(axes)


@pytest.mark.parametrize('trainer, regions', [('BraTSRegions', True), ('BraTSRegions_BN', False), ('BraTSRegions_DA3_BN', True), ('BraTSRegions_DA4_BN_BD', True),
                                              ('BraTSRegions_Dice', True), ('_BN', False), ('_DA3_BN', False)])
def test_trainers_of_regions_are_known_by_name(trainer, regions):
    about = _v1_labels({'num_classes': 3}, f'nnUNetTrainerV2{trainer}', None, None)
    assert ('regions_class_order' in about) == regions
    assert _V1_KNOWN.fullmatch(f'nnUNetTrainerV2{trainer}')


@pytest.mark.parametrize('trainer', ['nnUNetTrainerV2_LReLU_slope_2en1', 'nnUNetTrainerV2_ReLU_convReLUIN', 'nnUNetTrainerV2_lReLU_convReLUIN'])
def test_networks_that_compute_otherwise_are_refused(folders, tmp_path, trainer):
    [folder] = folders('v1_2d')
    edited(folder, lambda info: info.update(name=trainer))
    with pytest.raises(ExchangeError, match=f'computes otherwise.*{trainer}'): load_nnunet_v1(folder, tmp_path/'m')
    assert not (tmp_path/'m').exists()


def test_strangers_are_told(folders, tmp_path):
    [folder] = folders('v1_2d')
    edited(folder, lambda info: info.update(name='OurOwnTrainer'))
    with pytest.warns(ExchangeWarning, match='OurOwnTrainer'): load_nnunet_v1(folder, tmp_path/'m')
    edited(folder, lambda info: info['plans'].update(preprocessor_name='PreprocessorFor3D_NoResampling'))
    with pytest.raises(ExchangeError, match='prepared in another way'), warnings.catch_warnings():
        warnings.simplefilter('ignore', ExchangeWarning)
        load_nnunet_v1(folder, tmp_path/'n')
    edited(folder, lambda info: info['plans'].update(conv_per_stage=3, preprocessor_name=None))
    with pytest.raises(ExchangeError, match='3 convolutions'): load_nnunet_v1(folder, tmp_path/'n')


def test_folds_of_different_plans_are_refused(folders, tmp_path):
    [folder] = folders('v1_plain')
    file = folder/'fold_1'/'model_final_checkpoint.model.pkl'
    info = pickle.loads(file.read_bytes())
    info['plans']['plans_per_stage'][0]['patch_size'] = np.array([12, 24, 24])
    file.write_bytes(pickle.dumps(info))
    with pytest.raises(ExchangeError, match='another plan'): load_nnunet_v1(folder, tmp_path/'m')


# ---- v2: older plans and plans that inherit
def replan(folder, change):
    plans = json.loads((folder/'plans.json').read_text())
    change(plans)
    (folder/'plans.json').write_text(json.dumps(plans))


@pytest.mark.parametrize('name', ['plain', '2d', 'residual'])
def test_plans_before_version_2_3(folders, tmp_path, converted, name):
    [folder] = folders(f'v2_{name}')
    def older(plans):
        for c in plans['configurations'].values():
            k = c.pop('architecture')
            kwargs = k['arch_kwargs']
            c.update(UNet_class_name=k['network_class_name'].rpartition('.')[2], UNet_base_num_features=3, unet_max_num_features=320, conv_kernel_sizes=kwargs['kernel_sizes'],
                     n_conv_per_stage_encoder=kwargs.get('n_conv_per_stage') or kwargs['n_blocks_per_stage'], n_conv_per_stage_decoder=kwargs['n_conv_per_stage_decoder'],
                     pool_op_kernel_sizes=kwargs['strides'], num_pool_per_axis=[2, 2])
        plans['foreground_intensity_properties_by_modality'] = plans.pop('foreground_intensity_properties_per_channel')
    replan(folder, older)
    old, new = (Plans.load(m/'plans.json') for m in (load_nnunet_v2(folder, tmp_path/'m'), converted['v2', name]))
    [c] = old.configurations
    a, b = old.configuration(c).to_dict(), new.configuration(c).to_dict()
    assert [k for k, v in a.items() if v != b[k]] == []
    assert old.intensities == new.intensities


def test_configurations_inherit_and_others_are_left(folders, tmp_path):
    [folder] = folders('v2_plain')
    def more(plans):
        plans['configurations']['3d_fullres_bs8'] = {'inherits_from': '3d_fullres', 'batch_size': 8}
        plans['configurations']['broken'] = {'inherits_from': 'broken'}
        plans['configurations']['other'] = {**plans['configurations']['3d_fullres'], 'normalization_schemes': ['ZScoreNormalization']}
    replan(folder, more)
    plans = Plans.load(load_nnunet_v2(folder, tmp_path/'m')/'plans.json')
    assert list(plans.configurations) == ['3d_fullres', '3d_fullres_bs8'] and plans.configuration('3d_fullres_bs8').batch_size == 8
    assert sorted(plans.trace['left_out']) == ['broken', 'other']


@pytest.mark.parametrize('path, value, words', [
    ('resampling_fn_data', 'my_resampling', 'my_resampling'), ('architecture.network_class_name', 'a.b.SwinUNETR', 'SwinUNETR'), ('resampling_fn_seg_kwargs.is_seg', False, 'is_seg'),
    ('architecture.arch_kwargs.strides', [[2, 2, 2]]*3, 'stages of'), ('architecture.arch_kwargs.nonlin_kwargs', {'negative_slope': .3}, 'negative_slope'),
    ('architecture.arch_kwargs.features_per_stage', [3, 5, 12], 'stages of'), ('normalization_schemes', ['Mine'], 'Mine'), ('preprocessor_name', 'Mine', 'prepared in another way'),
    ('inherits_from', '3d_fullres', 'inherits'), ('patch_size', [12, 20, 21], 'patch_size'), ('resampling_fn_data_kwargs.speed', 3, 'speed')])
def test_what_v2_plans_ask_and_segnb_has_not(folders, tmp_path, path, value, words):
    [folder] = folders('v2_plain')
    def change(plans):
        d, (*way, last) = plans['configurations']['3d_fullres'], path.split('.')
        for key in way: d = d[key]
        d[last] = value
    replan(folder, change)
    with pytest.raises(Exception, match=words) as caught: load_nnunet_v2(folder, tmp_path/'m')
    assert type(caught.value).__name__ in ('ExchangeError', 'PlansError') and not (tmp_path/'m').exists()


def test_prefixes_of_wrapped_networks(folders, tmp_path, converted):
    [folder] = folders('v2_2d')
    file = folder/'fold_0'/'checkpoint_final.pth'
    state = torch.load(file, weights_only=False)
    state['network_weights'] = OrderedDict((f'module._orig_mod.{k}', v) for k, v in state['network_weights'].items())
    state['inference_allowed_mirroring_axes'] = None
    torch.save(state, file)
    a, b = (load_checkpoint(m/'fold_0'/'checkpoint_final.pt') for m in (load_nnunet_v2(folder, tmp_path/'m'), converted['v2', '2d']))
    assert all(torch.equal(a['network'][k], b['network'][k]) for k in b['network']) and a['mirror_axes'] == [] and b['mirror_axes'] == [0, 1]


def test_images_that_were_turned(folders, tmp_path):
    [folder] = folders('v2_2d')
    replan(folder, lambda plans: plans.update(image_reader_writer='NibabelIOWithReorient'))
    with pytest.warns(ExchangeWarning, match='right, anterior, superior'): load_nnunet_v2(folder, tmp_path/'m')


# ---- the reader against Python's own
def alike(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, np.ndarray): return a.dtype.newbyteorder('=') == b.dtype.newbyteorder('=') and np.array_equal(a, b)
    return a == b or (a != a and b != b)


@pytest.mark.parametrize('protocol', range(6))
def test_values_as_python_reads_them(tmp_path, protocol):
    value = {'a': [1, -2, 3 << 70, 1.5, float('inf'), True, None, 'tëxt', b'bytes\xff'], 7: (1, (2,), (3, 4), (5, 6, 7), (8,)*9, ()), 'set': {1, 2}, 'frozen': frozenset('ab'),
             'np': [np.float32(1.25), np.float64(2), np.int64(-3), np.bool_(True), np.str_('word')], 'ordered': OrderedDict(x=1, y=OrderedDict(z=2)),
             'arrays': [np.arange(6).reshape(2, 3).astype(t) for t in ('f4', 'f8', 'i2', 'u1', '>i4', '?')] + [np.asfortranarray(np.ones((2, 3))), np.zeros((0, 3)), np.array(['ab', 'c'])]}
    value['again'] = value['a']
    (tmp_path/'p.pkl').write_bytes(pickle.dumps(value, protocol=protocol))
    found = read_pickle(tmp_path/'p.pkl')
    plain = pickle.loads((tmp_path/'p.pkl').read_bytes())
    plain['np'] = [v.item() for v in plain['np']]
    assert alike(plain, found)


@pytest.mark.parametrize('new', [True, False])
def test_tensors_as_torch_reads_them(tmp_path, new):
    base = torch.arange(24.).reshape(4, 6)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    value = {'t': base.t(), 'row': base[1], 'step': base[::2, ::3], 'one': torch.tensor(3.), 'none': torch.zeros(0, 3), 'parameter': torch.nn.Parameter(base), **{str(k): base.to(k) for k in kinds}}
    torch.save({'weights': value, 'device': torch.device('cpu'), 'size': torch.Size((1, 2))}, tmp_path/'w.pth', _use_new_zipfile_serialization=new)
    with _Weights(tmp_path/'w.pth') as w:
        assert w.value['device'] == 'cpu' and w.value['size'] == (1, 2)
        assert all(torch.equal(w.tensor(t), value[k]) and w.tensor(t).dtype == value[k].dtype for k, t in w.value['weights'].items())
