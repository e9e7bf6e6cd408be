"The wheel holds the package and nothing else, and works where the repository is not."
import subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    r = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', str(out), str(ROOT)], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return next(out.glob('*.whl'))

def test_the_wheel_holds_the_package_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split('/')[0] for n in names}
    assert {t for t in tops if not t.endswith('.dist-info')} == {'segnb'}
    assert {f'segnb/{f.name}' for f in (ROOT/'segnb').glob('*.py')} == {n for n in names if n.startswith('segnb/')}

def test_the_installed_wheel_runs_from_anywhere(wheel, tmp_path):
    site = tmp_path/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', str(site), str(wheel)], check=True, capture_output=True)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import segnb, segnb.cli; assert 'site' in segnb.__file__, segnb.__file__; print(segnb.__version__); sys.exit(segnb.cli.main(sys.argv[1:]))"
    r = subprocess.run([sys.executable, '-c', code, str(site), '--help'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for verb in ('demo', 'plan', 'preprocess', 'train', 'predict', 'evaluate'): assert verb in r.stdout
