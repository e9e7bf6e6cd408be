"""Record how nnU-Net 1.7.1 merges the probabilities of several models.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/71_ensembling.py
Writes tests/recorded/71_ensembling.npz (probabilities, merged probabilities, label maps) and .json (the cases' properties).
"""
import contextlib, json, os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import SimpleITK as sitk

SEED = 71
OUT = Path(__file__).resolve().parents[1]/'recorded'
SHAPE, BOX, SPACING = (12, 15, 16), ((1, 11), (2, 14), (1, 15)), (2., 1., 1.2)  # the image, its crop, mm
CROP = tuple(b - a for a, b in BOX)
# name: (transposition, shape in the plan's axes, spacing in the plan's axes) of each member, and the labels that regions write
CASES = {
    'one_grid': ([((0, 1, 2), CROP, SPACING)]*3, None),
    'one_grid_regions': ([((0, 1, 2), CROP, SPACING)]*3, (1, 2, 3)),
    'coarse_and_fine': ([((0, 1, 2), (8, 10, 11), (2.5, 1.2, 1.5)), ((0, 1, 2), (14, 12, 16), (1.4, 1., 1.05))], None),
    'turned': ([((1, 0, 2), (10, 9, 12), (1.2, 2.2, 1.4)), ((0, 1, 2), (13, 12, 16), (1.5, 1., 1.05))], None),
    'two_grids_regions': ([((0, 1, 2), (8, 10, 11), (2.5, 1.2, 1.5)), ((0, 1, 2), (14, 12, 16), (1.4, 1., 1.05))], (1, 2, 3)),
}


def belief(rng, shape, regions):
    "Softmax of smooth noise over 3 classes, or one independent probability for each of 3 regions"
    coarse = rng.normal(0, 1.6, (3, *[-(-s//3) for s in shape]))
    for axis in (1, 2, 3): coarse = np.repeat(coarse, 3, axis)
    logits = coarse[(slice(None), *[slice(0, s) for s in shape])] + rng.normal(0, .3, (3, *shape))
    return (1/(1 + np.exp(-logits)) if regions else np.exp(logits)/np.exp(logits).sum(0)).astype(np.float16)


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.inference.ensemble_predictions import merge_files
        from nnunet.inference.segmentation_export import save_segmentation_nifti_from_softmax
    arrays, info = {}, {}
    for number, (name, (members, regions)) in enumerate(CASES.items()):
        rng, folder, files = np.random.default_rng([SEED, number]), Path(tempfile.mkdtemp()), []
        info[name] = dict(regions=regions, members=[])
        for i, (forward, shape, spacing) in enumerate(members):
            p = arrays[f'{name}/{i}'] = belief(rng, shape, regions)
            backward = [forward.index(j) for j in range(3)]
            properties = dict(original_size_of_raw_data=np.array(SHAPE), size_after_cropping=CROP, crop_bbox=[list(b) for b in BOX], original_spacing=np.array(SPACING),
                              spacing_after_resampling=np.array([spacing[j] for j in backward]), itk_spacing=SPACING[::-1], itk_origin=(0., 0., 0.),
                              itk_direction=(1., 0, 0, 0, 1, 0, 0, 0, 1))  # the second spacing in the axes of the data: none of these cases meets the slip
            files.append(str(folder/f'{i}.npz'))
            with contextlib.redirect_stdout(open(os.devnull, 'w')):
                save_segmentation_nifti_from_softmax(p.astype(np.float32).transpose([0] + [b + 1 for b in backward]).copy(), str(folder/f'{i}.nii.gz'), properties, 1, regions,
                                                     None, None, files[-1], None, None, 0)
            info[name]['members'].append(dict(identifier='case', shape=SHAPE, spacing=SPACING, bbox=BOX, shape_after_crop=CROP, transpose_forward=forward, transpose_backward=backward,
                                              shape_after_resampling=shape, spacing_after_resampling=spacing))
        with contextlib.redirect_stdout(open(os.devnull, 'w')):
            merge_files(files, [f[:-4] + '.pkl' for f in files], str(folder/'merged.nii.gz'), True, True)
        arrays[f'{name}/labels'] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder/'merged.nii.gz')))
        arrays[f'{name}/merged'] = np.load(folder/'merged.npz')['softmax']
    about = dict(command='python tests/record/71_ensembling.py', seed=SEED, versions={p: version(p) for p in ('nnunet', 'numpy', 'SimpleITK', 'scikit-image')}, cases=info)
    (OUT/'71_ensembling.json').write_text(json.dumps(about, indent=1) + '\n')
    np.savez_compressed(OUT/'71_ensembling.npz', **arrays)
    for f in ('json', 'npz'): print(f'wrote 71_ensembling.{f}', (OUT/f'71_ensembling.{f}').stat().st_size)


if __name__ == '__main__': main()
