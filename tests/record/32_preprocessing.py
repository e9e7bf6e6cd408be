"""Record nnU-Net 1.7.1's whole preprocessing of three small tasks: crop, plan, transpose, resample, normalise, class locations.

`ct` is a CT (statistics of the data set), `mr` has two channels and a wide rim of zeros (mask), `thick` has its coarse
axis last (transposed, separate z). Needs python 3.11 with nnunet==1.7.1 (README.md beside this file).
Writes tests/recorded/32_preprocessing_{ct,mr,thick}.npz.   Usage: python tests/record/32_preprocessing.py
"""
import contextlib, importlib.metadata, io, json, os, pickle, shutil, sys, tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage

TASKS = {  # name: (modalities, labels in dataset.json's order, shape, spacing of the middle case, rim of zeros in voxels)
    'ct': (('CT',), (2, 1), (14, 26, 28), (3.0, 1.25, 1.25), 0),
    'mr': (('T1', 'T2'), (1, 2), (18, 26, 24), (1.0, 1.5, 1.25), 4),
    'thick': (('MRI',), (1, 2), (28, 30, 9), (0.75, 0.75, 5.0), 0),
}


def case(rng, shape, channels, rim):
    "An ellipsoid body with two labels inside, whole numbers; air is 0 with a rim, else about -900"
    grid = (np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1) - np.array(shape) / 2 + .5) / (np.array(shape) / 2 - rim)
    radius = np.sqrt((grid**2).sum(-1)) + ndimage.gaussian_filter(rng.normal(size=shape), 2) * .6
    seg = np.where(radius < .3, 2, np.where(radius < .65, 1, 0)).astype(np.int16)
    texture = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1) * 90 for _ in range(channels)])
    data = np.round(100 + texture + 120 * seg).astype(np.int16)
    data[:, radius > .95] = 0 if rim else np.round(rng.normal(-900, 10, (radius > .95).sum()))
    return data, seg


def write_task(folder, name):
    "Write a raw task of three cases; the third has no label 2"
    import SimpleITK as sitk
    modalities, labels, shape, spacing, rim = TASKS[name]
    for part in ('imagesTr', 'labelsTr'): (folder / part).mkdir(parents=True)
    kept, rng = {}, np.random.default_rng([32, *map(ord, name)])
    for i, factor in enumerate((1.0, 0.8, 1.15)):
        data, seg = case(rng, tuple(n + int(rng.integers(-2, 3)) for n in shape), len(modalities), rim)
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
    planner = ExperimentPlanner3D_v21(str(cropped), str(done))
    planner.plan_experiment()
    planner.run_preprocessing(1)
    stage = max(planner.plans['plans_per_stage'])
    out['spacing'] = planner.plans['plans_per_stage'][stage]['current_spacing']
    out['transpose_forward'], out['transpose_backward'] = planner.plans['transpose_forward'], planner.plans['transpose_backward']
    out['schemes'] = np.array([planner.plans['normalization_schemes'][c] for c in range(len(TASKS[name][0]))])
    out['use_mask'] = np.array([planner.plans['use_mask_for_norm'][c] for c in range(len(TASKS[name][0]))])
    found = planner.plans['dataset_properties']['intensityproperties'] or {}
    keys = ('mean', 'sd', 'median', 'percentile_00_5', 'percentile_99_5')
    out['intensities'] = json.dumps({int(c): {k: float(p[k]) for k in keys} for c, p in found.items()})
    for i in range(3):
        file = done / f"{planner.plans['data_identifier']}_stage{stage}" / f'c{i}'
        both = np.load(f'{file}.npz')['data']
        with open(f'{file}.pkl', 'rb') as f: properties = pickle.load(f)
        out.update({f'c{i}/new_data': both[:-1], f'c{i}/new_seg': both[-1].astype(np.int8), f'c{i}/bbox': properties['crop_bbox']})
        for label, voxels in properties['class_locations'].items(): out[f'c{i}/locations_{label}'] = np.asarray(voxels, np.int16).reshape(-1, 3)
    return out


def main():
    work = Path(tempfile.mkdtemp())
    for variable in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[variable] = str(work / variable)
    os.environ['nnUNet_def_n_proc'] = '1'
    versions = json.dumps({p: importlib.metadata.version(p) for p in ('nnunet', 'numpy', 'scipy', 'scikit-image', 'batchgenerators')})
    for name in TASKS:
        with contextlib.redirect_stdout(io.StringIO()): out = record(name, work)
        out.update(command='python tests/record/32_preprocessing.py', versions=versions)
        np.savez_compressed(Path(__file__).parents[1] / 'recorded' / f'32_preprocessing_{name}.npz', **out)
        print(name, out['spacing'], out['transpose_forward'], out['schemes'], out['use_mask'], file=sys.stderr)
    shutil.rmtree(work)


if __name__ == '__main__': main()
