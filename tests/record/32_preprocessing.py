"""Record nnU-Net 1.7.1's whole preprocessing of five small tasks, for its 3D and its 2D configuration.

`ct` is a CT (statistics of the data set), `mr` has two channels and a wide rim of zeros (mask), `thick` has its coarse
axis last (transposed, separate z), `aniso` has thick slices of different thickness, `many` has eleven classes in an odd order.
Crop, plan, transpose, resample, normalise, class locations; also what it does with NaN and with the caller's spacing in 2D, and
with the label map of the stage before. Needs python 3.11 with nnunet==1.7.1 (README.md beside this file).
Writes tests/recorded/32_preprocessing_<task>.npz, 32_preprocessing_2d_<task>.npz and 32_preprocessing_defects.npz.
Usage: python tests/record/32_preprocessing.py
"""
import contextlib, importlib.metadata, io, json, os, pickle, shutil, sys, tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage

TASKS = {  # name: (modalities, labels in dataset.json's order, shape, spacing of the middle case, rim of zeros in voxels)
    'ct': (('CT',), (2, 1), (14, 26, 28), (3.0, 1.25, 1.25), 0),
    'mr': (('T1', 'T2'), (1, 2), (18, 26, 24), (1.0, 1.5, 1.25), 4),
    'thick': (('MRI',), (1, 2), (28, 30, 9), (0.75, 0.75, 5.0), 0),
    'aniso': (('MRI', 'MRI'), (1, 2), (14, 30, 27), (6.0, 0.9, 1.1), 3),
    'many': (('CT',), (7, 3, 1, 2, 11, 10, 4, 5, 6, 8, 9), (15, 24, 26), (2.5, 1.5, 1.0), 0),
}


def case(rng, shape, channels, rim, n_labels=2):
    "An ellipsoid body with two labels inside, whole numbers; air is 0 with a rim, else about -900"
    grid = (np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1) - np.array(shape) / 2 + .5) / (np.array(shape) / 2 - rim)
    radius = np.sqrt((grid**2).sum(-1)) + ndimage.gaussian_filter(rng.normal(size=shape), 2) * .6
    seg = np.where(radius < .3, 2, np.where(radius < .65, 1, 0)).astype(np.int16)
    if n_labels > 2: seg[seg > 0] = 1 + (np.floor((grid + 1) * 1.7).astype(int) @ (1, 3, 5))[seg > 0] % n_labels
    texture = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1) * 90 for _ in range(channels)])
    data = np.round(100 + texture + (120 if n_labels == 2 else 20) * seg).astype(np.int16)
    data[:, radius > .95] = 0 if rim else np.round(rng.normal(-900, 10, (radius > .95).sum()))
    return data, seg


def write_task(folder, name):
    "Write a raw task of three cases; the third has no label 2"
    import SimpleITK as sitk
    modalities, labels, shape, spacing, rim = TASKS[name]
    for part in ('imagesTr', 'labelsTr'): (folder / part).mkdir(parents=True)
    kept, rng = {}, np.random.default_rng([32, *map(ord, name)])
    for i, factor in enumerate((1.0, 0.8, 1.15)):
        data, seg = case(rng, tuple(n + int(rng.integers(-2, 3)) for n in shape), len(modalities), rim, len(labels))
        if i == 2: seg[seg == 2] = 0
        mm = [round(factor * s, 3) for s in spacing]
        for file, array in [(f'imagesTr/c{i}_{c:04d}', channel) for c, channel in enumerate(data)] + [(f'labelsTr/c{i}', seg.astype(np.uint8))]:
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing(mm[::-1])
            sitk.WriteImage(picture, str(folder / f'{file}.nii.gz'))
        kept.update({f'c{i}/data': data, f'c{i}/seg': seg.astype(np.int8), f'c{i}/spacing': mm})
    description = {'name': name, 'description': '', 'reference': '', 'licence': '', 'release': '', 'tensorImageSize': '4D',
                   'modality': {str(c): m for c, m in enumerate(modalities)}, 'labels': {'0': 'background', **{str(k): f'class{k}' for k in labels}},
                   'numTraining': 3, 'numTest': 0, 'test': [],
                   'training': [{'image': f'./imagesTr/c{i}.nii.gz', 'label': f'./labelsTr/c{i}.nii.gz'} for i in range(3)]}
    (folder / 'dataset.json').write_text(json.dumps(description))
    return {**kept, 'dataset.json': json.dumps(description)}


def record(name, work):
    from nnunet.experiment_planning.DatasetAnalyzer import DatasetAnalyzer
    from nnunet.experiment_planning.experiment_planner_baseline_2DUNet_v21 import ExperimentPlanner2D_v21
    from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21
    from nnunet.experiment_planning.utils import create_lists_from_splitted_dataset
    from nnunet.preprocessing.cropping import ImageCropper
    raw, cropped, done = (work / f'{name}_{part}' for part in ('raw', 'cropped', 'preprocessed'))
    out = write_task(raw, name)
    for folder in (cropped, done): folder.mkdir()
    ImageCropper(1, str(cropped)).run_cropping(create_lists_from_splitted_dataset(str(raw))[0], overwrite_existing=True)
    shutil.copy(raw / 'dataset.json', cropped)
    DatasetAnalyzer(str(cropped), overwrite=True, num_processes=1).analyze_dataset(collect_intensityproperties='CT' in TASKS[name][0])
    shutil.copy(cropped / 'dataset_properties.pkl', done)
    for which, planner in (('', ExperimentPlanner3D_v21(str(cropped), str(done))), ('2d', ExperimentPlanner2D_v21(str(cropped), str(done)))):
        planner.plan_experiment()
        planner.run_preprocessing(1)
        results = collect(planner, done, len(TASKS[name][0]))
        if which: yield f'{which}_{name}', {**results, 'dataset.json': out['dataset.json']}
        else: yield name, {**out, **results}


def collect(planner, done, n_channels):
    "What the planner decided about preprocessing, and the preprocessed cases"
    out, stage = {}, max(planner.plans['plans_per_stage'])
    out['spacing'] = planner.plans['plans_per_stage'][stage]['current_spacing']
    out['transpose_forward'], out['transpose_backward'] = planner.plans['transpose_forward'], planner.plans['transpose_backward']
    out['schemes'] = np.array([planner.plans['normalization_schemes'][c] for c in range(n_channels)])
    out['use_mask'] = np.array([planner.plans['use_mask_for_norm'][c] for c in range(n_channels)])
    found = planner.plans['dataset_properties']['intensityproperties'] or {}
    keys = ('mean', 'sd', 'median', 'percentile_00_5', 'percentile_99_5')
    out['intensities'] = json.dumps({int(c): {k: float(p[k]) for k in keys} for c, p in found.items()})
    for i in range(3):
        file = done / f"{planner.plans['data_identifier']}_stage{stage}" / f'c{i}'
        both = np.load(f'{file}.npz')['data']
        with open(f'{file}.pkl', 'rb') as f: properties = pickle.load(f)
        out.update({f'c{i}/new_data': both[:-1], f'c{i}/new_seg': both[-1].astype(np.int8), f'c{i}/bbox': properties['crop_bbox'],
                    f'c{i}/new_spacing': np.array(properties['spacing_after_resampling'], float)})
        for label, voxels in properties['class_locations'].items(): out[f'c{i}/locations_{label}'] = np.asarray(voxels, np.int16).reshape(-1, 3)
    return out


def defects():
    "NaN and the caller's spacing in 2D; the previous stage at test time and in training"
    from batchgenerators.augmentations.utils import resize_segmentation
    from nnunet.preprocessing.preprocessing import PreprocessorFor2D, resample_data_or_seg
    rng, out = np.random.default_rng(3207), {}
    data, seg = case(rng, (6, 20, 22), 1, 0)
    data = data.astype(np.float32)
    data[0, 2, 9, 10] = np.nan
    pre = PreprocessorFor2D({0: 'noNorm'}, {0: False}, [0, 1, 2], None)
    target, both = np.array([4., .8, .8]), []
    for thickness in (3., 5.):
        properties = {'original_spacing': np.array([thickness, 1., 1.])}
        resampled, _, properties = pre.resample_and_normalize(data.copy(), target, properties, seg[None].astype(np.float32))
        both.append(properties)
    out.update(nan_data=data, nan_seg=seg.astype(np.int8), nan_after=np.isnan(resampled), spacing_of_the_first=both[0]['spacing_after_resampling'], spacing_of_the_second=both[1]['spacing_after_resampling'])
    # the stage before: a map on the raw grid whose image is cropped to the box
    raw, box, shape = np.zeros((10, 24, 22), np.uint8), ((2, 9), (3, 21), (4, 20)), (9, 15, 13)
    raw[4:7, 8:15, 9:16] = 1; raw[5, 10:13, 10:14] = 2
    cut = raw[tuple(slice(*b) for b in box)]
    out.update(raw=raw, box=box, at_test_time=resize_segmentation(raw, shape, order=1), in_the_box=resize_segmentation(cut, shape, order=1))
    logits = np.stack([case(rng, (6, 11, 10), 1, 0)[0][0] / 90. for _ in range(3)])
    low = (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)
    out.update(low=low, from_low=resample_data_or_seg(low, shape, False, order=1, do_separate_z=None, order_z=0).argmax(0).astype(np.uint8))
    return out


def main():
    work = Path(tempfile.mkdtemp())
    for variable in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[variable] = str(work / variable)
    os.environ['nnUNet_def_n_proc'] = '1'
    versions = json.dumps({p: importlib.metadata.version(p) for p in ('nnunet', 'numpy', 'scipy', 'scikit-image', 'batchgenerators')})
    with contextlib.redirect_stdout(io.StringIO()): results = [r for name in TASKS for r in record(name, work)] + [('defects', defects())]
    for name, out in results:
        out.update(command='python tests/record/32_preprocessing.py', versions=versions)
        np.savez_compressed(Path(__file__).parents[1] / 'recorded' / f'32_preprocessing_{name}.npz', **out)
        print(name, *(out.get(k) for k in ('spacing', 'transpose_forward', 'schemes', 'use_mask')), file=sys.stderr)
    shutil.rmtree(work)


if __name__ == '__main__': main()
