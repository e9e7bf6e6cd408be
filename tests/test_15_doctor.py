"""The doctor: every known defect named once, sound data left in peace, repairs that hold and can be undone bit for bit."""
import html.parser
import importlib.util
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segnb.dataset import Dataset, check_dataset
from segnb.doctor import (DEFECTS, KINDS, DoctorError, Finding, Report, axis_codes, classify_grid, diagnose, displacement, examine, index_map, read_stored,
                          repair, resample_nearest, spoil, turn, undo, unscale)
from segnb.image import Geometry, SegnbError, write_image, write_label_map
from segnb.workers import read_json, write_json

HERE = Path(__file__).parent
ROOT = HERE.parent
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.resolve().parents[1]/'shared'/'data'))


def recorder(name):
    spec = importlib.util.spec_from_file_location(name, HERE/'record'/f'{name}.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module


FAULTS = recorder('14_dataset')
PLAIN = (1., 0., 0., 0., 1., 0., 0., 0., 1.)

# fault of the dataset chapter: kind the doctor gives it, word in its file
EXPECTED = {
    'missing channel': ('missing file', 'c1_0001'), 'missing label': ('missing file', 'c1.nii'), 'missing test channel': ('missing file', 'c3_0001'),
    'image of no case': ('extra file', 'c9_0000'), 'label of no case': ('extra file', 'c9.nii'), 'shape of a channel': ('needs resampling', 'c1_0001'),
    'shape of the label': ('needs resampling', 'c1.nii'), 'spacing of the label': ('header only', 'c1.nii'), 'origin of a channel': ('header only', 'c1_0001'),
    'direction of the label': ('header only', 'c1.nii'), 'undeclared label': ('undeclared label', 'c1.nii'), 'label between whole numbers': ('interpolated labels', 'c1.nii'),
    'NaN in a label': ('NaN or infinity', 'c1.nii'), 'NaN in an image': ('NaN or infinity', 'c1_0001'), 'infinity in an image': ('NaN or infinity', 'c1_0001'),
    'image of zeros': ('constant image', 'c1_0000'), 'image cut in half': ('unreadable file', 'c1_0001'), 'image without its last bytes': ('unreadable file', 'c1_0001'),
    'no training cases': ('description', 'dataset.json'), 'case listed twice': ('description', 'dataset.json'), 'no dataset.json': ('description', 'dataset.json'),
    'broken dataset.json': ('description', 'dataset.json'), 'no channels declared': ('description', 'dataset.json'), 'gap in the labels': ('undeclared label', 'c0.nii')}


@pytest.mark.parametrize('fault', FAULTS.SPOIL)
def test_every_fault_of_the_dataset_chapter_is_named(fault, tmp_path):
    folder = FAULTS.make(tmp_path/'Task001_Small')
    FAULTS.SPOIL[fault](folder)
    report = examine(folder, 0)
    if fault == 'nothing': assert report.findings == (); return
    kind, where = EXPECTED[fault]
    assert any(f.kind == kind and where in f.file for f in report.findings), report.table()


@pytest.fixture(scope='module')
def dirty(tmp_path_factory):
    "One case per defect, examined: (folder, report, expected)"
    folder = tmp_path_factory.mktemp('doctor')/'Task901_Dirty'
    expected = spoil(Dataset(ROOT/'data_samples'/'Task101_PhantomCT'), folder)
    return folder, examine(folder, 0), expected


def about(f, expected):
    "The case that a finding is about, those of the data set included"
    return f.case or next(c for c in expected if c in f.what or c == 'forgotten' and 'nobody' in f.what)


def test_every_defect_is_named_once_and_sound_cases_never(dirty):
    _, report, expected = dirty
    wanted = sorted((k, 'patient_7_t1' if c == 'patient_7_t2' else c) for c, k in expected.items() if k)
    assert sorted((f.kind, about(f, expected)) for f in report.findings) == wanted
    assert set(DEFECTS) <= set(expected) and len(wanted) == 24
    assert all(f.severity in ('error', 'warning', 'note') and f.meaning and f.repair and f.what for f in report.findings)


def test_workers_change_nothing(dirty):
    folder, report, _ = dirty
    assert examine(folder, 2) == report == examine(Dataset(folder), 1, progress=False)


def test_a_report_survives_json(dirty, tmp_path):
    _, report, _ = dirty
    report.save(tmp_path/'r.json')
    assert Report.load(tmp_path/'r.json') == report
    assert read_json(tmp_path/'r.json')['counts'] == report.counts == {'error': 15, 'warning': 6, 'note': 3}
    assert all(f'{kind} (' in report.table() for kind in {f.kind for f in report.findings})


class Page(html.parser.HTMLParser):
    "Collect tags; everything a page would load"
    def __init__(self, text):
        super().__init__(); self.open, self.loads, self.sections, self.pictures = [], [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag not in ('meta', 'img', 'br', 'link'): self.open.append(tag)
        if tag == 'section': self.sections += 1
        if tag == 'img': assert a['alt'] and a['src'].startswith('data:image/png;base64,'); self.pictures += 1
        self.loads += [a[k] for k in ('src', 'href') if k in a and not a[k].startswith(('data:', '#'))]

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_the_page_needs_no_other_file(dirty, tmp_path):
    folder, report, _ = dirty
    report.to_html(tmp_path/'r.html', pictures=1)
    text = (tmp_path/'r.html').read_text()
    page = Page(text)
    assert page.open == [] and page.loads == [] and page.sections == len({(f.kind, f.severity) for f in report.findings}) and page.pictures >= 20
    assert 'url(' not in text and '@import' not in text and len(text) < 1_500_000


def test_names_are_escaped(tmp_path):
    f = Finding('description', 'error', '<b>x', None, '<script>1</script>', 'm', 'r')
    Report('<i>', 'f', (f,), {}).to_html(tmp_path/'r.html')
    assert '<script>' not in (tmp_path/'r.html').read_text() and '<i>' not in (tmp_path/'r.html').read_text()


def same(a, b):
    (x, g), (y, h) = (read_stored(f) for f in (a, b))
    return x.dtype == y.dtype and x.tobytes() == y.tobytes() and g == h


def test_repair_holds_and_every_change_can_be_undone(dirty, tmp_path):
    folder, report, _ = dirty
    bytes_before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    log = repair(folder, report, out := tmp_path/'fixed', label_map={7: 2}, n_workers=2)
    assert json.loads((out/'repair.json').read_text())['changed'] == json.loads(json.dumps(log['changed']))
    check_dataset(Dataset(out))
    after = examine(out, 0)
    mended = {'header only', 'needs resampling', 'scaled labels', 'float labels', 'NaN or infinity', 'orientation', 'duplicate case', 'undeclared label'}
    assert after.counts['error'] == 0 and not {f.kind for f in after.findings} & mended
    assert {l['case'] for l in log['changed']} == {'almost_whole', 'display_mask', 'finer_label', 'infinite_image', 'lost_origin', 'lying_otherwise', 'nan_image', 'nan_label', 'unknown_class'}
    assert all((out/'imagesTr'/f'sound_{i}_0000.nii.gz').is_symlink() for i in range(10))
    changed = {l['file'] for l in log['changed']}
    assert not any(same(folder/f, out/f) for f in changed)
    for case in sorted({l['case'] for l in log['changed']}):
        undo(out, case)
        assert all(same(folder/l['file'], out/l['file']) for l in log['changed'] if l['case'] == case), case
    undo(out)
    assert Dataset(out).cases == Dataset(folder).cases and read_json(out/'dataset.json') == read_json(folder/'dataset.json')
    again = [(f.kind, f.case, f.what) for f in examine(out, 0).findings]
    assert again == [(f.kind, f.case, f.what) for f in report.findings if f.kind != 'extra file']
    assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == bytes_before


def test_the_repaired_values_are_right(dirty, tmp_path):
    folder, report, _ = dirty
    repair(folder, report, tmp_path/'fixed', label_map={7: 2}, n_workers=0)
    def label(f, c): return read_stored(f/'labelsTr'/f'{c}.nii.gz')[0][0]
    out = tmp_path/'fixed'
    assert np.array_equal(label(out, 'display_mask') * 85, label(folder, 'display_mask'))
    assert np.array_equal(label(out, 'unknown_class') == 2, label(folder, 'unknown_class') == 7)
    assert np.array_equal(label(out, 'finer_label'), label(folder, 'finer_label')[:, ::2, ::2])
    assert np.array_equal(label(out, 'almost_whole'), np.round(label(folder, 'almost_whole')))
    image = read_stored(out/'imagesTr/infinite_image_0000.nii.gz')[0]
    assert np.isfinite(image).all() and image.max() == np.ma.masked_invalid(read_stored(folder/'imagesTr/infinite_image_0000.nii.gz')[0]).max()
    assert read_stored(out/'labelsTr/lost_origin.nii.gz')[1] == read_stored(folder/'imagesTr/lost_origin_0000.nii.gz')[1]
    assert axis_codes(read_stored(out/'imagesTr/lying_otherwise_0000.nii.gz')[1].direction) == 'LPS'


def small(folder, n=4, ending='.nii.gz', shape=(6, 20, 22)):
    "A sound data set of n cases, and its geometry"
    geometry = Geometry((2, 1, 1.5) if shape[0] > 1 else (999, 1, 1), (0, 0, 0), PLAIN, shape)
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True)
    for i in range(n):
        image = np.random.default_rng(i).integers(0, 60, shape).astype(np.uint8)
        label = np.zeros(shape, np.uint8); label[:, 5:12, 5:14] = 1; label[:, 7:9, 7:10] = 2
        write_image(image + label * 60, geometry, folder/'imagesTr'/f'c{i}_0000{ending}'); write_label_map(label, geometry, folder/'labelsTr'/f'c{i}{ending}')
    write_json(dict(channel_names={'0': 'MR'}, labels={'background': 0, 'a': 1, 'b': 2}, numTraining=n, file_ending=ending), folder/'dataset.json')
    return folder, geometry


@pytest.mark.parametrize('factor, kind', [(.999, 'float labels'), (1.02, 'float labels'), (.9, 'interpolated labels')])
def test_rounding_errors_of_every_size(factor, kind, tmp_path):
    folder, geometry = small(tmp_path/'a')
    whole = read_stored(file := folder/'labelsTr'/'c1.nii.gz')[0][0]
    write_image(whole.astype(np.float32) * np.float32(factor), geometry, file)
    report = examine(folder, 0)
    assert [(f.kind, f.case) for f in report.findings] == [(kind, 'c1')]
    repair(folder, report, out := tmp_path/'b', n_workers=0)
    if kind == 'float labels': assert np.array_equal(read_stored(out/'labelsTr'/'c1.nii.gz')[0][0], whole)
    else: assert not (out/'labelsTr'/'c1.nii.gz').exists()


def test_pictures_of_other_sizes_are_never_pasted_into_a_corner(tmp_path):
    folder, _ = small(tmp_path/'a', ending='.png', shape=(1, 20, 22))
    half = np.zeros((1, 10, 11), np.uint8); half[:, 3:6, 3:6] = 1
    write_label_map(half, Geometry((999, 1, 1), (0, 0, 0), PLAIN, half.shape), folder/'labelsTr'/'c1.png')
    report = examine(folder, 0)
    assert [(f.kind, f.case) for f in report.findings] == [('unusable grid', 'c1')] and 'lies inside' not in report.findings[0].what
    assert list(repair(folder, report, tmp_path/'b', n_workers=0)['left_out']) == ['c1']
    report.to_html(tmp_path/'a.html')


def test_undo_brings_links_to_nothing_back_and_can_be_taken_up_again(tmp_path, monkeypatch):
    folder, geometry = small(tmp_path/'a', 5)
    for f in (folder/'labelsTr'/'c1.nii.gz', folder/'imagesTr'/'c2_0000.nii.gz'): f.unlink(); f.symlink_to(tmp_path/'gone.nii.gz')
    for i in (3, 4): write_image(read_stored(folder/'labelsTr'/f'c{i}.nii.gz')[0][0] * np.float32(1.001), geometry, folder/'labelsTr'/f'c{i}.nii.gz')
    report = examine(folder, 0)
    repair(folder, report, out := tmp_path/'b', n_workers=0)
    import segnb.doctor as module
    with monkeypatch.context() as m:  # stopped in the middle
        m.setattr(module, '_promise', lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError): undo(out)
    undo(out)
    assert [(f.kind, f.case, f.what) for f in examine(out, 0).findings] == [(f.kind, f.case, f.what) for f in report.findings]


def test_what_cannot_be_written_is_said_before_the_long_work(tmp_path, monkeypatch):
    folder, _ = small(tmp_path/'a')
    import segnb.doctor as module
    monkeypatch.setattr(module, 'examine', lambda *a: pytest.fail('examined first'))
    (tmp_path/'file').touch()
    for more in (dict(json_file=tmp_path/'file'/'x.json'), dict(html_file=tmp_path/'file'/'x.html')):
        with pytest.raises(SegnbError, match='cannot be written'): diagnose(folder, **more)
    for out, why in ((folder, 'inside'), (folder/'b', 'inside'), (tmp_path/'file', 'not empty')):
        with pytest.raises(DoctorError, match=why): diagnose(folder, out)


def test_the_table_tells_all_it_has_and_where_the_rest_is(tmp_path):
    folder, _ = small(tmp_path/'a', 9)
    for i in range(7): (folder/'imagesTr'/f'c{i}_0000.nii.gz').write_bytes(b'')
    text = examine(folder, 0).table()
    assert 'and 2 more' in text and 'stands in the JSON and the HTML' in text and max(map(len, text.splitlines())) <= 110
    (folder/'imagesTr'/'c0_0000.nii.gz').write_bytes(b'x' * 900)
    assert 'a header of 348 or 540 bytes' in ' '.join(examine(folder, 0).table().split())  # wrapped, not cut


def test_refusals(dirty, tmp_path):
    folder, report, _ = dirty
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x').touch()
    with pytest.raises(DoctorError, match='not empty'): repair(folder, report, tmp_path/'full')
    with pytest.raises(DoctorError, match='inside the data set'): repair(folder, report, folder/'copy')
    with pytest.raises(DoctorError, match='another data set'): repair(ROOT/'data_samples'/'Task101_PhantomCT', report, tmp_path/'other')
    with pytest.raises(SegnbError, match='no such folder'): examine(tmp_path/'nowhere')
    repair(folder, report, out := tmp_path/'fixed', n_workers=0)
    shutil.copy(out/'labelsTr/lost_origin.nii.gz', out/'labelsTr/display_mask.nii.gz')
    with pytest.raises(DoctorError, match='changed after the repair'): undo(out, 'display_mask')
    with pytest.raises(DoctorError, match='nothing was changed'): undo(out, 'sound_3')


def test_a_repair_that_fails_leaves_nothing(dirty, tmp_path):
    folder, report, _ = dirty
    copy = tmp_path/'Task902_Copy'
    shutil.copytree(folder, copy)
    here = replace(report, folder=str(copy), cases={c: dict(f, images=[p.replace(str(folder), str(copy)) for p in f['images']], label=f['label'].replace(str(folder), str(copy)))
                                                    for c, f in report.cases.items()},
                   findings=tuple(replace(f, file=f.file and f.file.replace(str(folder), str(copy))) for f in report.findings))
    (copy/'imagesTr/nan_image_0000.nii.gz').write_bytes(b'gone meanwhile')
    with pytest.raises(SegnbError): repair(copy, here, tmp_path/'fixed', n_workers=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['Task902_Copy']


def test_diagnose_says_writes_and_returns(dirty, tmp_path):
    folder, report, _ = dirty
    said = []
    status = diagnose(folder, tmp_path/'fixed', tmp_path/'r.json', tmp_path/'r.html', n_workers=0, say=said.append)
    assert status == 1 and said[0] == report.table() and any('left out half_a_file' in s for s in said) and (tmp_path/'r.html').exists()
    assert diagnose(ROOT/'data_samples'/'Task103_PhantomCells', n_workers=0, say=said.append) == 0 and 'Nothing found' in said[-1]


# ---- geometry ----

def random_geometry(rng, shape=(7, 9, 11)):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    return Geometry(rng.uniform(.5, 4, 3), rng.uniform(-200, 200, 3), (q * np.sign(np.diag(r))).ravel(), shape)


def as_sitk(array, g):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(g.spacing[::-1]); image.SetOrigin(g.origin); image.SetDirection(g.direction)
    return image


@pytest.mark.parametrize('seed', range(8))
def test_nearest_resampling_is_that_of_simpleitk(seed):
    rng = np.random.default_rng(seed)
    a, b = random_geometry(rng, (12, 13, 14)), random_geometry(rng, (10, 11, 9))
    b = replace(b, origin=np.subtract(a.to_world((5, 6, 6)), b.to_world((4, 5, 4))) + b.origin)
    labels = rng.integers(0, 200, a.shape).astype(np.uint8)
    there = sitk.GetArrayFromImage(sitk.Resample(as_sitk(labels, a), as_sitk(np.zeros(b.shape, np.uint8), b), sitk.Transform(), sitk.sitkNearestNeighbor))
    assert (resample_nearest(labels, a, b) == there).mean() > .999
    matrix, offset = index_map(a, b)
    assert np.allclose(a.to_world(matrix @ (1, 2, 3) + offset), b.to_world((1, 2, 3)))
    assert displacement(a, a) < 1e-9


CODES = [''.join(c) for p in itertools.permutations(('RL', 'AP', 'IS')) for c in itertools.product(*p)]


@pytest.mark.parametrize('codes', CODES)
def test_turning_to_each_of_the_48_orientations_keeps_every_voxel_in_place(codes):
    rng = np.random.default_rng(1)
    array, g = rng.normal(size=(3, 4, 5)), replace(random_geometry(rng, (3, 4, 5)), direction=(np.eye(3) + .1 * rng.normal(size=(3, 3))).ravel())
    turned, h, how = turn(array, g, codes)
    assert axis_codes(h.direction) == codes and h.shape == turned.shape
    for index in np.ndindex(turned.shape):
        matrix, offset = index_map(g, h)
        assert turned[index] == array[tuple(np.round(matrix @ index + offset).astype(int))]
    back, home, _ = turn(turned, h, axis_codes(g.direction))
    assert np.array_equal(back, array) and displacement(home, g) < 1e-9


@pytest.mark.parametrize('shift, tolerated', [(.005, True), (.05, False)])
@pytest.mark.parametrize('scale', [1e-3, 1, 1e3])
def test_the_tolerance_is_relative_to_the_voxel(scale, shift, tolerated):
    g = Geometry((scale, scale, scale), (scale, 2 * scale, 3 * scale), PLAIN, (8, 8, 8))
    label = np.zeros(g.shape, np.uint8); label[2:5, 2:5, 2:5] = 1
    moved = replace(g, origin=np.add(g.origin, (shift * scale, 0, 0)))
    assert (classify_grid(label, moved, label.astype(np.float32), g)[0] == 'same grid') == tolerated


# ---- formats, channels, references ----

def two_channels(folder, n=6, ending='.nii.gz', spoil=None, seed=0, more=None):
    "A small two-channel data set; `spoil(case, channels, label, geometry, label_geometry)` may change a case"
    rng = np.random.default_rng(seed)
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (folder/part).mkdir(parents=True)
    z, y, x = np.ogrid[:10, :20, :24]
    for i in range(n):
        inside = ((z - 5)**2 / 9 + (y - 10)**2 / 25 + (x - 11)**2 / 36 < 1) * np.ones((10, 20, 24))
        channels = [(100 * (k + 1) * inside + rng.normal(300, 8, inside.shape)).astype(np.float32) for k in range(2)]
        label = (inside + (inside * (x > 11))).astype(np.uint8)
        g = Geometry((3, 1, 1), (i, 2, 3), PLAIN, label.shape)
        parts = [channels, label, [g, g], g]
        if spoil: spoil(i, parts)
        for k, c in enumerate(parts[0]): write_image(c, parts[2][k], folder/('imagesTr' if i < n - 1 else 'imagesTs')/f'p{i}_{k:04d}{ending}')
        if i < n - 1: write_image(parts[1], parts[3], folder/'labelsTr'/f'p{i}{ending}')
    write_json({'channel_names': {'0': 'T1', '1': 'T2'}, 'labels': {'background': 0, 'one': 1, 'two': 2}, 'numTraining': n - 1, 'file_ending': ending, **(more or {})}, folder/'dataset.json')
    return folder


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha'])
def test_repairs_and_undo_in_every_volume_format(ending, tmp_path):
    def harm(i, p):
        if i == 0: p[0][1].ravel()[7:9] = np.nan, -np.inf
        if i == 1: p[1] = (p[1] * np.float32(.9999)).astype(np.float64)
        if i == 2: p[1] = p[1].astype(np.int32) * 127
        if i == 3: p[0], p[1] = [turn(c, p[3], 'SAR')[0] for c in p[0]], turn(p[1], p[3], 'SAR')[0]; p[3] = turn(np.zeros(p[3].shape), p[3], 'SAR')[1]; p[2] = [p[3]] * 2
        if i == 4: p[3] = replace(p[3], origin=(50, 60, 70))
    folder = two_channels(tmp_path/'Task001_A', 7, ending, harm)
    report = examine(folder, 0)
    assert sorted((f.kind, f.case) for f in report.findings) == [('NaN or infinity', 'p0'), ('float labels', 'p1'), ('header only', 'p4'), ('orientation', 'p3'), ('scaled labels', 'p2')]
    log = repair(folder, report, tmp_path/'fixed', n_workers=0)
    assert examine(tmp_path/'fixed', 0).findings == () and len(log['changed']) == 1 + 1 + 1 + 3 + 1
    undo(tmp_path/'fixed')
    assert all(same(folder/l['file'], tmp_path/'fixed'/l['file']) for l in log['changed'])


def test_an_oblique_case_is_turned_and_comes_back_to_the_bit(tmp_path):
    def harm(i, p):
        if i == 2:
            a = np.radians(17); tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
            (p[1], g, _), p[0] = turn(p[1], p[3], 'AIL'), [turn(c, p[3], 'AIL')[0] for c in p[0]]
            p[3] = replace(g, direction=(tilt @ np.reshape(g.direction, (3, 3))).ravel(), origin=(-31.7, 12.123, 703.9)); p[2] = [p[3]] * 2
    folder = two_channels(tmp_path/'Task001_A', 7, spoil=harm)
    report = examine(folder, 0)
    assert [(f.kind, f.case) for f in report.findings] == [('orientation', 'p2')]
    log = repair(folder, report, tmp_path/'fixed', n_workers=0)
    assert examine(tmp_path/'fixed', 0).findings == ()
    a, b = (read_stored(f/'imagesTr/p2_0000.nii.gz')[1] for f in (folder, tmp_path/'fixed'))
    _, expected, _ = turn(np.zeros(a.shape), a, axis_codes(b.direction))
    assert displacement(b, expected) < 1e-5                      # NIfTI stores float32
    undo(tmp_path/'fixed', 'p2')
    assert all(same(folder/l['file'], tmp_path/'fixed'/l['file']) for l in log['changed'])


def test_black_and_white_pictures(tmp_path):
    folder = tmp_path/'Task001_Pictures'
    for part in ('imagesTr', 'labelsTr'): (folder/part).mkdir(parents=True)
    rng, flat = np.random.default_rng(0), Geometry((999, 1, 1), (0, 0, 0), PLAIN, (1, 30, 40))
    for i in range(6):
        mask = np.zeros(flat.shape, np.uint8); mask[0, 5:20, 8:25] = 255 if i != 1 else 1
        if i == 2: mask[0, 5, 8:25] = 130, *[120] * 16
        write_image(np.clip(rng.normal(90, 30, flat.shape), 0, 255).astype(np.uint8), flat, folder/'imagesTr'/f'x{i}_0000.png'); write_image(mask, flat, folder/'labelsTr'/f'x{i}.png')
    write_json({'channel_names': {'0': 'grey'}, 'labels': {'background': 0, 'cell': 1}, 'numTraining': 6, 'file_ending': '.png'}, folder/'dataset.json')
    report = examine(folder, 0)
    assert [(f.kind, f.case) for f in report.findings] == [('scaled labels', c) for c in ('x0', 'x2', 'x3', 'x4', 'x5')]
    log = repair(folder, report, tmp_path/'fixed', n_workers=0)
    assert examine(tmp_path/'fixed', 0).findings == () and read_stored(tmp_path/'fixed/labelsTr/x2.png')[0].sum() == 14 * 17 + 1
    undo(tmp_path/'fixed')
    assert all(same(folder/l['file'], tmp_path/'fixed'/l['file']) for l in log['changed'])


def test_channels(tmp_path):
    def harm(i, p):
        if i == 0: p[2][1] = replace(p[2][1], origin=(90, 2, 3))                       # its header was lost
        if i == 1: p[0][1], p[2][1] = p[0][1][:, ::2, ::2], replace(p[2][1], spacing=(3, 2, 2), shape=(10, 10, 12))
        if i == 2: p[0][1] = p[0][0].copy()                                            # T1 stored as T2
        if i == 3: p[0][1][:] = 0
    folder = two_channels(tmp_path/'Task001_A', 9, spoil=harm)
    report = examine(folder, 0)
    assert sorted((f.kind, f.case) for f in report.findings) == [('constant image', 'p3'), ('duplicate channel', 'p2'), ('header only', 'p0'), ('needs resampling', 'p1')]
    log = repair(folder, report, tmp_path/'fixed', n_workers=0)
    assert set(log['left_out']) == {'p1', 'p3'} and [l['file'] for l in log['changed']] == ['imagesTr/p0_0001.nii.gz']
    assert [f.kind for f in examine(tmp_path/'fixed', 0).findings] == ['duplicate channel']
    assert any(n['kind'] == 'duplicate channel' for n in log['not_repaired'])


def test_a_test_case_that_is_also_trained_on(tmp_path):
    folder = two_channels(tmp_path/'Task001_A', 6, more={'test': ['./imagesTs/p5.nii.gz']})
    for k in range(2): write_image(read_stored(folder/f'imagesTs/p5_{k:04d}.nii.gz')[0], read_stored(folder/'labelsTr/p3.nii.gz')[1], folder/f'imagesTr/p3_{k:04d}.nii.gz')
    report = examine(folder, 0)
    assert [(f.kind, f.case) for f in report.findings] == [('duplicate case', 'p3')] and 'test case' in report.findings[0].what
    repair(folder, report, tmp_path/'fixed', n_workers=0)
    assert Dataset(tmp_path/'fixed').cases == ('p0', 'p1', 'p2', 'p4') and Dataset(tmp_path/'fixed').test_cases == ('p5',)


def test_the_same_case_in_another_format_is_a_duplicate(tmp_path):
    folder = two_channels(tmp_path/'Task001_A')
    for k in range(2): write_image(*read_stored(folder/f'imagesTr/p1_{k:04d}.nii.gz'), folder/f'imagesTr/twin_{k:04d}.nrrd')
    shutil.copy(folder/'labelsTr/p1.nii.gz', folder/'labelsTr/twin.nii.gz')
    files = {c: dict(images=[f'imagesTr/{c}_{k:04d}' + ('.nrrd' if c == 'twin' else '.nii.gz') for k in range(2)], label=f'labelsTr/{c}.nii.gz') for c in ('p0', 'p1', 'p2', 'p3', 'p4', 'twin')}
    write_json({**read_json(folder/'dataset.json'), 'dataset': files}, folder/'dataset.json')
    report = examine(folder, 0)
    assert [(f.kind, f.case, f.numbers['other']) for f in report.findings] == [('duplicate case', 'twin', 'p1')]


def test_references_stay_references(tmp_path):
    folder = two_channels(tmp_path/'elsewhere', spoil=lambda i, p: p[0][0].ravel().__setitem__(slice(0, 3), np.nan) if i == 1 else None)
    task = tmp_path/'Task002_B'; task.mkdir()
    files = {f'p{i}': dict(images=[str(folder/f'imagesTr/p{i}_{k:04d}.nii.gz') for k in range(2)], label=f'../elsewhere/labelsTr/p{i}.nii.gz') for i in range(5)}
    write_json({**read_json(folder/'dataset.json'), 'dataset': files}, task/'dataset.json')
    report = examine(task, 0)
    assert [(f.kind, f.case) for f in report.findings] == [('NaN or infinity', 'p1')]
    repair(task, report, tmp_path/'fixed', n_workers=0)
    data = Dataset(tmp_path/'fixed')
    assert examine(data, 0).findings == () and data.cases == ('p0', 'p1', 'p2', 'p3', 'p4') and data.read('p2').image.shape == (2, 10, 20, 24)
    undo(tmp_path/'fixed')
    assert [f.case for f in examine(tmp_path/'fixed', 0).findings] == ['p1']


def test_a_folder_whose_promise_is_broken(tmp_path):
    folder = two_channels(tmp_path/'Task001_A', spoil=lambda i, p: p[1].ravel().__setitem__(0, 9) if i == 1 else None)
    text = (folder/'dataset.json').read_text()
    (folder/'dataset.json').write_text(text[:30])
    report = examine(folder, 0)
    assert [f.kind for f in report.findings] == ['description'] and len(report.cases) == 6
    (folder/'dataset.json').write_text(text.replace('"channel_names"', '"chanel_names"'))     # labels are still readable
    assert {f.kind for f in examine(folder, 0).findings} == {'description', 'undeclared label'}
    with pytest.raises(SegnbError): repair(folder, report, tmp_path/'fixed')
    assert [f.kind for f in examine(tmp_path, 0).findings] == ['description']                 # a folder without anything


def test_regions_gaps_and_ignore_are_declared(tmp_path):
    def harm(i, p): p[1] = np.where(p[1] == 2, 4, p[1]).astype(np.uint8); p[1][0, 0, 0] = 9 if i == 1 else 5
    folder = two_channels(tmp_path/'Task001_A', spoil=harm, more={'labels': {'background': 0, 'whole': [1, 4], 'core': 4, 'ignore': 5}, 'regions_class_order': [1, 4]})
    assert [(f.kind, f.case, f.numbers['values']) for f in examine(folder, 0).findings if f.kind != 'description'] == [('undeclared label', 'p1', [9])]


def test_two_files_of_one_name_are_a_finding(tmp_path):
    listed = [dict(image=f'./imagesTr/p{i}.nrrd', label=f'./labelsTr/p{i}.nrrd') for i in range(5)]
    folder = two_channels(tmp_path/'Task001_A', ending='.nrrd', more={'training': listed, 'test': []})
    for e in ('.mha', '.nii.gz'): write_image(*read_stored(folder/'labelsTr/p2.nrrd'), folder/f'labelsTr/p2{e}')
    (folder/'labelsTr/p2.nrrd').unlink()
    report = examine(folder, 0)
    assert {(f.kind, f.case) for f in report.findings if f.case} == {('unreadable file', 'p2')}
    repair(folder, report, tmp_path/'fixed', n_workers=0)
    assert Dataset(tmp_path/'fixed').cases == ('p0', 'p1', 'p3', 'p4')


def test_masks_of_display_values():
    assert unscale(np.arange(256), (0, 1))[200.] == 1 and unscale([0, 64, 128, 191, 255], (0, 1, 2, 3, 4)) == {0: 0, 64: 1, 128: 2, 191: 3, 255: 4}
    assert unscale([0, 255], (0, 1, 2)) == {0: 0, 255: 2} and unscale([0, 1, 255], (0, 1, 2)) is None or unscale([0, 1, 255], (0, 1, 2))[1.] == 0
    assert unscale([], (0, 1)) is None and unscale([-1, 255], (0, 1)) is None


# ---- real data ----

@pytest.mark.skipif(not REAL.is_dir(), reason=f'no real data in {REAL}; name their folder by SEGNB_REAL_DATA')
@pytest.mark.parametrize('task', list(json.loads((HERE/'recorded'/'15_doctor.json').read_text())['findings']))
def test_real_data_sets_as_recorded(task):
    if not (REAL/task).is_dir(): pytest.skip(f'{task} is not there')
    known = json.loads((HERE/'recorded'/'15_doctor.json').read_text())['findings'][task]
    assert recorder('15_doctor').said(REAL/task) == known


@pytest.mark.skipif(not (REAL/'odd_geometry').is_dir(), reason=f'no odd_geometry in {REAL}')
def test_odd_files_are_named_one_by_one():
    report = examine(REAL/'odd_geometry', 0)
    kinds = {c: {f.kind for f in report.findings if f.case == c} for c in report.cases}
    assert 'header contradiction' in kinds['ct_shear'] and 'unreadable file' in kinds['asl_4d_oblique'] and 'wrong channels' in kinds['rgb_2d_slice']
    assert report.of('orientation') and not kinds['oblique_lesion_label'] & {'unreadable file', 'header contradiction'}
    assert set().union(*kinds.values()) <= set(KINDS)


def test_nothing_is_repaired_on_weak_evidence(tmp_path):
    def harm(i, p):
        if i == 2: p[0][:] = [np.random.default_rng(5 + k).normal(300, 8, p[1].shape).astype(np.float32) for k in range(2)]; p[3] = replace(p[3], origin=(4, 5, 3))
    folder = two_channels(tmp_path/'Task001_A', 7, spoil=harm)
    report = examine(folder, 0)
    assert [(f.kind, f.case, f.numbers['sure']) for f in report.of('header only')] == [('header only', 'p2', False)] and 'cannot decide' in report.of('header only')[0].what
    assert 'p2' in repair(folder, report, tmp_path/'careful', n_workers=0)['left_out']
    assert repair(folder, report, tmp_path/'bold', n_workers=0, unsure=True)['changed'][0]['case'] == 'p2'
    with pytest.raises(DoctorError, match='undeclared values'): repair(folder, report, tmp_path/'wrong', label_map={7: 12})
