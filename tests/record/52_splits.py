"""Record how nnU-Net 1.7.1 divides cases into folds, for the parity checks of the splits chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/52_splits.py
Writes tests/recorded/52_splits.json: per task `names` (how the cases are called: a format and a number) and, per fold,
the training and validation cases that nnUNetTrainerV2.do_split chooses; numbers stand for cases in sorted order.
"""
import contextlib, json, os, platform, tempfile
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'

OUT = Path(__file__).resolve().parents[1]/'recorded'/'52_splits.json'
TASKS = {'five': ('case_{:03d}', 5), 'seven': ('case_{:03d}', 7), 'ten': ('ct_{:03d}', 10), 'unpadded': ('BraTS_{}', 13),
         'hippocampus': ('hippocampus_{:03d}', 260)}
FOLDS = (0, 1, 2, 3, 4, 5, 6, 17, 'all')


def split(names, fold, folder):
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2
    trainer = nnUNetTrainerV2.__new__(nnUNetTrainerV2)
    trainer.fold, trainer.dataset_directory = fold, folder
    trainer.dataset, trainer.print_to_log_file = OrderedDict((n, {}) for n in names), lambda *a, **k: None
    trainer.do_split()
    return {'train': [str(k) for k in trainer.dataset_tr], 'val': [str(k) for k in trainer.dataset_val]}


def main():
    found = {}
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        for task, (form, n) in TASKS.items():
            names, folder = [form.format(i) for i in range(n)], tempfile.mkdtemp()
            number = {name: i for i, name in enumerate(sorted(names))}
            found[task] = {'names': form, 'n': n, 'folds': {str(fold): {part: [number[c] for c in cases] for part, cases in split(names[::-1], fold, folder).items()}
                                                            for fold in FOLDS if fold != 'all' or n < 20}}
    about = {'command': 'python tests/record/52_splits.py', 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'scikit-learn')}}}
    OUT.write_text(json.dumps(about | {'tasks': found}) + '\n')
    print(OUT.name, OUT.stat().st_size, 'bytes')


if __name__ == '__main__': main()
