"Export and clean the notebooks; fail, naming the files, where that changes anything."
import hashlib, os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

def contents(root):
    "Hash of every notebook and module"
    files = sorted([*root.glob('nbs/*.ipynb'), *root.glob('segnb/**/*.py'), root/'pyproject.toml', root/'README.md'])
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

def changed(root=ROOT):
    "Names of the files that `nbdev_clean`, `nbdev_export` and the README's generator change"
    before = contents(root)
    env = {**os.environ, 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'}
    for command in (['nbdev_clean'], ['nbdev_export']): subprocess.run([shutil.which(command[0], path=env['PATH'])], cwd=root, env=env, check=True)
    subprocess.run([sys.executable, root/'tools'/'readme.py'], cwd=root, env=env, check=True)
    after = contents(root)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))

if __name__ == '__main__':
    names = changed()
    if names: sys.exit('not in step with the notebooks (now rewritten; look at the difference and commit it): ' + ', '.join(names))
    print('notebooks, package and README are in step')
