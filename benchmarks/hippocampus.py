"""Accuracy: Task004_Hippocampus, fold 0 of the five folds, validation cases predicted whole and with mirroring.

Not part of `make bench`, because it takes its time. On a CPU:

    python benchmarks/hippocampus.py --minutes 15                     # precision as segnb chooses it for this processor
    python benchmarks/hippocampus.py --minutes 15 --no-mirror --val-iterations 10     # what suits fifteen minutes
    python benchmarks/hippocampus.py --minutes 15 --precision fp32
    python benchmarks/hippocampus.py --epochs 8 --iterations 100 --precision fp32    # and bf16: the same number of steps

With a GPU, segnb beside nnU-Net v2 for the same number of epochs, batch size and iterations:

    python benchmarks/hippocampus.py --epochs 50 --device cuda --peers PEERS/bin/python

The row is added to hippocampus.json, with the command, the hardware and the software; report.py puts it into RECORD.md.
"""
import argparse, json, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path

from common import DATA, HERE, _cpu_name, machine
import v2

ROWS = HERE/'hippocampus.json'


def ours(a, folder):
    "Plan, preprocess, train and validate with segnb; gives Dice and what was done"
    from segnb.dataset import Dataset
    from segnb.fingerprint import extract_fingerprint
    from segnb.planning import plan_experiment
    from segnb.preprocessing import preprocess_dataset
    from segnb.training import Trainer
    from segnb.validation import validate_fold
    from segnb.workers import read_json, write_json
    dataset, out, model = Dataset(DATA/'Task004_Hippocampus'), folder/'preprocessed', folder/'model'
    plans = plan_experiment(extract_fingerprint(dataset), planner=a.planner, dataset_name='Task004_Hippocampus')
    out.mkdir()
    plans.save(out/'plans.json')
    write_json(dataset.json, out/'dataset.json')
    preprocess_dataset(dataset, plans, out, [a.configuration])
    length = dict(minutes=a.minutes) if a.minutes else dict(epochs=a.epochs)
    trainer = Trainer(out, model, a.configuration, 0, **length, iterations=a.iterations, val_iterations=a.val_iterations, device=a.device,
                      precision=a.precision, seed=a.seed, progress='always', mirror_axes=() if a.no_mirror else None)
    began = time.perf_counter()
    history = trainer.fit()
    trained = time.perf_counter() - began
    result = validate_fold(model, 0, out, device=a.device)
    record = read_json(model/'fold_0'/'record.json')
    computed_in = str(trainer.dtype or 'float32').removeprefix('torch.')
    return dict(computed_in=computed_in, dice={k: v['dice'] for k, v in result['mean'].items()} | {'mean': result['foreground_mean']['dice']}, cases=len(result['cases']), training_seconds=trained,
                validation_seconds=time.perf_counter() - began - trained, steps=sum(r['iterations'] for r in history), epochs=len(history),
                batch_size=trainer.plan.batch_size, patch_size=list(trainer.plan.patch_size), parameters=sum(p.numel() for p in trainer.net.parameters()),
                settings=record['runs'][-1]['settings'], hardware=record['runs'][-1]['hardware'])


def theirs(a):
    "The same with nnU-Net v2, run by its own interpreter: this function is the body of that process"
    v2.prepare()
    task = DATA/'Task004_Hippocampus'
    plans, description = v2.planned(task)
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    preprocess([v2.number(task)], configurations=['3d_fullres'], num_processes=[2])
    plans['configurations']['3d_fullres']['batch_size'] = a.batch_size
    plans['continue_training'] = False
    trainer = nnUNetTrainer(plans, '3d_fullres', 0, description, torch.device(a.device))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = a.epochs, a.iterations, a.val_iterations
    trainer.do_split = lambda: (a.split['train'], a.split['val'])   # segnb's fold, which is nnU-Net v1's
    began = time.perf_counter()
    trainer.run_training()
    trained = time.perf_counter() - began
    trainer.perform_actual_validation()
    summary = json.loads((Path(trainer.output_folder)/'validation'/'summary.json').read_text())
    per_class = {k: v['Dice'] for k, v in summary['mean'].items()}
    return dict(dice=per_class | {'mean': summary['foreground_mean']['Dice']}, cases=len(summary['metric_per_case']), training_seconds=trained,
                steps=a.epochs*a.iterations, epochs=a.epochs, batch_size=a.batch_size)


def keep(who, found, a, software):
    "Add a row to the file of all runs"
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    rows.append(dict(who=who, command='python benchmarks/hippocampus.py ' + ' '.join(x if i == 0 or a.shown[i - 1] != '--peers' else 'PEERS/bin/python' for i, x in enumerate(a.shown)),
                     taken=time.strftime('%Y-%m-%d'), cpu=_cpu_name(), python=platform.python_version(), packages=software, **found))
    ROWS.write_text(json.dumps(rows, indent=1) + '\n')
    print(json.dumps(rows[-1], indent=1))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, help='training time')
    p.add_argument('--epochs', type=int, default=50, help='instead of minutes')
    p.add_argument('--iterations', type=int, default=250)
    p.add_argument('--val-iterations', type=int, default=50)
    p.add_argument('--device', default='cpu')
    p.add_argument('--precision', default='auto')
    p.add_argument('--configuration', default='3d_fullres')
    p.add_argument('--planner', default=None, help="default: 'cpu' on a CPU, else 'nnunet_v1'")
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--no-mirror', action='store_true', help='no mirroring, in training and so in prediction: a short training gains from it')
    p.add_argument('--peers', help='interpreter with nnU-Net v2: train it too, for the same number of epochs')
    p.add_argument('--theirs', help=argparse.SUPPRESS)
    a = p.parse_args()
    a.shown, a.planner = sys.argv[1:], a.planner or ('cpu' if a.device == 'cpu' else 'nnunet_v1')
    if a.theirs:   # in the peers' interpreter
        a.batch_size, a.split = (given := json.loads(Path(a.theirs).read_text()))['batch_size'], given['split']
        print('\nFIGURE ' + json.dumps(theirs(a)))
        return
    folder = Path(tempfile.mkdtemp(prefix='segnb_hippocampus_'))
    try:
        found = ours(a, folder)
        keep('segnb', found, a, machine(sys.executable))
        if a.peers and not a.minutes:
            record = json.loads((folder/'model'/'fold_0'/'record.json').read_text())
            (folder/'given.json').write_text(json.dumps(dict(batch_size=found['batch_size'], split=dict(train=record['train_cases'], val=record['val_cases']))))
            run = subprocess.run([a.peers, __file__, *a.shown, '--theirs', folder/'given.json'], stdout=subprocess.PIPE, text=True, check=True)
            keep('nnunetv2', json.loads([line for line in run.stdout.splitlines() if line.startswith('FIGURE ')][-1][7:]), a, machine(a.peers))
    finally: shutil.rmtree(folder)


if __name__ == '__main__': main()
