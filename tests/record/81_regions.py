"""Record what nnU-Net 1.7.1 does with overlapping regions: training, prediction, BraTS's label values, scores and the threshold.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/81_regions.py
Writes tests/recorded/81_regions.npz and .json:
`w0/`, `w5/` the weights before and after five calls of nnUNetTrainerV2BraTSRegions.run_iteration, the label maps and masks of the
batches (`seg<i>`, `target<i>_<resolution>`), `losses`, and what run_online_evaluation counts; `image`, `probabilities`, `decided_<order>`: predict_3D
with weights drawn from the seed in the order of the network's keys (sd 0.3, the segmentation outputs 9: answers away from one half); `brats`, `classes`, `back`: label values on the way in and out; `scores`: evaluate_BraTS_case and region_based_evaluation.evaluate_case
of label maps `truth<i>`, `said<i>`; `thresholds`: what determine_brats_postprocessing finds for them, and `replaced<i>` what apply_brats_threshold makes.
"""
import contextlib, json, os, pickle, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
np.bool = bool  # medpy 0.4.0
import SimpleITK as sitk
import torch

SEED = 81
OUT = Path(__file__).resolve().parents[1]/'recorded'
NETWORK = dict(in_channels=2, n_outputs=3, base_num_features=2, max_num_features=8, num_pool_per_axis=[2, 3, 3], batch_dice=False,
               pool_op_kernel_sizes=[[1, 2, 2], [2, 2, 2], [2, 2, 2]], conv_kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]])
PATCH, IMAGE, STEPS, SIZES = (8, 16, 16), (2, 9, 21, 19), 5, (0, 5, 20, 60, 200)
quiet = lambda: contextlib.redirect_stdout(open(os.devnull, 'w'))


def trainer_of_regions():
    "The trainer of the regions without plans or data"
    from nnunet.evaluation.region_based_evaluation import get_brats_regions
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    from nnunet.training.loss_functions.deep_supervision import MultipleOutputLoss2
    from nnunet.training.loss_functions.dice_loss import DC_and_BCE_loss
    from nnunet.training.network_training.competitions_with_custom_Trainers.BraTS2020.nnUNetTrainerV2BraTSRegions import nnUNetTrainerV2BraTSRegions
    Generic_UNet.MAX_NUM_FILTERS_3D = NETWORK['max_num_features'] # small files
    t = nnUNetTrainerV2BraTSRegions.__new__(nnUNetTrainerV2BraTSRegions)
    t.print_to_log_file = lambda *a, **k: None
    t.online_eval_foreground_dc, t.online_eval_tp, t.online_eval_fp, t.online_eval_fn, t.all_val_eval_metrics = [], [], [], [], []
    t.regions = get_brats_regions()
    t.threeD, t.num_input_channels, t.base_num_features, t.num_classes = True, NETWORK['in_channels'], NETWORK['base_num_features'], len(t.regions)
    t.net_num_pool_op_kernel_sizes, t.net_conv_kernel_sizes, t.conv_per_stage = NETWORK['pool_op_kernel_sizes'], NETWORK['conv_kernel_sizes'], 2
    t.fp16, t.initial_lr, t.weight_decay = False, 1e-2, 3e-5
    t.initialize_network()
    t.initialize_optimizer_and_scheduler()
    n = len(NETWORK['pool_op_kernel_sizes'])
    weights = np.array([1 / 2**i for i in range(n)]) * [i == 0 or i < n - 1 for i in range(n)]
    t.ds_loss_weights = weights / weights.sum()
    t.loss = MultipleOutputLoss2(DC_and_BCE_loss({}, {'batch_dice': False, 'do_bg': True, 'smooth': 0}), t.ds_loss_weights)
    return t


def batches(rng, regions):
    "Nested labels that can be seen in the image, and their masks at every resolution; the second sample of batch 2 has no enhancing part"
    from nnunet.training.data_augmentation.custom_transforms import ConvertSegmentationToRegionsTransform
    for i in range(STEPS):
        seg = np.kron(rng.integers(0, 4, (2, 1, 2, 4, 4)), np.ones((1, 1, 4, 4, 4), int)).astype(np.float32)
        if i == 2: seg[1][seg[1] == 3] = 2
        data = np.concatenate([seg + rng.normal(0, .5, seg.shape), rng.normal(0, 1, seg.shape)], 1).astype(np.float16)
        masks = ConvertSegmentationToRegionsTransform(regions)(seg=seg)['seg']
        yield seg.astype(np.uint8), data, [masks, masks[..., ::2, ::2], masks[..., ::2, ::4, ::4]]


def training(rng):
    torch.manual_seed(SEED)
    with quiet(): t = trainer_of_regions()
    arrays, losses, counts = {f'w0/{k}': v.numpy().copy() for k, v in t.network.state_dict().items()}, [], []
    for i, (seg, data, targets) in enumerate(batches(rng, t.regions)):
        arrays |= {f'seg{i}': seg, f'data{i}': data, **{f'target{i}_{s}': y.astype(bool) for s, y in enumerate(targets)}}
        t.network.train()
        batch = {'data': data.astype(np.float32), 'target': targets}
        losses.append(float(t.run_iteration(iter([batch]), True, True)))
        counts.append({k: [float(v) for v in getattr(t, f'online_eval_{k}')[-1]] for k in ('tp', 'fp', 'fn')})
        if i == STEPS - 1: arrays |= {f'w{i + 1}/{k}': v.numpy().copy() for k, v in t.network.state_dict().items()}
    return t, arrays, {'losses': losses, 'online': counts}


def prediction(rng, t):
    drawn = np.random.default_rng(SEED)
    t.network.load_state_dict({k: torch.from_numpy(drawn.normal(0, 9. if 'seg_outputs' in k else .3, v.shape).astype(np.float32)) for k, v in t.network.state_dict().items()})
    net, image = t.network, rng.normal(0, 1, IMAGE).astype(np.float16).astype(np.float32)
    image[0, 2:7, 6:15, 5:14] += 2
    net.eval(); net.do_ds = False
    arrays = {'image': image.astype(np.float16)}
    for order in ((1, 2, 3), (1, 3, 2)):
        with quiet():
            seg, p = net.predict_3D(image.copy(), do_mirroring=True, mirror_axes=(0, 1, 2), use_sliding_window=True, step_size=.5, patch_size=PATCH, regions_class_order=order,
                                    use_gaussian=True, pad_border_mode='constant', pad_kwargs={'constant_values': 0}, all_in_gpu=False, verbose=False, mixed_precision=False)
        arrays |= {'probabilities': p.astype(np.float32), 'decided_' + ''.join(map(str, order)): seg.astype(np.uint8)}
    return arrays


def label_maps(rng):
    "Truth and prediction of ten cases: nested boxes; some truths and some predictions have no enhancing part, or no tumour at all"
    for i in range(10):
        truth, said = np.zeros((2, 12, 14, 13), np.uint8)
        for m, shift in ((truth, 0), (said, int(rng.integers(0, 3)))):
            if i == 8 or (i == 9 and m is said): continue
            for value, size in ((1, 8), (2, 5), (3, 0 if (i in (1, 3) and m is truth) or (i in (1, 4) and m is said) else 2 + i % 3)):
                if size: m[shift + 1:shift + 1 + size, 2:2 + size, shift + 1:shift + 1 + size] = value
        if i == 3: said[:3, :2, 0] = 3  # a false alarm of a few voxels
        yield truth, said


def write(m, file):
    sitk.WriteImage(sitk.GetImageFromArray(m), str(file))


def brats(rng):
    "Values, scores, and the threshold below which the enhancing part is replaced"
    from nnunet.dataset_conversion import Task082_BraTS_2020 as v1
    from nnunet.dataset_conversion.Task032_BraTS_2018 import convert_labels_back_to_BraTS
    from nnunet.dataset_conversion.Task043_BraTS_2019 import copy_BraTS_segmentation_and_convert_labels
    from nnunet.evaluation.region_based_evaluation import evaluate_case, get_brats_regions
    folder, regions, info = Path(tempfile.mkdtemp()), get_brats_regions(), {'scores': []}
    for name in ('truth', 'said', 'out'): (folder/name).mkdir()
    arrays = {'brats': rng.choice(np.array([0, 1, 2, 4], np.uint8), (5, 6, 7))}
    write(arrays['brats'], folder/'in.nii.gz')
    copy_BraTS_segmentation_and_convert_labels(str(folder/'in.nii.gz'), str(folder/'classes.nii.gz'))
    arrays['classes'] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder/'classes.nii.gz')))
    arrays['back'] = convert_labels_back_to_BraTS(arrays['classes'])
    for i, (truth, said) in enumerate(label_maps(rng)):
        arrays |= {f'truth{i}': truth, f'said{i}': said}
        for name, m in (('truth', truth), ('said', said)): write(m, folder/name/f'c{i}.nii.gz')
        info['scores'].append({'challenge': [float(v) for v in v1.evaluate_BraTS_case(said, truth)],
                               'regions': [float(v) for v in evaluate_case(str(folder/'said'/f'c{i}.nii.gz'), str(folder/'truth'/f'c{i}.nii.gz'), list(regions.values()))]})
    with quiet(): v1.determine_brats_postprocessing(str(folder/'said'), str(folder/'truth'), str(folder/'out'), 1, SIZES, 2)
    sizes, means, best, _ = pickle.loads((folder/'out'/'threshold.pkl').read_bytes())
    info['thresholds'] = {'sizes': list(sizes), 'means': [float(m) for m in means], 'best': int(best)}
    for size in SIZES[1:]:
        v1.apply_brats_threshold(str(folder/'said'/'c3.nii.gz'), str(folder/'out'), size, 2)
        arrays[f'replaced{size}'] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder/'out'/'c3.nii.gz')))
    return arrays, info


if __name__ == '__main__':
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    t, arrays, info = training(rng)
    arrays |= prediction(rng, t)
    more, scores = brats(rng)
    about = {'command': 'python tests/record/81_regions.py', 'seed': SEED, 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'torch', 'MedPy')}}}
    np.savez_compressed(OUT/'81_regions.npz', **arrays, **more)
    (OUT/'81_regions.json').write_text(json.dumps(about | {'network': NETWORK, 'patch': PATCH, 'weights': t.ds_loss_weights.tolist()} | info | scores) + '\n')
    for f in ('npz', 'json'): print(f'81_regions.{f}', (OUT/f'81_regions.{f}').stat().st_size, 'bytes')
