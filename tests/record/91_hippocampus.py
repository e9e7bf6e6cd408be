"""Record a five-fold run on Task004_Hippocampus: what chapter 91 shows.

With segnb's own environment, after the commands that chapter 91 lists have run in WORKSPACE:

    python tests/record/91_hippocampus.py WORKSPACE [--quiet-minutes MINUTES]

`--quiet-minutes`: what a fold takes on this machine when nothing else runs, if the run itself shared the machine.
"""
import argparse, json, platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1]/'recorded'
TASK, CONFIGURATION = 'Task004_Hippocampus', '3d_fullres'
PACKAGES = ('segnb', 'torch', 'numpy', 'scipy', 'SimpleITK', 'batchgenerators', 'numba')


def cpu():
    lines = [line for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines() if line.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return lines[0].split(':', 1)[1].strip() if lines else platform.processor()


def fold(folder):
    record = json.loads((folder/'record.json').read_text(encoding='utf-8'))
    rows = [json.loads(line) for line in (folder/'log.jsonl').read_text(encoding='utf-8').splitlines()]
    summary = json.loads((folder/'validation'/'summary.json').read_text(encoding='utf-8'))
    settings = record['runs'][0]['settings']
    return dict(fold=record['fold'], started=[run['started'] for run in record['runs']], steps=sum(row['iterations'] for row in rows), seconds=round(rows[-1]['elapsed'], 1),
                hardware=record['runs'][0]['hardware'], settings={k: settings[k] for k in ('epochs', 'iterations', 'val_iterations', 'seed', 'initial_lr', 'momentum', 'precision', 'augmentation')},
                curve=[[row['epoch'], round(row['train_loss'], 4), round(row['val_loss'], 4), round(row['mean_dice'], 4)] for row in rows],
                cases={case: [round(scores[k]['dice'], 5) for k in ('1', '2')] for case, scores in sorted(summary['cases'].items())})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('workspace', type=Path)
    p.add_argument('--quiet-minutes', type=float)
    a = p.parse_args()
    model = a.workspace/'models'/TASK/CONFIGURATION
    plans = json.loads((model/'plans.json').read_text(encoding='utf-8'))
    folds = [fold(folder) for folder in sorted(model.glob('fold_?'))]
    scores = np.array([v for f in folds for v in f['cases'].values()])
    plan = plans['configurations'][CONFIGURATION]
    pooled = json.loads((model/'cross_validation.json').read_text(encoding='utf-8')) if (model/'cross_validation.json').exists() else None
    post = json.loads((model/'postprocessing.json').read_text(encoding='utf-8')) if (model/'postprocessing.json').exists() else None
    out = dict(task=TASK, configuration=CONFIGURATION, planner=plans['planner'], plan={k: plan[k] for k in ('patch_size', 'batch_size', 'spacing', 'base_num_features', 'num_pool_per_axis')},
               cpu=cpu(), packages={name: version(name) for name in PACKAGES}, quiet_minutes=a.quiet_minutes, folds=folds, mean=[round(float(v), 5) for v in scores.mean(0)],
               foreground_mean=round(float(scores.mean()), 5), postprocessing=post and post.get('steps', post), interval=pooled and pooled.get('foreground_mean', {}).get('interval'))
    (HERE/'91_hippocampus.json').write_text(json.dumps(out, indent=1) + '\n', encoding='utf-8')
    print(f'{len(folds)} folds, {len(scores)} cases, Dice {out["mean"]}, mean {out["foreground_mean"]}')


if __name__ == '__main__': main()
