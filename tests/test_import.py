"Importing the package changes nothing, and stays cheap."
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(f.stem for f in (ROOT/'segnb').glob('*.py') if not f.stem.startswith('_'))

def run(code):
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()

def test_import_segnb_is_bare():
    loaded = run("import sys, segnb; print([m for m in ('torch', 'numpy', 'matplotlib', 'SimpleITK', 'batchgenerators') if m in sys.modules])")
    assert loaded == '[]'

@pytest.mark.parametrize('module', ['image', 'labels', 'workers', 'dataset', 'cropping', 'fingerprint', 'planning', 'resampling', 'normalization', 'preprocessing', 'metrics', 'cli'])
def test_no_torch_where_none_is_needed(module): assert run(f"import sys, segnb.{module}; print('torch' in sys.modules)") == 'False'

def test_all_modules_leave_backend_environment_and_random_state_alone():
    code = f'''
import os, random, matplotlib, numpy as np
matplotlib.use('svg'); before = dict(os.environ); np.random.seed(1); random.seed(1); a, b = np.random.get_state()[1].copy(), random.getstate()
import importlib
for m in {MODULES!r}: importlib.import_module('segnb.' + m)
import torch
print(matplotlib.get_backend(), dict(os.environ) == before, (np.random.get_state()[1] == a).all(), random.getstate() == b, torch.cuda.is_initialized())
'''
    assert run(code) == 'svg True True True False'

def test_every_public_name_is_documented():
    code = f'''
import importlib, inspect
bad = []
for m in {MODULES!r}:
    module = importlib.import_module('segnb.' + m)
    for name in module.__all__:
        thing = getattr(module, name)
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not inspect.getdoc(thing): bad.append(m + '.' + name)
print(bad)
'''
    assert run(code) == '[]'
