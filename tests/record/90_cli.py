"""Record the first fold and the learning rate that nnU-Net 1.7.1 uses for ten phantom cases, and what its 18 commands take.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/90_cli.py
Writes tests/recorded/90_cli.json.
"""
import ast, contextlib, importlib.util, json, os, tempfile
from collections import OrderedDict
from importlib.metadata import entry_points, version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'


def taken(entry):
    "The names of flags and arguments that the function behind a command gives to its parser"
    with contextlib.redirect_stdout(open(os.devnull, 'w')): source = Path(importlib.util.find_spec(entry.module).origin).read_text()
    [function] = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef) and f.name == entry.attr]
    calls = [c for c in ast.walk(function) if isinstance(c, ast.Call) and getattr(c.func, 'attr', '') == 'add_argument']
    return [a.value for c in calls for a in c.args]


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.training.learning_rate.poly_lr import poly_lr
        from nnunet.training.network_training.nnUNetTrainer import nnUNetTrainer
    trainer = nnUNetTrainer.__new__(nnUNetTrainer)
    trainer.dataset = OrderedDict((f'ct_{i:03d}', None) for i in range(10))
    trainer.dataset_directory, trainer.fold, trainer.print_to_log_file = tempfile.mkdtemp(), 0, lambda *a, **k: None
    trainer.do_split()
    record = dict(command='python tests/record/90_cli.py', versions={p: version(p) for p in ('nnunet', 'numpy', 'scikit-learn')},
                  val=sorted(map(str, trainer.dataset_val)), lr_epoch_1_of_2=float(poly_lr(1, 2, .01, .9)),
                  flags={e.name: taken(e) for e in sorted(entry_points(group='console_scripts')) if e.value.startswith('nnunet.')})
    out = Path(__file__).resolve().parents[1]/'recorded'/'90_cli.json'
    out.write_text(json.dumps(record) + '\n')
    print('wrote', out.name, record)


if __name__ == '__main__': main()
