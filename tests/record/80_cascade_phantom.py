"""Train a cascade and a full-resolution network alone on long phantoms, and record what each says about cases it never saw.

Needs segnb's own environment; about four minutes of one CPU core. It goes on where it was stopped.
Usage, from the project root: python tests/record/80_cascade_phantom.py [FOLDER]
Writes tests/recorded/80_cascade_phantom.npz: Dice a case and class of `3d_lowres`, `3d_fullres` and `3d_cascade_fullres`, their training curves,
and of one case a plane: `image`, `truth`, and one label map a configuration.
"""
import json, platform, sys, tempfile, time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from segnb.augmentation import default_parameters, preset_parameters
from segnb.cascade import build_cascade, make_trunks
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import read_image, read_label_map
from segnb.planning import Planner, plan_experiment
from segnb.preprocessing import preprocess_dataset
from segnb.splits import five_folds, save_splits
from segnb.training import Trainer
from segnb.validation import validate_fold
from segnb.workers import read_json

OUT = Path(__file__).resolve().parents[1]/'recorded'/'80_cascade_phantom.npz'
OPTIONS = dict(epochs=20, iterations=25, val_iterations=2, n_workers=0, initial_lr=.02, progress=False)
FIRST = dict(epochs=48, augmentation='none')  # so that minutes suffice


def main(folder):
    torch.set_num_threads(1)
    began = time.process_time()
    raw = make_trunks(folder/'raw', 8, 0) if not (folder/'raw').exists() else folder/'raw'/'Task104_PhantomTrunk'
    dataset, pre, models = Dataset(raw), folder/'preprocessed', folder/'models'
    plans = plan_experiment(extract_fingerprint(dataset), memory_gb=.0105, planner=Planner(base_num_features=6), dataset_name=raw.name)
    if not (pre/'splits.json').exists():
        preprocess_dataset(dataset, plans, pre, ['3d_lowres', '3d_fullres'], n_workers=0)
        save_splits(five_folds(dataset.cases, n_folds=2), pre/'splits.json')
    settings = {k: v for k, v in OPTIONS.items() if k != 'progress'}
    damage = default_parameters(plans.configuration('3d_cascade_fullres'))  # of the masks only
    masks = preset_parameters('none', plans.configuration('3d_cascade_fullres')).replace(p_reshape_previous=damage.p_reshape_previous, p_remove_previous=damage.p_remove_previous)
    build_cascade(pre, models, folds=[0], first=FIRST, predict=dict(mirror=False, step_size=.6), progress=False, say=lambda text: print(text, flush=True), augmentation=masks, **settings)
    alone = models/'3d_fullres'
    if not (alone/'fold_0'/'checkpoint_final.pt').exists():
        trainer = Trainer(pre, alone, '3d_fullres', 0, augmentation='none', **OPTIONS)
        trainer.resume() if (alone/'fold_0'/'checkpoint_latest.pt').exists() else trainer.fit()
    validate_fold(alone, 0, pre, mirror=False, step_size=.6, progress=False, overwrite=False)
    names, dice, curves, arrays = ('3d_lowres', '3d_fullres', '3d_cascade_fullres'), {}, {}, {}
    for name in names:
        summary = read_json(models/name/'fold_0'/'validation'/'summary.json')
        dice[name] = {case: [scores[k]['dice'] for k in '12'] for case, scores in summary['cases'].items()}
        curves[name] = [json.loads(line)['mean_dice'] for line in (models/name/'fold_0'/'log.jsonl').read_text().splitlines()]
    case = sorted(dice['3d_lowres'])[0]
    truth = read_label_map(raw/'labelsTr'/f'{case}.nii.gz')[0]
    y = int(np.argmax(((truth > 0).sum((0, 2)))))
    arrays['image'], arrays['truth'] = read_image([raw/'imagesTr'/f'{case}_0000.nii.gz'])[0][0, :, y].astype(np.int16), truth[:, y].astype(np.uint8)
    for name in names: arrays[name] = read_label_map(models/name/'fold_0'/'validation'/f'{case}.nii.gz')[0][:, y].astype(np.uint8)
    about = dict(command='python tests/record/80_cascade_phantom.py', date=str(date.today()), hardware=platform.machine(), cpu_seconds=round(time.process_time() - began), settings=settings, first=FIRST,
                 case=case, plane=y, dice=dice, curves=curves, patch=plans.configuration('3d_fullres').patch_size, low_spacing=plans.configuration('3d_lowres').spacing)
    np.savez_compressed(OUT, about=json.dumps(about), **arrays)
    print('wrote', OUT.name, OUT.stat().st_size, 'bytes', json.dumps(dice, indent=1), about['cpu_seconds'])


if __name__ == '__main__': main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
