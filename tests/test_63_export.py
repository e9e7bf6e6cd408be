"What cells of the export chapter cannot try: threads, memory maps on disk, killed and failing writes, many classes."
import errno, json, os, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import segnb.export as export
from segnb.export import (ExportError, MAPS, export_case, probabilities_to_original_grid, read_probabilities, save_label_map, to_original_grid,
                          write_maps, write_probabilities)
from segnb.image import Geometry, read_geometry, read_label_map
from segnb.labels import Labels

OLD, NEW = (9, 14, 11), (13, 21, 17)
CASE = dict(identifier='a case', shape=(15, 21, 20), bbox=((1, 14), (0, 21), (2, 19)), shape_after_crop=NEW, spacing=(1., 1., 1.), transpose_forward=(0, 1, 2),
            transpose_backward=(0, 1, 2), shape_after_resampling=OLD, spacing_after_resampling=(13/9, 1.5, 17/11))
GRID = Geometry(CASE['spacing'], (0, 0, 0), np.eye(3).ravel(), CASE['shape'])


def several(n): return Labels.from_dict(dict(labels={f'class {i}' if i else 'background': i for i in range(n)}))

def scores(n, seed=0, dtype=np.float32):
    p = np.random.default_rng(seed).random((n, *OLD)).astype(np.float32)
    return (p/p.sum(0)).astype(dtype)

def slabs(array, step=2):
    for z in range(0, array.shape[1], step): yield z, array[:, z:z + step]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

@pytest.mark.parametrize('n', [2, 4, 5, 25])
def test_threads_do_not_change_a_voxel(n, threads):
    p = scores(n)
    threads(1)
    one = to_original_grid(p, CASE, several(n))
    for count in (2, 3, 64):   # more than there are rows, too
        threads(count)
        assert np.array_equal(to_original_grid(p, CASE, several(n)), one)

@pytest.mark.parametrize('mode', ['r', 'r+', 'c'])
def test_a_memory_map_is_read_and_left_alone(tmp_path, mode):
    p = scores(6, dtype=np.float16)
    np.save(tmp_path/'p.npy', p)
    mapped = np.load(tmp_path/'p.npy', mmap_mode=mode)
    if mode == 'c': mapped[0, 0, 0, 0] = p[0, 0, 0, 0] = 1   # written in memory only: must not be given back
    assert np.array_equal(to_original_grid(mapped, CASE, several(6)), to_original_grid(p, CASE, several(6)))
    assert np.array_equal(mapped, p)

def test_precision_and_layout_of_the_input_do_not_matter():
    p = scores(5, dtype=np.float16)
    expected = to_original_grid(p, CASE, several(5))
    for other in (p.astype(np.float32), p.astype(np.float64), np.asfortranarray(p), p.astype('>f2'), np.ascontiguousarray(p[::-1])[::-1]):
        assert np.array_equal(to_original_grid(other, CASE, several(5)), expected)
    before = p.copy()
    to_original_grid(p, CASE, several(5))
    assert np.array_equal(p, before)

def test_a_buffer_may_be_used_again_for_the_next_slab():
    p, room = scores(5), np.empty((5, 2, *OLD[1:]), np.float32)
    def reused():
        for z, slab in slabs(p):
            room[:, :slab.shape[1]] = slab
            yield z, room[:, :slab.shape[1]]
            room[...] = np.nan
    assert np.array_equal(to_original_grid(reused(), CASE, several(5)), to_original_grid(p, CASE, several(5)))
    assert np.array_equal(probabilities_to_original_grid(reused(), CASE), probabilities_to_original_grid(p, CASE))

def test_one_plane_of_one_voxel():
    case = {**CASE, 'shape_after_resampling': (1, 1, 1), 'spacing_after_resampling': (13., 21., 17.)}
    p = np.array([.2, .8], np.float32).reshape(2, 1, 1, 1)
    decided = to_original_grid(p, case, several(2))
    assert decided[1:14, :, 2:19].all() and decided.sum() == np.prod(NEW)

def test_half_a_thousand_classes_and_numbers_of_their_own():
    labels = Labels.from_dict(dict(labels={f'class {i}' if i else 'background': 7*i for i in range(500)}))
    p = scores(500)
    case = {**CASE, 'shape_after_crop': OLD, 'bbox': [(0, n) for n in OLD], 'spacing_after_resampling': CASE['spacing']}
    decided = to_original_grid(p, case, labels)
    assert decided.dtype == np.uint16 and np.array_equal(decided[:9, :14, :11], 7*p.argmax(0))

@pytest.mark.parametrize('bad, words', [
    (lambda p: p[:, :8], 'do not belong to this case'), (lambda p: p[:3], '3 probability maps for 4 labels'), (lambda p: p[0], 'do not belong'),
    (lambda p: slabs(p[:, :8]), 'slabs are missing.*8 planes'), (lambda p: [*slabs(p)][1:], 'must follow each other'),
    (lambda p: [*slabs(p), (9, p[:, :1])], 'must follow each other'), (lambda p: slabs(p[:, :, :5]), 'do not belong'), (lambda p: slabs(p[:2]), '2 probability maps'),
    (lambda p: np.where(p == p.max(), np.nan, p), 'NaN or infinity.*in plane'), (lambda p: np.where(p == p.max(), np.inf, p).astype(np.float16), 'NaN or infinity')])
def test_what_does_not_belong_is_refused_by_name(bad, words):
    with pytest.raises(ExportError, match='a case.*' + words): to_original_grid(bad(scores(4)), CASE, several(4))

def test_a_failing_network_is_not_taken_for_a_finished_one(tmp_path):
    def broken():
        yield 0, scores(4)[:, :2]
        raise RuntimeError('out of memory')
    for write in (lambda: write_probabilities(broken(), CASE, tmp_path/'x.npz'), lambda: write_maps(broken(), CASE, several(4), GRID, tmp_path/'x'),
                  lambda: export_case(broken(), CASE, several(4), GRID, tmp_path/'x.nii.gz', probabilities_file=tmp_path/'x.npz', maps=MAPS, maps_prefix=tmp_path/'x')):
        with pytest.raises(RuntimeError, match='out of memory'): write()
    assert not [*tmp_path.iterdir()]

def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(file, header):
        file.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(np.lib.format, 'write_array_header_1_0', full)
    with pytest.raises(OSError, match='No space left'): export_case(scores(4), CASE, several(4), GRID, tmp_path/'x.nii.gz', probabilities_file=tmp_path/'x.npz')
    assert not [*tmp_path.iterdir()]

def test_the_label_map_is_written_last(tmp_path, monkeypatch):
    order = []
    for name in ('write_probabilities', 'save_label_map'):
        monkeypatch.setattr(export, name, lambda *a, f=getattr(export, name), n=name: (order.append(n), f(*a)))
    monkeypatch.setattr(export._Maps, 'write', lambda *a: order.append('maps'))
    export_case(scores(4), CASE, several(4), GRID, tmp_path/'x.nii.gz', probabilities_file=tmp_path/'x.npz', maps=MAPS, maps_prefix=tmp_path/'x')
    assert order == ['write_probabilities', 'maps', 'save_label_map']

def test_postprocessing_is_handed_in_and_a_map_needs_a_place(tmp_path):
    seen = []
    def drop(labels, spacing):
        seen.append(spacing)
        return np.where(labels == 3, 0, labels)
    got = export_case(slabs(scores(4)), CASE, several(4), GRID, tmp_path/'new'/'x.nii.gz', postprocess=drop)
    assert seen == [CASE['spacing']] and set(np.unique(got)) == {0, 1, 2} and np.array_equal(read_label_map(tmp_path/'new'/'x.nii.gz')[0], got)
    with pytest.raises(ExportError, match='where shall the maps go'): export_case(scores(4), CASE, several(4), GRID, tmp_path/'y.nii.gz', maps=('margin',))

@pytest.mark.parametrize('order', [1, 3])
def test_one_pass_gives_what_three_give(tmp_path, order):
    p = scores(4)
    got = export_case(slabs(p), CASE, several(4), GRID, tmp_path/'x.nii.gz', probabilities_file=tmp_path/'x.npz', maps=MAPS, maps_prefix=tmp_path/'maps'/'x', order=order)
    assert np.array_equal(got, to_original_grid(p, CASE, several(4), order))
    assert np.array_equal(read_probabilities(tmp_path/'x.npz')[0], p.astype(np.float16))
    assert len([*(tmp_path/'maps').iterdir()]) == 6 and read_geometry(tmp_path/'maps'/'x_entropy.nii.gz') == GRID

def test_maps_of_regions(tmp_path):
    nested = Labels.from_dict(dict(labels={'background': 0, 'whole organ': [1, 2], 'core/inner': 2}, regions_class_order=[1, 2]))
    files = write_maps(scores(2), CASE, nested, GRID, tmp_path/'x')
    assert set(files) == {'entropy', 'margin', 'probability_1_whole_organ', 'probability_2_core_inner'} and all(f.exists() for f in files.values())

def test_a_read_only_folder_is_told(tmp_path):
    if os.geteuid() == 0: pytest.skip('root may write everywhere')
    tmp_path.chmod(0o500)
    with pytest.raises(OSError): write_probabilities(scores(4), CASE, tmp_path/'x.npz')

@pytest.mark.parametrize('damage', ['cut', 'garbage', 'flipped', 'empty', 'lost'])
def test_a_damaged_file_of_probabilities_is_told(tmp_path, damage):
    file = tmp_path/'x.npz'
    write_probabilities(scores(4), CASE, file)
    whole = file.read_bytes()
    middle = len(whole)//2
    if damage == 'lost': file.unlink()
    else: file.write_bytes(dict(cut=whole[:middle], garbage=b'no archive', flipped=whole[:middle] + bytes(255 - b for b in whole[middle:middle + 99]) + whole[middle + 99:], empty=b'')[damage])
    with pytest.raises(ExportError, match='cannot be read'): read_probabilities(file)

def test_files_of_the_old_way_are_read(tmp_path):
    np.savez_compressed(tmp_path/'old.npz', probabilities=scores(4, dtype=np.float16), properties=np.array(json.dumps(CASE)))
    kept, way_back = read_probabilities(tmp_path/'old.npz')
    assert np.array_equal(to_original_grid(kept, way_back, several(4)), to_original_grid(scores(4, dtype=np.float16), CASE, several(4)))

def test_memory_does_not_grow_with_the_volume():
    import tracemalloc
    to_original_grid(scores(4), CASE, several(4))
    def added(planes):
        case = {**CASE, 'shape_after_resampling': (planes, 14, 11), 'shape': (planes, 21, 20), 'bbox': ((0, planes), (0, 21), (2, 19)), 'shape_after_crop': (planes, 21, 17)}
        def endless():
            for z in range(planes): yield z, np.full((60, 1, 14, 11), 1/60, np.float32)
        tracemalloc.start()
        decided = to_original_grid(endless(), case, several(60))
        peak = tracemalloc.get_traced_memory()[1] - decided.nbytes
        tracemalloc.stop()
        return peak
    assert added(400) < 1.2*added(40) + 50_000

def test_numba_is_loaded_only_when_it_is_needed():
    code = "import sys, segnb.export; assert not {'numba', 'torch', 'matplotlib'} & set(sys.modules), 'loaded too early'"
    import subprocess
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).resolve().parents[1])

def test_nan_is_refused_on_every_path(tmp_path):
    p = scores(4)
    p[2, 4, 5, 6] = np.nan
    for write in (lambda: to_original_grid(p, CASE, several(4), 3), lambda: write_probabilities(p, CASE, tmp_path/'x.npz'), lambda: probabilities_to_original_grid(p, CASE, order=3),
                  lambda: write_maps(p, CASE, several(4), GRID, tmp_path/'x', 'probability'), lambda: export_case(p, CASE, several(4), GRID, tmp_path/'x.nii.gz', order=3)):
        with pytest.raises(ExportError, match='NaN or infinity.*in plane 4'): write()
    assert not [*tmp_path.iterdir()]

def test_one_map_may_be_named_alone(tmp_path):
    assert [*write_maps(scores(4), CASE, several(4), GRID, tmp_path/'x', 'entropy')] == ['entropy']

def test_another_image_is_refused_before_anything_is_written(tmp_path):
    other = Geometry(GRID.spacing, GRID.origin, GRID.direction, (15, 21, 19))
    with pytest.raises(ExportError, match='differ in shape'): export_case(scores(4), CASE, several(4), other, tmp_path/'x.nii.gz', probabilities_file=tmp_path/'x.npz')
    assert not [*tmp_path.iterdir()]
