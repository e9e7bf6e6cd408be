"""Record how nnU-Net 1.7.1 removes components, and what it decides about it from made-up cross-validations.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/70_postprocessing.py
Writes tests/recorded/70_postprocessing.npz (label maps) and .json (sizes, decisions, mean Dice).
"""
import contextlib, copy, json, os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import SimpleITK as sitk

SEED, SPACING = 70, (2.5, 1., .7)  # (z, y, x) mm
OUT = Path(__file__).resolve().parents[1]/'recorded'
COMPONENTS = {  # name: (for_which_classes, minimum sizes in mm3)
    'each': ([1, 2, 3], None), 'jointly': ([[1, 2, 3]], None), 'jointly then one': ([[1, 2, 3], 2], None), 'two together': ([[1, 3], 2], None),
    'every label': (None, None), 'with sizes': ([1, 2], {1: 30., 2: 8.75}), 'jointly with a size': ([[1, 2], 3], {(1, 2): 60., 3: 5.25})}
SCENARIOS = ('strays far away', 'a true second piece', 'jointly then one', 'nothing to gain', 'one class', 'an alarm vanishes', 'a class gets worse', 'one tiny organ', 'a gain on average') + \
    tuple(f'random {i}' for i in range(9))


def speckled(rng, shape=(12, 18, 16)):
    "A label map with large and small pieces of three labels, pieces that touch by an edge only, and two of equal size"
    coarse = rng.normal(size=[-(-s//3) for s in shape])
    for axis in range(3): coarse = np.repeat(coarse, 3, axis)
    noise = coarse[tuple(slice(0, s) for s in shape)] + rng.normal(0, .35, shape)
    out = np.digitize(noise, [.6, 1.1, 1.6]).astype(np.uint8)
    out[0, :4, :6] = 0
    out[0, 0, 0] = out[0, 1, 1] = 1
    out[-1, :, :] = 0
    out[-1, 2:4, 2:4] = out[-1, 8:10, 2:4] = 3
    return out


def ball(shape, centre, radius, value, into):
    z, y, x = np.ogrid[tuple(slice(0, n) for n in shape)]
    into[((z - centre[0])*1.5)**2 + (y - centre[1])**2 + (x - centre[2])**2 <= radius**2] = value


def cross_validation(name, rng, n=4, shape=(10, 18, 16)):
    "[(truth, prediction)] of a made-up cross-validation: an organ (1) with a lesion (2) in it, and what the scenario is named after"
    cases = []
    for i in range(n):
        truth = np.zeros(shape, np.uint8)
        centre = (5, 9 + rng.integers(-1, 2), 8 + rng.integers(-1, 2))
        ball(shape, centre, 5, 1, truth)
        if name == 'one tiny organ' and i == 0: truth[:] = 0; ball(shape, centre, 1.5, 1, truth)
        elif name != 'one class': ball(shape, centre, 2.2, 2, truth)
        said = np.roll(truth, int(rng.integers(0, 2)), 2)
        random = name.startswith('random')
        def stray(value, size=2, corner=None):
            c = corner or [int(rng.integers(0, 2)) * (s - size - 1) for s in shape]
            return tuple(slice(a, a + size) for a in c), value
        def put(into, where, value): into[where] = value
        if name in ('strays far away', 'one class') or random and rng.random() < .5: put(said, *stray(1, corner=(0, 0, 0)))
        if name == 'a true second piece' or random and rng.random() < .3:
            put(truth, *stray(2, 3, (0, 14, 12))); put(said, *stray(2, 3, (0, 14, 12))); put(said, *stray(1, corner=(0, 0, 0)))
        if name == 'one tiny organ' and i: put(said, *stray(1, 3, (0, 0, 0)))
        if name == 'a gain on average': put(said, *stray(1, 5, (0, 0, 0))); put(truth, *stray(2, 1, (8, 15, 13))); put(said, *stray(2, 1, (8, 15, 13)))
        if name == 'jointly then one': put(said, *stray(2, corner=(8, 0, 0))); put(said, *stray(2, 1, (5, 9, 3 + 2 * (i % 2))))
        if name == 'an alarm vanishes' and i == 0: truth[truth == 2] = 1; said[said == 2] = 1; put(said, *stray(2, corner=(0, 0, 0)))
        if name == 'a class gets worse' or random and rng.random() < .2: put(said, *stray(1)); put(truth, *stray(2, corner=(8, 15, 13))); put(said, *stray(2, corner=(8, 15, 13)))
        if random and rng.random() < .4: put(said, *stray(2, int(rng.integers(1, 4))))
        if random and rng.random() < .2: said[said == 2] = 1
        cases.append((truth, said))
    return cases


def write(array, file):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(file))


def plain(sizes): return [[list(k) if isinstance(k, tuple) else int(k), None if v is None else float(v)] for k, v in sizes.items()]


def components(rng, arrays):
    from nnunet.postprocessing.connected_components import remove_all_but_the_largest_connected_component as f
    found = {}
    for i in range(3):
        arrays[f'map_{i}'] = image = speckled(rng)
        for name, (which, sizes) in COMPONENTS.items():
            result, removed, kept = f(image.copy(), copy.deepcopy(which), float(np.prod(SPACING[::-1])), sizes)
            arrays[f'map_{i}/{name}'] = result
            found[f'map_{i}/{name}'] = {'which': which, 'min_sizes': None if sizes is None else [[k, v] for k, v in sizes.items()],
                                        'kept': plain(kept), 'removed': plain(removed)}
    return found


def decisions(name, cases):
    "What is decided plainly and in the advanced way, and the mean Dice before and after"
    from nnunet.evaluation.evaluator import aggregate_scores
    from nnunet.postprocessing.connected_components import determine_postprocessing
    classes = [0, 1] if name == 'one class' else [0, 1, 2]
    out = {'classes': classes[1:]}
    for way in ('plain', 'advanced'):
        base, truth = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        (base/'raw').mkdir()
        for i, (t, s) in enumerate(cases): write(t, truth/f'case_{i}.nii.gz'); write(s, base/'raw'/f'case_{i}.nii.gz')
        pairs = [(str(base/'raw'/f'case_{i}.nii.gz'), str(truth/f'case_{i}.nii.gz')) for i in range(len(cases))]
        aggregate_scores(pairs, labels=classes, num_threads=1, json_output_file=str(base/'raw'/'summary.json'))
        determine_postprocessing(str(base), str(truth), 'raw', final_subf_name='final', processes=1, advanced_postprocessing=way == 'advanced')
        final = json.loads((base/'final'/'summary.json').read_text())['results']['mean']
        out[way] = json.loads((base/'postprocessing.json').read_text()) | {'final': {str(c): final[str(c)]['Dice'] for c in classes[1:]}}
    return out


def main():
    arrays = {}
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        found = components(np.random.default_rng(SEED), arrays)
        decided = {}
        for i, name in enumerate(SCENARIOS):
            cases = cross_validation(name, np.random.default_rng([SEED, i]))
            decided[name] = decisions(name, cases)
            arrays[f'{name}/truth'], arrays[f'{name}/prediction'] = (np.stack(maps) for maps in zip(*cases))
    about = dict(command='python tests/record/70_postprocessing.py', seed=SEED, spacing=SPACING,
                 versions={p: version(p) for p in ('nnunet', 'numpy', 'scipy', 'SimpleITK')})
    (OUT/'70_postprocessing.json').write_text(json.dumps(about | {'components': found, 'decisions': decided}, indent=1) + '\n')
    np.savez_compressed(OUT/'70_postprocessing.npz', **arrays)
    for f in ('json', 'npz'): print(f'wrote 70_postprocessing.{f}', (OUT/f'70_postprocessing.{f}').stat().st_size)
    for name, d in decided.items(): print(f"{name:24} {d['plain']['for_which_classes']!s:20} {d['advanced']['for_which_classes']!s:20} {d['advanced']['min_valid_object_sizes']}")


if __name__ == '__main__': main()
