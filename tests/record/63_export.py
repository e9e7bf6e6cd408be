"""Record how nnU-Net 1.7.1 brings probabilities back to the original grid.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/63_export.py
Writes tests/recorded/63_export.npz (probabilities, label maps) and .json (the cases' properties).
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


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.inference.segmentation_export import save_segmentation_nifti_from_softmax
    arrays, info = {}, {}
    for i, (name, (k, plan_shape, forward, crop_shape, shape, start, spacing, target)) in enumerate(CASES.items()):
        rng = np.random.default_rng([SEED, i])
        coarse = rng.normal(0, 2, (k, *[-(-s//3) for s in plan_shape]))
        for axis in (1, 2, 3): coarse = np.repeat(coarse, 3, axis)
        logits = coarse[(slice(None), *[slice(0, s) for s in plan_shape])] + rng.normal(0, .4, (k, *plan_shape))
        p = np.exp(logits); p = (p/p.sum(0)).astype(np.float32)
        backward = [forward.index(j) for j in range(3)]
        box = [[a, a + s] for a, s in zip(start, crop_shape)]
        properties = dict(original_size_of_raw_data=np.array(shape), size_after_cropping=crop_shape, crop_bbox=[list(b) for b in box], original_spacing=np.array(spacing),
                          spacing_after_resampling=np.array(target), itk_spacing=spacing[::-1], itk_origin=(0., 0., 0.), itk_direction=(1., 0, 0, 0, 1, 0, 0, 0, 1))
        file = os.path.join(tempfile.mkdtemp(), 'x.nii.gz')
        with contextlib.redirect_stdout(open(os.devnull, 'w')):
            save_segmentation_nifti_from_softmax(p.transpose([0] + [b + 1 for b in backward]).copy(), file, properties, 1, None, None, None, None, None, None, 0)
        arrays[name + '/probabilities'] = p
        arrays[name + '/labels'] = sitk.GetArrayFromImage(sitk.ReadImage(file))
        info[name] = dict(shape=shape, spacing=spacing, bbox=box, shape_after_crop=crop_shape, transpose_forward=forward, transpose_backward=backward,
                          shape_after_resampling=plan_shape, spacing_after_resampling=target)
    OUT.mkdir(exist_ok=True)
    record = dict(command='python tests/record/63_export.py', seed=SEED, versions={p: version(p) for p in ('nnunet', 'numpy', 'SimpleITK', 'scikit-image')}, properties=info)
    (OUT/'63_export.json').write_text(json.dumps(record, indent=1) + '\n')
    np.savez_compressed(OUT/'63_export.npz', **arrays)
    for f in ('json', 'npz'): print(f'wrote {OUT.name}/63_export.{f}', (OUT/f'63_export.{f}').stat().st_size)


if __name__ == '__main__': main()
