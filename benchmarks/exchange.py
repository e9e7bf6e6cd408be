"""Exchange: models in and out of one file, and what a model from elsewhere costs before its first answer.

`file`: a model of thirty million weights and two folds into one verified file, and back, beside copying and hashing the same bytes.
`first_case`: one new process each: load a model and predict its first case (segnb), beside the network alone on the same windows
and mirrored copies, weights loaded by torch (`network_alone`). Both after `import torch`; the difference, packages, plan,
reading, preprocessing, window, export, writing, is to be no more than two seconds.
`first_case_v1`, `first_case_v2`: the same with an official model folder, which is read, converted and then asked.
"""
import json, shutil, subprocess, sys, tempfile
from pathlib import Path

from common import HERE, entry, main, measure
from models import FewCases, model_of

SAMPLE = HERE.parent/'data_samples'/'Task101_PhantomCT'
OFFICIAL = HERE.parent/'tests'/'recorded'/'official'


def large(folder):
    return model_of(FewCases(SAMPLE), Path(folder)/'model'/'3d_fullres', (0, 1))


def there_and_back():
    from segnb.exchange import export_model, import_model
    with tempfile.TemporaryDirectory() as folder:
        model, place = large(folder), Path(folder)
        def work():
            export_model(model, place/'model.segnb')
            import_model(place/'model.segnb', place/'again', overwrite=True)
        return measure(work, 3)


def copied():
    import hashlib
    with tempfile.TemporaryDirectory() as folder:
        model, place = large(folder), Path(folder)
        files = sorted(f for f in model.rglob('*') if f.is_file())
        def work():
            for target in (place/'one', place/'two'):
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(model, target)
            for f in files: hashlib.sha256(f.read_bytes()).hexdigest()
        return measure(work, 3)


entry('file', 'segnb')(there_and_back)
entry('file', 'copy_and_hash')(copied)


FIRST = '''
import sys, time, json, resource, warnings
warnings.simplefilter('ignore')
import torch
torch.set_num_threads(2)
began, cpu = time.perf_counter(), time.process_time()
from segnb.prediction import Predictor
kind, model, place, *files = sys.argv[1:]
if kind != 'segnb':
    from segnb import exchange
    model = getattr(exchange, 'load_nnunet_' + kind)(model, place + '/converted')
p = Predictor.from_folder(model, device='cpu')
p.predict_files(files, place + '/out.nii.gz')
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1.024e-3]))
'''

ALONE = '''
import sys, time, json, resource, warnings
warnings.simplefilter('ignore')
import torch
torch.set_num_threads(2)
from segnb.prediction import Predictor
from segnb.sliding_window import sliding_steps
from segnb.image import read_image
from segnb.preprocessing import preprocess_case
kind, model, place, *files = sys.argv[1:]
p = Predictor.from_folder(model, device='cpu')
image, grid = read_image(files)
data, *_ = preprocess_case(image, None, grid.spacing, p.plans, p.configuration.name)
n = p.configuration.dimensions
patch, shape = p.configuration.patch_size, [max(s, t) for s, t in zip(data.shape[4-n:], p.configuration.patch_size)]
windows = 1 if n == 3 else data.shape[1]
for steps in sliding_steps(shape, patch, .5): windows *= len(steps)
copies = 2**len(p.mirror_axes)
x = torch.zeros(2 if n == 3 and windows*copies > 1 else 1, data.shape[0], *patch)
began, cpu = time.perf_counter(), time.process_time()
with torch.inference_mode():
    for network in p.networks:
        for _ in range(-(-windows*copies//len(x))): network(x)
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1.024e-3]))
'''

def first_case(program, kind):
    with tempfile.TemporaryDirectory() as folder:
        if kind == 'segnb': model = model_of(FewCases(SAMPLE), Path(folder)/'model', (0,), planner='cpu')
        else: model = OFFICIAL/f'{kind}_plain.zip'
        if program is ALONE and kind != 'segnb':
            from segnb import exchange
            model = getattr(exchange, f'load_nnunet_{kind}')(model, Path(folder)/'model')
        files = FewCases(SAMPLE).image_files(FewCases(SAMPLE).cases[0])
        run = subprocess.run([sys.executable, '-c', program, kind, str(model), folder, *map(str, files)], capture_output=True, text=True)
        if run.returncode: raise RuntimeError(run.stderr[-2000:])
        seconds, cpu, peak = json.loads(run.stdout.splitlines()[-1])
    return dict(seconds=seconds, fastest=seconds, cpu_seconds=cpu, calls=1, peak_mb=round(peak), unit='a first case')


for kind in ('segnb', 'v1', 'v2'):
    group = 'first_case' if kind == 'segnb' else f'first_case_{kind}'
    entry(group, 'segnb')(lambda k=kind: first_case(FIRST, k))
    entry(group, 'network_alone')(lambda k=kind: first_case(ALONE, k))


if __name__ == '__main__': main(__doc__)
