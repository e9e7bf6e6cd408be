"""Record what nnU-Net 1.7.1 does in a cascade: low resolution, the maps handed on, full resolution, both predicted.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/80_cascade.py
Writes tests/recorded/80_cascade.npz: four training images with much air (`image/<case>`, `label/<case>`), two test images
(`cropped`: with air, `whole`: without), the plan by hand, the trained weights of both stages `low/<tensor>`, `high/<tensor>`,
the maps that the second stage trained with `previous/<case>`, and per test image the answers of both stages: `answer/<image>/low`,
`answer/<image>/high` as the original gives it, and `answer/<image>/high_boxed`, where the map went through the crop box first.
"""
import contextlib, json, os, pickle, random, shutil, sys, tempfile
from importlib.metadata import version
from pathlib import Path

WORK = tempfile.mkdtemp()
for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'):
    os.environ[key] = f'{WORK}/{key}'
    os.makedirs(os.environ[key])
os.environ |= {'MPLBACKEND': 'agg', 'nnUNet_def_n_proc': '1', 'OMP_NUM_THREADS': '1'}
import numpy as np
import torch

OUT = Path(__file__).resolve().parents[1]/'recorded'/'80_cascade.npz'
SPACING = (1.25, 1., 2.5)  # z, y, x of the files: the last axis becomes the first
STAGE = dict(patch_size=np.array([8, 16, 16]), batch_size=2, num_pool_per_axis=[1, 2, 2], do_dummy_2D_data_aug=False, pool_op_kernel_sizes=[[1, 2, 2], [2, 2, 2]],
             conv_kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]], original_spacing=np.array([2.5, 1.25, 1.]), median_patient_size_in_voxels=np.array([12, 24, 28]))
SPACINGS = {0: np.array([3.5, 1.9, 1.5]), 1: np.array([2.5, 1.25, 1.])}


def image(seed, air):
    "A body with two parts and noise, in air"
    from scipy.ndimage import gaussian_filter
    rng = np.random.RandomState(seed)
    shape = (34, 36, 16) if air else (26, 28, 12)
    field = gaussian_filter(rng.normal(size=shape), (3, 3, 1.5))
    field /= field.std()
    label = np.where(field > 1.1, 1, np.where(field < -1.1, 2, 0)).astype(np.uint8)
    data = np.round(300 + 150*(label == 1) - 110*(label == 2) + rng.normal(0, 25, shape)).astype(np.int16)
    if air:
        body = np.zeros(shape, bool)
        body[3:25, 8:33, 2:13] = True
        data, label = data*body, label*body
    return data, label


def write(array, file):
    import SimpleITK as sitk
    im = sitk.GetImageFromArray(array)
    im.SetSpacing([float(s) for s in SPACING[::-1]])
    sitk.WriteImage(im, str(file))


def plans(labels=2):
    return dict(num_stages=2, num_modalities=1, modalities={0: 'MRI'}, normalization_schemes={0: 'nonCT'}, dataset_properties={'intensityproperties': None}, num_classes=labels,
                all_classes=[1, 2], base_num_features=3, use_mask_for_norm={0: True}, keep_only_largest_region=None, min_region_size_per_class=None, min_size_per_class=None,
                transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0], data_identifier='nnUNetData_plans_v2.1', plan_per_stage=None, preprocessor_name='GenericPreprocessor', conv_per_stage=2,
                plans_per_stage={i: dict(STAGE, current_spacing=SPACINGS[i]) for i in SPACINGS})


def train(cls, stage, plans_file, out, prep):
    from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
    t = cls(plans_file, 'all', output_folder=out, dataset_directory=prep, batch_dice=stage == 1, stage=stage, unpack_data=False, deterministic=True, fp16=False)
    np.random.seed(stage), random.seed(stage), torch.manual_seed(stage)
    t.initialize(True)
    t.tr_gen, t.val_gen = SingleThreadedAugmenter(t.dl_tr, t.tr_gen.transform), SingleThreadedAugmenter(t.dl_val, t.val_gen.transform)
    t.max_num_epochs, t.num_batches_per_epoch, t.num_val_batches_per_epoch = (2, 30, 1) if stage == 0 else (6, 50, 1)
    t.plot_network_architecture = lambda: None
    t.run_training()
    t.network.eval()
    shutil.copy(plans_file, f'{out}/plans.pkl')
    return t


def boxed(resize, box, forward):
    "The original's resizing, on the part of the map that the image was cropped to"
    def through_box(seg, shape, order=3):
        return resize(seg[tuple(slice(*box[a]) for a in forward)], shape, order)
    return through_box


def main():
    import SimpleITK as sitk
    load = torch.load
    torch.load = lambda *a, **k: load(*a, **{'weights_only': False} | k)
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        import nnunet.paths
        from nnunet.inference import predict as p
        from nnunet.preprocessing.cropping import ImageCropper
        from nnunet.preprocessing.preprocessing import GenericPreprocessor
        from nnunet.training.cascade_stuff.predict_next_stage import predict_next_stage
        from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2
        from nnunet.training.network_training.nnUNetTrainerV2_CascadeFullRes import nnUNetTrainerV2CascadeFullRes
        torch.set_num_threads(1)
        arrays, prep = {}, f'{WORK}/prep'
        os.makedirs(f'{prep}/cropped'), os.makedirs(f'{WORK}/raw')
        lists, cases = [], [f'c{i}' for i in range(4)]
        for i, case in enumerate(cases):
            data, label = image(i, True)
            arrays |= {f'image/{case}': data, f'label/{case}': label}
            write(data, f'{WORK}/raw/{case}_0000.nii.gz'), write(label, f'{WORK}/raw/{case}.nii.gz')
            lists.append([f'{WORK}/raw/{case}_0000.nii.gz', f'{WORK}/raw/{case}.nii.gz'])
        ImageCropper(1, f'{prep}/cropped').run_cropping(lists, overwrite_existing=True)
        shutil.copytree(f'{prep}/cropped/gt_segmentations', f'{prep}/gt_segmentations')
        plan, plans_file = plans(), f'{prep}/plans.pkl'
        with open(plans_file, 'wb') as f: pickle.dump(plan, f)
        with open(f'{prep}/cropped/dataset_properties.pkl', 'wb') as f: pickle.dump({'all_classes': [1, 2]}, f)
        GenericPreprocessor(plan['normalization_schemes'], plan['use_mask_for_norm'], plan['transpose_forward'], None).run([SPACINGS[0].copy(), SPACINGS[1].copy()], f'{prep}/cropped', prep, plan['data_identifier'], 1)
        ends = {}
        for stage, (net, cls) in enumerate((('3d_lowres', nnUNetTrainerV2), ('3d_cascade_fullres', nnUNetTrainerV2CascadeFullRes))):
            out = f'{nnunet.paths.network_training_output_dir}/{net}/TaskX/{cls.__name__}__p'
            os.makedirs(out)
            t = train(cls, stage, plans_file, out, prep)
            if stage == 0: predict_next_stage(t, f"{prep}/{plan['data_identifier']}_stage1")
            arrays |= {f"{('low', 'high')[stage]}/{k}": v.numpy() for k, v in t.network.state_dict().items()}
            ends[stage], ends[f'trainer {stage}'] = out, t
        for case in cases: arrays[f'previous/{case}'] = np.load(f'{ends[0]}/pred_next_stage/{case}_segFromPrevStage.npz')['data']
        resize = p.resize_segmentation
        for name, air in (('cropped', True), ('whole', False)):
            data, _ = image(10 + air, air)
            file = f'{WORK}/raw/{name}_0000.nii.gz'
            write(data, file)
            arrays[f'image/{name}'] = data
            how = dict(do_tta=True, mixed_precision=False, overwrite_existing=True)
            p.predict_cases(ends[0], [[file]], [f'{WORK}/{name}_low.nii.gz'], ['all'], False, 1, 1, None, **how)
            box = ends['trainer 1'].preprocess_patient([file])[2]['crop_bbox']
            for variant, function in (('high', resize), ('high_boxed', boxed(resize, box, plan['transpose_forward']))):
                p.resize_segmentation = function
                p.predict_cases(ends[1], [[file]], [f'{WORK}/{name}_{variant}.nii.gz'], ['all'], False, 1, 1, [f'{WORK}/{name}_low.nii.gz'], **how)
            p.resize_segmentation = resize
            for variant in ('low', 'high', 'high_boxed'): arrays[f'answer/{name}/{variant}'] = sitk.GetArrayFromImage(sitk.ReadImage(f'{WORK}/{name}_{variant}.nii.gz'))
    about = dict(command='python tests/record/80_cascade.py', versions={n: version(n) for n in ('nnunet', 'numpy', 'scipy', 'scikit-image', 'torch')}, spacing=SPACING,
                 stages={str(i): {k: np.asarray(v).tolist() for k, v in dict(STAGE, current_spacing=SPACINGS[i]).items()} for i in SPACINGS},
                 transpose_forward=plan['transpose_forward'], transpose_backward=plan['transpose_backward'], base_num_features=plan['base_num_features'])
    np.savez_compressed(OUT, about=json.dumps(about), **arrays)
    print('wrote', OUT.name, OUT.stat().st_size, 'bytes', {k: np.unique(v, return_counts=True)[1].tolist() for k, v in arrays.items() if k.startswith(('answer', 'previous'))},
          'losses', ends['trainer 0'].all_tr_losses, ends['trainer 1'].all_tr_losses)
    shutil.rmtree(WORK)


if __name__ == '__main__': main()
