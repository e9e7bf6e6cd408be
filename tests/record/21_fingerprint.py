"""Record the fingerprints nnU-Net 1.7.1 takes, for the parity checks of the fingerprint chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md, and data_samples/.
Usage, from the project root: python tests/record/21_fingerprint.py
Writes tests/recorded/21_fingerprint.json: for three small made-up tasks, for one pool of intensities and for two
of the phantom data sets, what the original measures. The voxels of the made-up tasks are in 21_fingerprint.npz.
"""
import contextlib, json, os, platform, shutil, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ.update(MPLBACKEND='agg', nnUNet_def_n_proc='1')
import numpy as np
import SimpleITK as sitk

SEED = 21
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT/'tests'/'recorded'
TASKS = {'two_channels': (('PET', 'CT'), 4), 'lower_case': (('ct',), 3), 'no_ct': (('SPECT', 'CTA'), 3)} # CTA is not exactly CT


def made_up(rng, channels, n):
    "Cases with a zero margin, some zeros inside, fractions among the intensities and labels that may be absent"
    for i in range(n):
        shape = rng.integers((6, 14, 14), (12, 22, 22))
        image = (rng.integers(-1000*8, 2000*8, (len(channels), *shape)) / 8).astype(np.float32)
        low, high = rng.integers(0, 3, 3), shape - rng.integers(0, 3, 3)
        inside = np.zeros(shape, bool); inside[tuple(map(slice, low, high))] = True
        image[:, ~inside] = 0
        image[:, rng.random(shape) < .05] = 0
        seg = (rng.integers(0, 3, shape) * (rng.random(shape) < .4)).astype(np.uint8)
        yield image, seg * (i != 1), np.round(rng.uniform(.5, 4, 3), 4) # the second case is empty


def write_task(folder, cases, channels):
    for sub in ('imagesTr', 'labelsTr'): (folder/sub).mkdir(parents=True)
    def write(array, spacing, file):
        image = sitk.GetImageFromArray(array); image.SetSpacing([float(s) for s in spacing[::-1]])
        sitk.WriteImage(image, str(file))
    for i, (image, seg, spacing) in enumerate(cases):
        for c, channel in enumerate(image): write(channel, spacing, folder/'imagesTr'/f'case_{i}_{c:04d}.nii.gz')
        write(seg, spacing, folder/'labelsTr'/f'case_{i}.nii.gz')
    meta = {'modality': {str(c): name for c, name in enumerate(channels)}, 'labels': {'0': 'background', '2': 'two', '1': 'one'},
            'training': [{'image': f'./imagesTr/case_{i}.nii.gz', 'label': f'./labelsTr/case_{i}.nii.gz'} for i in range(len(cases))], 'test': []}
    (folder/'dataset.json').write_text(json.dumps(meta))


def measure(task):
    "Crop and analyse with the original, as its planning command does"
    from nnunet.experiment_planning.DatasetAnalyzer import DatasetAnalyzer
    from nnunet.experiment_planning.utils import create_lists_from_splitted_dataset
    from nnunet.preprocessing.cropping import ImageCropper
    cropped = tempfile.mkdtemp()
    lists, modalities = create_lists_from_splitted_dataset(str(task))
    ImageCropper(1, cropped).run_cropping(lists, overwrite_existing=True)
    shutil.copy(task/'dataset.json', cropped)
    names = list(modalities.values())
    found = DatasetAnalyzer(cropped, num_processes=1).analyze_dataset('CT' in names or 'ct' in names)
    statistics = found['intensityproperties']
    return {'spacings': [list(map(float, s)) for s in found['all_spacings']], 'shapes': [list(map(int, s)) for s in found['all_sizes']],
            'channels': names, 'labels': found['all_classes'], 'size_reductions': list(map(float, found['size_reductions'].values())),
            'intensities': None if statistics is None else {str(c): named(p) for c, p in statistics.items()}}


def named(p):
    "The original's names of the statistics, spelt out"
    spelt = dict(mean='mean', sd='sd', median='median', min='mn', max='mx', percentile_00_5='percentile_00_5', percentile_99_5='percentile_99_5')
    return {ours: float(p[theirs]) for ours, theirs in spelt.items()}


def main():
    rng = np.random.default_rng(SEED)
    arrays, found = {}, {}
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        from nnunet.experiment_planning.DatasetAnalyzer import DatasetAnalyzer
        for name, (channels, n) in TASKS.items():
            cases = list(made_up(rng, channels, n))
            folder = Path(tempfile.mkdtemp())/name
            write_task(folder, cases, channels)
            found[name] = measure(folder)
            for i, (image, seg, _) in enumerate(cases): arrays[f'{name}/{i}/image'], arrays[f'{name}/{i}/seg'] = image, seg
        pool = np.random.default_rng(SEED).integers(-64_000, 192_000, 300_001).astype(np.float32) / 64
        keys = ('median', 'mean', 'sd', 'mn', 'mx', 'percentile_99_5', 'percentile_00_5')
        found['pool'] = {'seed': SEED, 'sum': float(pool.sum(dtype=float)), 'statistics': named(dict(zip(keys, DatasetAnalyzer._compute_stats(list(pool)))))}
        found['samples'] = {t: measure(ROOT/'data_samples'/t) for t in ('Task101_PhantomCT', 'Task102_PhantomMR')}
    found['command'] = 'python tests/record/21_fingerprint.py'
    found['versions'] = {p: version(p) for p in ('nnunet', 'numpy', 'SimpleITK')} | {'python': platform.python_version()}
    (OUT/'21_fingerprint.json').write_text(json.dumps(found, indent=1) + '\n')
    np.savez_compressed(OUT/'21_fingerprint.npz', **arrays)
    print(*[(f.name, f.stat().st_size) for f in OUT.glob('21_*')])


if __name__ == '__main__': main()
