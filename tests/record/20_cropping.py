"""Record what nnU-Net 1.7.1 crops, for the parity checks of the cropping chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md, and data_samples/.
Usage, from the project root: python tests/record/20_cropping.py
Writes tests/recorded/20_cropping.npz: per case `<name>/data`, `<name>/seg` (inputs) and
`<name>/mask`, `<name>/out_data`, `<name>/out_seg`, `<name>/bbox` (what the original makes of them); for two phantom
cases the box and the number of voxels that get the label -1 (`outside`).
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED = 20
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT/'tests'/'recorded'/'20_cropping.npz'
SAMPLES = {'mr_000': ('Task102_PhantomMR', 4), 'ct_003': ('Task101_PhantomCT', 1)} # case: task, channels


def ball(shape, radius, centre=(0, 0, 0)):
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing='ij')
    return sum((a - c)**2 for a, c in zip(axes, centre)) < radius**2


def head(rng, channels, shape, radius=.7, thin=.0):
    "Noise inside a ball, zero outside; each channel loses a fraction `thin` of its voxels, and there is a zero cavity"
    data = np.round(rng.normal(100, 20, (channels, *shape))).astype(np.float32)
    data[:, ~ball(shape, radius, rng.uniform(-.2, .2, 3))] = 0
    data[rng.random(data.shape) < thin] = 0
    data[:, ball(shape, .25)] = 0
    return data


def some_labels(rng, shape, low=0):
    return rng.integers(low, 4, shape).astype(np.float32) * (rng.random(shape) < .3)


def inputs():
    rng = np.random.default_rng(SEED)
    yield 'four_channels', head(rng, 4, (11, 14, 13), thin=.5), some_labels(rng, (11, 14, 13))
    yield 'one_channel', head(rng, 1, (16, 12, 14)), some_labels(rng, (16, 12, 14))
    ct = np.round(rng.normal(-200, 400, (1, 6, 15, 15))).astype(np.float32)
    ct[rng.random(ct.shape) < .02] = 0
    yield 'ct_with_zeros_inside', ct, some_labels(rng, (6, 15, 15))
    yield 'labels_outside_the_mask', head(rng, 2, (12, 12, 12), radius=.5), some_labels(rng, (12, 12, 12))
    yield 'labels_below_minus_one', head(rng, 1, (10, 12, 11)), some_labels(rng, (10, 12, 11), low=-4)
    yield 'no_labels', head(rng, 3, (12, 10, 13)), None
    slice2d = head(rng, 3, (1, 24, 20))
    yield 'one_slice', slice2d, some_labels(rng, (1, 24, 20))
    nan = head(rng, 1, (9, 10, 10), radius=.5); nan[0, 0, 1, 2] = np.nan
    yield 'nan_is_not_zero', nan, some_labels(rng, (9, 10, 10))
    lone = np.zeros((2, 8, 9, 10), np.float32); lone[1, 3, 4, 5] = -7
    yield 'one_voxel', lone, some_labels(rng, (8, 9, 10))


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.preprocessing.cropping import ImageCropper, create_nonzero_mask
        found = {}
        for name, data, seg in inputs():
            out, out_seg, props = ImageCropper.crop(data.copy(), {'original_spacing': [1, 1, 1]}, None if seg is None else seg[None].copy())
            found[f'{name}/data'] = data
            if seg is not None: found[f'{name}/seg'] = seg.astype(np.int16)
            found[f'{name}/mask'] = create_nonzero_mask(data)
            found[f'{name}/out_data'], found[f'{name}/out_seg'] = out, out_seg[0].astype(np.int16)
            found[f'{name}/bbox'] = np.array(props['crop_bbox'])
        for case, (task, channels) in SAMPLES.items():
            folder = ROOT/'data_samples'/task
            images = [str(folder/'imagesTr'/f'{case}_{c:04d}.nii.gz') for c in range(channels)]
            _, seg, props = ImageCropper.crop_from_list_of_files(images, str(folder/'labelsTr'/f'{case}.nii.gz'))
            found[f'{case}/bbox'], found[f'{case}/outside'] = np.array(props['crop_bbox']), (seg == -1).sum()
    versions = {p: version(p) for p in ('nnunet', 'numpy', 'scipy')} | {'python': platform.python_version()}
    np.savez_compressed(OUT, command='python tests/record/20_cropping.py', versions=json.dumps(versions), **found)
    print(OUT.name, OUT.stat().st_size, 'bytes')


if __name__ == '__main__': main()
