"""Measure the peak memory and processor time of preprocessing one case in a fresh process, beside what `estimate_case` foresees.

Needs segnb itself and the real data sets (folder in SEGNB_REAL_DATA, default ../shared/data). The last row is a synthetic CT
of 512 x 512 x 600 voxels, brought to 1.5 mm. Writes tests/recorded/32_memory.json.   Usage: python tests/record/32_memory.py
"""
import json, os, resource, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('SEGNB_REAL_DATA', ROOT/'..'/'shared'/'data'))
JOBS = [(task, factor) for task in ('Task004_Hippocampus', 'Task010_SarcomaCT', 'Task013_MSLesion', 'Task015_Nuclei2D',
                                    'Task020_TotalSegCT', 'Task021_TumourAniso') for factor in (1, .8)]


def large_ct(folder):
    "A body with two organs in 512 x 512 x 600 voxels, written as a task of one case"
    from segnb.image import Geometry, write_image, write_label_map
    rng, shape = np.random.default_rng(0), (600, 512, 512)
    z, y, x = np.ogrid[-1:1:600j, -1:1:512j, -1:1:512j]
    image = np.full(shape, -1000, np.int16)
    image[np.broadcast_to((y / .7)**2 + (x / .9)**2 < 1, shape)] = 40
    image += np.repeat(np.repeat(rng.normal(0, 12, (600, 64, 64)), 8, 1), 8, 2).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[((z - .1) / .3)**2 + ((y + .1) / .3)**2 + ((x - .2) / .35)**2 < 1] = 1
    label[((z - .1) / .1)**2 + ((y + .1) / .1)**2 + ((x - .2) / .1)**2 < 1] = 2
    image[label > 0] += 60
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True)
    geometry = Geometry((1., .8, .8), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), shape)
    write_image(image, geometry, folder/'imagesTr'/'large_0000.nii.gz')
    write_label_map(label, geometry, folder/'labelsTr'/'large.nii.gz')
    (folder/'dataset.json').write_text(json.dumps({'channel_names': {'0': 'CT'}, 'labels': {'background': 0, 'organ': 1, 'lesion': 2}, 'file_ending': '.nii.gz'}))


def plan(raw, factor, spacing, file):
    "Plan a task; other spacings than its own, so that cases are resampled"
    from segnb.dataset import Dataset
    from segnb.fingerprint import extract_fingerprint
    from segnb.planning import plan_experiment
    plans = plan_experiment(extract_fingerprint(Dataset(raw), 0))
    full = plans.configuration('3d_fullres')
    replace(plans, configurations={'3d_fullres': replace(full, spacing=spacing or tuple(mm * factor for mm in full.spacing))}).save(file)


def one_case(raw, plans_file):
    "Preprocess the first case of a task in this process; print what it took"
    from segnb.dataset import Dataset
    from segnb.planning import Plans
    import segnb.preprocessing as p
    dataset, plans = Dataset(raw), Plans.load(plans_file)
    case, name = dataset.cases[0], '3d_fullres'
    with tempfile.TemporaryDirectory() as out:
        for folder in (name, 'gt_segmentations'): (Path(out)/folder).mkdir()
        identities = {name: p.preprocessing_identity(plans, name)}
        start = time.process_time()
        p._claim(Path(out), identities)
        p._preprocess_one(case, dataset, plans, Path(out), {name: {case}}, identities)
        seconds = time.process_time() - start
        stored = p.PreprocessedCase(Path(out)/name, case)
        foreseen = p._estimate(dataset, plans, [name], case)
        row = dict(case=case, raw=int(np.prod(stored.properties['shape'])), after=int(stored.seg.size), channels=len(dataset.channels),
                   peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, estimate=foreseen.memory, seconds=round(seconds, 3),
                   estimate_seconds=round(foreseen.seconds, 3), disk=sum(f.stat().st_size for f in (Path(out)/name).iterdir()), estimate_disk=foreseen.disk)
    print(json.dumps(row))


def main():
    rows = []
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, __file__, 'large', str(Path(work)/'Task900_Large')], check=True)  # this process stays small: children inherit its peak
        jobs = [(DATA/task, factor, None) for task, factor in JOBS] + [(Path(work)/'Task900_Large', 1, (1.5, 1.5, 1.5))]
        for raw, factor, spacing in jobs:
            for command in ((['plan', factor, json.dumps(spacing)]), ['case']):
                arguments = [sys.executable, __file__, command[0], raw, Path(work)/'plans.json', *command[1:]]
                said = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=True).stdout
            rows.append({'case': '', 'task': raw.name, 'spacing_factor': factor, **json.loads(said)})
            rows[-1]['case'] = f"{raw.name.split('_')[1]}, {rows[-1]['case'][:16]}" + (f', {factor} × its spacing' if factor != 1 else '')
            print(rows[-1], file=sys.stderr)
    out = dict(command='python tests/record/32_memory.py', python=sys.version.split()[0], numpy=np.__version__, cases=rows)
    (ROOT/'tests'/'recorded'/'32_memory.json').write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    if len(sys.argv) == 1: main()
    elif sys.argv[1] == 'large': large_ct(Path(sys.argv[2]))
    elif sys.argv[1] == 'plan': plan(Path(sys.argv[2]), float(sys.argv[4]), json.loads(sys.argv[5]), sys.argv[3])
    else: one_case(Path(sys.argv[2]), sys.argv[3])
