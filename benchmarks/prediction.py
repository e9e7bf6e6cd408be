"""Prediction: peak memory with one fold and with five, whole folders of real data, and the time until the first case.

`memory_<task>`: the first case of a task, planned as segnb plans it, predicted from files to a label map, with one fold, with
five folds in the memory of one (`segnb_five`), and with five networks side by side (`side_by_side`). Networks have random
weights; on real tasks they are small, so that the figure shows what a case needs, and in `memory_weights` they are large
(some ten million weights, a small image), so that it shows what weights need. Seconds are those of one case.
`folder`: four cases of the hippocampus from files to files: in order, with a process that prepares, and nnU-Net v2's predictor
with the same network (its own architecture by the same plan), the same window, mirrored alike.
`ready`: a new process until it could take its first case: packages imported, a small model of one fold loaded.
"""
import dataclasses, json, subprocess, sys, tempfile
from pathlib import Path

from common import DATA, entry, main, mark, measure
from models import FewCases, model_of

FIVE = range(5)
TASKS = ('Task004_Hippocampus', 'Task010_SarcomaCT', 'Task020_TotalSegCT')
WIDE = dict(planner='cpu', base_num_features=64, max_num_features=512)
NARROW = dict(base_num_features=4, max_num_features=32)


PREDICT = '''
import sys, json, resource, time, warnings
warnings.simplefilter('ignore')
from segnb.prediction import Predictor
model, out, side_by_side, folds, files = sys.argv[1], sys.argv[2], sys.argv[3] == 'True', [int(f) for f in sys.argv[4].split(',')], sys.argv[5:]
p = Predictor.from_folder(model, folds=folds, device='cpu', mirror=False, step_size=1.)
if side_by_side:
    networks = [Predictor.from_folder(model, folds=k, device='cpu').networks[0] for k in folds]
    p = Predictor(networks, p.plans, p.configuration.name, p.labels, device='cpu', mirror=False, step_size=1.)
with open('/proc/self/status') as f: before = next(int(line.split()[1]) for line in f if line.startswith('VmRSS'))
start, cpu = time.perf_counter(), time.process_time()
p.predict_files(files, out)
print(json.dumps(dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, before=before*1.024e-3)))
with open('/proc/self/status') as f: print(next(int(line.split()[1]) for line in f if line.startswith('VmHWM'))*1.024e-3)
'''

def one_case(task, folds, side_by_side=False, **features):
    "Predict a case in a process of its own; peak memory of that process, models and packages included"
    with tempfile.TemporaryDirectory() as folder:
        dataset = FewCases(task) if task else None
        if task: files = dataset.image_files(dataset.cases[0])
        else: dataset, files = small_task(Path(folder))
        model = model_of(dataset, Path(folder)/'model', folds, **features)
        run = subprocess.run([sys.executable, '-c', PREDICT, str(model), f'{folder}/out.nii.gz', str(side_by_side), ','.join(map(str, folds)), *map(str, files)],
                             capture_output=True, text=True, check=True)
        figures, peak = run.stdout.splitlines()
        figures = json.loads(figures)
    return dict(seconds=figures['seconds'], fastest=figures['seconds'], cpu_seconds=figures['cpu_seconds'], calls=1, peak_mb=round(float(peak)), before_mb=round(figures['before']), unit='a case')


def small_task(folder):
    "Four phantom cases, and the middle of one: a few windows"
    import numpy as np
    from segnb.image import read_image, write_image
    dataset = FewCases(Path(__file__).resolve().parent.parent/'data_samples'/'Task101_PhantomCT')
    image, grid = read_image(dataset.image_files(dataset.cases[0]))
    middle = np.ascontiguousarray(image[:, :, 30:80, 30:80])
    write_image(middle, dataclasses.replace(grid, shape=middle.shape[1:]), folder/'middle_0000.nii.gz')
    return dataset, [folder/'middle_0000.nii.gz']


for name in TASKS:
    if (DATA/name).exists():
        entry(f'memory_{name[:7]}', 'segnb')(lambda t=DATA/name: one_case(t, (0,), **NARROW))
        entry(f'memory_{name[:7]}', 'segnb_five')(lambda t=DATA/name: one_case(t, FIVE, **NARROW))
        mark(f'memory_{name[:7]}', 'segnb', .97, 'peak_mb', of='segnb_five')
entry('memory_weights', 'segnb')(lambda: one_case(None, (0,), **WIDE))
entry('memory_weights', 'segnb_five')(lambda: one_case(None, FIVE, **WIDE))
entry('memory_weights', 'side_by_side')(lambda: one_case(None, FIVE, True, **WIDE))
mark('memory_weights', 'segnb', .97, 'peak_mb', of='segnb_five')


# ---- a folder -------------------------------------------------------------------------------------------------------

def folder_of(n_workers):
    from segnb.prediction import Predictor
    dataset = FewCases(DATA/'Task004_Hippocampus')
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(dataset, Path(folder)/'model', (0,))
        predictor = Predictor.from_folder(model, device='cpu')
        cases = {case: dataset.image_files(case) for case in dataset.cases}
        return measure(lambda: predictor.predict_folder(cases, Path(folder)/'out', overwrite=True, progress=False, n_workers=n_workers), 3, per=len(cases), memory='tree')


def folder_v2():
    "nnU-Net v2's predictor from files to files, with a network of its own by the plan of segnb"
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    import v2
    plans, description = v2.planned(DATA/'Task004_Hippocampus')
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    manager = PlansManager(plans)
    c = manager.get_configuration('3d_fullres')
    network = get_network_from_plans(c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import, 1, 3, deep_supervision=False)
    predictor = nnUNetPredictor(device=torch.device('cpu'), perform_everything_on_device=False, allow_tqdm=False)
    predictor.manual_initialization(network.eval(), manager, c, [network.state_dict()], description, 'nnUNetTrainer', (0, 1, 2))
    files = [list(map(str, images)) for _, images, _ in v2.cases(DATA/'Task004_Hippocampus')[:4]]
    with tempfile.TemporaryDirectory() as folder:
        def work(): predictor.predict_from_files_sequential(files, [f'{folder}/{i}' for i in range(len(files))], save_probabilities=False, overwrite=True)
        return measure(work, 3, per=len(files), memory='tree')


if (DATA/'Task004_Hippocampus').exists():
    entry('folder', 'segnb')(lambda: folder_of(0))
    entry('folder', 'segnb_process')(lambda: folder_of(1))
    entry('folder', 'nnunetv2', 'peers')(folder_v2)


# ---- until the first case -------------------------------------------------------------------------------------------

def started(code, *args, n=5):
    "Median seconds of new processes that run a line of code"
    def work(): subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *args], check=True, stdout=subprocess.DEVNULL, cwd='/')
    return measure(work, n)


def ready():
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(small_task(Path(folder))[0], Path(folder)/'model', (0,), **NARROW)
        return started('import sys; from segnb.prediction import Predictor; Predictor.from_folder(sys.argv[1], device="cpu")', str(model))


entry('ready', 'segnb')(ready)
entry('ready', 'torch_alone')(lambda: started('import torch'))
entry('ready', 'nnunetv2_import', 'peers')(lambda: started('import nnunetv2.inference.predict_from_raw_data'))
entry('ready', 'monai_import', 'peers')(lambda: started('import monai.inferers'))
mark('ready', 'nnunetv2_import', 1.2)

if __name__ == '__main__': main(__doc__)
