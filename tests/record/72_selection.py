"""Record which configuration nnU-Net 1.7.1 chooses, for the parity checks of the selection chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/72_selection.py
Writes tests/recorded/72_selection.json: for each made-up task the Dice of every case and class of every candidate (`dice`,
in the order in which the original lists them), the mean that it compared and the candidate that it named last, or that it
stopped with an error; and how it averages the Dice of cases, on values with nan.
The original's main function runs whole, on summary.json files that hold made-up numbers; nothing is trained or predicted.
"""
import contextlib, io, json, os, platform, sys, tempfile, warnings
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

ROOT = Path(tempfile.mkdtemp())
for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = str(ROOT/key)
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

OUT = Path(__file__).resolve().parents[1]/'recorded'/'72_selection.json'
CONFIGURATIONS = ('2d', '3d_lowres', '3d_fullres', '3d_cascade_fullres')
SEED = 72


def worlds():
    "(name, configurations, {candidate: Dice (cases, classes)}): clear choices, exact ties of every kind, absent classes"
    rng = np.random.default_rng(SEED)
    for i in range(40):
        configurations = [c for c in CONFIGURATIONS if rng.random() < .7] or ['3d_fullres']
        n_cases, n_classes = int(rng.integers(2, 9)), int(rng.integers(1, 4))
        candidates = configurations + ['+'.join(p) for p in combinations(configurations, 2)]
        kind = ('plain', 'coarse', 'tie', 'absent', 'absent everywhere')[i % 5]
        dice = {c: np.round(rng.uniform(.3, .9, (n_cases, n_classes)), 6) for c in candidates}
        if kind == 'coarse': dice = {c: np.round(d * 2) / 2 for c, d in dice.items()}  # many equal means
        if kind == 'tie' and len(candidates) > 1:  # the best scores stand at two candidates
            best = max(dice, key=lambda c: dice[c].mean(0).mean())
            dice[candidates[int(rng.integers(len(candidates)))]] = dice[best].copy()
        if kind.startswith('absent'):
            gone = rng.random((n_cases, n_classes)) < .3
            gone[0] = False
            if kind == 'absent everywhere': gone[:, -1] = True
            for d in dice.values(): d[gone] = np.nan
        yield f'{i}: {kind}', configurations, dice


def summary(dice):
    "A summary.json of the original with these Dice"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        means = [float(np.nanmean(column)) for column in dice.T]
    return {'results': {'all': [], 'mean': {'0': {'Dice': .99}, **{str(k + 1): {'Dice': m} for k, m in enumerate(means)}}}}


def build(task, configurations, dice):
    "The folders that the original expects: models, folds, summaries"
    from batchgenerators.utilities.file_and_folder_operations import save_json, save_pickle
    from nnunet.paths import default_cascade_trainer, default_plans_identifier, default_trainer, network_training_output_dir
    from nnunet.utilities.folder_names import get_output_folder_name
    trainer = {c: default_cascade_trainer if c == '3d_cascade_fullres' else default_trainer for c in configurations}
    names = {}
    for c in configurations:
        folder = Path(get_output_folder_name(c, task, trainer[c], default_plans_identifier))
        (folder/'cv_niftis_raw').mkdir(parents=True)
        save_json({}, str(folder/'postprocessing.json'))
        save_json(summary(dice[c]), str(folder/'cv_niftis_raw'/'summary.json'))
        save_pickle({'all_classes': [1]}, str(folder/'plans.pkl'))
        for fold in range(5):
            (folder/f'fold_{fold}'/'validation_raw').mkdir(parents=True)
            save_json({}, str(folder/f'fold_{fold}'/'validation_raw'/'summary.json'))
        names[c] = c
    for a, b in combinations(configurations, 2):
        name = f'ensemble_{a}__{trainer[a]}__{default_plans_identifier}--{b}__{trainer[b]}__{default_plans_identifier}'
        folder = Path(network_training_output_dir, 'ensembles', task, name)
        (folder/'ensembled_raw').mkdir(parents=True)
        save_json({}, str(folder/'postprocessing.json'))
        save_json(summary(dice[f'{a}+{b}']), str(folder/'ensembled_raw'/'summary.json'))
        names[f'{a}+{b}'] = name
    return names


def choose(task, number, configurations, names):
    "What the original compared, and which candidate it named last"
    from nnunet.evaluation.model_selection import figure_out_what_to_submit as original
    said, sys.argv = io.StringIO(), ['x', '-t', str(number), '-m', *configurations]
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            original.main()
    except KeyError as error: return {'error': f'KeyError: {error}'}
    ours = {v: k for k, v in names.items()}
    lines = said.getvalue().splitlines()
    scores = {ours[w[0]]: float(w[1]) for w in map(str.split, lines) if len(w) == 2 and w[0] in ours}
    named = [ours[line.split()[3]] for line in lines if line.startswith(f'{task} submit model')]
    return {'scores': scores, 'chosen': named[-1], 'named': named}


def main():
    tasks = []
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        for number, (name, configurations, dice) in enumerate(worlds(), 1):
            task = f'Task{number:03d}_Made'
            answer = choose(task, number, configurations, build(task, configurations, dice))
            tasks.append({'name': name, 'dice': {c: np.where(np.isnan(d), None, d).tolist() for c, d in dice.items()}, **answer})
    about = {'command': 'python tests/record/72_selection.py', 'seed': SEED, 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy')}}}
    OUT.write_text(json.dumps(about | {'tasks': tasks}) + '\n')
    ties = sum(len(t.get('named', [])) > 1 for t in tasks)
    print(OUT.name, OUT.stat().st_size, 'bytes,', len(tasks), 'tasks,', ties, 'ties,', sum('error' in t for t in tasks), 'errors')


if __name__ == '__main__': main()
