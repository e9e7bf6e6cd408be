"""Record what nnU-Net v2 makes of made-up cases: preprocessed data, logits and label maps, with drawn weights.

    python tests/record/v2_prediction.py tests/recorded

needs nnunetv2 2.8.1 and torch; see README.md. Writes v2_preprocessing.npz and v2_prediction.npz.
"""
import json, os, sys
from copy import deepcopy
from pathlib import Path

import numpy as np
from scipy import ndimage

SPLINE = dict(order=3, order_z=0, force_separate_z=None)
TORCH = dict(force_separate_z=None)
CT = dict(mean=60., std=35., median=58., min=-900., max=900., percentile_00_5=-80., percentile_99_5=170.)
# shape and spacing of the image, order of the plan's axes, target spacing in that order, patch; the rest has a usual value
CASES = {
    'plain': dict(shape=(14, 30, 33), spacing=(2., 1., 1.), target=(1.6, 1.1, 1.1), patch=(8, 16, 16)),
    'cropped': dict(shape=(20, 34, 30), spacing=(1.5, 1., 1.), target=(1.4, 1.2, 1.2), patch=(8, 16, 16), body=True, channels=['T1', 'T2'], folds=2),
    'turned': dict(shape=(30, 28, 11), spacing=(1., 1., 2.5), target=(2., .9, .9), patch=(8, 16, 16), forward=(2, 0, 1), body=True, mirror=(0, 2)),
    'coarse z': dict(shape=(9, 36, 34), spacing=(5., 1., 1.), target=(3.6, .9, 1.1), patch=(4, 16, 16), kernel=(1, 3, 3)),
    'coarse plan': dict(shape=(24, 26, 30), spacing=(1., 1., 1.), target=(3.5, 1., 1.1), patch=(4, 16, 16)),
    'two disagree': dict(shape=(16, 12, 40), spacing=(2., 4., .8), target=(4., 1.1, 1.), patch=(4, 16, 16), forward=(0, 1, 2)),
    'slices': dict(shape=(7, 33, 29), spacing=(4., 1., 1.), target=(1.2, 1.1), patch=(16, 16), body=True),
    'small': dict(shape=(6, 12, 11), spacing=(2., 1., 1.), target=(2., 1., 1.), patch=(8, 16, 16)),
    'residual': dict(shape=(16, 30, 26), spacing=(1.5, 1., 1.), target=(1.5, 1.3, 1.3), patch=(8, 16, 16), residual=True, channels=['CT', 'T1']),
    'regions': dict(shape=(14, 28, 30), spacing=(1.5, 1., 1.), target=(1.3, 1.2, 1.1), patch=(8, 16, 16), body=True, regions=True),
    'torch': dict(shape=(14, 30, 33), spacing=(2., 1., 1.), target=(1.6, 1.1, 1.1), patch=(8, 16, 16), function='resample_torch_fornnunet', body=True),
    'torch, coarse z': dict(shape=(9, 36, 34), spacing=(5., 1., 1.), target=(3.6, .9, 1.1), patch=(4, 16, 16), function='resample_torch_fornnunet'),
    'nothing': dict(shape=(10, 26, 25), spacing=(2., 1., 1.), target=(1.6, 1.1, 1.1), patch=(8, 16, 16), function='no_resampling_hack'),
    'z order': dict(shape=(9, 30, 31), spacing=(4.5, 1., 1.), target=(3., .9, 1.1), patch=(4, 16, 16), kwargs=dict(order_z=1)),
    'never apart': dict(shape=(9, 30, 31), spacing=(4.5, 1., 1.), target=(3., .9, 1.1), patch=(4, 16, 16), kwargs=dict(force_separate_z=False)),
    'second stage': dict(shape=(20, 34, 30), spacing=(1.5, 1., 1.), target=(1.4, 1.2, 1.2), patch=(8, 16, 16), body=True, previous=True),
    'tiny units': dict(shape=(14, 26, 27), spacing=(2., 1., 1.), target=(1.6, 1.1, 1.1), patch=(8, 16, 16), unit=1e-6, body=True),
}


def case(d):
    "Image (C, Z, Y, X) and label map (Z, Y, X), drawn from a seed"
    rng = np.random.default_rng(len(d['shape']) * 1000 + sum(d['shape']))
    smooth = lambda sigma: ndimage.gaussian_filter(rng.normal(size=d['shape']), sigma, mode='wrap')
    blob, label = smooth(2), np.zeros(d['shape'], np.int16)
    label[blob > np.quantile(blob, .7)], label[blob > np.quantile(blob, .9)] = 1, 2
    channels = d.get('channels', ['T1' if d.get('body') else 'CT'])
    image = np.stack([60 + 300 * smooth(1) + 25 * (label > 0) * (c + 1) + 20 * (label == 2) for c in range(len(channels))])
    if d.get('body'):
        grid = np.meshgrid(*[np.linspace(-1.25, 1.25, n) for n in d['shape']], indexing='ij')
        outside = sum(g**2 for g in grid) > 1
        image[:, outside] = 0
        image[:, d['shape'][0] // 2, d['shape'][1] // 2, d['shape'][2] // 2] = 0 # a hole, which is filled
        label[outside] *= rng.random(int(outside.sum())) < .05 # a little foreground in the air
    return (image * d.get('unit', 1)).astype(np.float32), label


def plans_of(d):
    "Plans and dataset.json as nnU-Net v2 writes them"
    channels = d.get('channels', ['T1' if d.get('body') else 'CT'])
    axes, n = len(d['patch']), 3
    function = d.get('function', 'resample_data_or_seg_to_shape')
    usual = {} if function == 'no_resampling_hack' else TORCH if 'torch' in function else SPLINE
    def kwargs(is_seg, order): return ({} if not usual else {'is_seg': is_seg, **usual, **({'order': order} if 'order' in usual else {}), **d.get('kwargs', {})})
    strides = [[1] * axes, [1, 2, 2][-axes:], [2] * axes]
    kernels = [list(d.get('kernel', (3,) * axes)), [3] * axes, [3] * axes]
    stages = {'n_blocks_per_stage': [1, 2, 2]} if d.get('residual') else {'n_conv_per_stage': [2] * n}
    dims = 'torch.nn.modules.{}.{}' + f'{axes}d'
    configuration = dict(
        data_identifier='x', preprocessor_name='DefaultPreprocessor', batch_size=2, patch_size=list(d['patch']), spacing=list(d['target']),
        median_image_size_in_voxels=list(d['shape'])[-axes:], normalization_schemes=['CTNormalization' if c == 'CT' else 'ZScoreNormalization' for c in channels],
        use_mask_for_norm=[bool(d.get('body')) and c != 'CT' for c in channels], batch_dice=False,
        **{f'resampling_fn_{what}': function for what in ('data', 'seg', 'probabilities')}, resampling_fn_data_kwargs=kwargs(False, 3),
        resampling_fn_seg_kwargs=kwargs(True, 1), resampling_fn_probabilities_kwargs=kwargs(False, 1),
        architecture=dict(
            network_class_name=f"dynamic_network_architectures.architectures.unet.{'ResidualEncoderUNet' if d.get('residual') else 'PlainConvUNet'}",
            arch_kwargs=dict(n_stages=n, features_per_stage=[4, 8, 16], conv_op=dims.format('conv', 'Conv'), kernel_sizes=kernels, strides=strides, **stages,
                             n_conv_per_stage_decoder=[1 if d.get('residual') else 2] * (n - 1), conv_bias=True, norm_op=dims.format('instancenorm', 'InstanceNorm'),
                             norm_op_kwargs=dict(eps=1e-5, affine=True), dropout_op=None, dropout_op_kwargs=None, nonlin='torch.nn.LeakyReLU', nonlin_kwargs=dict(inplace=True)),
            _kw_requires_import=['conv_op', 'norm_op', 'dropout_op', 'nonlin']))
    name = '2d' if axes == 2 else '3d_cascade_fullres' if d.get('previous') else '3d_fullres'
    if d.get('previous'): configuration['previous_stage'] = '3d_lowres'
    forward = list(d.get('forward', (0, 1, 2)))
    plans = dict(dataset_name='Dataset001_Made', plans_name='nnUNetPlans', transpose_forward=forward, transpose_backward=[forward.index(i) for i in range(3)],
                 original_median_spacing_after_transp=list(np.array(d['spacing'])[forward]), original_median_shape_after_transp=list(np.array(d['shape'])[forward]),
                 image_reader_writer='SimpleITKIO', configurations={name: configuration, **({'3d_lowres': deepcopy(configuration)} if d.get('previous') else {})},
                 experiment_planner_used='ExperimentPlanner', label_manager='LabelManager',
                 foreground_intensity_properties_per_channel={str(i): CT for i in range(len(channels))})
    labels = {'background': 0, 'whole': [1, 2], 'core': [2]} if d.get('regions') else {'background': 0, 'a': 1, 'b': 2}
    dataset = dict(channel_names={str(i): c for i, c in enumerate(channels)}, labels=labels, numTraining=5, file_ending='.nii.gz',
                   **({'regions_class_order': [1, 2]} if d.get('regions') else {}))
    return json.loads(json.dumps(plans, default=float)), dataset, name


def weights(network, seed):
    "Drawn weights by their first names; the seed gives them again"
    import torch
    rng, seen, found = np.random.default_rng(seed), set(), {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen: continue
        seen.add(tensor.data_ptr())
        found[key] = list(tensor.shape)
        scale = 1. if key.endswith('weight') and tensor.ndim == 1 else (2 / max(1, np.prod(tensor.shape[1:])))**.5 if tensor.ndim > 1 else .3
        tensor.data.copy_(torch.from_numpy(rng.normal(0, scale, tensor.shape).astype(np.float32)))
    return found


def main(folder):
    os.environ.update(nnUNet_def_n_proc='1', nnUNet_raw='.', nnUNet_preprocessed='.', nnUNet_results='.', MPLBACKEND='agg')
    import torch
    torch.set_num_threads(1)
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as bring_home
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    ready, answers, about = {}, {}, {}
    for name, d in CASES.items():
        plans, dataset, configuration = plans_of(d)
        image, label = case(d)
        manager = PlansManager(deepcopy(plans))
        c, labels = manager.get_configuration(configuration), manager.get_label_manager(dataset)
        shown = label if d.get('previous') else None
        for truth in (label, shown):
            data, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(image, None if truth is None else truth[None], dict(spacing=list(d['spacing'])),
                                                                                    manager, c, dataset)
            if truth is label and not d.get('previous'): seg_of_truth = seg
        if not d.get('previous'): ready[f'{name}/seg'] = seg_of_truth[0].astype(np.int8)
        ready[f'{name}/data'] = data if data.size < 12000 else data[:, ::2, ::3, ::3]
        x = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels.foreground_labels, data.dtype))) if d.get('previous') else data
        networks, shapes = [], None
        for fold in range(d.get('folds', 1)):
            network = nnUNetTrainer.build_network_architecture(manager, c, len(x), labels.num_segmentation_heads, enable_deep_supervision=False)
            shapes = weights(network, 7 + fold)
            networks.append(deepcopy(network.state_dict()))
        p = nnUNetPredictor(tile_step_size=.5, use_gaussian=True, use_mirroring=True, perform_everything_on_device=False, device=torch.device('cpu'), allow_tqdm=False)
        p.manual_initialization(network, manager, c, networks, dataset, 'nnUNetTrainer', tuple(d.get('mirror', range(len(d['patch'])))))
        logits = p.predict_logits_from_preprocessed_data(torch.from_numpy(x))
        assert logits.dtype == torch.float16
        mask, kept = bring_home(logits, manager, c, labels, properties, return_probabilities=True, num_threads_torch=1)
        sure = np.sort(kept, 0)
        close = (np.abs(kept - .5) < 1e-3).any(0) if d.get('regions') else sure[-1] - sure[-2] < 4e-3
        answers[f'{name}/mask'], answers[f'{name}/close'] = mask.astype(np.uint8), np.packbits(close)
        answers[f'{name}/logits'] = logits.numpy()[:, ::3, ::4, ::4]
        answers[f'{name}/probabilities'] = np.asarray(kept, np.float16)[:, ::3, ::4, ::4]
        about[name] = dict(d, plans=plans, dataset=dataset, configuration=configuration, weights=shapes)
        print(name, mask.shape, np.bincount(mask.ravel()), 'close', int(close.sum()), flush=True)
    told = dict(about=json.dumps(about), command='python tests/record/v2_prediction.py tests/recorded')
    np.savez_compressed(Path(folder)/'v2_preprocessing.npz', **ready, command=told['command'])
    np.savez_compressed(Path(folder)/'v2_prediction.npz', **answers, **told)


if __name__ == '__main__': main(sys.argv[1])
