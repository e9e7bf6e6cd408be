"""Cases preprocessed and predicted as nnU-Net v2 does it: with plan fields, drawn weights, and what v2 made of them."""
import importlib.util
import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.labels import Labels
from segnb.network import build_network, v2_key_map
from segnb.planning import Configuration, Plans
from segnb.prediction import Predictor
from segnb.preprocessing import preprocess_case

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location('v2_prediction', HERE/'record'/'v2_prediction.py')
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
answers, ready = np.load(HERE/'recorded'/'v2_prediction.npz'), np.load(HERE/'recorded'/'v2_preprocessing.npz')
about = json.loads(str(answers['about']))


def plans_of(name):
    "The recorded plan as ours"
    d, v2 = about[name], about[name]['plans']
    c, found = v2['configurations'][d['configuration']], {}
    kwargs, axes = c['architecture']['arch_kwargs'], len(c['patch_size'])
    short = {'resample_data_or_seg_to_shape': 'spline', 'resample_torch_fornnunet': 'torch', 'no_resampling_hack': 'none'}
    def settings(what):
        given, names = c[f'resampling_fn_{what}_kwargs'], dict(order='order', order_z='order_z', force_separate_z='separate')
        return {'function': short[c[f'resampling_fn_{what}']], **{names[k]: v for k, v in given.items() if k in names}}
    spacing, shape = list(c['spacing']), list(c['median_image_size_in_voxels'])
    if axes == 2: spacing, shape = [v2['original_median_spacing_after_transp'][0], *spacing], [d['shape'][0], *shape]
    residual = 'Residual' in c['architecture']['network_class_name']
    usual = dict(
        patch_size=c['patch_size'], batch_size=2, spacing=spacing, median_shape=shape, pool_op_kernel_sizes=kwargs['strides'][1:],
        num_pool_per_axis=[int(math.log2(n)) for n in np.prod(kwargs['strides'], axis=0)], conv_kernel_sizes=kwargs['kernel_sizes'],
        do_dummy_2d_data_aug=False, base_num_features=4, max_num_features=16, batch_dice=False, architecture='residual_v2' if residual else 'plain_v2',
        blocks_per_stage_encoder=kwargs.get('n_blocks_per_stage', kwargs.get('n_conv_per_stage')), blocks_per_stage_decoder=kwargs['n_conv_per_stage_decoder'],
        normalize_first=True, aggregate='logits_half', resampling={what: settings(what) for what in ('data', 'seg', 'probabilities')})
    found = {n: Configuration(n, **usual) for n in v2['configurations']}
    if 'previous_stage' in c: found[d['configuration']] = Configuration(d['configuration'], **usual, previous_stage='3d_lowres', previous_like_seg=True)
    named = {'CTNormalization': 'CT', 'ZScoreNormalization': 'zscore_v2'}
    intensities = {int(k): {('sd' if s == 'std' else s): x for s, x in v.items()} for k, v in v2['foreground_intensity_properties_per_channel'].items()}
    target = [v2['original_median_spacing_after_transp'][i] for i in v2['transpose_backward']]
    return Plans('', 'v2', 8, [*d['dataset']['channel_names'].values()], [1, 2], target, v2['transpose_forward'], v2['transpose_backward'],
                 [named[s] for s in c['normalization_schemes']], c['use_mask_for_norm'], intensities, found, {})


def predictor_of(name, **options):
    d, plans = about[name], plans_of(name)
    c, labels, networks = plans.configuration(d['configuration']), Labels.from_dict(d['dataset']), []
    names = v2_key_map(c)
    for fold in range(d.get('folds', 1)):
        network, rng, state = build_network(c, plans.n_inputs(c.name), labels.n_outputs, deep_supervision=False), np.random.default_rng(7 + fold), {}
        for key, shape in d['weights'].items():
            scale = 1. if key.endswith('weight') and len(shape) == 1 else (2/max(1, np.prod(shape[1:])))**.5 if len(shape) > 1 else .3
            state[names[key]] = torch.from_numpy(rng.normal(0, scale, shape).astype(np.float32))
        network.load_state_dict(state)
        networks.append(network)
    return Predictor(networks, plans, c.name, labels, 'cpu', mirror=tuple(d.get('mirror', range(len(d['patch'])))), **options)


@lru_cache(1)
def predicted(name):
    d = about[name]
    image, label = recorder.case(d)
    previous = label.astype(np.uint8) if d.get('previous') else None
    predictor = predictor_of(name)
    mask, probabilities = predictor.predict(image, tuple(d['spacing']), return_probabilities=True, previous=previous)
    data, _, properties = preprocess_case(image, None, d['spacing'], predictor.plans, d['configuration'], previous=previous)
    return mask, probabilities, predictor.predict_preprocessed(data, properties.get('previous'))


@pytest.mark.parametrize('name', about)
def test_preprocessed(name):
    d, plans = about[name], plans_of(name)
    image, label = recorder.case(d)
    previous = label if d.get('previous') else None
    data, _, properties = preprocess_case(image, None, d['spacing'], plans, d['configuration'], previous=previous)
    part = data if data.size < 12000 else data[:, ::2, ::3, ::3]
    theirs = ready[f'{name}/data']
    np.testing.assert_allclose(part, theirs, atol=1e-5*max(1, np.abs(theirs).max()))
    if previous is None: np.testing.assert_array_equal(preprocess_case(image, label, d['spacing'], plans, d['configuration'])[1], ready[f'{name}/seg'])
    assert properties['way_back']['scores'] == 'logits_half'


@pytest.mark.parametrize('name', about)
def test_logits(name):
    "all but a thousandth are the same number, to the last bit of half precision"
    ours, theirs = predicted(name)[2][:, ::3, ::4, ::4].astype(np.float16), answers[f'{name}/logits']
    assert ours.shape == theirs.shape
    far = np.abs(ours.astype(np.float32) - theirs.astype(np.float32))
    assert (far > 0).mean() < .02 and far.max() < 2**-8*max(1., float(np.abs(theirs.astype(np.float32)).max())), ((far > 0).mean(), far.max())


@pytest.mark.parametrize('name', about)
def test_mask(name):
    "the label map is that of v2 but where two answers are nearly equal"
    mask, probabilities, _ = predicted(name)
    theirs = answers[f'{name}/mask']
    close = np.unpackbits(answers[f'{name}/close'])[:mask.size].reshape(mask.shape).astype(bool)
    differ = mask != theirs
    assert not (differ & ~close).any(), (int(differ.sum()), int((differ & ~close).sum()))
    assert differ.sum() <= max(1, 2e-4*mask.size), int(differ.sum())
    np.testing.assert_allclose(probabilities[:, ::3, ::4, ::4], answers[f'{name}/probabilities'].astype(np.float32), atol=4e-3)


def test_files_and_slabs(tmp_path):
    "the same through files, with what is kept on the way: probabilities that anybody can average and decide"
    from segnb.export import read_probabilities, to_original_grid
    from segnb.image import Geometry, write_image
    name = 'cropped'
    d, predictor = about[name], predictor_of(name)
    image, _ = recorder.case(d)
    geometry = Geometry(tuple(d['spacing']), (0, 0, 0), tuple(np.eye(3).ravel()), image.shape[1:])
    files = [tmp_path/f'c_{i:04d}.nii.gz' for i in range(len(image))]
    for file, channel in zip(files, image): write_image(channel, geometry, file)
    mask = predictor.predict_files(files, tmp_path/'out'/'c.nii.gz', save_probabilities=True, maps=('margin', 'probability'))
    np.testing.assert_array_equal(mask, predicted(name)[0])
    kept, properties = read_probabilities(tmp_path/'out'/'c.npz')
    assert 'way_back' not in properties
    again = to_original_grid(kept, properties, predictor.labels)
    assert (again != mask).mean() < 1e-3
    np.testing.assert_allclose(kept.astype(np.float32).sum(0), 1, atol=2e-3)


def test_modes_and_regions():
    "deciding on the grid of the plan asks logits, not probabilities, whether they are above one half"
    name = 'regions'
    d = about[name]
    image, _ = recorder.case(d)
    normal = predicted(name)[0]
    for mode in ('fast', 'fastest'):
        quick = predictor_of(name, mode=mode).predict(image, tuple(d['spacing']))
        assert (quick != normal).mean() < .1


def test_defaults_are_v1():
    "without the fields a plan is what it was: no way back of its own, the same identity as in earlier versions"
    plans = plans_of('plain')
    c = plans.configuration('3d_fullres')
    import dataclasses
    old = dataclasses.replace(c, architecture='plain', blocks_per_stage_encoder=None, blocks_per_stage_decoder=None, normalize_first=False, resampling=None,
                              aggregate='probabilities')
    assert old.way_back is None
    d = old.to_dict()
    for key in ('normalize_first', 'resampling', 'previous_like_seg', 'previous_whole', 'aggregate', 'network_options'): del d[key]
    assert Configuration.from_dict(d) == old
    a, b = (dataclasses.replace(plans, configurations={'3d_fullres': x}).identity() for x in (old, Configuration.from_dict(d)))
    assert a == b != plans.identity()
