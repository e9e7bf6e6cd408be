"""Train six tiny models with nnU-Net 1.7.1, as its own commands lay them out on disk, and predict one unseen case with each.

`plain` is 3d_fullres with two folds and a post-processing on a CT, `2d` two slices' networks on a cropped MR, `residual` the
FabiansUNet on thick slices whose coarse axis is last, `cascade` both stages on the cropped MR (3d_lowres and
3d_cascade_fullres, fold `all`), `regions` the BraTS trainer. A few dozen steps each: enough for masks with every label.
Needs python 3.11 with nnunet==1.7.1 (README.md beside this file); about ten minutes on one core.
Writes tests/recorded/official/v1_<model>.zip (plans.pkl, postprocessing.json, fold_*/model_final_checkpoint.model(.pkl)) and
tests/recorded/84_official_v1.npz: the images, nnU-Net's masks, and where its two best classes differ by less than 0.002.
Usage: python tests/record/84_official_v1.py [name of a model ...]
"""
import contextlib, copy, importlib.util, json, os, pickle, random, shutil, sys, tempfile, time, zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RECORDED = HERE.parent / 'recorded'
_spec = importlib.util.spec_from_file_location('tasks', HERE / '32_preprocessing.py')
tasks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tasks)
tasks.TASKS['brats'] = (('T1', 'T2'), (1, 2, 3), (18, 26, 24), (1.0, 1.5, 1.25), 4)
tasks.TASKS['thick'] = (('MRI',), (1, 2), (28, 30, 12), (0.75, 0.75, 3.5), 0)
CASES, STEPS, PRISTINE = 5, 80, {}
MODELS = {  # name: (task, [(configuration, trainer, patch, pools)])
    'plain': ('ct', [('3d_fullres', 'nnUNetTrainerV2', (12, 20, 20), [[1, 2, 2], [2, 2, 2]])]),
    '2d': ('mr', [('2d', 'nnUNetTrainerV2', (20, 20), [[2, 2], [2, 2]])]),
    'residual': ('thick', [('3d_fullres', 'nnUNetTrainerV2_ResencUNet', (8, 20, 20), [[1, 2, 2], [2, 2, 2]])]),
    'cascade': ('mr', [('3d_lowres', 'nnUNetTrainerV2', (12, 16, 16), [[2, 2, 2], [1, 2, 2]]),
                       ('3d_cascade_fullres', 'nnUNetTrainerV2CascadeFullRes', (12, 20, 20), [[2, 2, 2], [1, 2, 2]])]),
    'regions': ('brats', [('3d_fullres', 'nnUNetTrainerV2BraTSRegions', (12, 20, 20), [[2, 2, 2], [1, 2, 2]])])}


@contextlib.contextmanager
def quiet():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): yield


def raw_task(folder, name):
    "A raw task of five training cases, and a test case"
    import SimpleITK as sitk
    modalities, labels, shape, spacing, rim = tasks.TASKS[name]
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (folder / part).mkdir(parents=True)
    rng, kept = np.random.default_rng([84, *map(ord, name)]), None
    for i, factor in enumerate((1.0, .9, 1.1, .95, 1.05, .85)): # the unseen case is resampled, too
        data, seg = tasks.case(rng, tuple(n + int(rng.integers(-2, 3)) for n in shape), len(modalities), rim, 2)
        if len(labels) == 3: seg[(seg == 2) & (np.arange(seg.shape[0]) % 2 == 0)[:, None, None]] = 3
        data = data + (80 * (seg == 3)).astype(np.int16)
        mm, where = [round(factor * s, 3) for s in spacing], 'imagesTr' if i < CASES else 'imagesTs'
        for file, array in [(f'{where}/c{i}_{c:04d}', channel) for c, channel in enumerate(data)] + [(f'labelsTr/c{i}', seg.astype(np.uint8))] * (i < CASES):
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing(mm[::-1])
            sitk.WriteImage(picture, str(folder / f'{file}.nii.gz'))
        kept = dict(data=data, seg=seg.astype(np.uint8), spacing=np.array(mm))
    described = dict(name=name, description='', reference='', licence='', release='', tensorImageSize='4D', modality={str(c): m for c, m in enumerate(modalities)},
                     labels={'0': 'background', **{str(k): f'class{k}' for k in sorted(labels)}}, numTraining=CASES, numTest=1, test=[f'./imagesTs/c{CASES}.nii.gz'],
                     training=[dict(image=f'./imagesTr/c{i}.nii.gz', label=f'./labelsTr/c{i}.nii.gz') for i in range(CASES)])
    (folder / 'dataset.json').write_text(json.dumps(described))
    return kept


def plans_of(task, raw, work, stages):
    "Crop, analyse and plan with nnU-Net; then small patches and few features; then preprocess"
    from nnunet.experiment_planning.alternative_experiment_planning.experiment_planner_residual_3DUNet_v21 import ExperimentPlanner3DFabiansResUNet_v21
    from nnunet.experiment_planning.DatasetAnalyzer import DatasetAnalyzer
    from nnunet.experiment_planning.experiment_planner_baseline_2DUNet_v21 import ExperimentPlanner2D_v21
    from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21
    from nnunet.experiment_planning.utils import create_lists_from_splitted_dataset
    from nnunet.preprocessing.cropping import ImageCropper
    cropped, done = work / 'cropped', work / 'preprocessed'
    for folder in (cropped, done): folder.mkdir()
    ImageCropper(1, str(cropped)).run_cropping(create_lists_from_splitted_dataset(str(raw))[0], overwrite_existing=True)
    for folder in (cropped, done): shutil.copy(raw / 'dataset.json', folder)
    DatasetAnalyzer(str(cropped), overwrite=True, num_processes=1).analyze_dataset(collect_intensityproperties='CT' in tasks.TASKS[task][0])
    shutil.copy(cropped / 'dataset_properties.pkl', done)
    residual = 'Resenc' in stages[0][1]
    kind = ExperimentPlanner2D_v21 if stages[0][0] == '2d' else ExperimentPlanner3DFabiansResUNet_v21 if residual else ExperimentPlanner3D_v21
    planner = kind(str(cropped), str(done))
    planner.plan_experiment()
    plans, [last] = planner.plans, [max(planner.plans['plans_per_stage'])]
    spacing = np.array(plans['plans_per_stage'][last]['current_spacing'], float)
    found = {}
    for i, (_, _, patch, pools) in enumerate(stages):
        one = copy.deepcopy(plans['plans_per_stage'][last])
        coarser = 1.5 if len(stages) > i + 1 else 1.
        one.update(patch_size=np.array(patch), batch_size=2, pool_op_kernel_sizes=([[1, 1, 1]] if residual else []) + pools, conv_kernel_sizes=[[3] * len(patch)] * (len(pools) + 1),
                   num_pool_per_axis=[int(sum(k[a] == 2 for k in pools)) for a in range(len(patch))], do_dummy_2D_data_aug=False, current_spacing=spacing * coarser,
                   original_spacing=spacing, median_patient_size_in_voxels=np.round(np.array(one['median_patient_size_in_voxels']) / coarser).astype(int))
        if residual: one.update(num_blocks_encoder=(1, 2, 2), num_blocks_decoder=(1, 1))
        found[i] = one
    plans.update(plans_per_stage=found, num_stages=len(found), base_num_features=3)
    planner.plans, planner.plans_per_stage = plans, found
    planner.plans_fname = str(done / 'nnUNetPlansv2.1_plans.pkl')
    planner.save_my_plans()
    ExperimentPlanner3D_v21.run_preprocessing(planner, 1) if residual else planner.run_preprocessing(1) # its own does nothing
    if not (done / 'gt_segmentations').exists(): shutil.copytree(raw / 'labelsTr', done / 'gt_segmentations')
    with open(done / 'splits_final.pkl', 'wb') as f:
        keys = [f'c{i}' for i in range(CASES)]
        pickle.dump([dict(train=np.array(keys[:2]), val=np.array(keys[2:])), dict(train=np.array(keys[2:]), val=np.array(keys[:2]))], f)
    return planner.plans_fname, done


def trainer_class(name):
    import nnunet
    from nnunet.training.model_restore import recursive_find_python_class
    return recursive_find_python_class([os.path.join(nnunet.__path__[0], 'training', 'network_training')], name, 'nnunet.training.network_training')


def train(name, kind, plans_file, fold, out, done, stage, steps=STEPS):
    from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
    from nnunet.training.data_augmentation import default_data_augmentation as defaults
    for table in (defaults.default_3D_augmentation_params, defaults.default_2D_augmentation_params): # a trainer changes them; a new process would have them fresh
        PRISTINE.setdefault(id(table), copy.deepcopy(dict(table)))
        table.clear()
        table.update(copy.deepcopy(PRISTINE[id(table)]))
    t = trainer_class(kind)(plans_file, fold, output_folder=str(out), dataset_directory=str(done), batch_dice=stage == 1 or name != 'cascade', stage=stage, unpack_data=False, deterministic=True, fp16=False)
    t.initialize(True)
    t.tr_gen, t.val_gen = SingleThreadedAugmenter(t.dl_tr, t.tr_gen.transform), SingleThreadedAugmenter(t.dl_val, t.val_gen.transform)
    np.random.seed(84)
    random.seed(84)
    t.max_num_epochs, t.num_batches_per_epoch, t.num_val_batches_per_epoch, t.initial_lr = 2, steps // 2, 1, .03
    t.plot_network_architecture = lambda: None
    t.run_training()
    t.network.eval()
    return t


def record(name, work):
    import nnunet.paths
    from nnunet.inference.predict import predict_cases
    from nnunet.postprocessing.consolidate_postprocessing import consolidate_folds
    from nnunet.training.cascade_stuff.predict_next_stage import predict_next_stage
    task, stages = MODELS[name]
    raw, folder, before, found = work / 'raw', f'Task084_{name}', None, {}
    found.update({f'{name}/{k}': v for k, v in raw_task(raw, task).items()})
    plans_file, done = plans_of(task, raw, work, stages)
    images = sorted(map(str, (raw / 'imagesTs').glob('*.nii.gz')))
    members = {}
    for stage, (configuration, kind, *_) in enumerate(stages):
        out = Path(nnunet.paths.network_training_output_dir) / configuration / folder / f'{kind}__nnUNetPlansv2.1'
        folds = ['all'] if name == 'cascade' else [0, 1] if name == 'plain' else [0]
        for fold in folds:
            t = train(name, kind, plans_file, fold, out, done, stage, STEPS * (4 if name == 'regions' else 1)) # regions take longer to rise above one half
            if name == 'plain': t.validate(save_softmax=False)
            if configuration == '3d_lowres': predict_next_stage(t, str(done / f"{t.plans['data_identifier']}_stage1"))
            found[f'{name}/{configuration}/losses_{fold}'] = np.array(t.all_tr_losses, np.float32)
        if name == 'plain': consolidate_folds(str(out), folds=(0, 1))
        mask = work / f'{configuration}.nii.gz'
        predict_cases(str(out), [images], [str(mask)], folds, True, 1, 1, None if before is None else [str(before)], do_tta=True, mixed_precision=False, overwrite_existing=True)
        found.update({f'{name}/{configuration}/{k}': v for k, v in answers(mask, work).items()})
        before = mask
        kept = ['plans.pkl', 'postprocessing.json', *(f'{"all" if f == "all" else f"fold_{f}"}/model_final_checkpoint.model{e}' for f in folds for e in ('', '.pkl'))]
        members.update({f'{configuration}/{folder}/{kind}__nnUNetPlansv2.1/{k}': (out / k).read_bytes() for k in kept if (out / k).exists()})
    with zipfile.ZipFile(RECORDED / 'official' / f'v1_{name}.zip', 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for member, content in members.items(): z.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED, 9)
    return found


def answers(mask, work):
    "nnU-Net's mask, and where its answer hangs by a thread"
    import SimpleITK as sitk
    p = np.load(str(mask)[:-7] + '.npz')['softmax'].astype(np.float32)
    with open(str(mask)[:-7] + '.pkl', 'rb') as f: properties = pickle.load(f)
    close = np.zeros(properties['original_size_of_raw_data'], bool)
    regions = properties.get('regions_class_order') is not None
    order = np.sort(p, 0)
    close[tuple(slice(*b) for b in properties['crop_bbox'])] = (np.abs(p - .5) < .001).any(0) if regions else order[-1] - order[-2] < .002
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))
    return dict(mask=labels, close=close)


def main():
    wanted = sys.argv[1:] or list(MODELS)
    (RECORDED / 'official').mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp())
    for variable in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[variable] = str(work / variable)
    os.environ.update(nnUNet_def_n_proc='1', nnUNet_n_proc_DA='1', MPLBACKEND='agg')
    import torch
    torch.set_num_threads(1)
    load = torch.load
    torch.load = lambda *a, **k: load(*a, **{'weights_only': False, **k})  # its checkpoints hold numpy scalars
    if 'bool' not in vars(np): np.bool = bool                              # for MedPy 0.4.0
    out = RECORDED / '84_official_v1.npz'
    found = dict(np.load(out)) if out.exists() and sys.argv[1:] else {}
    found.update(command='python tests/record/84_official_v1.py', versions=json.dumps({p: version(p) for p in ('nnunet', 'torch', 'numpy', 'batchgenerators')}))
    for name in wanted:
        start, part = time.time(), work / name
        part.mkdir()
        with quiet(): new = record(name, part)
        found = {k: v for k, v in found.items() if not k.startswith(f'{name}/')} | new
        np.savez_compressed(out, **found)
        for k, v in new.items():
            if k.endswith('/mask'): print(name, k, v.shape, np.bincount(v.ravel()), 'close', new[k.replace('mask', 'close')].sum(), f'{time.time() - start:.0f} s', file=sys.stderr, flush=True)
    shutil.rmtree(work)


if __name__ == '__main__': main()
