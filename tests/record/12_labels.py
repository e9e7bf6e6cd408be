"""Record how nnU-Net 1.7.1 spreads and checks label maps, for the parity checks of the labels chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/12_labels.py
Writes tests/recorded/12_labels.npz: `labels` (a label map), `one_hot` (to_one_hot of it with all of 0..4, label 3 being absent),
`one_hot_of_what_occurs` (the same without a list of labels), `scores`, `decided` (argmax as export does it), and
`accepted` (verify_contains_only_expected_labels for the declared label lists in `declared`, padded with -1).
Regions whole (1, 2, 3), core (2, 3) and enhancing (3): `parts` (a label map), `region_masks` (ConvertSegmentationToRegionsTransform of it),
`region_scores`, and `region_decided` (the file that save_segmentation_nifti_from_softmax writes with region_class_order (1, 2, 3)).
"""
import os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import SimpleITK as sitk

SEED = 12
OUT = Path(__file__).resolve().parents[1]/'recorded'/'12_labels.npz'
REGIONS, ORDER = {'whole': (1, 2, 3), 'core': (2, 3), 'enhancing': (3,)}, (1, 2, 3)
DECLARED = ((0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3), (0, 1, 2))


def regions(rng):
    "What the original makes of regions: masks for training, and a label map for export"
    from nnunet.inference.segmentation_export import save_segmentation_nifti_from_softmax
    from nnunet.training.data_augmentation.custom_transforms import ConvertSegmentationToRegionsTransform
    parts = rng.choice([0, 1, 2, 3], (4, 7, 6)).astype(np.int16)
    masks = ConvertSegmentationToRegionsTransform(REGIONS)(seg=parts[None, None])['seg'][0]
    scores = np.round(rng.random((3, 4, 7, 6)), 1).astype(np.float32)  # one decimal, so that many are exactly one half
    known = dict(original_spacing=(1., 1., 1.), spacing_after_resampling=(1., 1., 1.), size_after_cropping=(4, 7, 6), original_size_of_raw_data=(4, 7, 6),
                 crop_bbox=None, itk_spacing=(1., 1., 1.), itk_origin=(0., 0., 0.), itk_direction=(1., 0., 0., 0., 1., 0., 0., 0., 1.))
    with tempfile.TemporaryDirectory() as folder:
        save_segmentation_nifti_from_softmax(scores.copy(), f'{folder}/out.nii.gz', known, region_class_order=ORDER, verbose=False)
        decided = sitk.GetArrayFromImage(sitk.ReadImage(f'{folder}/out.nii.gz'))
    return dict(parts=parts, region_masks=masks, region_scores=scores, region_decided=decided)


def main():
    from nnunet.preprocessing.sanity_checks import verify_contains_only_expected_labels
    from nnunet.utilities.one_hot_encoding import to_one_hot
    rng = np.random.default_rng(SEED)
    labels = rng.choice([0, 1, 2, 4], (3, 5, 6)).astype(np.int16)
    scores = np.round(rng.random((5, 3, 5, 6)), 1).astype(np.float32)  # one decimal, so that there are ties
    with tempfile.TemporaryDirectory() as folder:
        file = f'{folder}/labels.nii.gz'
        sitk.WriteImage(sitk.GetImageFromArray(labels), file)
        accepted = [verify_contains_only_expected_labels(file, d)[0] for d in DECLARED]
    out = dict(command='python tests/record/12_labels.py', versions=[f'{p} {version(p)}' for p in ('nnunet', 'numpy', 'SimpleITK')], labels=labels,
               one_hot=to_one_hot(labels, [0, 1, 2, 3, 4]), one_hot_of_what_occurs=to_one_hot(labels), scores=scores, decided=scores.argmax(0),
               accepted=accepted, declared=[list(d) + [-1] * (5 - len(d)) for d in DECLARED], **regions(rng))
    np.savez_compressed(OUT, **{k: np.asarray(v) for k, v in out.items()})
    print(f'{OUT.name}: {len(out)} entries, {OUT.stat().st_size/1e3:.0f} kB')


if __name__ == '__main__':
    main()
