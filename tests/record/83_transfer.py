"""Record trainings that begin with the weights of another task beside trainings from nothing: what chapter 83 shows.

With segnb's own environment, about half an hour on one core; what FOLDER holds already is not done again:

    python tests/record/83_transfer.py [FOLDER [near] [far]]
"""
import itertools, json, math, platform, sys, tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch

from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import write_image, write_label_map
from segnb.planning import PLANNERS, plan_experiment
from segnb.preprocessing import preprocess_dataset
from segnb.samples import make_case
from segnb.splits import save_splits
from segnb.training import Trainer
from segnb.transfer import fine_tuning, misfits, transfer_plans
from segnb.validation import validate_fold
from segnb.workers import write_json

ROOT = Path(__file__).parents[2]
OUT = ROOT/'tests'/'recorded'/'83_transfer.json'
SOURCE, TARGET = dict(epochs=25, iterations=20, val_iterations=2), dict(epochs=12, iterations=12, val_iterations=8)
SEEDS, TRAIN = (0, 1, 2), 2
ARMS = {'from nothing': None, 'pretrained': {}, 'pretrained, gently': dict(freeze_encoder=3, lr_encoder=.001)}


class Small(type(PLANNERS['cpu'])):
    "The CPU planner with half the features and a sixth of the patch"
    name, base_num_features, max_patch_voxels = 'small', 8, 14000


def clinic(folder, n=6):
    "MR phantoms as another clinic has them: one sequence less, another order, other numbers for the same tissues"
    order, numbers = ('T2', 'T1c', 'FLAIR'), {1: 2, 2: 3, 3: 1}
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        case = make_case('Task102_PhantomMR', i, seed=7)
        for c, name in enumerate(order): write_image(case.image[('FLAIR', 'T1', 'T1c', 'T2').index(name)], case.geometry, folder/'imagesTr'/f'clinic_{i}_{c:04d}.nii.gz')
        write_label_map(np.select([case.label == k for k in numbers], list(numbers.values()), 0).astype(np.int16), case.geometry, folder/'labelsTr'/f'clinic_{i}.nii.gz')
    write_json({'name': folder.name, 'tensorImageSize': '3D', 'modality': dict(enumerate(order)), 'labels': {'0': 'background', '1': 'enhancing', '2': 'edema', '3': 'necrotic core'},
                'numTraining': n, 'training': [dict(image=f'./imagesTr/clinic_{i}.nii.gz', label=f'./labelsTr/clinic_{i}.nii.gz') for i in range(n)]}, folder/'dataset.json')
    return folder


def prepare(raw, out, source=None):
    "Fingerprint, plan (imposed where there is a source) and preprocessed cases"
    data = Dataset(raw)
    fingerprint = extract_fingerprint(data, 1)
    plans = plan_experiment(fingerprint, planner=Small(), dataset_name=raw.name) if source is None else transfer_plans(source, fingerprint, 'source', raw.name)
    out.mkdir(parents=True, exist_ok=True)
    plans.save(out/'plans.json')
    write_json(data.json, out/'dataset.json')
    preprocess_dataset(data, plans, out, '3d_fullres', n_workers=0)
    return data, plans, misfits(plans, fingerprint)


def train(trainer):
    "Begin a training, go on with it, or leave it as it is"
    if not (trainer.folder/'checkpoint_final.pt').exists(): trainer.resume() if (trainer.folder/'record.json').exists() else trainer.fit()


def pair(name, source_raw, target_raw, work):
    "Train the source once, the target in every way with every seed"
    print(name, flush=True)
    prepare(source_raw, work/'source')
    train(Trainer(work/'source', work/'model', fold='all', seed=0, progress=False, device='cpu', n_workers=0, **SOURCE))
    data, plans, said = prepare(target_raw, work/'target', work/'model'/'plans.json')
    save_splits([{'train': data.cases[:TRAIN], 'val': data.cases[TRAIN:]}], work/'target'/'splits.json')
    runs = []
    for seed, (arm, how) in itertools.product(SEEDS, ARMS.items()):
        model = work/f'{arm}_{seed}'.replace(' ', '_').replace(',', '')
        fold, options = model/'fold_0', {} if how is None else fine_tuning(work/'model', **how)
        train(Trainer(work/'target', model, fold=0, seed=seed, progress=False, device='cpu', n_workers=0, **TARGET, **options))
        if not (fold/'validation'/'summary.json').exists(): validate_fold(model, 0, work/'target', device='cpu', progress=False)
        history = [json.loads(line) for line in (fold/'log.jsonl').read_text(encoding='utf-8').splitlines()]
        scores = json.loads((fold/'validation'/'summary.json').read_text(encoding='utf-8'))['cases']
        dice = [[s[str(k)]['dice'] for k in data.labels.foreground] for s in scores.values()]
        runs.append(dict(arm=arm, seed=seed, patch_dice=[round(r['mean_dice'] or 0, 4) for r in history], loss=[round(r['train_loss'], 4) for r in history],
                         dice=[[None if v is None or v != v else round(v, 4) for v in row] for row in dice]))
        print(arm, seed, runs[-1]['patch_dice'][::4], round(float(np.nanmean(np.array(dice, float))), 3), flush=True)
    how = json.loads((work/'pretrained_0'/'fold_0'/'record.json').read_text(encoding='utf-8'))['transfer']
    return dict(name=name, source=source_raw.name, target=target_raw.name, channels=how['channels'], outputs=how['outputs'], misfits=said, runs=runs,
                fates={f: sum(math.prod(r['shape']) for r in how['rows'] if r['fate'] == f) for f in ('taken', 'adapted', 'left')})


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        samples = ROOT/'data_samples'
        made = {'near': lambda: (samples/'Task102_PhantomMR', clinic(base/'Task112_Clinic')), 'far': lambda: (samples/'Task101_PhantomCT', samples/'Task102_PhantomMR')}
        pairs = [pair(name, *made[name](), base/name) for name in sys.argv[2:] or made]
    write_json(dict(made=dict(command=' '.join(['python tests/record/83_transfer.py FOLDER', *(p['name'] for p in pairs)]), date=str(date.today()), seeds=list(SEEDS), cpu=platform.machine(), torch=torch.__version__),
                    source=SOURCE, target=TARGET, train_cases=TRAIN, pairs=pairs), OUT)


if __name__ == '__main__': main()
