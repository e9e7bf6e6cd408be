"""Record the plans of nnU-Net 2.8.1's three presets of residual encoders for made-up fingerprints of every kind.

Needs python 3.11 with nnunetv2==2.8.1 (benchmarks/requirements-peers.txt); some minutes on one core.
Usage, from the project's root: python tests/record/24_planning_v2.py
"""
import builtins, hashlib, importlib.util, json, os, sys, tempfile
from pathlib import Path

import numpy as np
import torch

here, work, say = Path(__file__).resolve().parent, Path(tempfile.mkdtemp()), print
for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'): os.environ[name] = str(work/name)
builtins.print = lambda *args, **kwargs: None        # the planners print every trial
import nnunetv2.experiment_planning.experiment_planners.default_experiment_planner as original
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import nnUNetPlannerResEncL, nnUNetPlannerResEncM, nnUNetPlannerResEncXL

spec = importlib.util.spec_from_file_location('inputs', here/'24_planning_inputs.py')
inputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inputs)
PLANNERS = {'resenc_m': nnUNetPlannerResEncM, 'resenc_l': nnUNetPlannerResEncL, 'resenc_xl': nnUNetPlannerResEncXL}
SEED, N = 2402, int(sys.argv[1]) if len(sys.argv) > 1 else 180
raw, preprocessed = work/'nnUNet_raw'/'Dataset001_Made', work/'nnUNet_preprocessed'/'Dataset001_Made'
for folder in (raw, preprocessed): folder.mkdir(parents=True)
original.get_filenames_of_train_images_and_targets = lambda folder, json: {'a': {'images': ['a.nii.gz']}}
original.determine_reader_writer_from_dataset_json = lambda json, image: type(json)
count = original.ExperimentPlanner.static_estimate_VRAM_usage


def counted(*args): # the numbers of a network are not needed, only their count
    with torch.device('meta'): return count(*args)


original.ExperimentPlanner.static_estimate_VRAM_usage = staticmethod(counted)


def plain(v): return [plain(x) for x in v] if isinstance(v, (list, tuple, np.ndarray)) else v.item() if isinstance(v, np.generic) else v


def short(v): return ' '.join(''.join(map(str, row)) if isinstance(row, list) else str(row) for row in plain(v)) # '111 122 222'


def plan(which, spacings, shapes, channels, labels):
    "What one preset decides: per configuration what the network and its patch are"
    (raw/'dataset.json').write_text(json.dumps({'channel_names': {str(c): 'MRI' for c in range(channels)}, 'labels': {'background': 0, **{f'k{i}': i for i in range(1, labels + 1)}},
                                                'numTraining': len(shapes), 'file_ending': '.nii.gz'}))
    (preprocessed/'dataset_fingerprint.json').write_text(json.dumps({'spacings': plain(spacings), 'shapes_after_crop': plain(shapes), 'median_relative_size_after_cropping': 1.,
                                                                     'foreground_intensity_properties_per_channel': {}}))
    for old in preprocessed.glob('nnUNet*.json'): old.unlink()
    p, found = PLANNERS[which]('Dataset001_Made').plan_experiment(), {}
    for name, c in p['configurations'].items():
        if 'patch_size' not in c: continue # a cascade's second stage is as 3d_fullres
        k = c['architecture']['arch_kwargs']
        found[name] = dict(patch=plain(c['patch_size']), batch=c['batch_size'], spacing=plain(c['spacing']), batch_dice=c['batch_dice'], network=c['architecture']['network_class_name'].rpartition('.')[2],
                           strides=short(k['strides']), kernels=short(k['kernel_sizes']), features=short(k['features_per_stage']), down=short(k['n_blocks_per_stage']), up=short(k['n_conv_per_stage_decoder']))
    return dict(transpose=plain(p['transpose_forward']), configurations=found)


rows, drawn = [], hashlib.sha256()
for i in range(N):
    one, row = inputs.fingerprint(SEED, i), {}
    drawn.update(json.dumps([plain(v) for v in one]).encode())
    for which in PLANNERS:
        try: row[which] = plan(which, *one)
        except Exception as error: row[which] = f'{type(error).__name__}: {error}'[:100]
    rows.append(row)
out = here.parent/'recorded'/'24_planning_v2.json'
errors = [f'{i} {which}: {p}' for i, row in enumerate(rows) for which, p in row.items() if isinstance(p, str)]
text = ',\n'.join(json.dumps(row, separators=(',', ':')) for row in rows)
about = json.dumps(dict(command='python tests/record/24_planning_v2.py', versions=f'nnunetv2 2.8.1, numpy {np.__version__}, python {sys.version.split()[0]}', seed=SEED, inputs=drawn.hexdigest()))
out.write_text(f'{{"about": {about},\n"plans": [\n{text}]}}\n')
say(out.name, out.stat().st_size, 'bytes', len(errors), 'errors', errors[:5])
