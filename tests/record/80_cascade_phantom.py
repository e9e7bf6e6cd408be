"""Train a cascade and a full-resolution network alone on trunks whose glands only a far end tells apart, and on trunks where a look at the gland tells.

Needs segnb's own environment; about three minutes of one CPU core for each of the three runs. Stopped, it goes on with the next call.
Usage, from the project root: python tests/record/80_cascade_phantom.py [FOLDER [RUN ...]]      (with names of runs, such as alike_0: these only)
Writes tests/recorded/80_cascade_phantom.npz. `about` (JSON): settings, batches, and of every run (phantom 'alike' or 'unlike', seed) the Dice of every
test case, [near gland, far gland, both as one, near and far gland when only the largest piece of each is kept], by configuration; of the first test case of every run: `plane/RUN` (image, one plane) and the label maps
`truth/RUN`, `3d_lowres/RUN`, `3d_fullres/RUN`, `3d_cascade_fullres/RUN` (whole volumes). Of alike_0 also `large_balls`: the second stage
trained with masks damaged by nnU-Net's balls of 1 to 8 voxels, where the glands have a radius of 6.5; `3d_cascade_fullres` has balls of 1 to 2.
The three networks of the cascade (first stage of folds 0 and 1, second stage of fold 0) share the number of batches that the network alone has.
Test cases are in no fold; each network that answers was trained on the same half of the other cases (fold 0).
"""
import json, platform, sys, tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch

from segnb.augmentation import default_parameters, preset_parameters
from segnb.cascade import CascadePredictor, build_cascade, make_trunks
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import read_image, read_label_map
from segnb.metrics import dice
from segnb.planning import Planner, plan_experiment
from segnb.postprocessing import keep_largest_component
from segnb.prediction import Predictor
from segnb.preprocessing import preprocess_dataset
from segnb.splits import five_folds, save_splits
from segnb.training import Trainer
from segnb.workers import read_json, write_json

OUT = Path(__file__).resolve().parents[1]/'recorded'/'80_cascade_phantom.npz'
RUNS = [(True, 0), (False, 0), (True, 1)] # (glands alike, seed)
TRAIN, TEST, GB, PLANNER = 64, 10, .003, dict(base_num_features=8)
OPTIONS = dict(iterations=50, val_iterations=1, n_workers=0, optimizer='adamw', initial_lr=.004, device='cpu', progress=False)
EPOCHS = {'3d_lowres': 20, '3d_cascade_fullres': 20, '3d_fullres': 60} # 20 + 20 + 20 = 60
BALLS = (1, 2) # voxels
ASK = dict(mirror=False, step_size=.5, device='cpu')


def masks(c, balls):
    "Nothing is done to the images; the masks of the first stage are damaged as often as nnU-Net does"
    usual = default_parameters(c)
    return preset_parameters('none', c).replace(p_reshape_previous=usual.p_reshape_previous, p_remove_previous=usual.p_remove_previous, reshape_previous=balls or usual.reshape_previous)


def train_one(pre, model, configuration, seed, **how):
    if (model/'fold_0'/'checkpoint_final.pt').exists(): return
    trainer = Trainer(pre, model, configuration, 0, epochs=EPOCHS[configuration], seed=seed, **how, **OPTIONS)
    trainer.resume() if (model/'fold_0'/'checkpoint_latest.pt').exists() else trainer.fit(overwrite=True)


def train(dataset, folder, alike, seed):
    "All networks of one run, and the plan"
    pre, models = folder/'preprocessed', folder/'models'
    plans = plan_experiment(extract_fingerprint(dataset, n_workers=0), memory_gb=GB, planner=Planner(**PLANNER), dataset_name=dataset.name)
    if not (pre/'splits.json').exists():
        preprocess_dataset(dataset, plans, pre, ['3d_lowres', '3d_fullres'], n_workers=0)
        save_splits(five_folds(dataset.cases, n_folds=2), pre/'splits.json')
    c = plans.configuration('3d_cascade_fullres')
    build_cascade(pre, models, folds=[0], dataset=dataset, first=dict(epochs=EPOCHS['3d_lowres'], augmentation='none'), epochs=EPOCHS['3d_cascade_fullres'], augmentation=masks(c, BALLS),
                  predict={k: v for k, v in ASK.items() if k != 'device'}, validate=False, seed=seed, say=lambda text: print(text, flush=True), **OPTIONS)
    train_one(pre, models/'3d_fullres', '3d_fullres', seed, augmentation='none')
    if alike and seed == 0: train_one(pre, models/'large_balls', '3d_cascade_fullres', seed, augmentation=masks(c, None))
    return plans


def one_run(folder, alike, seed):
    "What each configuration says about the test cases of a run"
    raw = folder/'raw'/'Task104_PhantomTrunk'
    if not (raw/'dataset.json').exists(): make_trunks(folder/'raw', TRAIN, TEST, seed, alike)
    plans = train(Dataset(raw), folder, alike, seed)
    both = CascadePredictor.from_folder(folder/'models'/'3d_cascade_fullres', folds=[0], **ASK)
    large = Predictor.from_folder(folder/'models'/'large_balls', folds=[0], **ASK) if alike and seed == 0 else None
    alone, scores, kept = Predictor.from_folder(folder/'models'/'3d_fullres', folds=[0], **ASK), {}, {}
    for file in sorted((raw/'imagesTs').glob('*.nii.gz')):
        case = file.name.removesuffix('_0000.nii.gz')
        image, truth = read_image([file])[0], read_label_map(raw/'labelsTs'/f'{case}.nii.gz')[0]
        second, first = both.predict(image, (1, 1, 1), return_first=True)
        answers = {'3d_lowres': first, '3d_fullres': alone.predict(image, (1, 1, 1)), '3d_cascade_fullres': second}
        if large: answers['large_balls'] = large.predict(image, (1, 1, 1), previous=first)
        for name, m in answers.items():
            tidy = keep_largest_component(m, [1, 2])
            found = dice(truth, m, 1), dice(truth, m, 2), dice((truth > 0)*1, (m > 0)*1, 1), dice(truth, tidy, 1), dice(truth, tidy, 2)
            scores.setdefault(name, {})[case] = [round(d, 4) for d in found]
        if not kept:
            y = int(np.argmax(((truth == 1).sum((0, 2)) + 1.)*((truth == 2).sum((0, 2)) + 1.)))
            kept = {'plane': image[0, :, y].astype(np.int16), 'truth': truth.astype(np.uint8), **{k: m.astype(np.uint8) for k, m in answers.items()}}
            example = dict(case=case, y=y)
    np.savez_compressed(folder/'kept.npz', **kept)
    low, full = plans.configuration('3d_lowres'), plans.configuration('3d_fullres')
    write_json(dict(phantom='alike' if alike else 'unlike', seed=seed, dice=scores, example=example, patch=low.patch_size, patch_full=full.patch_size, batch=low.batch_size, low_spacing=low.spacing), folder/'result.json')


def main(folder, *only):
    torch.set_num_threads(1)
    runs, arrays = {}, {}
    for alike, seed in RUNS:
        run = f"{'alike' if alike else 'unlike'}_{seed}"
        if only and run not in only: continue
        if not (folder/run/'result.json').exists(): one_run(folder/run, alike, seed)
        runs[run] = read_json(folder/run/'result.json')
        with np.load(folder/run/'kept.npz') as kept: arrays |= {f'{k}/{run}': kept[k] for k in kept.files}
        if only: continue
        about = dict(command='python tests/record/80_cascade_phantom.py', date=str(date.today()), hardware=platform.machine(), train=TRAIN, test=TEST, memory_gb=GB, planner=PLANNER,
                     settings={k: v for k, v in OPTIONS.items() if k not in ('progress', 'device')}, epochs=EPOCHS, balls=BALLS, runs=runs)
        np.savez_compressed(OUT, about=json.dumps(about), **arrays)
        means = {name: np.mean(list(cases.values()), 0).round(3).tolist() for name, cases in runs[run]['dice'].items()}
        print(run, means, OUT.stat().st_size, flush=True)


if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()), *sys.argv[2:])
