"""Record 3D, 2D and residual plans of nnU-Net 1.7.1 for made-up fingerprints of every kind: numbers to read, and a hash of each whole plan.

Needs python 3.11 with nnunet==1.7.1 and the constraints of tests/record/README.md; takes about 10 minutes on two cores.
Usage, from the project's root: python tests/record/24_planning_all.py
"""
import builtins, hashlib, importlib.util, json, multiprocessing, os, pickle, sys, tempfile
from pathlib import Path

import numpy as np

here, work, say = Path(__file__).resolve().parent, Path(tempfile.mkdtemp()), print
for name in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[name] = str(work/name)
builtins.print = lambda *args, **kwargs: None        # the planners print every trial
from nnunet.experiment_planning.alternative_experiment_planning.experiment_planner_residual_3DUNet_v21 import ExperimentPlanner3DFabiansResUNet_v21
from nnunet.experiment_planning.experiment_planner_baseline_2DUNet_v21 import ExperimentPlanner2D_v21
from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21

spec = importlib.util.spec_from_file_location('inputs', here/'24_planning_inputs.py')
inputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inputs)
PLANNERS = {'3d': ExperimentPlanner3D_v21, '2d': ExperimentPlanner2D_v21, 'residual': ExperimentPlanner3DFabiansResUNet_v21}
KEYS = ('patch_size', 'batch_size', 'median_patient_size_in_voxels', 'num_pool_per_axis', 'pool_op_kernel_sizes', 'conv_kernel_sizes',
        'do_dummy_2D_data_aug', 'num_blocks_encoder', 'num_blocks_decoder')
SEED, N = 2402, int(sys.argv[1]) if len(sys.argv) > 1 else 2000
(work/'dataset_properties.pkl').write_bytes(pickle.dumps({}))


class Count(list):
    "A list of case files that has a length but no members; the planner only counts them"
    def __init__(self, n): super().__init__(); self.n = n
    def __len__(self): return self.n
    def __iter__(self): return iter(())


def plain(v): return [plain(x) for x in v] if isinstance(v, (list, tuple, np.ndarray)) else v.item() if isinstance(v, np.generic) else v


def plan(which, spacings, shapes, channels, labels):
    planner = PLANNERS[which](str(work), str(work))
    planner.dataset_properties = dict(all_spacings=list(spacings), all_sizes=[tuple(map(int, s)) for s in shapes], all_classes=list(range(1, labels + 1)),
        modalities={c: 'MRI' for c in range(channels)}, size_reductions={0: 1.}, intensityproperties=None)
    planner.list_of_cropped_npz_files, planner.save_my_plans = Count(len(shapes)), lambda: None
    planner.plan_experiment()
    return planner


def plan_all(i):
    "Everything the record keeps of fingerprint `i`: per planner an error's name, or stages, patches, batches and the hash of the whole plan"
    one, found = inputs.fingerprint(SEED, i), {}
    for which in PLANNERS:
        try: p = plan(which, *one)
        except (UnboundLocalError, IndexError, OverflowError) as e:
            found[which] = type(e).__name__
            continue
        stages, patch, batch = [p.plans_per_stage[k] for k in sorted(p.plans_per_stage)], np.zeros((2, 3), int), np.zeros(2, int)
        whole = [list(map(int, p.transpose_forward))]
        for s, stage in zip((1,) if len(stages) == 1 else (0, 1), stages):        # 0: low resolution, 1: full resolution
            size = plain(stage['patch_size'])
            patch[s, :len(size)], batch[s] = size, stage['batch_size']
            whole.append([[float(f'{mm:.9g}') for mm in stage['current_spacing']], *(plain(stage.get(k)) for k in KEYS)])
        found[which] = len(stages), patch, batch, int(hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16], 16)
    return hashlib.sha256(json.dumps([plain(v) for v in one]).encode()).hexdigest(), found


out = {w: dict(stages=np.zeros(N, np.int8), patch=np.zeros((N, 2, 3), np.int16), batch=np.zeros((N, 2), np.int32), plan=np.zeros(N, np.uint64)) for w in PLANNERS}
errors, drawn = {w: {} for w in PLANNERS}, hashlib.sha256()
with multiprocessing.get_context('fork').Pool(2) as pool:
    for i, (digest, found) in enumerate(pool.imap(plan_all, range(N), chunksize=4)):
        drawn.update(digest.encode())
        for which, one in found.items():
            if isinstance(one, str): errors[which][i] = one      # stages stays 0
            else:
                for key, value in zip(('stages', 'patch', 'batch', 'plan'), one): out[which][key][i] = value
folder = here.parent/'recorded'
np.savez_compressed(folder/'24_planning_all.npz', command='python tests/record/24_planning_all.py', versions=f'nnunet 1.7.1, numpy {np.__version__}, python {sys.version.split()[0]}',
                    seed=SEED, inputs=drawn.hexdigest(), errors=json.dumps(errors), **{f'{w}_{k}': v for w, o in out.items() for k, v in o.items()})
say('24_planning_all.npz', (folder/'24_planning_all.npz').stat().st_size, 'bytes', errors)
