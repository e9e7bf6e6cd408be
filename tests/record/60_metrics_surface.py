"""Record what nnU-Net 1.7.1 says of surfaces, and the summary.json it writes, for the parity checks of the metrics chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/60_metrics_surface.py
Writes tests/recorded/60_metrics_surface.npz (`<case>/reference`, `<case>/prediction`, uint8) and tests/recorded/60_metrics_surface.json:
the spacing of every case; per case and label all metrics of evaluation/metrics.py and the surface Dice of evaluation/surface_dice.py;
the same for a region (labels 1 and 2 as one) and for label 1 of an image of one slice (`flat`); and the summary that `aggregate_scores(advanced=True)` and `foreground_mean` leave behind.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
np.bool = bool # MedPy 0.4.0 asks for it

SEED, LABELS, REGION, TOLERANCES = 61, (1, 2, 3), (1, 2), (.5, 1., 2., 5.)
SPACINGS = ((1., 1., 1.), (3., .8, .8), (.7, .7, .7), (1.25, .9766, .9766), (5., .5, .5))
OUT = Path(__file__).resolve().parents[1]/'recorded'


def ball(rng, shape):
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    centre, radii = [rng.uniform(.2, .8)*n for n in shape], [max(1., rng.uniform(.12, .35)*n) for n in shape]
    return sum(((g - c)/r)**2 for g, c, r in zip(grid, centre, radii)) <= 1


def pairs():
    "(case, spacing, reference, prediction): balls that are moved, cut at the border, broken up, lost, made up, or all there is"
    rng = np.random.default_rng(SEED)
    for i in range(12):
        shape = tuple(int(n) for n in rng.integers(8, 30, 3))
        reference = np.zeros(shape, np.uint8)
        for label in LABELS: reference[ball(rng, shape)] = label
        prediction = np.roll(reference, tuple(rng.integers(-2, 3, 3)), (0, 1, 2))
        prediction[rng.random(shape) < .004] = rng.integers(0, 4)
        if i == 3: prediction[prediction == 2] = 0       # missed wholly
        if i == 4: reference[reference == 3] = 0         # a false alarm
        if i == 5: reference[reference == 1] = 0; prediction[prediction == 1] = 0 # absent in both
        if i == 6: prediction = reference.copy()         # perfect
        if i == 7: reference[:] = 1                      # fills the image
        if i == 8: prediction[:] = 0; prediction[0, 0, 0] = 2; reference[-1, -1, -1] = 2 # one voxel, far away
        yield f'case_{i:02}', SPACINGS[i % len(SPACINGS)], reference, prediction


def plain(scores): return {k: v if v is None or isinstance(v, (int, str)) else float(v) for k, v in scores.items()}


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        import SimpleITK as sitk
        from nnunet.evaluation.add_mean_dice_to_json import foreground_mean
        from nnunet.evaluation.evaluator import aggregate_scores
        from nnunet.evaluation.metrics import ALL_METRICS, ConfusionMatrix
        from nnunet.evaluation.region_based_evaluation import create_region_from_mask
        from nnunet.evaluation.surface_dice import normalized_surface_dice
    def score(prediction, reference, spacing):
        found = plain({m: f(confusion_matrix=ConfusionMatrix(prediction, reference), voxel_spacing=spacing) for m, f in ALL_METRICS.items()})
        if prediction.any() and reference.any():
            found['surface Dice'] = [float(normalized_surface_dice(prediction, reference, t, spacing)) for t in TOLERANCES]
        return found
    arrays, spacings, cases, regions = {}, {}, {}, {}
    folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
    for case, spacing, *maps in pairs():
        spacings[case] = spacing
        for folder, name, array in zip(folders, ('reference', 'prediction'), maps):
            arrays[f'{case}/{name}'] = array
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(spacing[::-1])
            sitk.WriteImage(image, str(folder/f'{case}.nii.gz'))
        cases[case] = {str(k): score(maps[1] == k, maps[0] == k, spacing) for k in LABELS}
        regions[case] = score(*(create_region_from_mask(m, REGION) for m in maps[::-1]), spacing)
    rng = np.random.default_rng(SEED + 1)
    flat = [ball(rng, (1, 24, 30)) for _ in range(2)]
    arrays |= {'flat/reference': flat[0].astype(np.uint8), 'flat/prediction': flat[1].astype(np.uint8)}
    files = [(str(folders[1]/f'{case}.nii.gz'), str(folders[0]/f'{case}.nii.gz')) for case in cases]
    summary = folders[1]/'summary.json'
    aggregate_scores(files, labels=list(LABELS), num_threads=1, advanced=True, json_output_file=str(summary), json_name='a name', json_description='some words', json_task='Task001_Test')
    foreground_mean(str(summary))
    written = json.loads(summary.read_text())
    for case in written['results']['all']: case.update({k: Path(case[k]).name for k in ('test', 'reference')})
    about = dict(command='python tests/record/60_metrics_surface.py', seed=SEED,
                 versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'MedPy', 'numpy', 'scipy', 'SimpleITK')}})
    np.savez_compressed(OUT/'60_metrics_surface.npz', **arrays, about=json.dumps(about))
    result = about | dict(labels=LABELS, region=REGION, tolerances=TOLERANCES, spacings=spacings, cases=cases, regions=regions, summary=written,
                          flat={'spacing': (1., .8, .8), **score(*flat[::-1], (1., .8, .8))})
    (OUT/'60_metrics_surface.json').write_text(json.dumps(result) + '\n')
    for f in ('60_metrics_surface.npz', '60_metrics_surface.json'): print(f, (OUT/f).stat().st_size, 'bytes')


if __name__ == '__main__': main()
