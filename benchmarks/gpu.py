"""An epoch of 250 training and 50 validation iterations on a GPU, augmentation and loading included: segnb beside nnU-Net v2.

hippocampus: Task004_Hippocampus with segnb's 3d_fullres plan (nnU-Net v2 gets the same batch size); cube_128: patch 128^3, batch 2,
five poolings, ten made cases of 160^3 voxels. Both sides train in half precision with their own augmentation workers. The first
epoch of each is thrown away (it compiles and fills queues), the median of the others counts.

window_large: a trained-size network (five poolings, 32 features, three classes) over a volume of 400x512x512 voxels, patch 128^3,
step 0.5, mirrored along three axes, half precision: the probabilities or logits of all voxels, on the way to a label map.

Needs a GPU: `python benchmarks/gpu.py --peers PEERS/bin/python --rounds 2`. SEGNB_BENCH_DEVICE (cuda), SEGNB_BENCH_ITERATIONS (250),
SEGNB_BENCH_EPOCHS (3) and SEGNB_BENCH_VOLUME (400,512,512) are for trying the script elsewhere.
"""
import json, os, statistics, tempfile
from pathlib import Path

from common import DATA, _status, entry, main, mark
import v2

DEVICE, ITERATIONS, EPOCHS = (os.environ.get(f'SEGNB_BENCH_{k}', d) for k, d in (('DEVICE', 'cuda'), ('ITERATIONS', '250'), ('EPOCHS', '3')))
ITERATIONS, EPOCHS = int(ITERATIONS), int(EPOCHS)
VALIDATION = max(1, ITERATIONS//5)


def made():
    "Write (once) ten noisy bodies of 160^3 voxels as a raw task"
    import numpy as np
    import SimpleITK as sitk
    import inputs
    task = v2.SCRATCH/'Task990_Cube'
    if not (task/'dataset.json').exists():
        for part in ('imagesTr', 'labelsTr'): (task/part).mkdir(parents=True, exist_ok=True)
        for i in range(10):
            for file, array in ((f'imagesTr/cube_{i}_0000', inputs.image((160,)*3, i)[0].astype(np.int16)), (f'labelsTr/cube_{i}', inputs.labels((160,)*3, 2, i).astype(np.uint8))):
                sitk.WriteImage(sitk.GetImageFromArray(array), str(task/f'{file}.nii.gz'), useCompression=True)
        training = [dict(image=f'./imagesTr/cube_{i}.nii.gz', label=f'./labelsTr/cube_{i}.nii.gz') for i in range(10)]
        (task/'dataset.json').write_text(json.dumps(dict(name='Cube', modality={'0': 'MRI'}, labels={'0': 'background', '1': 'first', '2': 'second'}, numTraining=10, training=training, test=[])))
    return task


def figures(seconds):
    import torch
    memory = torch.cuda.max_memory_allocated()/1e6 if torch.cuda.is_available() else 0
    return dict(seconds=statistics.median(seconds[1:] or seconds), first_epoch=seconds[0], cpu_seconds=0., calls=len(seconds), unit='an epoch', peak_mb=round(_status('VmHWM')),
                gpu_mb=round(memory), gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else DEVICE)


def planned(task):
    "segnb's plans of a task, those of the cube edited"
    from segnb.dataset import Dataset
    from segnb.fingerprint import extract_fingerprint
    from segnb.planning import plan_experiment
    dataset = Dataset(task)
    plans = plan_experiment(extract_fingerprint(dataset), dataset_name=task.name)
    if task.name == 'Task990_Cube': plans = plans.edit('3d_fullres', patch_size=(128, 128, 128), batch_size=2, allow=True)
    return dataset, plans


def ours(task):
    from segnb.preprocessing import preprocess_dataset
    from segnb.training import Trainer
    from segnb.workers import write_json
    dataset, plans = planned(task)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/'preprocessed'
        out.mkdir()
        plans.save(out/'plans.json')
        write_json(dataset.json, out/'dataset.json')
        preprocess_dataset(dataset, plans, out, ['3d_fullres'])
        history = Trainer(out, Path(folder)/'model', '3d_fullres', 0, epochs=EPOCHS, iterations=ITERATIONS, val_iterations=VALIDATION, device=DEVICE).fit()
    plan = plans.configuration('3d_fullres')
    (v2.SCRATCH/f'{task.name}.json').write_text(json.dumps(dict(patch_size=plan.patch_size, batch_size=plan.batch_size)))   # for the peer
    return figures([row['seconds'] for row in history])


def theirs(task):
    plans, description = v2.planned(task)
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    preprocess([v2.number(task)], configurations=['3d_fullres'], num_processes=[2])
    ours, c = json.loads((v2.SCRATCH/f'{task.name}.json').read_text()), plans['configurations']['3d_fullres']
    c.update(patch_size=list(ours['patch_size']), batch_size=ours['batch_size'])
    if task.name == 'Task990_Cube':
        c['architecture']['arch_kwargs'].update(n_stages=6, features_per_stage=[32, 64, 128, 256, 320, 320], kernel_sizes=[[3]*3]*6, strides=[[1]*3] + [[2]*3]*5,
                                                n_conv_per_stage=[2]*6, n_conv_per_stage_decoder=[2]*5)
    plans['continue_training'] = False
    trainer = nnUNetTrainer(plans, '3d_fullres', 0, description, torch.device(DEVICE))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, ITERATIONS, VALIDATION
    trainer.run_training()
    kept = trainer.logger.get_checkpoint() if hasattr(trainer.logger, 'get_checkpoint') else trainer.logger.my_fantastic_logging
    return figures([end - start for start, end in zip(kept['epoch_start_timestamps'], kept['epoch_end_timestamps'])])


VOLUME = tuple(int(n) for n in os.environ.get('SEGNB_BENCH_VOLUME', '400,512,512').split(','))
PATCH, CLASSES = (128, 128, 128) if min(VOLUME) >= 128 else (64, 64, 64), 3


def timed(predict, synchronize):
    "Median of two predictions after one that is thrown away, with the peak of the device"
    import time
    import torch
    seconds = []
    for i in range(3):
        if i == 1 and torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        predict()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return figures(seconds) | dict(unit='a volume', first_epoch=None, first_call=seconds[0])


def network():
    "A plain U-Net of 32 to 320 features in eager mode"
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    torch.manual_seed(0)
    return PlainConvUNet(1, 6, [32, 64, 128, 256, 320, 320], torch.nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 2, CLASSES, 2, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
                         norm_op_kwargs=dict(eps=1e-5, affine=True), nonlin=torch.nn.LeakyReLU, nonlin_kwargs=dict(inplace=True), deep_supervision=False).eval().to(DEVICE)


def volume():
    import numpy as np
    return np.random.default_rng(0).standard_normal((1, *VOLUME), dtype=np.float32)


def window_ours():
    import numpy as np
    import torch
    from segnb.network import build_network
    from segnb.planning import Configuration
    from segnb.sliding_window import sliding_window_slabs
    plan = Configuration(name='3d_fullres', patch_size=PATCH, batch_size=2, spacing=(1., 1., 1.), median_shape=VOLUME, num_pool_per_axis=(5, 5, 5), pool_op_kernel_sizes=((2,)*3,)*5,
                         conv_kernel_sizes=((3,)*3,)*6, do_dummy_2d_data_aug=False, base_num_features=32, max_num_features=320, batch_dice=False)
    net, image = build_network(plan, 1, CLASSES, deep_supervision=False).eval().to(DEVICE), volume()
    decided = np.empty(VOLUME, np.uint8)

    def predict():
        for start, slab in sliding_window_slabs(net, image, PATCH, CLASSES, mirror_axes=(0, 1, 2), device=DEVICE, precision='fp16' if DEVICE == 'cuda' else 'fp32'):
            decided[start:start + slab.shape[1]] = slab.argmax(0)
    return timed(predict, torch.cuda.synchronize if DEVICE == 'cuda' else lambda: None)


def window_theirs():
    from types import SimpleNamespace
    v2.prepare()
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    predictor = nnUNetPredictor(.5, True, True, DEVICE == 'cuda', torch.device(DEVICE), allow_tqdm=False)
    predictor.network, predictor.allowed_mirroring_axes = network(), (0, 1, 2)
    predictor.configuration_manager, predictor.label_manager = SimpleNamespace(patch_size=list(PATCH)), SimpleNamespace(num_segmentation_heads=CLASSES)
    image = torch.from_numpy(volume())
    return timed(lambda: predictor.predict_sliding_window_return_logits(image).argmax(0).cpu(), torch.cuda.synchronize if DEVICE == 'cuda' else lambda: None)


def cuda_there():
    import torch
    return DEVICE != 'cuda' or torch.cuda.is_available()


for name, task in (('epoch_hippocampus', lambda: DATA/'Task004_Hippocampus'), ('epoch_cube_128', made)):
    entry(name, 'segnb')(lambda t=task: ours(t()))
    entry(name, 'nnunetv2', 'peers')(lambda t=task: theirs(t()))
    mark(name, 'nnunetv2', 1.2)
entry('window_large', 'segnb')(window_ours)
entry('window_large', 'nnunetv2', 'peers')(window_theirs)
mark('window_large', 'nnunetv2', 1.2)
mark('window_large', 'nnunetv2', 2, 'gpu_mb')

if __name__ == '__main__':
    if cuda_there(): main(__doc__)
    else: raise SystemExit('gpu.py: no CUDA device here; nothing was measured')
