"""Record how nnU-Net 1.7.1 augments, for the parity checks of the augmentation chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/41_augmentation.py
Writes tests/recorded/41_augmentation.json (patch sizes to load, the settings of every transform, order-0 picks, quantiles
of what each transform alone does to one patch) and tests/recorded/41_augmentation.npz: `<kind>/data`, `<kind>/seg` (a
loaded batch) and per seed `<kind>/<seed>/data`, `<kind>/<seed>/target_<i>` (what the whole chain makes of it), kinds as in
KINDS; `one/data`, `one/seg` and `one/<step>`: one transform with given numbers; `remove/<seed>`: removed components.
"""
import contextlib, copy, json, os, platform, random, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED, MASKED = 41, [True, False]
POOLS = {3: [[1, 2, 2], [2, 2, 2], [2, 2, 2]], 2: [[2, 2], [2, 2], [2, 1]]}
KINDS = { # kind: (patch, dummy 2D, seeds, preset, cascade or regions)
    '3d': ((8, 12, 12), False, 8, '', None), 'dummy_2d': ((4, 16, 14), True, 4, '', None), '2d': ((24, 20), False, 6, '', None),
    '2d_long': ((32, 16), False, 3, '', None), 'regions': ((8, 12, 12), False, 2, '', 'regions'), 'cascade': ((8, 12, 12), False, 5, '', 'cascade'),
    'DA2': ((8, 12, 12), False, 3, 'DA2', None), 'DA3': ((8, 12, 12), False, 4, 'DA3', None), 'insane': ((8, 12, 12), False, 4, 'insane', None),
    'DA5': ((8, 12, 12), False, 4, 'DA5', None), 'DA5_2d': ((24, 24), False, 3, 'DA5', None), 'DA3_dummy': ((4, 14, 14), True, 2, 'DA3', None)}
REGIONS, DRAWS = {'whole': (1, 2), 'core': (2,)}, 2000
OUT = Path(__file__).resolve().parents[1]/'recorded'


def trainer(cls, defaults, patch_size, dummy_2d=False):
    "A trainer that knows just what its augmentation settings depend on; v1's global defaults as a fresh process has them"
    from nnunet.training.data_augmentation import default_data_augmentation as module
    for live, fresh in ((module.default_3D_augmentation_params, defaults[0]), (module.default_2D_augmentation_params, defaults[1])):
        live.clear()
        live.update(copy.deepcopy(fresh))
    return again(cls, patch_size, dummy_2d)


def again(cls, patch_size, dummy_2d=False):
    "A further trainer in the same process"
    self = cls.__new__(cls)
    self.net_num_pool_op_kernel_sizes, self.threeD, self.do_dummy_2D_aug = POOLS[len(patch_size)], len(patch_size) == 3, dummy_2d
    self.patch_size, self.use_mask_for_norm = np.array(patch_size), dict(enumerate(MASKED))
    self.print_to_log_file, self.do_mirroring, self.regions, self.num_classes = lambda *a, **k: None, True, None, 3
    self.setup_DA_params()
    return self


def chain_of(cls, defaults, patch, dummy, extra=None):
    "(trainer, list of its training transforms)"
    from nnunet.training.data_augmentation.data_augmentation_insaneDA import get_insaneDA_augmentation
    from nnunet.training.data_augmentation.data_augmentation_insaneDA2 import get_insaneDA_augmentation2
    from nnunet.training.data_augmentation.data_augmentation_moreDA import get_moreDA_augmentation
    t = trainer(cls, defaults, patch, dummy)
    if hasattr(t, 'get_train_transforms'): return t, t.get_train_transforms()
    make = {'nnUNetTrainerV2_DA3': get_insaneDA_augmentation2, 'nnUNetTrainerV2_insaneDA': get_insaneDA_augmentation}.get(cls.__name__, get_moreDA_augmentation)
    if extra == 'cascade': # what nnUNetTrainerV2CascadeFullRes.setup_DA_params adds
        t.data_aug_params.update(move_last_seg_chanel_to_data=True, cascade_do_cascade_augmentations=True, cascade_random_binary_transform_p=.4,
            cascade_random_binary_transform_p_per_label=1, cascade_random_binary_transform_size=(1, 8), cascade_remove_conn_comp_p=.2,
            cascade_remove_conn_comp_max_size_percent_threshold=.15, cascade_remove_conn_comp_fill_with_other_class_p=0.,
            selected_seg_channels=[0, 1], all_segmentation_labels=[1, 2])
    return t, make(None, None, t.patch_size, t.data_aug_params, deep_supervision_scales=t.deep_supervision_scales, pin_memory=False,
                   regions=REGIONS if extra == 'regions' else None)[0].transform.transforms


def loaded_batch(rng, shape, previous=False):
    seg = np.zeros((2, 1, *shape), np.float32)
    for sample in seg:
        for label in (1, 2):
            start = [int(rng.integers(0, n//2)) for n in shape]
            sample[(0, *(slice(s, s + int(rng.integers(2, 9))) for s in start))] = label
    seg[0, :, :3], seg[1, ..., :4] = -1, -1
    noise = np.round(rng.normal(0, .5, (2, 2, *shape)), 2)
    data = (np.concatenate([seg, -seg], 1) + noise).astype(np.float32)
    if previous: seg = np.concatenate([seg, np.maximum(np.roll(seg, 1, 3), 0)], 1)
    return data, seg


def plain(x):
    if isinstance(x, dict): return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)): return [plain(v) for v in x]
    if isinstance(x, np.generic): return x.item()
    return x if isinstance(x, (str, int, float, bool, type(None))) else getattr(x, '__name__', type(x).__name__)


def seeded(seed):
    np.random.seed(seed)
    random.seed(seed) # batchgenerators draws from both


def find(transforms, name, i=0):
    "The i-th transform of this class, looked for inside OneOfTransform too"
    flat = [u for t in transforms for u in getattr(t, 'list_of_transforms', [t])]
    return copy.copy([t for t in flat if type(t).__name__ == name][i])


def alone(chains):
    "{step: transform that happens to every sample}, with the ranges and the chances per channel of the recipe"
    def sure(t, **more):
        for k, v in {'p_per_sample': 1, **more}.items(): setattr(t, k, v)
        return t
    base, da5 = chains['3d'], chains['DA5']
    space = dict(p_rot_per_sample=0, p_scale_per_sample=0, p_el_per_sample=0, do_elastic_deform=False)
    steps = {'rotation': sure(find(base, 'SpatialTransform'), **{**space, 'p_rot_per_sample': 1}),
             'scale': sure(find(base, 'SpatialTransform'), **{**space, 'p_scale_per_sample': 1}),
             'scale_DA5': sure(find(da5, 'SpatialTransform'), **{**space, 'p_scale_per_sample': 1}),
             'rotation_DA5': sure(find(da5, 'SpatialTransform'), **{**space, 'p_rot_per_sample': 1}),
             'elastic_DA3': sure(find(chains['DA3'], 'SpatialTransform_2'), **{**space, 'p_el_per_sample': 1, 'do_elastic_deform': True}),
             'elastic_insane': sure(find(chains['insane'], 'SpatialTransform'), **{**space, 'p_el_per_sample': 1, 'do_elastic_deform': True})}
    names = {'noise': 'GaussianNoiseTransform', 'blur': 'GaussianBlurTransform', 'brightness': 'BrightnessMultiplicativeTransform',
             'contrast': 'ContrastAugmentationTransform', 'low_resolution': 'SimulateLowResolutionTransform', 'gamma_inverted': 'GammaTransform',
             'mirror': 'MirrorTransform'}
    steps |= {step: sure(find(base, name)) for step, name in names.items()} | {'gamma': sure(find(base, 'GammaTransform', 1))}
    names = {'quarter_turn': 'Rot90Transform', 'transpose': 'TransposeAxesTransform', 'median': 'MedianFilterTransform', 'blur_DA5': 'GaussianBlurTransform',
             'brightness_shift': 'BrightnessTransform', 'low_resolution_DA5': 'SimulateLowResolutionTransform', 'contrast_DA5': 'ContrastAugmentationTransform',
             'rectangles': 'BlankRectangleTransform', 'gradient': 'BrightnessGradientAdditiveTransform', 'local_gamma': 'LocalGammaTransform',
             'sharpen': 'SharpeningTransform'}
    steps |= {step: sure(find(da5, name)) for step, name in names.items()}
    return steps | {'contrast_free': sure(find(da5, 'ContrastAugmentationTransform', 1))}


def features(data, seg, crop):
    "Numbers that describe one sample: channel 0 and labels"
    x = data[0].astype(float)
    return [np.abs(x - crop).mean(), x.mean(), x.std(), x.min(), x.max(), x.ravel()[0], (seg[0] == 1).mean(), (seg[0] == 2).mean()]


def distributions(steps, data, seg, patch):
    "{step: [mean, sd, quantiles 5 to 95 %] per feature}"
    cut = tuple(slice((n - p)//2, (n - p)//2 + p) for n, p in zip(data.shape[1:], patch))
    small, labels, out = data[(slice(None), *cut)], seg[(slice(None), *cut)], {}
    for step, t in steps.items():
        spatial = step.split('_')[0] in ('rotation', 'scale', 'elastic')
        n = DRAWS//4 if step.startswith('elastic') else DRAWS
        seeded(SEED)
        rows = []
        for _ in range(n):
            b = t(data=(data if spatial else small)[None].copy(), seg=(seg if spatial else labels)[None].copy())
            rows.append(features(b['data'][0], b['seg'][0], small[0]))
        rows = np.array(rows)
        def short(x): return [[float(f'{v:.6g}') for v in row] for row in np.atleast_2d(x)]
        out[step] = {'draws': n, 'mean': short(rows.mean(0))[0], 'sd': short(rows.std(0))[0],
                     'quantiles': short(np.quantile(rows, np.arange(.05, .96, .05), axis=0))}
    return out


def given_numbers(steps, data, seg, patch):
    "{step: image after the transform with these numbers}"
    def const(v): return lambda *_: v
    def axis(values): return lambda shape, d: values[d]
    hill = dict(loc=axis((.2, .5, .7)), scale=axis((3., 4., 5.)), p_per_channel=1)
    numbers = {'rotation': dict(angle_x=(.3, .3), angle_y=(-.2, -.2), angle_z=(.5, .5)), 'scale': dict(scale=(1.2, 1.2)),
               'blur': dict(blur_sigma=(.8, .8), p_per_channel=1), 'brightness': dict(multiplier_range=(1.2, 1.2)), 'contrast': dict(contrast_range=(1.3, 1.3)),
               'contrast_free': dict(contrast_range=(1.3, 1.3), p_per_channel=1), 'low_resolution': dict(zoom_range=(.6, .6), p_per_channel=1),
               'gamma': dict(gamma_range=(1.4, 1.4)), 'gamma_inverted': dict(gamma_range=(1.4, 1.4)), 'brightness_shift': dict(mu=.4, sigma=0, p_per_channel=1),
               'median': dict(filter_size=3, p_per_channel=1), 'sharpen': dict(strength=.5, p_per_channel=1),
               'gradient': dict(max_strength=const(-2.), **hill), 'local_gamma': dict(gamma=const(2.5), **hill)}
    cut = tuple(slice((n - p)//2, (n - p)//2 + p) for n, p in zip(data.shape[1:], patch))
    out = {}
    for step, values in numbers.items():
        t, spatial = copy.copy(steps[step]), step in ('rotation', 'scale')
        for k, v in values.items(): setattr(t, k, v)
        d, s = (data, seg) if spatial else (a[(slice(None), *cut)] for a in (data, seg))
        b = t(data=d[None].copy(), seg=s[None].copy())
        out[f'one/{step}'] = b['data'][0].astype(np.float32)
        if spatial: out[f'one/{step}/seg'] = b['seg'][0].astype(np.int8)
    return out


def removed(rng):
    "The removal of components as it was meant: with the two arguments in their places"
    from nnunet.training.data_augmentation.pyramid_augmentations import RemoveRandomConnectedComponentFromOneHotEncodingTransform as Remove
    masks = (rng.random((1, 3, 8, 9, 10)) < [[[[[.12]]], [[[.06]]], [[[.3]]]]]).astype(np.float32)
    out = {'remove/masks': masks.astype(np.int8)}
    for seed in range(6):
        seeded(seed)
        t = Remove([-3, -2, -1], p_per_sample=.6, fill_with_other_class_p=0., dont_do_if_covers_more_than_X_percent=.05)
        out[f'remove/{seed}'] = t(data=masks.copy())['data'].astype(np.int8)
    return out


def main():
    from nnunet.training.data_augmentation import default_data_augmentation as module
    from nnunet.training.data_augmentation.downsampling import downsample_seg_for_ds_transform2
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2
    from nnunet.training.network_training.nnUNet_variants.data_augmentation.nnUNetTrainerV2_DA2 import nnUNetTrainerV2_DA2
    from nnunet.training.network_training.nnUNet_variants.data_augmentation.nnUNetTrainerV2_DA3 import nnUNetTrainerV2_DA3
    from nnunet.training.network_training.nnUNet_variants.data_augmentation.nnUNetTrainerV2_DA5 import nnUNetTrainerV2_DA5
    from nnunet.training.network_training.nnUNet_variants.data_augmentation.nnUNetTrainerV2_insaneDA import nnUNetTrainerV2_insaneDA
    presets = {'': nnUNetTrainerV2, 'DA2': nnUNetTrainerV2_DA2, 'DA3': nnUNetTrainerV2_DA3, 'DA5': nnUNetTrainerV2_DA5, 'insane': nnUNetTrainerV2_insaneDA}
    cls = nnUNetTrainerV2
    defaults = copy.deepcopy((module.default_3D_augmentation_params, module.default_2D_augmentation_params))
    rng, arrays, settings, loaded, chains = np.random.default_rng(SEED), {}, {}, [], {}
    patches = [[28, 36, 30], [40, 56, 40], [128, 128, 128], [20, 320, 256], *rng.integers(8, 320, (60, 3)).tolist()]
    for patch in patches:
        first = trainer(cls, defaults, patch).basic_generator_patch_size
        second = again(cls, patch).basic_generator_patch_size
        dummy = trainer(cls, defaults, patch, True).basic_generator_patch_size
        loaded.append(plain([patch, first, second, dummy]))
    presets_loaded = [plain([patch, dummy, name, trainer(c, defaults, patch, dummy).basic_generator_patch_size])
                      for name, c in presets.items() for patch, dummy in (([40, 56, 40], False), ([20, 64, 64], True), ([56, 40], False), ([96, 40], False))]
    for kind, (patch, dummy, seeds, preset, extra) in KINDS.items():
        t, chain = chain_of(presets[preset], defaults, patch, dummy, extra)
        chains[kind] = chain
        settings[kind] = {'patch_size': patch, 'dummy_2d': dummy, 'preset': preset, 'seeds': seeds, 'scales': plain(t.deep_supervision_scales),
                          'transforms': [[type(x).__name__, plain(vars(x))] for x in chain]}
        data, seg = arrays[f'{kind}/data'], arrays[f'{kind}/seg'] = loaded_batch(rng, t.basic_generator_patch_size, extra == 'cascade')
        for seed in range(seeds):
            seeded(seed)
            batch = dict(data=data.copy(), seg=seg.copy())
            for transform in chain: batch = transform(**batch)
            arrays[f'{kind}/{seed}/data'] = batch['data'].numpy()
            for i, target in enumerate(batch['target']): arrays[f'{kind}/{seed}/target_{i}'] = target.numpy().astype(np.int8)
    steps = alone(chains)
    data, seg = loaded_batch(rng, (16, 16, 16))
    arrays |= {'one/data': data[0], 'one/seg': seg[0].astype(np.int8)}
    for t in steps.values():
        if hasattr(t, 'patch_size'): t.patch_size = (10, 10, 10)
    steps['transpose'].transpose_any_of_these = steps['quarter_turn'].axes = (0, 1, 2)
    steps['rectangles'].rectangle_size = [[1, 3]]*3
    arrays |= given_numbers(steps, data[0], seg[0], (10, 10, 10))
    spread = distributions(steps, data[0], seg[0], (10, 10, 10))
    arrays |= removed(rng)
    picks = {}
    for n in range(1, 65):
        for scale in (1, 1/2, 1/4, 1/8, 1/16):
            if round(n*scale) < 1: continue
            line = np.arange(n, dtype=np.float32)[None, None, :, None, None]
            picks[f'{n}, {scale}'] = downsample_seg_for_ds_transform2(line, [[scale, 1, 1]])[0].ravel().astype(int).tolist()
    record = dict(command='python tests/record/41_augmentation.py', use_mask_for_norm=MASKED, pool_op_kernel_sizes=POOLS[3], pool_op_kernel_sizes_2d=POOLS[2],
                  loaded_patch_sizes=loaded, preset_patch_sizes=presets_loaded, settings=settings, picks=picks, spread=spread,
                  versions={'python': platform.python_version(),
                            **{k: version(k) for k in ('nnunet', 'numpy', 'scipy', 'scikit-image', 'batchgenerators')}})
    (OUT/'41_augmentation.json').write_text(json.dumps(record) + '\n', encoding='utf-8')
    np.savez_compressed(OUT/'41_augmentation.npz', **arrays)
    print('wrote', OUT/'41_augmentation.json', OUT/'41_augmentation.npz')


if __name__ == '__main__':
    with contextlib.redirect_stdout(open(os.devnull, 'w')): import nnunet
    main()
