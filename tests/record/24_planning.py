"""Record the 3D plans of nnU-Net 1.7.1 for chapter planning, from made-up fingerprints and from a few real data sets' numbers.

Needs python 3.11 with nnunet==1.7.1 and the constraints of tests/record/README.md.
Usage, from the project's root: python tests/record/24_planning.py
"""
import contextlib, io, json, os, pickle, sys, tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

work = Path(tempfile.mkdtemp())
for name in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[name] = str(work/name)
quiet = lambda: contextlib.redirect_stdout(io.StringIO())
with quiet():
    from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21
    from nnunet.run.default_configuration import get_default_configuration

class Count(list):
    "A list of case files that has a length but no members; the planner only counts them"
    def __init__(self, n): super().__init__(); self.n = n
    def __len__(self): return self.n
    def __iter__(self): return iter(())

def plan(spacings, shapes, channels, labels, reductions=(1.,)):
    folder = work/'nnUNet_preprocessed'/'nnUNet'/'Task001_X'
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'dataset_properties.pkl').write_bytes(pickle.dumps({}))
    planner = ExperimentPlanner3D_v21(str(folder), str(folder))
    planner.dataset_properties = dict(all_spacings=[np.array(s, float) for s in spacings], all_sizes=[tuple(map(int, s)) for s in shapes],
        all_classes=list(labels), modalities=dict(enumerate(channels)), size_reductions=dict(enumerate(reductions)), intensityproperties=None)
    planner.list_of_cropped_npz_files = Count(len(shapes))
    with quiet(): planner.plan_experiment()
    return planner

def batch_dice(planner, network):
    "What the original's run command would choose for these plans"
    from nnunet.paths import preprocessing_output_dir
    folder = Path(preprocessing_output_dir)/'Task001_X'
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'X_plans_3D.pkl').write_bytes(pickle.dumps(planner.plans))
    with quiet(): return bool(get_default_configuration(network, 'Task001_X', 'nnUNetTrainerV2', 'X')[3])

def fingerprint(rng, i):
    "Three cases and how often they are repeated; every other one has round spacings, where ties and exact factors of 2 and 3 occur"
    if i % 2:
        base, size = rng.choice([.5, .625, .75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6], 3), rng.choice([8, 16, 20, 24, 32, 48, 64, 96, 128, 160, 256, 320, 512], 3)
        spacings, shapes = np.tile(base, (3, 1)), np.tile(size, (3, 1))
    else:
        base = np.round([[rng.uniform(.4, 2)]*3, [rng.uniform(1.5, 9), *[rng.uniform(.3, 1.5)]*2], rng.uniform(.3, 5, 3)][i//2 % 3], 4)
        size = [rng.integers(30, 420, 3), [rng.integers(8, 70), *rng.integers(96, 600, 2)], rng.integers(12, 420, 3)][i//2 % 3]
        order = rng.permutation(3)
        spacings = np.round(np.array(base)[order]*np.exp(rng.normal(0, rng.choice([0, .05, .4]), (3, 3))), 4)
        shapes = np.maximum(2, np.round(np.array(size)[order]*np.exp(rng.normal(0, .15, (3, 3))))).astype(int)
    return spacings, shapes, int(rng.integers(1, 70)), int(rng.integers(1, 5)), int(rng.integers(1, 14))

N, STEPS, rng = 1000, 9, np.random.default_rng(2401)
out = dict(spacings=np.zeros((N, 3, 3)), shapes=np.zeros((N, 3, 3), np.int16), repeats=np.zeros(N, np.int16), channels=np.zeros(N, np.int8), labels=np.zeros(N, np.int8),
           target=np.zeros((N, 3)), forward=np.zeros((N, 3), np.int8), backward=np.zeros((N, 3), np.int8), stages=np.zeros(N, np.int8), batch_dice=np.full((N, 2), -1, np.int8),
           spacing=np.zeros((N, 2, 3)), patch=np.zeros((N, 2, 3), np.int16), median=np.zeros((N, 2, 3), np.int16), batch=np.zeros((N, 2), np.int32),
           number=np.zeros((N, 2, 3), np.int8), pools=np.zeros((N, 2, STEPS, 3), np.int8), kernels=np.zeros((N, 2, STEPS, 3), np.int8), dummy=np.zeros((N, 2), bool))
for i in range(N):
    spacings, shapes, repeats, channels, labels = fingerprint(rng, i)
    for key, value in dict(spacings=spacings, shapes=shapes, repeats=repeats, channels=channels, labels=labels).items(): out[key][i] = value
    try: p = plan(np.tile(spacings, (repeats, 1)), np.tile(shapes, (repeats, 1)), ['MRI']*channels, range(1, labels + 1))
    except UnboundLocalError: continue      # the median case is exactly four patches: the original crashes; stages stays 0
    stages = [p.plans_per_stage[k] for k in sorted(p.plans_per_stage)]
    for key, value in dict(target=np.array(stages[-1]['current_spacing'])[p.transpose_backward],
                           forward=p.transpose_forward, backward=p.transpose_backward, stages=len(stages)).items(): out[key][i] = value
    for s, stage in zip((1,) if len(stages) == 1 else (0, 1), stages):             # 0: low resolution, 1: full resolution
        for key, name in dict(spacing='current_spacing', patch='patch_size', median='median_patient_size_in_voxels', batch='batch_size', number='num_pool_per_axis', dummy='do_dummy_2D_data_aug').items():
            out[key][i, s] = stage[name]
        for key, name in dict(pools='pool_op_kernel_sizes', kernels='conv_kernel_sizes').items():
            if stage[name]: out[key][i, s, :len(stage[name])] = stage[name]
        if i < 60: out['batch_dice'][i, s] = batch_dice(p, '3d_fullres' if s else '3d_lowres')

SETS = {'Hippocampus, 260 cases': ([(1, 1, 1)]*260, [(36, 50, 35)]*260, ['MRI'], 2), 'Hippocampus, 200 cases': ([(1, 1, 1)]*200, [(36, 50, 35)]*200, ['MRI'], 2),
        'BraTS 2020': ([(1, 1, 1)]*369, [(138, 169, 138)]*369, ['FLAIR', 'T1', 'T1c', 'T2'], 3),
        'Pancreas CT (NIH)': ([(1, .859375, .859375)]*82, [(215, 512, 512), (216, 512, 512)]*41, ['CT'], 1),
        'Liver': ([(1, .767578125, .767578125)]*131, [(482, 512, 512)]*131, ['CT'], 2)}
headers = [sitk.ReadImage(str(f)) for f in sorted(Path(__file__).resolve().parents[2].glob('data_samples/Task101_PhantomCT/imagesTr/*.nii.gz'))]
SETS['CT phantom'] = [h.GetSpacing()[::-1] for h in headers], [h.GetSize()[::-1] for h in headers], ['CT'], 3   # its air is not zero: not cropped
plain = lambda v: {str(k): plain(x) for k, x in v.items()} if isinstance(v, dict) else [plain(x) for x in v] if isinstance(v, (list, tuple, np.ndarray)) else v.item() if isinstance(v, np.generic) else v
named = {}
for name, (spacings, shapes, channels, labels) in SETS.items():
    p = plan(spacings, shapes, channels, range(1, labels + 1))
    k = len(shapes) if name == 'CT phantom' else 2                                   # the others repeat after two cases
    named[name] = dict(spacings=spacings[:k], shapes=shapes[:k], n_cases=len(shapes), channels=channels, labels=list(range(1, labels + 1)), stages=[p.plans_per_stage[k] for k in sorted(p.plans_per_stage)])
names, reductions = ['CT', 'ct', 'MRI', 'T2', 'noNorm', 'SPECT', 'CT2'], [.3, .74, .75, .76, 1.]
norm = []
for r in reductions:
    p = plan([(1, 1, 1)], [(32, 32, 32)], names, [1], [r]).plans
    norm.append(dict(reduction=r, channels=names, schemes=list(p['normalization_schemes'].values()), masks=[bool(m) for m in p['use_mask_for_norm'].values()]))
head = dict(command='python tests/record/24_planning.py', versions=f'nnunet 1.7.1, numpy {np.__version__}, python {sys.version.split()[0]}')
folder = Path(__file__).resolve().parents[1]/'recorded'
np.savez_compressed(folder/'24_planning.npz', **head, **out)
(folder/'24_planning.json').write_text(json.dumps(plain({**head, 'data sets': named, 'normalization': norm}), separators=(',', ':')) + '\n')
for f in ('24_planning.npz', '24_planning.json'): print(f, (folder/f).stat().st_size, 'bytes')
