"Components and decisions equal those of nnU-Net 1.7.1 (recorded by tests/record/70_postprocessing.py); laws, faults and real label maps."
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label as scipy_label

from segnb.image import Geometry, ImageError, SegnbError, read_label_map, write_label_map
from segnb.labels import Labels
from segnb.postprocessing import (Postprocessing, PostprocessingError, _entries, _keep, _volume, apply_postprocessing, consolidate_folds, determine_postprocessing,
                                  keep_largest_component, removed_figure, validation_files)
from segnb.viewer import recorded
from segnb.workers import write_json

THEIRS, ARRAYS = recorded('70_postprocessing.json'), recorded('70_postprocessing.npz')
REAL = Path(os.environ.get('SEGNB_REAL_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))
QUIET = dict(n_workers=0, progress=False)


def entry(e): return tuple(e) if np.ndim(e) else e

def grid(shape, spacing=(1, 1, 1)): return Geometry(spacing, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1), shape)


@pytest.mark.parametrize('name', THEIRS['components'])
def test_components_and_their_sizes(name):
    c, image = THEIRS['components'][name], ARRAYS[name.split('/')[0]]
    which = None if c['which'] is None else [entry(e) for e in c['which']]
    sizes = None if c['min_sizes'] is None else {entry(k): v for k, v in c['min_sizes']}
    before = image.copy()
    assert np.array_equal(keep_largest_component(image, which, THEIRS['spacing'], sizes), ARRAYS[name])
    assert np.array_equal(image, before)
    entries = _entries(which if which is not None else [1, 2, 3])
    by_entry = sizes and {_entries(k)[0]: v for k, v in sizes.items()}
    _, kept, removed = _keep(image, entries, _volume(THEIRS['spacing']), by_entry)
    for ours, theirs in ((kept, c['kept']), (removed, c['removed'])):
        assert {k: v for k, v in ours.items()} == {_entries(entry(k))[0]: v for k, v in theirs if v is not None}


@pytest.mark.parametrize('way', ('plain', 'advanced'))
@pytest.mark.parametrize('name', THEIRS['decisions'])
def test_decisions(name, way, tmp_path):
    d, files = THEIRS['decisions'][name], []
    for kind in ('prediction', 'truth'):
        stack = ARRAYS[f'{name}/{kind}']
        files.append({f'case_{i}': tmp_path/f'{kind}_{i}.nii.gz' for i in range(len(stack))})
        for file, m in zip(files[-1].values(), stack): write_label_map(m, grid(m.shape, THEIRS['spacing']), file)
    ours, theirs = determine_postprocessing(*files, d['classes'], minimum_sizes=way == 'advanced', **QUIET), d[way]
    assert list(ours.which) == [entry(e) for e in theirs['for_which_classes']]
    for our, their in (('raw', 'dc_per_class_raw'), ('joint', 'dc_per_class_pp_all'), ('each', 'dc_per_class_pp_per_class'), ('final', 'final')):
        assert our in ours.scores or not theirs[their]
        assert {str(k): v for k, v in ours.scores.get(our, {}).items()} == theirs[their]  # to the last digit
    write_json({k: v for k, v in theirs.items() if k != 'final'}, tmp_path/'theirs.json')
    read = Postprocessing.load(tmp_path/'theirs.json')                               # v1's own file
    assert read.which == ours.which and read.n_cases == ours.n_cases == 4
    assert (read.min_sizes is None) == (ours.min_sizes is None)
    for k in ours.min_sizes or {}: assert ours.min_sizes[k] == pytest.approx({_entries(j)[0]: v for j, v in read.min_sizes.items()}[_entries(k)[0]], rel=1e-12)
    for m in ARRAYS[f'{name}/prediction']:
        assert np.array_equal(ours.apply(m, THEIRS['spacing']), read.apply(m, THEIRS['spacing']))


def naive(labels, entries, volume=1., sizes=None):
    labels = labels.copy()
    for e in entries:
        pieces, n = scipy_label(np.isin(labels, e))
        count = np.bincount(pieces.ravel(), minlength=n + 1)[1:]
        for i, k in enumerate(count, 1):
            if k != count.max() and (sizes is None or k*volume < sizes[e]): labels[pieces == i] = 0
    return labels


@pytest.mark.parametrize('seed', range(25))
def test_the_obvious_way_agrees(seed):
    rng = np.random.default_rng([70, seed])
    shape = rng.integers(1, 16, 3)
    labels = (rng.integers(0, 5, shape)*(rng.random(shape) < rng.uniform(.3, 1))).astype(rng.choice([np.uint8, np.int16, np.uint16, np.int32, np.int64]))
    if seed % 3 == 0: labels *= 100
    k = 100 if seed % 3 == 0 else 1
    asked = [k, (k, 2*k), [k, 2*k, 3*k, 4*k], [(k, 2*k, 3*k), 2*k, (3*k, 4*k), k], [4*k, 4*k], [7*k, k]]
    for which in asked:
        once = keep_largest_component(labels, which)
        assert once.dtype == labels.dtype and np.array_equal(once, naive(labels, _entries(which)))
        if not isinstance(which, list) or len(which) < 3: assert np.array_equal(keep_largest_component(once, which), once)
        assert np.array_equal(once, np.where(once != 0, labels, 0))                     # nothing new appears
        assert np.array_equal(keep_largest_component(labels[::-1, :, ::-1], which)[::-1, :, ::-1], once)
        turned = keep_largest_component(labels.transpose(2, 0, 1), which).transpose(1, 2, 0)
        assert np.array_equal(turned, once)                                             # however the array lies in memory
    spacing, sizes = rng.uniform(.5, 3, 3), {k: 4., (2*k, 3*k): 9.}
    assert np.array_equal(keep_largest_component(labels, list(sizes), spacing, sizes), naive(labels, _entries(list(sizes)), _volume(spacing), {_entries(e)[0]: v for e, v in sizes.items()}))


def test_more_pieces_than_sixteen_bits_can_number():
    board = (np.indices((44, 60, 60)).sum(0) % 2).astype(np.uint8)
    board[20, 20, 20:23] = 1
    kept = keep_largest_component(board, 1)
    assert board.sum() > 1 << 16 and naive(board[15:25, 15:25, 15:28], [(1,)]).sum() == kept.sum() and kept[20, 20, 21]


def test_what_is_no_label_map_or_no_request_is_refused():
    labels = np.zeros((3, 3, 3), np.int16)
    for wrong in (0, -1, [1, 0], [()], (1, -2)):
        with pytest.raises(PostprocessingError, match='above 0'): keep_largest_component(labels, wrong)
    for wrong in (labels*.5, labels[0], labels[None]):
        with pytest.raises(PostprocessingError, match='not a label map'): keep_largest_component(wrong, 1)
    with pytest.raises(PostprocessingError, match='minimum size is missing'): Postprocessing((1, 2), {1: 3.})


def test_the_numbers_of_the_data_set_are_used(tmp_path):
    truth, said = np.zeros((2, 4, 6, 9), np.int16)
    truth[1:3, 1:4, 1:4] = said[1:3, 1:4, 1:4] = 205
    said[0, 5, 8] = 205
    truth[3, 5, 5] = said[3, 5, 5] = 420
    for name, m in (('truth', truth), ('said', said)): write_label_map(m, grid(m.shape), tmp_path/f'{name}.nii.gz')
    labels = Labels.from_dict({'labels': {'background': 0, 'organ': 205, 'lesion': 420}})
    decision = determine_postprocessing({'a': tmp_path/'said.nii.gz'}, {'a': tmp_path/'truth.nii.gz'}, labels, **QUIET)
    assert decision.which == (205,) and decision.names == {205: 'organ', 420: 'lesion'}
    assert np.array_equal(decision.apply(said), truth)
    decision.save(tmp_path/'d.json')
    assert Postprocessing.load(tmp_path/'d.json') == decision and 'organ' in Postprocessing.load(tmp_path/'d.json').explain()


@pytest.fixture
def folder(tmp_path):
    "Three label maps with a stray voxel each"
    (tmp_path/'in').mkdir()
    for i in range(3):
        m = np.zeros((3, 5, 6), np.uint8)
        m[:, 1:4, 1:3] = 1
        m[0, 0, 5] = 1
        write_label_map(m, grid(m.shape, (3, .7, 1.1)), tmp_path/'in'/f'case_{i}.nii.gz')
    return tmp_path


def test_a_folder_with_workers_in_place_and_resumed(folder):
    rule, out = Postprocessing((1,)), folder/'out'
    assert apply_postprocessing(folder/'in', out, rule, n_workers=2, progress=False) == {f'case_{i}': 1 for i in range(3)}
    (out/'case_1.nii.gz').unlink()
    stamp = (out/'case_0.nii.gz').stat().st_mtime_ns
    assert apply_postprocessing(folder/'in', out, out/'postprocessing.json', overwrite=False, **QUIET) == {'case_1': 1}
    assert (out/'case_0.nii.gz').stat().st_mtime_ns == stamp
    assert apply_postprocessing(folder/'in', folder/'in', rule, **QUIET)['case_2'] == 1   # in place
    assert apply_postprocessing(folder/'in', folder/'in', rule, **QUIET)['case_2'] == 0
    a, b = (read_label_map(folder/f/'case_2.nii.gz') for f in ('in', 'out'))
    assert np.array_equal(a[0], b[0]) and a[1] == b[1] and not a[1].differences(grid((3, 5, 6), (3, .7, 1.1)))


def test_results_of_two_decisions_or_of_older_maps_are_not_mixed(folder):
    def ask(rule, source='in', out='out'): return apply_postprocessing(folder/source, folder/out, rule, overwrite=False, **QUIET)
    assert ask(Postprocessing((2,))) == {f'case_{i}': 0 for i in range(3)}
    assert ask(Postprocessing((1,))) == {f'case_{i}': 1 for i in range(3)} and ask(Postprocessing((1,))) == {}
    shutil.copyfile(folder/'in'/'case_0.nii.gz', folder/'in'/'new') and (folder/'in'/'new').replace(folder/'in'/'case_1.nii.gz')  # predicted again
    assert ask(Postprocessing((1,))) == {'case_1': 1}
    (folder/'out'/'case_2.nii.gz').write_bytes((folder/'in'/'case_2.nii.gz').read_bytes())
    (folder/'out'/'postprocessing.json').write_text('{')                                     # damaged: nothing is trusted
    assert len(ask(Postprocessing((1,)))) == 3 and ask(Postprocessing((1,)), 'out')['case_2'] == 0
    assert ask(Postprocessing((1,)), 'in', 'in')['case_2'] == 1                              # in place it is always done


def test_files_of_one_name_in_two_folders(folder):
    for i in range(2): (folder/f'patient_{i}').mkdir(), shutil.copy(folder/'in'/'case_0.nii.gz', folder/f'patient_{i}'/'answer.nii.gz')
    found = {f'{i} é "x"': folder/f'patient_{i}'/'answer.nii.gz' for i in range(2)}
    assert len(apply_postprocessing(found, folder/'out', Postprocessing((1,)), **QUIET)) == 2
    assert sorted(f.name for f in (folder/'out').glob('*.gz')) == [f'{i} é "x".nii.gz' for i in range(2)]


@pytest.mark.parametrize('dtype', ['>i2', '>u4', '<i8', 'u1', '>i8'])
def test_any_byte_order_and_layout(dtype):
    a = np.asfortranarray(np.array([[[5, 5, 0, 5, 0, 9, 9]], [[5, 0, 9, 0, 0, 9, 9]]], dtype))
    a.flags.writeable = False
    for which in ([5, 9], [(5, 9)], 5):
        kept = keep_largest_component(a, which)
        assert kept.dtype == a.dtype and np.array_equal(kept, keep_largest_component(a.astype(np.int32), which)) and (kept != a).any()


@pytest.mark.parametrize('which', ['1', [1.5], [('a',)], [None], [[]], 0, [(1, -2)], [1, True, 0]])
def test_requests_that_name_no_label(which):
    with pytest.raises(PostprocessingError, match='labels above 0'): keep_largest_component(np.ones((1, 2, 2), np.uint8), which)


def test_no_case_decides_nothing():
    with pytest.raises(PostprocessingError, match='no cases'): determine_postprocessing({}, {}, [1], **QUIET)


def test_a_damaged_map_is_named_and_nothing_half_written_stays(folder):
    bad = folder/'in'/'case_1.nii.gz'
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(SegnbError, match='case_1'): apply_postprocessing(folder/'in', folder/'out', Postprocessing((1,)), **QUIET)
    assert sorted(f.name for f in (folder/'out').iterdir()) == ['case_0.nii.gz', 'postprocessing.json']           # whole, and what made it
    with pytest.raises(SegnbError, match='case_1'): determine_postprocessing(folder/'in', folder/'in', [1], **QUIET)


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='needs a user who cannot write everywhere')
def test_a_folder_that_cannot_be_written(folder):
    (folder/'out').mkdir(mode=0o500)
    with pytest.raises(SegnbError, match='cannot be written'): apply_postprocessing(folder/'in', folder/'out', Postprocessing((1,)), **QUIET)


def test_an_output_that_is_a_file(folder):
    (folder/'out').write_text('')
    with pytest.raises(SegnbError, match='out'): apply_postprocessing(folder/'in', folder/'out', Postprocessing((1,)), **QUIET)


def test_links_are_not_needed_to_pool_folds(folder, monkeypatch):
    def refuse(*_): raise OSError('no links here')
    monkeypatch.setattr(Path, 'symlink_to', refuse)
    for i in range(3):
        validation = folder/'model'/f'fold_{i}'/'validation'
        validation.mkdir(parents=True)
        shutil.copy(folder/'in'/f'case_{i}.nii.gz', validation)
        write_json({'cases': {f'case_{i}': None}}, validation/'summary.json')
    write_json({'labels': {'0': 'background', '1': 'organ'}}, folder/'model'/'dataset.json')
    reference = folder/'reference'
    apply_postprocessing(folder/'in', reference, Postprocessing((1,)), **QUIET)
    decision = consolidate_folds(folder/'model', reference, **QUIET)
    assert decision.which == ((1,),) and decision.scores['final'] == {1: 1.}
    pooled = json.loads((folder/'model'/'cross_validation.json').read_text())
    assert pooled['fold_of'] == {f'case_{i}': i for i in range(3)} and pooled['foreground_mean']['dice'] < 1
    assert list(validation_files(folder/'model', [1, 2])) == ['case_1', 'case_2']
    with pytest.raises(PostprocessingError, match='fold 7 missing'): validation_files(folder/'model', [0, 7])


def test_the_picture_shows_what_went():
    before = np.zeros((4, 8, 9), np.uint8)
    before[1:3, 2:5, 2:5] = 1
    before[3, 7, 7:9] = 1
    fig = removed_figure(before, keep_largest_component(before, 1), (2, 1, 1))
    assert [a.get_title() for a in fig.axes] == ['slice 3: removed in red', 'from the front: 2 voxels, 0.004 ml removed']
    removed_figure(before, before)                                                       # nothing removed is a picture, too


@pytest.mark.skipif(not REAL.exists(), reason=f'no real data in {REAL}')
def test_real_label_maps():
    files = [f for task in ('Task004_Hippocampus', 'Task010_SarcomaCT', 'Task020_BraTS') for f in sorted(REAL.glob(f'{task}*/labelsTr/*.nii.gz'))[:8]]
    if not files: pytest.skip('no label maps there')
    for file in files:
        labels, _ = read_label_map(file)
        for which in ([1, 2], (1, 2)): assert np.array_equal(keep_largest_component(labels, which), naive_fast(labels, _entries(which))), file.name


def naive_fast(labels, entries):
    labels = labels.copy()
    for e in entries:
        pieces, n = scipy_label(np.isin(labels, e))
        count = np.bincount(pieces.ravel(), minlength=n + 1)
        count[0] = count.max(initial=0, where=np.arange(n + 1) > 0)
        labels[count[pieces] < count[0]] = 0
    return labels
