"Ensembles equal those of nnU-Net 1.7.1 (recorded by tests/record/71_ensembling.py) but where its float16 makes ties; laws, memory, faults."
import json, os, shutil, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest

from segnb.ensembling import EnsembleError, _Kept, average_probabilities, ensemble_case, ensemble_probabilities, probability_files
from segnb.export import probabilities_to_original_grid, read_probabilities, to_original_grid, write_probabilities
from segnb.image import Geometry, SegnbError, read_label_map
from segnb.labels import Labels
from segnb.postprocessing import Postprocessing
from segnb.viewer import recorded
from segnb.workers import write_json

THEIRS, ARRAYS = recorded('71_ensembling.json')['cases'], recorded('71_ensembling.npz')
GEOMETRY = Geometry((2., 1., 1.2), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), (12, 15, 16)).to_dict()
QUIET = dict(n_workers=0, progress=False)
PLAIN = Labels.from_dict({'labels': {'0': 'background', '1': 'a', '2': 'b'}})
REGIONS = Labels.from_dict({'labels': {'background': 0, 'all': [1, 2, 3], 'inner': [2, 3], 'core': 3}, 'regions_class_order': [1, 2, 3]})


def labels_of(name): return REGIONS if THEIRS[name]['regions'] else PLAIN

def members_of(name): return [(ARRAYS[f'{name}/{i}'], {**way, 'geometry': GEOMETRY}) for i, way in enumerate(THEIRS[name]['members'])]

def box_of(name): return tuple(slice(*b) for b in THEIRS[name]['members'][0]['bbox'])

def close_calls(name):
    "Voxels that a few roundings to float16 may decide either way"
    merged, close = ARRAYS[f'{name}/merged'].astype(float), np.zeros(GEOMETRY['shape'], bool)
    top = np.sort(merged, 0)
    close[box_of(name)] = (np.abs(merged - .5) < 1.5e-3).any(0) if THEIRS[name]['regions'] else top[-1] - top[-2] < 1.5e-3
    return close

def written(name, folder):
    "The members of a recorded case as folders of kept probabilities"
    folders = [folder/f'member_{i}' for i in range(len(members_of(name)))]
    for f, m in zip(folders, members_of(name)): write_probabilities(*m, f/'case.npz')
    return folders


@pytest.mark.parametrize('name', THEIRS)
def test_as_the_original(name, tmp_path):
    out = ensemble_probabilities(written(name, tmp_path), tmp_path/'out', labels=labels_of(name), save_probabilities=True, **QUIET)
    ours, theirs = read_label_map(out['case'])[0], ARRAYS[f'{name}/labels']
    differ = ours != theirs
    assert not (differ & ~close_calls(name)).any() and differ.mean() < 2e-3
    assert np.array_equal(ours, ensemble_case(members_of(name), labels_of(name))[0])     # from files or from arrays
    kept, way = read_probabilities(tmp_path/'out'/'case.npz')
    full = probabilities_to_original_grid(kept, way, bool(THEIRS[name]['regions']))[(slice(None), *box_of(name))]
    assert np.abs(full - ARRAYS[f'{name}/merged']).max() < 1.1e-3


@pytest.mark.parametrize('name', ('one_grid', 'one_grid_regions'))
def test_the_mean_on_one_grid_is_the_very_same_before_it_is_rounded(name):
    members = [p for p, _ in members_of(name)]
    mean = average_probabilities(members)
    assert mean.dtype == np.float32 and np.array_equal(mean.astype(np.float16), ARRAYS[f'{name}/merged'])
    assert np.array_equal(average_probabilities(members, [2, 2, 2]), mean)
    exact = np.mean(np.array(members, np.float64), 0)
    assert np.abs(mean - exact).max() < 1e-7
    ours, theirs = ensemble_case(members_of(name), labels_of(name))[0][box_of(name)], ARRAYS[f'{name}/labels'][box_of(name)]
    assert np.array_equal(ours, labels_of(name).to_label_map(exact))                      # what float64 decides; the original does not
    assert np.array_equal(theirs, labels_of(name).to_label_map(ARRAYS[f'{name}/merged'])) and (ours != theirs).any()


def random_members(rng, n, regions, same):
    shape = rng.integers(6, 14, 3)
    box = [[int(a), int(b)] for a, b in zip(rng.integers(0, 2, 3), shape - rng.integers(0, 2, 3))]
    geometry, members = Geometry(rng.uniform(.5, 5, 3), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), shape), []
    for _ in range(n):
        forward = [int(i) for i in rng.permutation(3)]
        crop = [b - a for a, b in box]
        there = [max(1, int(crop[f]*rng.uniform(.5, 1.6))) for f in forward]
        p = rng.random((3, *there)).astype(np.float32)
        way = dict(identifier='x', shape=shape.tolist(), spacing=list(geometry.spacing), bbox=box, shape_after_crop=crop, transpose_forward=forward,
                   transpose_backward=[forward.index(i) for i in range(3)], shape_after_resampling=there,
                   spacing_after_resampling=[geometry.spacing[f]*crop[f]/m for f, m in zip(forward, there)], geometry=geometry.to_dict())
        members.append((p if regions else p/p.sum(0), way) if not (same and members) else (rng.permutation(members[0][0]), members[0][1]))
        if not same and rng.random() < .4:
            b = [[a + int(rng.integers(0, 2)), e] for a, e in box]
            members[-1][1].update(bbox=b, shape_after_crop=[e - a for a, e in b])
    return members


@pytest.mark.parametrize('seed', range(16))
def test_the_obvious_way_agrees(seed):
    rng = np.random.default_rng([71, seed])
    labels = REGIONS if seed % 2 else PLAIN
    members, weights = random_members(rng, int(rng.integers(2, 5)), bool(seed % 2), seed % 4 < 2), None
    if seed % 3 == 0: weights = rng.uniform(0, 2, len(members)).tolist()
    w = np.ones(len(members)) if weights is None else np.array(weights)
    full = sum(v*probabilities_to_original_grid(p, way, bool(labels.regions)).astype(float) for (p, way), v in zip(members, w))/w.sum()
    top = np.sort(full, 0)
    close = (np.abs(full - .5) < 1e-5).any(0) if labels.regions else top[-1] - top[-2] < 1e-5
    ours, (kept, way) = ensemble_case(members, labels, weights, keep=True)
    assert not ((ours != labels.to_label_map(full)) & ~close).any() and close.mean() < .01
    assert np.abs(probabilities_to_original_grid(kept, way, bool(labels.regions)) - full).max() < 1e-3
    back = list(reversed(members)), None if weights is None else weights[::-1]
    other = ensemble_case(back[0], labels, back[1])[0]
    assert not ((other != ours) & ~close).any()                                           # the order of members does not matter


def test_float16_ties_are_told_apart():
    step = 2**-12
    close = np.array([[.25, .375, .375], [.25, .375, .375 + step]], np.float16)[..., None, None, None]
    assert np.mean(close, 0).argmax(0).item() == 1 and average_probabilities(close).argmax(0).item() == 2
    edge = np.array([[.5], [.5 + 2**-11]], np.float16)[..., None, None, None]              # a region at one half
    assert not (np.mean(edge, 0) > .5).any() and (average_probabilities(edge) > .5).all()


def test_workers_and_resume(tmp_path):
    folders = written('turned', tmp_path)
    for f in folders:
        for i in range(3): shutil.copy(f/'case.npz', f/f'more_{i}.npz')
    ask = lambda **o: ensemble_probabilities(folders, tmp_path/'out', labels=PLAIN, progress=False, **o)
    files = ask(n_workers=2)
    one = read_label_map(files['case'])[0]
    assert sorted(files) == ['case', 'more_0', 'more_1', 'more_2'] and all(np.array_equal(read_label_map(f)[0], one) for f in files.values())
    stamps = {c: f.stat().st_mtime_ns for c, f in files.items()}
    files['more_1'].unlink()
    ask(n_workers=0, overwrite=False)
    assert {c for c, f in files.items() if f.stat().st_mtime_ns != stamps[c]} == {'more_1'}
    ask(n_workers=0, overwrite=False, save_probabilities=True)                             # now the probabilities are wanted, too
    assert (tmp_path/'out'/'case.npz').exists()
    assert ask(n_workers=0, cases=['case'])['case'].exists()


def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path):
    folders = written('turned', tmp_path)
    for i in range(12): [shutil.copy(f/'case.npz', f/f'more_{i:02d}.npz') for f in folders]
    write_json({'labels': {'0': 'background', '1': 'a', '2': 'b'}}, tmp_path/'dataset.json')
    script = textwrap.dedent(f'''
        import os, segnb.ensembling as e
        real, done = e._ensemble_files, []
        def dies(task):
            if len(done) == 5: os._exit(9)
            done.append(real(task))
        e._ensemble_files = dies
        e.ensemble_probabilities({[str(f) for f in folders]!r}, {str(tmp_path/'out')!r}, n_workers=0, progress=False)''')
    assert subprocess.run([sys.executable, '-c', script]).returncode == 9
    there = sorted((tmp_path/'out').glob('*.nii.gz'))
    stamps = {f: f.stat().st_mtime_ns for f in there}
    assert len(there) == 5
    files = ensemble_probabilities(folders, tmp_path/'out', overwrite=False, **QUIET)
    assert len(files) == 13 and all(f.exists() for f in files.values()) and all(f.stat().st_mtime_ns == t for f, t in stamps.items())


def test_memory_does_not_grow_with_the_members(tmp_path):
    import tracemalloc
    way = dict(identifier='x', shape=[40, 60, 60], spacing=[1, 1, 1], bbox=[[0, 40], [0, 60], [0, 60]], shape_after_crop=[40, 60, 60], transpose_forward=[0, 1, 2],
               transpose_backward=[0, 1, 2], shape_after_resampling=[40, 60, 60], spacing_after_resampling=[1, 1, 1], geometry=None)
    other = {**way, 'shape_after_resampling': [30, 60, 60], 'spacing_after_resampling': [4/3, 1, 1]}
    labels = Labels.from_dict({'labels': {str(k): f'c{k}' if k else 'background' for k in range(16)}})
    rng = np.random.default_rng(0)
    write_probabilities(rng.random((16, 40, 60, 60), np.float32), way, tmp_path/'a.npz')
    write_probabilities(rng.random((16, 30, 60, 60), np.float32), other, tmp_path/'b.npz')
    def peak(*names):
        members = [_Kept(tmp_path/f'{n}.npz') for n in names]
        tracemalloc.start()
        ensemble_case([(m, m.way) for m in members], labels)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most/1e6
    peak('a', 'a'), peak('a', 'b')                                                         # compiles what is compiled on first use
    one_class = 40*60*60*4/1e6
    assert peak(*'aaaaaa') < peak('a', 'a') + 2*one_class
    assert peak(*'ababab') < peak('a', 'b') + 2*one_class
    assert peak('a', 'b') < 12*one_class                                                   # of 16 classes; all at full size: 32


def test_members_are_never_overwritten(tmp_path):
    folders = written('turned', tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    for out in (folders[0], tmp_path/'elsewhere'/'..'/folders[1].name):
        with pytest.raises(EnsembleError, match='among the answers of a member'): ensemble_probabilities(folders, out, labels=PLAIN, save_probabilities=True, **QUIET)
    with pytest.raises(EnsembleError, match='two members'): ensemble_probabilities(folders[0], tmp_path/'out', labels=PLAIN, **QUIET)
    with pytest.raises(ValueError, match='no such file'): ensemble_probabilities(folders, tmp_path/'out', labels=PLAIN, postprocessing=tmp_path/'lost.json', **QUIET)
    assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == before


def test_folders_that_do_not_match(tmp_path):
    a, b = written('turned', tmp_path)
    shutil.copy(a/'case.npz', a/'extra.npz')
    ask = lambda members, **o: ensemble_probabilities(members, tmp_path/'out', **{'labels': PLAIN, **QUIET, **o})
    with pytest.raises(EnsembleError, match='extra.*member 2 lacks 1 case'): ask([a, b])
    with pytest.raises(EnsembleError, match='nowhere'): ask([a, b], cases=['nowhere'])
    with pytest.raises(EnsembleError, match='two members'): ask([a])
    with pytest.raises(EnsembleError, match='no kept probabilities'): ask([a, tmp_path])
    with pytest.raises(EnsembleError, match='do not fit'): ask([a, b], weights=[1, float('nan')], cases=['case'])
    with pytest.raises(EnsembleError, match='labels are not known'): ask([a, b], labels=None, cases=['case'])
    write_json({'labels': {'0': 'background', '1': 'a'}}, tmp_path/'dataset.json')
    with pytest.raises(EnsembleError, match='another number of maps'): ask([a, b], labels=None, cases=['case'])
    p, way = members_of('turned')[1]
    write_probabilities(p, {**way, 'geometry': {**GEOMETRY, 'origin': [0, 0, 7]}}, b/'case.npz')
    with pytest.raises(EnsembleError, match='different images.*origin'): ask([a, b], cases=['case'])
    (b/'case.npz').write_bytes((a/'case.npz').read_bytes()[:-2000])
    with pytest.raises(EnsembleError, match='case.npz.*cannot be read'): ask([a, b], cases=['case'])
    np.savez(b/'case.npz', softmax=p)                                                      # of another program
    with pytest.raises(EnsembleError, match='cannot be read'): ask([a, b], cases=['case'])
    assert not list((tmp_path/'out').glob('*.nii.gz'))


@pytest.mark.parametrize('where', (.2, .5, .8, .97))
@pytest.mark.parametrize('name', ('one_grid', 'turned'))
def test_bytes_that_are_wrong_inside_are_noticed(name, where, tmp_path):
    a, b, *_ = written(name, tmp_path)
    raw = bytearray((b/'case.npz').read_bytes())
    raw[int(len(raw)*where)] ^= 0xff
    (b/'case.npz').write_bytes(bytes(raw))
    with pytest.raises(SegnbError, match='cannot be read|hold NaN'): ensemble_probabilities([a, b], tmp_path/'out', labels=PLAIN, **QUIET)
    assert not list((tmp_path/'out').glob('*.nii.gz'))


def test_post_processing_keeps_the_untouched_maps(tmp_path):
    folders = written('coarse_and_fine', tmp_path)
    Postprocessing((1, 2)).save(tmp_path/'rule.json')
    out = ensemble_probabilities(folders, tmp_path/'out', labels=PLAIN, postprocessing=tmp_path/'rule.json', **QUIET)
    raw = read_label_map(tmp_path/'out'/'not_postprocessed'/'case.nii.gz')[0]
    assert np.array_equal(read_label_map(out['case'])[0], Postprocessing((1, 2)).apply(raw)) and (read_label_map(out['case'])[0] != raw).any()
    assert json.loads((tmp_path/'out'/'postprocessing.json').read_text())['which'] == [1, 2]


def test_the_folds_of_configurations_are_pooled(tmp_path):
    from segnb.image import write_label_map
    for k, name in enumerate(('2d', '3d')):
        model = tmp_path/'Task001_X'/name
        for fold in range(2):
            folder = model/f'fold_{fold}'/'validation'
            write_probabilities(*members_of('turned')[k], folder/f'case_{fold}.npz')
            write_label_map(np.zeros(GEOMETRY['shape'], np.uint8), Geometry.from_dict(GEOMETRY), folder/f'case_{fold}.nii.gz')
            write_json({'cases': {f'case_{fold}': None}}, folder/'summary.json')
        write_json({'labels': {'0': 'background', '1': 'a', '2': 'b'}}, model/'dataset.json')
    models = [tmp_path/'Task001_X'/n for n in ('2d', '3d')]
    out = ensemble_probabilities(models, tmp_path/'Task001_X'/'ensembles'/'2d+3d', **QUIET)
    assert list(out) == ['case_0', 'case_1']
    assert not ((read_label_map(out['case_1'])[0] != ARRAYS['turned/labels']) & ~close_calls('turned')).any()
    assert list(probability_files(models[0], [1])) == ['case_1']
    (models[0]/'fold_1'/'validation'/'case_1.npz').unlink()
    with pytest.raises(EnsembleError, match='case_1.*were not kept.*overwrite=False'): probability_files(models[0])
