"""Record the spacings nnU-Net 1.7.1 plans for random data sets, for the parity checks of the spacing chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md, and data_samples/.
Usage, from the project root: python tests/record/22_spacing.py
Writes tests/recorded/22_spacing.npz. Data sets are stored one after another: rows `first[i]:first[i+1]` of
`spacings` and `shapes` belong to data set i. `target` is the original's target spacing. For those that get a low
resolution search, `lowres_*` holds the patch voxels of every step, the last spacing tried, and whether it was kept.
The names of two phantom data sets hold their target spacings.
"""
import contextlib, json, os, pickle, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED, N, N_LOWRES = 22, 400, 24
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT/'tests'/'recorded'/'22_spacing.npz'
SAMPLES = {'Task101_PhantomCT': 1, 'Task102_PhantomMR': 4} # task: channels


def dataset(rng, kind):
    "Spacings and shapes of one made-up data set; kinds 1 to 3 lean on the anisotropy rule"
    n = int(rng.choice([1, 2, 3, 5, 8, 13]))
    fine, across = rng.uniform(.3, 1.6), rng.integers(64, 600)
    spacing, shape = {
        0: lambda: ([fine]*3, rng.integers(40, 400, 3)),                                                # isotropic
        1: lambda: ([rng.uniform(2, 12), fine, fine], [rng.integers(5, 60), across, across]),           # thick slices
        2: lambda: ([fine*rng.uniform(2.8, 3.2), fine, fine], [across*rng.uniform(.3, .37), across, across]), # borderline
        3: lambda: ([rng.uniform(3, 9), fine, fine*rng.uniform(.9, 2)], [rng.integers(8, 40), across, across]), # mixed protocols
        4: lambda: (rng.uniform(.3, 6, 3), rng.integers(8, 500, 3))}[kind]()                            # anything
    order = rng.permutation(3)
    spacing, shape = np.array(spacing)[order], np.array(shape)[order]
    jitter = rng.choice([0, .1, .6])
    spacings = spacing * np.exp(rng.normal(0, jitter, (n, 3)))
    if kind == 3: spacings[rng.random(n) < .4, int(np.argmax(spacing))] = fine * rng.uniform(.5, 1.5)
    shapes = np.maximum(1, np.round(shape * np.exp(rng.normal(0, .15, (n, 3))))).astype(int)
    return np.round(spacings, 6), shapes


def phantoms(task, channels):
    "Spacings and shapes after the original's cropping of the training cases of a sample data set"
    from nnunet.preprocessing.cropping import ImageCropper
    found = []
    for label in sorted((ROOT/'data_samples'/task/'labelsTr').glob('*.nii.gz')):
        images = [str(label.parents[1]/'imagesTr'/label.name.replace('.nii.gz', f'_{c:04d}.nii.gz')) for c in range(channels)]
        found.append(ImageCropper.crop_from_list_of_files(images, str(label))[2])
    return np.array([p['original_spacing'] for p in found]), np.array([p['size_after_cropping'] for p in found])


def planner(spacings, shapes):
    from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21
    folder = tempfile.mkdtemp()
    names = [f'c{i}' for i in range(len(shapes))]
    with open(f'{folder}/dataset_properties.pkl', 'wb') as f:
        pickle.dump({'all_spacings': list(spacings), 'all_sizes': [tuple(s) for s in shapes], 'all_classes': [1, 2],
                     'modalities': {0: 'CT'}, 'size_reductions': dict.fromkeys(names, 1.), 'intensityproperties': None}, f)
    it = ExperimentPlanner3D_v21(folder, folder)
    it.list_of_cropped_npz_files = type('Counted', (list,), {'__len__': lambda self: len(names), '__iter__': lambda self: iter(())})()
    it.save_my_plans = lambda: None
    it.steps = []
    plan_stage = it.get_properties_for_stage
    def watched(current, *rest):
        stage = plan_stage(current, *rest)
        it.steps.append((np.array(current)[it.transpose_backward], int(np.prod(stage['patch_size']))))
        return stage
    it.get_properties_for_stage = watched
    return it


def main():
    rng = np.random.default_rng(SEED)
    sets = [dataset(rng, i % 5) for i in range(N)]
    targets, lowres = [], []
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        for i, (spacings, shapes) in enumerate(sets):
            it = planner(spacings, shapes)
            targets.append(it.get_target_spacing())
            if len(lowres) < N_LOWRES and np.prod(np.median(shapes, 0)) > 1e7:
                it.plan_experiment()
                if len(it.steps) > 1: lowres.append((i, it.steps, len(it.plans_per_stage) == 2))
        samples = {task: planner(*phantoms(task, channels)).get_target_spacing() for task, channels in SAMPLES.items()}
    first = np.cumsum([0] + [len(s) for s, _ in sets])
    versions = {p: version(p) for p in ('nnunet', 'numpy')} | {'python': platform.python_version()}
    np.savez_compressed(OUT, command='python tests/record/22_spacing.py', versions=json.dumps(versions), first=first,
        spacings=np.concatenate([s for s, _ in sets]), shapes=np.concatenate([s for _, s in sets]), target=np.array(targets),
        **samples, lowres_set=[i for i, _, _ in lowres], lowres_kept=[k for _, _, k in lowres],
        lowres_last=np.array([s[-1][0] for _, s, _ in lowres]),
        lowres_first=np.cumsum([0] + [len(s) for _, s, _ in lowres]),
        lowres_patch=np.concatenate([[v for _, v in s] for _, s, _ in lowres]))
    print(OUT.name, OUT.stat().st_size, 'bytes;', len(lowres), 'low resolution searches,', sum(k for _, _, k in lowres), 'kept')


if __name__ == '__main__': main()
