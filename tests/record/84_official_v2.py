"""Train six tiny models with nnU-Net v2, as its own commands lay them out on disk, and predict one unseen case with each.

`plain` is 3d_fullres with two folds on a CT, `2d` slices of a cropped MR, `residual` the residual encoder on thick slices whose
coarse axis is last, `cascade` both stages on the cropped MR (fold `all`), `regions` overlapping regions and an ignore label,
`torchres` the plan that resamples with torch.
Needs an environment with nnunetv2 (benchmarks/requirements-peers.txt); about five minutes on one core.
Writes tests/recorded/official/v2_<model>.zip (plans.json, dataset.json, fold_*/checkpoint_final.pth) and
tests/recorded/84_official_v2.npz: the images, nnU-Net's masks, and where its two best classes differ by less than 0.01.
Usage: python tests/record/84_official_v2.py [name of a model ...]
"""
import contextlib, importlib.util, json, os, random, shutil, sys, tempfile, time, zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RECORDED = HERE.parent / 'recorded'
_spec = importlib.util.spec_from_file_location('official_v1', HERE / '84_official_v1.py')
v1 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(v1)
CASES, STEPS, DATASET = v1.CASES, 80, 'Dataset084_Official'
MODELS = {  # name: (task, planner, [(configuration, patch, strides)])
    'plain': ('ct', 'ExperimentPlanner', [('3d_fullres', (12, 20, 20), [[1, 1, 1], [1, 2, 2], [2, 2, 2]])]),
    '2d': ('mr', 'ExperimentPlanner', [('2d', (20, 20), [[1, 1], [2, 2], [2, 2]])]),
    'residual': ('thick', 'nnUNetPlannerResEncM', [('3d_fullres', (8, 20, 20), [[1, 1, 1], [1, 2, 2], [2, 2, 2]])]),
    'cascade': ('mr', 'ExperimentPlanner', [('3d_lowres', (12, 16, 16), [[1, 1, 1], [2, 2, 2], [1, 2, 2]]), ('3d_cascade_fullres', (12, 20, 20), [[1, 1, 1], [2, 2, 2], [1, 2, 2]])]),
    'regions': ('brats', 'ExperimentPlanner', [('3d_fullres', (12, 20, 20), [[1, 1, 1], [2, 2, 2], [1, 2, 2]])]),
    'torchres': ('thick', 'nnUNetPlannerResEncL_torchres', [('3d_fullres', (8, 20, 20), [[1, 1, 1], [1, 2, 2], [2, 2, 2]])])}


def shrink(plans, stages, residual):
    "Small patches and few features; the stages asked for"
    had = plans['configurations']
    full = had['2d' if stages[0][0] == '2d' else '3d_fullres']
    found = {}
    for name, patch, strides in stages:
        one = json.loads(json.dumps(full))
        kwargs = one['architecture']['arch_kwargs']
        n = len(strides)
        kwargs.update(n_stages=n, features_per_stage=[3, 6, 12], kernel_sizes=[[3] * len(patch)] * n, strides=strides, n_conv_per_stage_decoder=[1 if residual else 2] * (n - 1))
        kwargs.update({'n_blocks_per_stage': [1, 2, 2]} if residual else {'n_conv_per_stage': [2] * n})
        one.update(patch_size=list(patch), batch_size=2, data_identifier=f"{plans['plans_name']}_{name}")
        if name == '3d_lowres': one.update(spacing=[1.5 * s for s in full['spacing']], next_stage='3d_cascade_fullres', batch_dice=False)
        found[name] = one
    if '3d_cascade_fullres' in found:
        found['3d_fullres'] = found['3d_cascade_fullres'] | {'data_identifier': f"{plans['plans_name']}_3d_fullres"}
        found['3d_cascade_fullres'] = {'inherits_from': '3d_fullres', 'previous_stage': '3d_lowres'}
    plans['configurations'] = found


def train(plans, configuration, fold, described, steps=STEPS):
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    torch.manual_seed(84); np.random.seed(84); random.seed(84)
    t = nnUNetTrainer(plans={**json.loads(json.dumps(plans)), 'continue_training': False}, configuration=configuration, fold=fold, dataset_json=described, device=torch.device('cpu'))
    t.num_epochs, t.num_iterations_per_epoch, t.num_val_iterations_per_epoch, t.initial_lr = 2, steps // 2, 1, .03
    t.run_training()
    return t


def record(name):
    import torch
    import nnunetv2
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    task, planner, stages = MODELS[name]
    roots = {k: Path(os.environ[f'nnUNet_{k}']) for k in ('raw', 'preprocessed', 'results')}
    for root in roots.values(): shutil.rmtree(root / DATASET, ignore_errors=True)
    raw, done = roots['raw'] / DATASET, roots['preprocessed'] / DATASET
    found = {f'{name}/{k}': v for k, v in v1.raw_task(raw, task).items()}
    old = json.loads((raw / 'dataset.json').read_text())
    described = dict(channel_names=old['modality'], labels={n: int(i) for i, n in old['labels'].items()}, numTraining=CASES, file_ending='.nii.gz')
    if name == 'regions':
        described.update(labels={'background': 0, 'whole': [1, 2, 3], 'core': [2, 3], 'enhancing': [3], 'ignore': 4}, regions_class_order=[1, 2, 3])
    (raw / 'dataset.json').write_text(json.dumps(described))
    os.environ['nnUNet_n_proc_DA'] = '1' # which the planner takes for torch's threads
    extract_fingerprints([84], num_processes=1, check_dataset_integrity=False, show_progress_bar=False)
    identifier = plan_experiments([84], planner)
    plans = json.loads((done / f'{identifier}.json').read_text())
    shrink(plans, stages, 'ResEnc' in planner)
    (done / f'{identifier}.json').write_text(json.dumps(plans))
    (done / 'splits_final.json').write_text(json.dumps([dict(train=['c0', 'c1'], val=['c2', 'c3', 'c4']), dict(train=['c2', 'c3', 'c4'], val=['c0', 'c1'])]))
    preprocess([84], identifier, [n if n != '3d_cascade_fullres' else '3d_fullres' for n, *_ in stages], [1] * len(stages), show_progress_bar=False)
    members, before = {}, None
    os.environ['nnUNet_n_proc_DA'] = '0' # batches are made in this process
    for configuration, *_ in stages:
        folds = ['all'] if name == 'cascade' else [0, 1] if name == 'plain' else [0]
        for fold in folds:
            t = train(plans, configuration, fold, described, STEPS * (4 if name == 'regions' else 1))
            found[f'{name}/{configuration}/losses_{fold}'] = np.array(t.logger.local_logger.my_fantastic_logging['train_losses'], np.float32)
            if configuration == '3d_lowres': t.perform_actual_validation(False)
        out = Path(t.output_folder_base)
        p = nnUNetPredictor(tile_step_size=.5, use_gaussian=True, use_mirroring=True, perform_everything_on_device=False, device=torch.device('cpu'), allow_tqdm=False)
        p.initialize_from_trained_model_folder(str(out), folds, 'checkpoint_final.pth')
        mask = roots['results'] / name / configuration / 'c5'
        mask.parent.mkdir(parents=True)
        p.predict_from_files_sequential([[str(f) for f in sorted((raw / 'imagesTs').glob('*'))]], [str(mask)], True, True, None if before is None else str(before.parent))
        found.update({f'{name}/{configuration}/{k}': v for k, v in answers(mask, 'regions_class_order' in described).items()})
        before = mask
        kept = ['plans.json', 'dataset.json', *(f'fold_{f}/checkpoint_final.pth' for f in folds)]
        members.update({f'{DATASET}/{out.name}/{k}': (out / k).read_bytes() for k in kept})
    with zipfile.ZipFile(RECORDED / 'official' / f'v2_{name}.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for member, content in members.items(): z.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED, 9)
    return found


def answers(mask, regions):
    "nnU-Net's mask, and where its answer hangs by a thread: it adds logits in half precision"
    import SimpleITK as sitk
    p = np.load(f'{mask}.npz')['probabilities'].astype(np.float32)
    order = np.sort(p, 0)
    return dict(mask=sitk.GetArrayFromImage(sitk.ReadImage(f'{mask}.nii.gz')), close=(np.abs(p - .5) < .003).any(0) if regions else order[-1] - order[-2] < .01)


def main():
    wanted = sys.argv[1:] or list(MODELS)
    (RECORDED / 'official').mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp())
    for part in ('raw', 'preprocessed', 'results'):
        os.environ[f'nnUNet_{part}'] = str(work / part)
        (work / part).mkdir()
    os.environ.update(nnUNet_def_n_proc='1', MPLBACKEND='agg')
    import torch
    torch.set_num_threads(1)
    out = RECORDED / '84_official_v2.npz'
    found = dict(np.load(out)) if out.exists() and sys.argv[1:] else {}
    found.update(command='python tests/record/84_official_v2.py', versions=json.dumps({p: version(p) for p in ('nnunetv2', 'torch', 'numpy', 'batchgeneratorsv2', 'dynamic-network-architectures')}))
    for name in wanted:
        start = time.time()
        with v1.quiet(): new = record(name)
        found = {k: v for k, v in found.items() if not k.startswith(f'{name}/')} | new
        np.savez_compressed(out, **found)
        for k, v in new.items():
            if k.endswith('/mask'): print(name, k, v.shape, np.bincount(v.ravel()), 'close', new[k.replace('mask', 'close')].sum(), f'{time.time() - start:.0f} s', file=sys.stderr, flush=True)
    shutil.rmtree(work)


if __name__ == '__main__': main()
