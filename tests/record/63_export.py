"""Record how nnU-Net 1.7.1 brings probabilities back to the original grid.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/63_export.py
Writes tests/recorded/63_export.npz and 63_export_more.npz (probabilities, label maps) and .json of both (the cases' properties).
The second pair holds regions, other spline orders, and cases of random size, spacing and axes.
"""
import contextlib, json, os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import SimpleITK as sitk

SEED = 63
OUT = Path(__file__).resolve().parents[1]/'recorded'
# name: (K, shape after resampling in plan axes, transpose_forward, shape after crop in original axes, shape, start of the box, spacing, spacing after resampling in plan axes)
CASES = {
    'isotropic': (3, (10, 14, 12), (0, 1, 2), (13, 11, 15), (16, 14, 18), (1, 2, 3), (1., 1.2, .9), (1.3, 1., 1.1)),
    'coarse_z': (4, (6, 16, 14), (0, 1, 2), (9, 12, 18), (9, 12, 18), (0, 0, 0), (5., .8, .8), (7., .7, .9)),
    'coarse_x_transposed': (3, (5, 14, 12), (2, 0, 1), (16, 10, 7), (18, 12, 8), (1, 1, 1), (.8, .8, 4.), (5., .9, .7)),
    'not_resampled': (3, (8, 9, 10), (0, 1, 2), (8, 9, 10), (10, 9, 12), (1, 0, 2), (2., 1., 1.), (2., 1., 1.)),
    'one_slice': (2, (1, 15, 12), (0, 1, 2), (1, 20, 17), (1, 22, 20), (0, 1, 2), (6., 1., 1.), (6., 1.3, 1.4)),
    # the original takes the wrong axis for z here (only the target is anisotropic and the axes are transposed)
    'target_coarse_transposed': (3, (5, 14, 12), (2, 0, 1), (16, 10, 14), (16, 10, 14), (0, 0, 0), (1., 1., 2.), (4., 1.1, .9)),
}


def random_cases(n):
    "Cases like the above; the original spacing is anisotropic or the target is not, so that the original takes the right axis"
    rng = np.random.default_rng([SEED, 1000])
    for i in range(n):
        forward = tuple(int(a) for a in rng.permutation(3))
        crop, coarse = tuple(int(a) for a in rng.integers(5, 15, 3)), rng.random() < .5
        spacing = rng.uniform(.7, 1.4, 3)
        if coarse: spacing[rng.integers(3)] *= 6
        target = np.exp(rng.uniform(-.3, .3, 3))*spacing[list(forward)] if coarse else rng.uniform(.7, 1.4, 3)
        plan = tuple(int(max(1, round(crop[j]*spacing[j]/t))) for j, t in zip(forward, target))
        start = rng.integers(0, 3, 3)
        shape = tuple(int(a) for a in np.array(crop) + start + rng.integers(0, 3, 3))
        yield f'random_{i}', (int(rng.integers(2, 6)), plan, forward, crop, shape, tuple(map(int, start)), tuple(map(float, spacing)), tuple(map(float, target))), {}


def more():
    "Name, case, options of the call (regions: the classes that they write; order, order_z)"
    for name in ('isotropic', 'coarse_x_transposed'): yield f'regions_{name}', CASES[name], dict(regions=(2, 1, 3)[:CASES[name][0]])
    for name, options in (('isotropic', dict(order=3)), ('isotropic', dict(order=0)), ('coarse_z', dict(order_z=1)), ('coarse_x_transposed', dict(order=3, order_z=1))):
        yield '_'.join([name, *(f'{k}_{v}' for k, v in options.items())]), CASES[name], options
    yield from random_cases(14)


def made_up(rng, k, plan_shape, regions=False):
    "Probabilities in coarse blocks with noise, (k, *plan_shape) float32"
    coarse = rng.normal(0, 2, (k, *[-(-s//3) for s in plan_shape]))
    for axis in (1, 2, 3): coarse = np.repeat(coarse, 3, axis)
    logits = coarse[(slice(None), *[slice(0, s) for s in plan_shape])] + rng.normal(0, .4, (k, *plan_shape))
    p = np.exp(logits)
    return (p/(p + 1) if regions else p/p.sum(0)).astype(np.float32)


def export(p, case, regions=None, order=1, order_z=0):
    "What the original writes, and the case's properties in segnb's names"
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.inference.segmentation_export import save_segmentation_nifti_from_softmax
        _, plan_shape, forward, crop_shape, shape, start, spacing, target = case
        backward = [forward.index(j) for j in range(3)]
        box = [[a, a + s] for a, s in zip(start, crop_shape)]
        properties = dict(original_size_of_raw_data=np.array(shape), size_after_cropping=crop_shape, crop_bbox=[list(b) for b in box], original_spacing=np.array(spacing),
                          spacing_after_resampling=np.array(target), itk_spacing=spacing[::-1], itk_origin=(0., 0., 0.), itk_direction=(1., 0, 0, 0, 1, 0, 0, 0, 1))
        file = os.path.join(tempfile.mkdtemp(), 'x.nii.gz')
        save_segmentation_nifti_from_softmax(p.transpose([0] + [b + 1 for b in backward]).copy(), file, properties, order, regions, None, None, None, None, None, order_z)
    known = dict(shape=shape, spacing=spacing, bbox=box, shape_after_crop=crop_shape, transpose_forward=forward, transpose_backward=backward,
                 shape_after_resampling=plan_shape, spacing_after_resampling=target)
    return sitk.GetArrayFromImage(sitk.ReadImage(file)), known


def write(name, arrays, **record):
    record = dict(command='python tests/record/63_export.py', seed=SEED, versions={p: version(p) for p in ('nnunet', 'numpy', 'SimpleITK', 'scikit-image')}, **record)
    (OUT/f'{name}.json').write_text(json.dumps(record, indent=1) + '\n')
    np.savez_compressed(OUT/f'{name}.npz', **arrays)
    for f in ('json', 'npz'): print(f'wrote {OUT.name}/{name}.{f}', (OUT/f'{name}.{f}').stat().st_size)


def main():
    OUT.mkdir(exist_ok=True)
    arrays, info = {}, {}
    for i, (name, case) in enumerate(CASES.items()):
        p = arrays[name + '/probabilities'] = made_up(np.random.default_rng([SEED, i]), *case[:2])
        arrays[name + '/labels'], info[name] = export(p, case)
    write('63_export', arrays, properties=info)
    arrays, info, options = {}, {}, {}
    for i, (name, case, options[name]) in enumerate(more()):
        p = made_up(np.random.default_rng([SEED, 100 + i]), *case[:2], 'regions' in options[name]).astype(np.float16)   # as it is kept
        arrays[name + '/probabilities'] = p
        arrays[name + '/labels'], info[name] = export(p.astype(np.float32), case, **options[name])
    write('63_export_more', arrays, properties=info, options=options)


if __name__ == '__main__': main()
