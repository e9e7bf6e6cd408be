"""Record what nnU-Net 1.7.1 writes in its modes fast and fastest, where the label map is decided before it goes home.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/64_prediction_modes.py
Writes tests/recorded/64_prediction_modes.npz: made-up label maps on the grid of a plan, and what the original makes of them.
"""
import contextlib, json, os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'

# shape and spacing on the plan's grid, those after cropping, box, shape of the image; axes are not turned, for there the original has its defect
CASES = {'isotropic': dict(shape=(14, 20, 22), spacing=(1.5, 1.5, 1.5), cropped=(11, 26, 29), old=(2., 1.15, 1.15), bbox=((2, 13), (0, 26), (3, 32)), whole=(15, 26, 40)),
         'thick': dict(shape=(7, 18, 25), spacing=(5., 1.4, 1.4), cropped=(9, 25, 31), old=(4., 1., 1.1), bbox=((0, 9), (4, 29), (1, 32)), whole=(9, 31, 33)),
         'thick target': dict(shape=(6, 16, 16), spacing=(5., 1.5, 1.5), cropped=(12, 12, 13), old=(2.5, 2., 1.9), bbox=((1, 13), (1, 13), (0, 13)), whole=(14, 14, 13)),
         'same shape': dict(shape=(8, 9, 10), spacing=(1., 1., 1.), cropped=(8, 9, 10), old=(1., 1., 1.), bbox=((0, 8), (0, 9), (0, 10)), whole=(8, 9, 10))}


def blobs(shape, n, seed):
    "A label map of n smooth objects"
    import numpy as np
    from scipy.ndimage import gaussian_filter
    rng = np.random.RandomState(seed)
    scores = np.stack([gaussian_filter(rng.normal(size=shape), 1.6) for _ in range(n + 1)])
    scores[0] += .05
    return scores.argmax(0).astype(np.uint8)


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        import numpy as np
        import SimpleITK as sitk
        from nnunet.inference.segmentation_export import save_segmentation_nifti
    arrays, about = {}, {}
    for i, (name, c) in enumerate(CASES.items()):
        arrays[f'{name}/in'] = blobs(c['shape'], 3, 100 + i)
        for mode, options in (('fast', dict(order=1, force_separate_z=None, order_z=0)), ('fastest', dict(order=0, force_separate_z=None))):
            properties = dict(size_after_cropping=c['cropped'], original_size_of_raw_data=np.array(c['whole']), original_spacing=np.array(c['old']), spacing_after_resampling=np.array(c['spacing']),
                              crop_bbox=[list(b) for b in c['bbox']], itk_spacing=c['old'][::-1], itk_origin=(0., 0., 0.), itk_direction=(1., 0., 0., 0., 1., 0., 0., 0., 1.))
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(open(os.devnull, 'w')):
                save_segmentation_nifti(arrays[f'{name}/in'].astype(int), f'{folder}/out.nii.gz', properties, **options)
                arrays[f'{name}/{mode}'] = sitk.GetArrayFromImage(sitk.ReadImage(f'{folder}/out.nii.gz'))
        about[name] = c
    about = dict(command='python tests/record/64_prediction_modes.py', versions={p: version(p) for p in ('nnunet', 'numpy', 'scipy', 'scikit-image')}, cases=about)
    out = Path(__file__).resolve().parents[1]/'recorded'/'64_prediction_modes.npz'
    np.savez_compressed(out, about=json.dumps(about), **arrays)
    print('wrote', out.name, {k: v.shape for k, v in arrays.items()}, out.stat().st_size, 'bytes')


if __name__ == '__main__': main()
