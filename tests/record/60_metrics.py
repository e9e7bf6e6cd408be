"""Record how nnU-Net 1.7.1 evaluates a folder of label maps, for the parity checks of the metrics chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/60_metrics.py
Writes tests/recorded/60_metrics.npz (`<case>/reference`, `<case>/prediction`, uint8) and tests/recorded/60_metrics.json:
per case and label the Dice and voxel counts, the mean of every label and the foreground mean.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED, LABELS = 60, (1, 2, 3, 4)
OUT = Path(__file__).resolve().parents[1]/'recorded'


def pairs():
    "(case, reference, prediction): label 3 is rare, label 4 occurs in no map, and every kind of absence occurs"
    rng = np.random.default_rng(SEED)
    for i in range(6):
        shape = rng.integers(5, 12, 3)
        reference = (rng.integers(0, 4, shape) * (rng.random(shape) < .5)).astype(np.uint8)
        prediction = np.where(rng.random(shape) < .7, reference, rng.integers(0, 4, shape)).astype(np.uint8)
        if i in (1, 3): reference[reference == 3] = 0    # predicted but absent: 0
        if i in (2, 3): prediction[prediction == 3] = 0  # 2: missed wholly: 0; 3: absent in both: nan
        if i == 4: prediction = reference.copy()         # perfect
        if i == 5: prediction[:] = 0                     # nothing found
        yield f'case_{i}', reference, prediction


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        import SimpleITK as sitk
        from nnunet.evaluation.add_mean_dice_to_json import foreground_mean
        from nnunet.evaluation.evaluator import evaluate_folder
    arrays, folders = {}, [Path(tempfile.mkdtemp()) for _ in range(2)]
    for case, *maps in pairs():
        for folder, name, array in zip(folders, ('reference', 'prediction'), maps):
            arrays[f'{case}/{name}'] = array
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder/f'{case}.nii.gz'))
    scores = evaluate_folder(str(folders[0]), str(folders[1]), LABELS)
    foreground_mean(str(folders[1]/'summary.json'))
    means = json.loads((folders[1]/'summary.json').read_text())['results']['mean']
    def keep(s): return {'dice': s['Dice'], 'n_reference': s['Total Positives Reference'], 'n_prediction': s['Total Positives Test']}
    cases = {Path(s['test']).name.split('.')[0]: {label: keep(s[label]) for label in map(str, LABELS)} for s in scores['all']}
    about = dict(command='python tests/record/60_metrics.py', seed=SEED,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'SimpleITK')}})
    np.savez_compressed(OUT/'60_metrics.npz', **arrays, about=json.dumps(about))
    result = about | dict(labels=LABELS, cases=cases, mean={label: means[label]['Dice'] for label in map(str, LABELS)}, foreground_mean=means['mean']['Dice'])
    (OUT/'60_metrics.json').write_text(json.dumps(result, indent=1) + '\n')
    for f in ('60_metrics.npz', '60_metrics.json'): print(f, (OUT/f).stat().st_size, 'bytes')


if __name__ == '__main__': main()
