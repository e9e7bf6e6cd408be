"""Record how nnU-Net 1.7.1 augments, for the parity checks of the augmentation chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/41_augmentation.py
Writes tests/recorded/41_augmentation.json (patch sizes to load, the settings of every transform, order-0 picks) and
tests/recorded/41_augmentation.npz: `<kind>/data`, `<kind>/seg` (a loaded batch) and per seed `<kind>/<seed>/data`,
`<kind>/<seed>/target_<i>` (what the whole chain makes of it); kind is `3d` or `dummy_2d`.
"""
import contextlib, copy, json, os, platform, random, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED, SEEDS = 41, {'3d': range(12), 'dummy_2d': range(6)}
PATCH, POOLS, MASKED = {'3d': (8, 12, 12), 'dummy_2d': (4, 16, 14)}, [[1, 2, 2], [2, 2, 2], [2, 2, 2]], [True, False]
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
    self.net_num_pool_op_kernel_sizes, self.threeD, self.do_dummy_2D_aug = POOLS, True, dummy_2d
    self.patch_size, self.use_mask_for_norm = np.array(patch_size), dict(enumerate(MASKED))
    self.print_to_log_file = lambda *a, **k: None
    self.setup_DA_params()
    return self


def loaded_batch(rng, shape):
    seg = np.zeros((2, 1, *shape), np.float32)
    for sample in seg:
        for label in (1, 2):
            start = [int(rng.integers(0, n//2)) for n in shape]
            sample[(0, *(slice(s, s + int(rng.integers(2, 9))) for s in start))] = label
    seg[0, :, :3], seg[1, ..., :4] = -1, -1
    noise = np.round(rng.normal(0, .5, (2, 2, *shape)), 2)
    return (np.concatenate([seg, -seg], 1) + noise).astype(np.float32), seg


def plain(x):
    if isinstance(x, dict): return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)): return [plain(v) for v in x]
    return x.item() if isinstance(x, np.generic) else x


def main():
    from nnunet.training.data_augmentation import default_data_augmentation as module
    from nnunet.training.data_augmentation.data_augmentation_moreDA import get_moreDA_augmentation
    from nnunet.training.data_augmentation.downsampling import downsample_seg_for_ds_transform2
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2 as cls
    defaults = copy.deepcopy((module.default_3D_augmentation_params, module.default_2D_augmentation_params))
    rng, arrays, settings, loaded = np.random.default_rng(SEED), {}, {}, []
    patches = [[28, 36, 30], [40, 56, 40], [128, 128, 128], [20, 320, 256], *rng.integers(8, 320, (60, 3)).tolist()]
    for patch in patches:
        first = trainer(cls, defaults, patch).basic_generator_patch_size
        second = again(cls, patch).basic_generator_patch_size
        dummy = trainer(cls, defaults, patch, True).basic_generator_patch_size
        loaded.append(plain([patch, first, second, dummy]))
    for kind, patch in PATCH.items():
        t = trainer(cls, defaults, patch, kind == 'dummy_2d')
        chain = get_moreDA_augmentation(None, None, t.patch_size, t.data_aug_params,
                                        deep_supervision_scales=t.deep_supervision_scales, pin_memory=False)[0].transform
        settings[kind] = {'scales': plain(t.deep_supervision_scales),
                          'transforms': [[type(x).__name__, plain(vars(x))] for x in chain.transforms]}
        data, seg = arrays[f'{kind}/data'], arrays[f'{kind}/seg'] = loaded_batch(rng, t.basic_generator_patch_size)
        for seed in SEEDS[kind]:
            np.random.seed(seed)
            random.seed(seed) # batchgenerators draws from both
            batch = chain(data=data.copy(), seg=seg.copy())
            arrays[f'{kind}/{seed}/data'] = batch['data'].numpy()
            for i, target in enumerate(batch['target']): arrays[f'{kind}/{seed}/target_{i}'] = target.numpy().astype(np.int8)
    picks = {}
    for n in range(1, 65):
        for scale in (1, 1/2, 1/4, 1/8, 1/16):
            if round(n*scale) < 1: continue
            line = np.arange(n, dtype=np.float32)[None, None, :, None, None]
            picks[f'{n}, {scale}'] = downsample_seg_for_ds_transform2(line, [[scale, 1, 1]])[0].ravel().astype(int).tolist()
    record = dict(command='python tests/record/41_augmentation.py', use_mask_for_norm=MASKED, pool_op_kernel_sizes=POOLS,
                  patch_size=PATCH, loaded_patch_sizes=loaded, settings=settings, picks=picks,
                  versions={'python': platform.python_version(),
                            **{k: version(k) for k in ('nnunet', 'numpy', 'scipy', 'scikit-image', 'batchgenerators')}})
    (OUT/'41_augmentation.json').write_text(json.dumps(record) + '\n', encoding='utf-8')
    np.savez_compressed(OUT/'41_augmentation.npz', **arrays)
    print('wrote', OUT/'41_augmentation.json', OUT/'41_augmentation.npz')


if __name__ == '__main__':
    with contextlib.redirect_stdout(open(os.devnull, 'w')): import nnunet
    main()
