"""Record what classes, regions and sparse annotation give on MR phantoms; runs in segnb's own environment, about 25 minutes on one core.

Usage, from the project root: python tests/record/81_regions_compare.py [seeds]
Twelve phantoms of Task102_PhantomMR to train on, eight others to test. Every way is trained from three seeds, all with the same plan, length
and recipe, and predicts the eight whole images:
  classes           softmax over edema, necrotic core, enhancing
  regions           sigmoids of whole tumour, tumour core, enhancing
  slices            regions; one axial slice in eight is annotated, the rest ignored
  as background     the same slices, but what nobody annotated is called background
Writes tests/recorded/81_regions_compare.json: Dice of each region, mean over the cases, for each way and seed.
"""
import json, os, platform, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch
torch.set_num_threads(1)
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import read_label_map, write_image, write_label_map
from segnb.metrics import evaluate_folder
from segnb.planning import plan_experiment
from segnb.prediction import Predictor
from segnb.preprocessing import preprocess_dataset
from segnb.regions import make_region_dataset, make_sparse_dataset
from segnb.samples import TASKS, _description, make_case
from segnb.training import Trainer
from segnb.workers import write_json

OUT = Path(__file__).resolve().parents[1]/'recorded'/'81_regions_compare.json'
REGIONS = {'whole tumour': [1, 2, 3], 'tumour core': [2, 3], 'enhancing': [3]}
TRAIN, TEST, EPOCHS, ITERATIONS, EVERY = 12, 8, 8, 40, 8


def phantoms(folder):
    "A data set as Task102_PhantomMR, with more cases; the truth of the test cases lies in labelsTs"
    for i in range(TRAIN + TEST):
        case, part = make_case('Task102_PhantomMR', i), 'Tr' if i < TRAIN else 'Ts'
        for kind in ('images', 'labels'): (folder/f'{kind}{part}').mkdir(parents=True, exist_ok=True)
        for c, channel in enumerate(case.image): write_image(channel.astype(np.int16), case.geometry, folder/f'images{part}'/f'{case.identifier}_{c:04d}.nii.gz')
        write_label_map(case.label, case.geometry, folder/f'labels{part}'/f'{case.identifier}.nii.gz')
    json_ = _description('Task102_PhantomMR')
    write_json({k: v for k, v in json_.items() if k not in ('training', 'test', 'numTraining', 'numTest')}, folder/'dataset.json')
    return Dataset(folder)


def ignored_as_background(dataset, out):
    "The sparse data set with the wrong idea: what nobody annotated is background"
    value = dataset.labels.values[dataset.labels.ignore]
    made = make_region_dataset(work/'raw'/'Task102_PhantomMR', out, REGIONS)
    for case in made.cases:
        m, geometry = read_label_map(dataset.label_file(case))
        made.label_file(case).unlink()
        write_label_map(np.where(m == value, 0, m), geometry, made.label_file(case))
    return made


def run(name, dataset, plans, seed):
    folder = work/f'{name}_{seed}'
    if not (pre := work/'preprocessed'/name).exists(): preprocess_dataset(dataset, plans, pre, ('3d_fullres',), n_workers=0)
    began = time.process_time()
    Trainer(pre, folder/'3d_fullres', fold='all', epochs=EPOCHS, iterations=ITERATIONS, val_iterations=1, seed=seed, device='cpu', n_workers=0, progress=False).fit()
    trained = time.process_time() - began
    Predictor.from_folder(folder/'3d_fullres', folds=['all'], device='cpu', mirror=False).predict_folder(work/'raw'/'Task102_PhantomMR'/'imagesTs', folder/'out', n_workers=0, progress=False)
    result = evaluate_folder(work/'raw'/'Task102_PhantomMR'/'labelsTs', folder/'out', judge.labels, n_workers=0, progress=False)
    mean = {r: result['regions']['mean'][r]['dice'] for r in REGIONS}
    print(name, seed, {k: round(v, 4) for k, v in mean.items()}, f'{trained:.0f} s', flush=True)
    return mean


if __name__ == '__main__':
    seeds, scores = int(sys.argv[1]) if len(sys.argv) > 1 else 3, {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        classes = phantoms(work/'raw'/'Task102_PhantomMR')
        judge = regions = make_region_dataset(classes, work/'raw'/'Task202_Regions', REGIONS)
        slices = make_sparse_dataset(regions, work/'raw'/'Task203_Slices', every=EVERY)
        ways = {'classes': classes, 'regions': regions, 'slices': slices, 'as background': ignored_as_background(slices, work/'raw'/'Task204_Wrong')}
        grid = dict(patch_size=(32, 32, 32), batch_size=2, base_num_features=8)
        plans = {k: plan_experiment(extract_fingerprint(d, n_workers=0), planner='cpu').edit('3d_fullres', **grid) for k, d in ways.items()}
        for seed in range(seeds):
            for name, dataset in ways.items(): scores.setdefault(name, []).append(run(name, dataset, plans[name], seed))
            about = dict(command='python tests/record/81_regions_compare.py', date=time.strftime('%Y-%m-%d'), hardware='one CPU core', torch=torch.__version__, train=TRAIN, test=TEST,
                         epochs=EPOCHS, iterations=ITERATIONS, every=EVERY, plan=dict(grid, spacing=list(plans['regions'].configuration('3d_fullres').spacing)), scores=scores)
            write_json(about, OUT)
    print('wrote', OUT)
