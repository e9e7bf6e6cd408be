"""Every format, and odd files of every kind: read right, or refused with the file, the reason and what to do."""
import gzip
import itertools
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segnb import image as module
from segnb.image import (IMAGE_ENDINGS, Geometry, ImageError, header_findings, image_ending, read_geometry, read_image, read_label_map,
                         split_4d, write_image, write_label_map)

REAL = Path(os.environ.get('SEGNB_REAL_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))
real = pytest.mark.skipif(not (REAL/'odd_geometry').is_dir(), reason=f'no real data in {REAL} (set SEGNB_REAL_DATA)')
UPRIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)
VOXELS = np.arange(120, dtype='<i2').reshape(6, 5, 4)
SROW = np.array([[2., 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]])
CODES = {'u1': 2, 'i2': 4, 'i4': 8, 'f4': 16, 'f8': 64, 'i1': 256, 'u2': 512, 'u4': 768, 'i8': 1024, 'u8': 1280, 'c8': 32, 'c16': 1792}


def nifti1(dim=(3, 4, 5, 6, 1, 1, 1, 1), kind=4, pixdim=(1, 2, 3, 4, 0, 0, 0, 0), slope=0, inter=0, units=2, q=0, s=0, quat=(0, 0, 0), offset=(0, 0, 0),
           srow=SROW, intent=0, end='<', start=352, magic=b'n+1\0'):
    "A NIfTI-1 header, field by field"
    b = bytearray(352)
    for at, layout, *values in ((0, 'i', 348), (40, '8h', *dim), (68, 'h', intent), (70, '2h', kind, 16), (76, '8f', *pixdim), (108, '3f', start, slope, inter),
                                (252, '2h', q, s), (256, '3f', *quat), (268, '3f', *offset), (280, '12f', *np.ravel(srow))):
        struct.pack_into(end + layout, b, at, *values)
    b[123], b[344:348] = units, magic
    return bytes(b)


def nifti2(dim=(3, 4, 5, 6, 1, 1, 1, 1), kind=4, pixdim=(1, 2, 3, 4, 0, 0, 0, 0), slope=0, inter=0, q=0, s=0, quat=(0, 0, 0), offset=(0, 0, 0), srow=SROW, end='<'):
    "A NIfTI-2 header, field by field"
    b = bytearray(544)
    for at, layout, *values in ((0, 'i', 540), (12, '2h', kind, 16), (16, '8q', *dim), (104, '8d', *pixdim), (168, 'q', 544), (176, '2d', slope, inter),
                                (344, '2i', q, s), (352, '3d', *quat), (376, '3d', *offset), (400, '12d', *np.ravel(srow)), (500, '2i', 2, 0)):
        struct.pack_into(end + layout, b, at, *values)
    b[4:12] = b'n+2\0\r\n\x1a\n'
    return bytes(b)


def put(file, *parts):
    file.write_bytes(b''.join(p if isinstance(p, bytes) else p.tobytes() for p in parts))
    return file


def refused(*patterns, call=read_image, file=None, **choices):
    "The call raises ImageError; the message names the file and says all of this"
    with pytest.raises(ImageError) as e: call(file, **choices)
    text = str(e.value)
    for p in (Path(file).name, *patterns): assert p in text, f'{p!r} not in: {text}'


def same_as_simpleitk(file, array, geometry):
    itk = sitk.ReadImage(str(file))
    assert (geometry.spacing, geometry.origin, geometry.direction) == (itk.GetSpacing()[::-1], itk.GetOrigin(), itk.GetDirection())
    assert np.array_equal(array[0], sitk.GetArrayFromImage(itk).astype(np.float32))


def test_endings():
    assert [image_ending(f) for f in ('a.nii.gz', 'x/b.NII.GZ', 'c.nrrd', 'd.gz', 'e', '.png', 'f.b.tif')] == ['.nii.gz', '.NII.GZ', '.nrrd', '', '', '', '.tif']
    assert {'.nii.gz', '.nii', '.nrrd', '.mha', '.mhd', '.png', '.tif', '.bmp'} <= set(IMAGE_ENDINGS)


# ---- NIfTI: the same as SimpleITK, over random headers ----

def random_header(rng):
    "A header as scanners and tools write them: any orientation, codes, units; qform and sform agree to a rounding"
    quat = rng.normal(size=4) if rng.random() < .8 else np.eye(4)[rng.integers(4)]
    a, b, c, d = quat / np.linalg.norm(quat) * (-1 if quat[0] < 0 else 1)
    turn = np.array([[a*a+b*b-c*c-d*d, 2*(b*c-a*d), 2*(b*d+a*c)], [2*(b*c+a*d), a*a+c*c-b*b-d*d, 2*(c*d-a*b)], [2*(b*d-a*c), 2*(c*d+a*b), a*a+d*d-c*c-b*b]])
    qfac = rng.choice([1, -1, 0, -.5])
    size = rng.uniform(.3, 6, 3) if rng.random() < .7 else np.ones(3)
    offset = rng.uniform(-300, 300, 3)
    srow = np.column_stack([turn * [1, 1, -1 if qfac < 0 else 1] * size, offset]) + rng.choice([0, 0, 1e-7, 1e-5, 3e-5]) * rng.normal(size=(3, 4))
    slope, inter = ((1, 0), (0, 0), (np.nan, np.nan), (2.5, -1024.1), (-.3, 7), (1, 5), (2, np.nan))[rng.integers(7)]
    return dict(pixdim=(qfac, *size, 0, 0, 0, 0), q=int(rng.integers(0, 3)), s=int(rng.integers(0, 4)), quat=(b, c, d), offset=offset, srow=srow,
                units=int(rng.choice([0, 1, 2, 2, 3, 10])), slope=slope, inter=inter, end=str(rng.choice(['<', '>'])))


def test_nifti_is_read_as_simpleitk_reads_it_to_the_last_bit(tmp_path):
    rng, read = np.random.default_rng(0), 0
    for _ in range(600):
        header = random_header(rng)
        kind = str(rng.choice(['u1', 'i1', 'i2', 'u2', 'i4', 'u4', 'f4', 'f8', 'i8', 'u8']))
        low, high = (-100, 100) if kind[0] in 'if' else (0, 200)
        voxels = rng.integers(low, high, 120).astype(header['end'] + kind) * (3 if kind in ('i2', 'u2', 'i4', 'u4', 'f8') else 1)
        file = put(tmp_path/'a.nii', nifti1(kind=CODES[kind], **header), voxels.astype(header['end'] + kind))
        try: itk = sitk.ReadImage(str(file))
        except RuntimeError: continue   # SimpleITK allows less shear
        same_as_simpleitk(file, *read_image(file))
        assert read_geometry(file) == read_image(file)[1] and itk.GetSize() == (4, 5, 6)
        read += 1
    assert read > 500


@real
@pytest.mark.parametrize('task', sorted(f.name for f in REAL.glob('Task*')) if REAL.is_dir() else [])
def test_real_files_are_read_as_simpleitk_reads_them(task):
    for file in sorted((REAL/task/'imagesTr').glob('*.nii.gz'))[:6] + sorted((REAL/task/'labelsTr').glob('*.nii.gz'))[:6]:
        same_as_simpleitk(file, *read_image(file))
        assert not header_findings(file), file


def test_without_isal_the_same(tmp_path, monkeypatch):
    write_image(VOXELS, Geometry((4, 3, 2), (1, 2, 3), UPRIGHT, VOXELS.shape), tmp_path/'a.nii.gz')
    array, geometry = read_image(tmp_path/'a.nii.gz')
    monkeypatch.setattr(module, 'fast_zlib', zlib)
    assert np.array_equal(read_image(tmp_path/'a.nii.gz')[0], array) and read_geometry(tmp_path/'a.nii.gz') == geometry
    put(tmp_path/'b.nii.gz', (tmp_path/'a.nii.gz').read_bytes()[:-9])
    refused('cut short', file=tmp_path/'b.nii.gz')


# ---- NIfTI: odd storage ----

def test_nifti_2(tmp_path):
    for end in '<>':
        file = put(tmp_path/'a.nii', nifti2(s=1, end=end), VOXELS.astype(end + 'i2'))
        array, geometry = read_image(file)
        assert np.array_equal(array[0], VOXELS) and geometry == Geometry((4, 3, 2), (-10, -20, 30), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (6, 5, 4)) == read_geometry(file)
    exact = SROW * (1 + 1e-12)
    assert read_geometry(put(tmp_path/'b.nii', nifti2(s=1, srow=exact), VOXELS)).origin == (-exact[0, 3], -exact[1, 3], exact[2, 3])   # float64 stays
    assert read_geometry(put(tmp_path/'q.nii', nifti2(q=1, quat=(0, 0, 1), offset=(1, 2, 3)), VOXELS)).direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    packed = put(tmp_path/'c.nii.gz', gzip.compress(nifti2(s=1, slope=2, inter=1) + VOXELS.tobytes()))
    assert np.array_equal(read_image(packed)[0][0], VOXELS*2 + 1)
    refused('cut short', '783 bytes', '784 bytes', file=put(tmp_path/'d.nii', nifti2(s=1), VOXELS.tobytes()[:-1]))
    write_label_map(VOXELS, read_geometry(file), tmp_path/'e.nii.gz')
    assert read_geometry(tmp_path/'e.nii.gz') == read_geometry(file)


def test_several_gzip_members_zero_padding_and_a_false_name(tmp_path):
    plain = nifti1(s=1) + VOXELS.tobytes()
    whole = read_image(put(tmp_path/'plain.nii', plain))
    for name, data in (('two', gzip.compress(plain[:100]) + gzip.compress(plain[100:])), ('many', b''.join(gzip.compress(plain[i:i+7]) for i in range(0, len(plain), 7))),
                       ('empty', gzip.compress(b'') + gzip.compress(plain) + gzip.compress(b'')), ('padded', gzip.compress(plain) + bytes(1000)), ('plain', plain)):
        array, geometry = read_image(put(tmp_path/f'{name}_.nii.gz', data))
        assert np.array_equal(array, whole[0]) and geometry == whole[1] == read_geometry(tmp_path/f'{name}_.nii.gz')
    assert np.array_equal(read_image(put(tmp_path/'packed.nii', gzip.compress(plain)))[0], whole[0])
    refused('damaged', file=put(tmp_path/'junk.nii.gz', gzip.compress(plain) + b'junk'))
    for data in (gzip.compress(plain)[:-1], gzip.compress(plain)[:-8], gzip.compress(plain[:200]) + gzip.compress(plain[200:])[:-4]):
        refused('cut short', file=put(tmp_path/'cut.nii.gz', data))


def test_voxels_far_behind_the_header(tmp_path):
    file = put(tmp_path/'a.nii.gz', gzip.compress(nifti1(s=1, start=300_000) + bytes(300_000 - 352) + VOXELS.tobytes()))
    assert np.array_equal(read_image(file)[0][0], VOXELS)
    refused('cut short', file=put(tmp_path/'b.nii', nifti1(s=1, start=300_000), VOXELS))


def test_voxel_kinds(tmp_path):
    for kind, code in CODES.items():
        file = put(tmp_path/f'{kind}.nii', nifti1(kind=code, s=1), VOXELS.astype(kind))
        if kind[0] == 'c': refused('complex', 'magnitude', file=file)
        else:
            assert np.array_equal(read_image(file)[0][0], VOXELS) and read_image(file)[0].dtype == np.float32
            assert np.array_equal(read_label_map(file)[0], VOXELS) and read_label_map(file)[0].dtype == np.int16
    for code in (0, 1, 1536, 2048, 999): refused(f'datatype {code}', file=put(tmp_path/'odd.nii', nifti1(kind=code, s=1), VOXELS))
    big = np.full((6, 5, 4), 2**40)
    refused('whole numbers from -32768 to 32767', call=read_label_map, file=put(tmp_path/'big.nii', nifti1(kind=1024, s=1), big))
    assert read_image(tmp_path/'big.nii')[0][0, 0, 0, 0] == 2.**40


def test_slope_and_intercept(tmp_path):
    def values(**k):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            array = read_image(put(tmp_path/'a.nii', nifti1(s=1, **k), VOXELS))[0][0]
        idle = np.isfinite(k['inter']) and k['inter'] and (not np.isfinite(k['slope']) or not k['slope'])
        assert any('without a slope' in str(w.message) for w in told) == bool(idle)
        return array
    assert np.array_equal(values(slope=.5, inter=-1024), VOXELS*.5 - 1024)
    for k in (dict(slope=0, inter=0), dict(slope=1, inter=0), dict(slope=np.nan, inter=np.nan), dict(slope=np.inf, inter=3), dict(slope=0, inter=5), dict(slope=np.nan, inter=5)):
        assert np.array_equal(values(**k), VOXELS)
    assert any('intercept' in f for f in header_findings(put(tmp_path/'a.nii', nifti1(s=1, slope=0, inter=5), VOXELS)))
    put(tmp_path/'half.nii', nifti1(s=1, slope=.5, inter=0), VOXELS)
    refused('whole numbers', '0.5', call=read_label_map, file=tmp_path/'half.nii')
    put(tmp_path/'twice.nii', nifti1(s=1, slope=2, inter=1), VOXELS)
    assert np.array_equal(read_label_map(tmp_path/'twice.nii')[0], VOXELS*2 + 1)
    floats = np.array([np.nan, np.inf, 1.5]*40, '<f4')
    assert np.array_equal(read_image(put(tmp_path/'f.nii', nifti1(s=1, kind=16, slope=2, inter=1), floats))[0].ravel(), floats*2 + 1, equal_nan=True)


def test_axes(tmp_path):
    flat = read_image(put(tmp_path/'two.nii', nifti1(dim=(2, 4, 30, 1, 1, 1, 1, 1), s=1), VOXELS))
    assert flat[0].shape == (1, 1, 30, 4) and flat[1].spacing == (999, 3, 2) and flat[1].origin == (-10, -20, 0)
    for dim in ((4, 4, 5, 6, 1, 1, 1, 1), (5, 4, 5, 6, 1, 1, 1, 1), (7, 4, 5, 6, 1, 1, 1, 1)):
        assert read_image(put(tmp_path/'one.nii', nifti1(dim=dim, s=1), VOXELS))[0].shape == (1, 6, 5, 4)
    for dim, shape in (((4, 4, 5, 3, 2, 1, 1, 1), (2, 3, 5, 4)), ((5, 4, 5, 3, 1, 2, 1, 1), (2, 3, 5, 4)), ((5, 4, 5, 1, 2, 3, 1, 1), (6, 1, 5, 4))):
        file = put(tmp_path/'many.nii', nifti1(dim=dim, s=1), VOXELS)
        refused('wrong number of axes', 'split_4d', 'split=True', file=file)
        refused('wrong number of axes', file=file, call=read_label_map)
        refused('wrong number of axes', file=file, call=read_geometry)
        assert np.array_equal(read_image(file, split=True)[0], VOXELS.reshape(shape)) and read_geometry(file, split=True).shape == shape[1:]
    refused('axes', file=put(tmp_path/'line.nii', nifti1(dim=(1, 120, 1, 1, 1, 1, 1, 1), s=1), VOXELS))
    for dim in ((0, 4, 5, 6, 1, 1, 1, 1), (9, 4, 5, 6, 1, 1, 1, 1), (3, -4, 5, 6, 1, 1, 1, 1)): refused('damaged', file=put(tmp_path/'bad.nii', nifti1(dim=dim), VOXELS))
    refused('cut short', file=put(tmp_path/'huge2.nii', nifti2(dim=(3, 2**40, 2**40, 4, 1, 1, 1, 1)), VOXELS))
    for start in (np.nan, np.inf, 1e30): refused('damaged', file=put(tmp_path/'start.nii', nifti1(start=start), VOXELS))
    refused('cut short', file=put(tmp_path/'huge.nii', nifti1(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), VOXELS))


def test_colours_in_nifti(tmp_path):
    file = put(tmp_path/'rgb.nii', nifti1(dim=(3, 4, 5, 2, 1, 1, 1, 1), kind=128, s=1), VOXELS.astype('u1'))
    assert np.array_equal(read_image(file)[0], np.moveaxis(VOXELS.reshape(2, 5, 4, 3), 3, 0))
    refused('one number per voxel', call=read_label_map, file=file)
    file = put(tmp_path/'rgba.nii', nifti1(dim=(3, 2, 5, 3, 1, 1, 1, 1), kind=2304, s=1), VOXELS.astype('u1'))
    refused('transparency', "alpha='drop'", file=file)
    with pytest.warns(UserWarning, match='transparency left out'): dropped = read_image(file, alpha='drop')[0]
    assert np.array_equal(dropped, np.moveaxis(VOXELS.reshape(3, 5, 2, 4), 3, 0)[:3])
    sitk.WriteImage(sitk.GetImageFromArray(np.arange(36, dtype=np.float32).reshape(2, 3, 2, 3), isVector=True), str(tmp_path/'vector.nii.gz'))
    assert np.array_equal(read_image(tmp_path/'vector.nii.gz')[0], np.moveaxis(np.arange(36).reshape(2, 3, 2, 3), 3, 0))


# ---- NIfTI: headers that contradict themselves ----

SHEAR = SROW + np.array([[0, .9, 0, 0], [0]*4, [0]*4])
HALF_TURN = dict(q=1, quat=(0, 0, 1), offset=(10, 20, 30))       # the opposite direction of SROW's x and y
AGREE = dict(q=1, quat=(0, 0, 0), offset=(10, 20, 30))


@pytest.mark.parametrize('header, named, ways', [
    (dict(s=1, srow=SHEAR), 'sheared', ()),
    (dict(s=1, srow=SHEAR, **AGREE), 'sheared', ('qform',)),
    (dict(s=1, **HALF_TURN), 'qform and sform', ('qform', 'sform')),
    (dict(s=2, **{**AGREE, 'offset': (10, 20, 31)}), 'qform and sform place the grid differently, up to 0.25 voxels', ('qform', 'sform')),
    (dict(s=1, srow=SROW*1.1), 'different sizes of a voxel, up to 0.5 voxels', ('sform',)),
    (dict(s=1, pixdim=(1, 0, 3, 4, 0, 0, 0, 0)), 'no size of a voxel along x', ('sform',)),
    (dict(s=1, pixdim=(1, 2, -3, 4, 0, 0, 0, 0)), 'no size of a voxel along y, but -3', ('sform',)),
    (dict(q=1, pixdim=(1, 2, np.nan, 4, 0, 0, 0, 0)), 'no size of a voxel along y, but nan', ()),
    (dict(pixdim=(1, 2, 3, np.inf, 0, 0, 0, 0)), 'no size of a voxel along z', ()),
    (dict(s=1, srow=np.zeros((3, 4))), 'do not span space', ()),
    (dict(s=1, srow=SROW*np.nan, **AGREE), 'do not span space', ('qform',)),
    (dict(s=1, srow=np.zeros((3, 4)), **AGREE), 'do not span space', ('qform',)),
    (dict(q=1, quat=(1, 1, 1)), 'quaternion has the length 1.732', ()),
    (dict(q=1, quat=(np.nan, 0, 0)), 'quaternion has the length nan', ()),
    (dict(q=1, offset=(0, np.inf, 0)), 'qform: offset (0, inf, 0)', ()),
    (dict(s=1, q=1, offset=(0, np.nan, 0)), 'qform: offset (0, nan, 0)', ('sform',)),
])
@pytest.mark.parametrize('make', [nifti1, nifti2])
def test_contradictions_are_named_and_chosen(make, header, named, ways, tmp_path):
    file = put(tmp_path/'odd.nii', make(**header), VOXELS)
    assert any(named in f for f in header_findings(file)), header_findings(file)
    for call in (read_image, read_geometry, read_label_map):
        refused('contradicts itself', named, *([f"header='{w}'" for w in ways] or ['correct the header']), file=file, call=call)
        for choice in ('qform', 'sform'):
            if choice not in ways: refused(f'no {choice} to go by', file=file, call=call, header=choice)
    for choice in ways:
        array, geometry = read_image(file, header=choice)
        assert np.array_equal(array[0], VOXELS) and geometry == read_geometry(file, header=choice)
        signs = (1, 1, 1) if choice == 'qform' and 'quat' in header and header['quat'] == (0, 0, 1) else (-1, -1, 1)
        lengths = np.sqrt((np.reshape(header.get('srow', SROW), (3, 4))[:, :3]**2).sum(0))[::-1] if choice == 'sform' else (4, 3, 2)
        assert np.allclose(geometry.spacing, lengths, rtol=1e-6) and np.allclose(geometry.direction, np.diag(signs).ravel(), atol=1e-6)


def test_small_disagreement_passes_and_is_named(tmp_path):
    file = put(tmp_path/'a.nii', nifti1(s=1, srow=SROW + .01*np.eye(3, 4, 3), **AGREE), VOXELS)
    assert len(header_findings(file)) == 1 and 'qform and sform place the grid differently, up to 0.005 voxels' in header_findings(file)[0]
    same_as_simpleitk(file, *read_image(file))
    file = put(tmp_path/'b.nii', nifti1(s=1, srow=SROW + np.array([[0, .004, 0, 0], [0]*4, [0]*4])), VOXELS)   # SimpleITK refuses this much shear
    assert 'sheared' in header_findings(file)[0] and not np.abs(np.reshape(read_geometry(file).direction, (3, 3)) @ np.reshape(read_geometry(file).direction, (3, 3)).T - np.eye(3)).max() > 1e-9


def test_headers_that_say_little(tmp_path):
    file = put(tmp_path/'none.nii', nifti1(), VOXELS)
    assert 'nothing says how the patient lies' in header_findings(file)[0]
    same_as_simpleitk(file, *read_image(file))
    for header in (dict(q=1), dict(s=3), dict(q=-1, s=1), dict(q=1, pixdim=(-1, 2, 3, 4, 0, 0, 0, 0)), dict(q=1, pixdim=(0, 2, 3, 4, 0, 0, 0, 0)),
                   dict(s=1, srow=SROW * [[-1], [1], [1]]), dict(s=1, units=3), dict(s=1, units=1), dict(s=1, units=0), dict(q=1, quat=(1, 0, 0)), dict(q=1, quat=(.6, .8, 0))):
        same_as_simpleitk(put(tmp_path/'a.nii', nifti1(**header), VOXELS), *read_image(tmp_path/'a.nii'))
    assert 'micrometres' in header_findings(put(tmp_path/'u.nii', nifti1(s=1, units=3), VOXELS))[0]
    one_slice = put(tmp_path/'slice.nii', nifti1(dim=(3, 4, 30, 1, 1, 1, 1, 1), pixdim=(1, 2, 3, 0, 0, 0, 0, 0), q=1), VOXELS)
    assert read_geometry(one_slice).spacing == (1, 3, 2) and header_findings(one_slice)
    with pytest.raises(ImageError, match='no such choice for header'): read_image(file, header='maybe')
    with pytest.raises(ImageError, match='no such choice for alpha'): read_image(file, alpha='keep')


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha'])
def test_left_handed_and_permuted_grids_go_round(ending, tmp_path):
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        given = Geometry((2.5, .75, 1.5), (1, -2, 3), (np.eye(3)[list(order)] * signs).ravel(), (6, 5, 4))
        write_image(VOXELS, given, tmp_path/f'a{ending}')
        array, geometry = read_image(tmp_path/f'a{ending}')
        assert geometry == given and np.array_equal(array[0], VOXELS) and not header_findings(tmp_path/f'a{ending}')


def test_channels_of_several_kinds_of_file(tmp_path):
    grid = Geometry((4, 3, 2), (1, 2, 3), UPRIGHT, VOXELS.shape)
    files = [tmp_path/f'{i}{e}' for i, e in enumerate(('.nii.gz', '.nii', '.nrrd', '.mha'))]
    for i, file in enumerate(files): write_image(VOXELS + i, grid, file)
    for some in (files, files[:2], files[2:], files[::-1]):
        array, geometry = read_image(some)
        assert array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable and geometry == grid
        assert np.array_equal(array, [VOXELS + int(f.name[0]) for f in some])
    write_image(np.stack([VOXELS]*2)[0], grid, tmp_path/'5.nii.gz')
    rgb = put(tmp_path/'6.nii', nifti1(kind=128, s=1, srow=[[-2, 0, 0, -1], [0, -3, 0, -2], [0, 0, 4, 3]]), np.repeat(VOXELS.astype('u1')[..., None], 3, 3))
    assert np.array_equal(read_image([tmp_path/'5.nii.gz', rgb])[0], [VOXELS]*4)
    for ending in ('.jpg', '.jpeg', '.dcm', '.mhd', '.nhdr', '.img', '.xyz', ''):
        with pytest.raises(ImageError, match=f'no{ending}'): write_image(VOXELS[:1].astype(np.uint8), Geometry((999, 1, 1), (0, 0, 0), UPRIGHT, (1, 5, 4)), tmp_path/f'no{ending}')
    assert not list(tmp_path.glob('no*'))


# ---- broken files of every format ----

def test_one_name_with_two_endings(tmp_path):
    geometry = Geometry((2, 1, 1), (0, 0, 0), UPRIGHT, VOXELS.shape)
    for i, ending in enumerate(('.nii', '.nii.gz', '.nrrd', '.mha')): write_image(VOXELS + i, geometry, tmp_path/f'a{ending}')
    for i, ending in enumerate(('.nii', '.nii.gz', '.nrrd', '.mha')): assert np.array_equal(read_image(tmp_path/f'a{ending}')[0][0], VOXELS + i)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'a.nii.gz'))), VOXELS)  # the neighbour's voxels
    assert 'a.nii lies beside it' in header_findings(tmp_path/'a.nii.gz')[0] and not header_findings(tmp_path/'a.nii')


def test_what_is_wrong_is_said_in_the_words_of_the_reader(tmp_path):
    for ending in IMAGE_ENDINGS: refused('the file is empty', '0 bytes', 'copy or download it again', file=put(tmp_path/f'zero{ending}', b''))
    page = b'<!doctype html><html>not found</html>'
    for ending in ('.png', '.tif', '.bmp', '.jpg'): refused('no picture of the kind', '<!do', 'give it the ending', file=put(tmp_path/f'page{ending}', page))
    for ending in ('.nrrd', '.mha'): refused('content that no reader knows', 'expected one of .nii.gz', 'copy or download', file=put(tmp_path/f'page{ending}', page))
    cut = put(tmp_path/'cut.tif', b'II*\0' + bytes([200, 0, 0, 0]) + bytes(20))
    refused('damaged or cut short', '28 bytes', file=cut)
    assert 'unpack' not in str(pytest.raises(ImageError, read_image, cut).value)
    for value, why in ((40000, 'smaller numbers'), (.5, 'interpolated')):
        sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 3, 4), value, np.float32)), str(tmp_path/'label.nii'))
        refused('whole numbers', why, call=read_label_map, file=tmp_path/'label.nii')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='the superuser may read everything')
def test_no_permission(tmp_path):
    file = put(tmp_path/'a.nii', nifti1(), VOXELS)
    file.chmod(0)
    refused('no permission', file=file)



def test_nothing_is_no_image(tmp_path):
    for ending in IMAGE_ENDINGS:
        for data in (b'', b'a', bytes(400), b'x'*5000): refused(file=put(tmp_path/f'bad{ending}', data))
        refused('no such file', file=tmp_path/f'none{ending}')
        (tmp_path/f'folder{ending}').mkdir()
        refused('no such file', 'no DICOM series', file=tmp_path/f'folder{ending}')
    for name in ('a.hdr', 'a.img'): refused('pair of header and voxels', file=put(tmp_path/name, nifti1(magic=b'ni1\0')))
    refused('no NIfTI file', 'left and right', file=put(tmp_path/'analyze.nii', nifti1(magic=bytes(4)), VOXELS))


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha', '.png', '.bmp', '.tif', '.jpg', '.mhd', '.nhdr'])
def test_a_file_cut_anywhere_is_refused(ending, tmp_path):
    rng = np.random.default_rng(0)
    array = sitk.GetImageFromArray(rng.integers(0, 255, (40, 30) if ending in module.PICTURES else (6, 20, 30)).astype(np.uint8))
    sitk.WriteImage(array, str(tmp_path/f'whole{ending}'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole = read_image(tmp_path/f'whole{ending}')[0]
        part = next((f for f in tmp_path.iterdir() if f.suffix in ('.raw', '.zraw', '.gz') and ending in ('.mhd', '.nhdr')), tmp_path/f'whole{ending}')
        data = part.read_bytes()
        for cut in {*range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 9, len(data))}:
            part.write_bytes(data[:cut])
            try: back = read_image(tmp_path/f'whole{ending}')[0]
            except ImageError as e: assert f'whole{ending}' in str(e)
            else: assert ending == '.nrrd' and np.array_equal(back, whole), f'{cut} of {len(data)} bytes read as an image'
    if part.suffix == '.raw':
        part.unlink()
        refused(file=tmp_path/f'whole{ending}')


# ---- NRRD and MHA ----

NRRD = b'NRRD0004\ntype: int16\ndimension: %d\nspace: %s\nsizes: %s\nspace directions: %s\nendian: %s\nencoding: raw\nspace origin: (1,2,3)\n\n'
MHA = b'ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\nTransformMatrix = %s\nOffset = 1 2 3\nElementSpacing = %s\nDimSize = 4 5 6\nElementType = MET_SHORT\nElementDataFile = LOCAL\n'


def test_nrrd(tmp_path):
    def nrrd(space=b'left-posterior-superior', directions=b'(2,0,0) (0,3,0) (0,0,4)', end='<', sizes=b'4 5 6'):
        return put(tmp_path/'a.nrrd', NRRD % (len(sizes.split()), space, sizes, directions, b'little' if end == '<' else b'big'), VOXELS.astype(end + 'i2'))
    for end in '<>':
        array, geometry = read_image(nrrd(end=end))
        assert np.array_equal(array[0], VOXELS) and geometry == Geometry((4, 3, 2), (1, 2, 3), UPRIGHT, (6, 5, 4))
    assert read_geometry(nrrd(space=b'right-anterior-superior')) == Geometry((4, 3, 2), (-1, -2, 3), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (6, 5, 4))
    refused('not upright', 'sheared', 'cosine', file=nrrd(directions=b'(2,0,0) (.9,3,0) (0,0,4)'))
    assert 'sheared' in header_findings(tmp_path/'a.nrrd')[0]
    for directions in (b'(2,0,0) (0,3,0) (0,0,0)', b'(2,0,0) (0,3,0) (2,0,0)'): refused(file=nrrd(directions=directions))
    refused('domain axes', file=nrrd(sizes=b'4 5 3 2', directions=b'(2,0,0) (0,3,0) (0,0,4) none'))
    file = put(tmp_path/'a.nrrd', (tmp_path/'a.nrrd').read_bytes().replace(b'encoding', b'kinds: domain domain domain list\nencoding'))
    refused('wrong number of values per voxel', 'split=True', file=file)
    array, geometry = read_image(file, split=True)
    assert np.array_equal(array, VOXELS.reshape(2, 3, 5, 4)) and geometry.spacing == (4, 3, 2)


def test_detached_headers(tmp_path):
    itk = sitk.GetImageFromArray(VOXELS)
    itk.SetSpacing((2, 3, 4)); itk.SetOrigin((1, 2, 3))
    for ending, packed in itertools.product(('.nhdr', '.mhd'), (False, True)):
        folder = tmp_path/f'{ending[1:]}{packed}'
        folder.mkdir()
        sitk.WriteImage(itk, str(folder/f'a{ending}'), useCompression=packed)
        array, geometry = read_image(folder/f'a{ending}')
        assert np.array_equal(array[0], VOXELS) and geometry == Geometry((4, 3, 2), (1, 2, 3), UPRIGHT, (6, 5, 4)) == read_geometry(folder/f'a{ending}')
        next(f for f in folder.iterdir() if f.suffix != ending).unlink()
        refused(file=folder/f'a{ending}')


def test_mha(tmp_path):
    def mha(matrix=b'1 0 0 0 1 0 0 0 1', spacing=b'2 3 4'): return put(tmp_path/'a.mha', MHA % (matrix, spacing), VOXELS)
    array, geometry = read_image(mha())
    assert np.array_equal(array[0], VOXELS) and geometry == Geometry((4, 3, 2), (1, 2, 3), UPRIGHT, (6, 5, 4))
    refused('not upright', 'sheared', file=mha(b'1 0 0 .2 1 0 0 0 1'))
    refused('not upright', 'length (2, 2, 2) instead of 1', file=mha(b'2 0 0 0 2 0 0 0 2'))
    for bad in (mha(b'1 0 0 0 1 0 0 0 0'), mha(spacing=b'1 0 1'), mha(spacing=b'1 nan 1')): refused(file=bad)
    rng = np.random.default_rng(0)
    for ending in ('.mha', '.nrrd'):
        for packed in (True, False):
            sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(tmp_path/f'p{ending}'), useCompression=packed)
            assert np.array_equal(read_image(tmp_path/f'p{ending}')[0][0], VOXELS)
    for _ in range(40):   # any geometry at all, to the last bit
        given = Geometry(rng.uniform(.1, 9, 3), rng.uniform(-500, 500, 3), np.linalg.qr(rng.normal(size=(3, 3)))[0].ravel(), (6, 5, 4))
        write_image(VOXELS, given, tmp_path/'b.mha')
        assert read_geometry(tmp_path/'b.mha') == given


@pytest.mark.parametrize('ending', ['.mha', '.nrrd', '.mhd', '.nhdr'])
def test_flipped_bits_of_packed_voxels_are_found(ending, tmp_path):
    rng = np.random.default_rng(0)
    itk = sitk.GetImageFromArray(rng.integers(0, 99, (6, 20, 30)).astype(np.int16))
    sitk.WriteImage(itk, str(tmp_path/f'a{ending}'), useCompression=True)
    whole, part = read_image(tmp_path/f'a{ending}')[0], max(tmp_path.iterdir(), key=lambda f: f.stat().st_size)
    data = part.read_bytes()
    for at in rng.integers(len(data) - 4000, len(data), 80):
        flipped = bytearray(data); flipped[at] ^= 1 << int(rng.integers(8))
        part.write_bytes(flipped)
        try: back = read_image(tmp_path/f'a{ending}')[0]
        except ImageError as e: assert f'a{ending}' in str(e)
        else: assert np.array_equal(back, whole)
    refused(file=put(tmp_path/'none.mha', (MHA % (b'1 0 0 0 1 0 0 0 1', b'1 1 1')).replace(b'4 5 6', b'4 5 0')))


# ---- 4D to one file a channel ----

@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha'])
def test_split_4d(ending, tmp_path):
    rng = np.random.default_rng(0)
    for dtype in (np.int16, np.float32, np.uint8):
        voxels = rng.integers(0, 200, (3, 4, 5, 6)).astype(dtype)
        itk = sitk.JoinSeries([sitk.GetImageFromArray(v) for v in voxels])
        itk.SetSpacing((1.5, .5, 2.5, 1)); itk.SetOrigin((1, 2, 3, 0)); itk.SetDirection(np.diag([-1., 1, 1, 1]).ravel())
        sitk.WriteImage(itk, str(tmp_path/f'four{ending}'))
        before = (tmp_path/f'four{ending}').read_bytes()
        array, geometry = read_image(tmp_path/f'four{ending}', split=True)
        assert np.array_equal(array, voxels) and geometry == Geometry((2.5, .5, 1.5), (1, 2, 3), (-1, 0, 0, 0, 1, 0, 0, 0, 1), (4, 5, 6))
        files = split_4d(tmp_path/f'four{ending}', tmp_path)
        assert [f.name for f in files] == [f'four_{i:04d}{".nii.gz" if ending == ".nii" else ending}' for i in range(3)]
        for file, channel in zip(files, voxels):
            back, grid = read_image(file)
            assert np.array_equal(back[0], channel) and grid == geometry and sitk.GetArrayFromImage(sitk.ReadImage(str(file))).dtype == dtype
        named = split_4d(tmp_path/f'four{ending}', [tmp_path/f'x{i}.nii.gz' for i in range(3)])
        assert np.array_equal(read_image(named[2])[0][0], voxels[2])
        assert before == (tmp_path/f'four{ending}').read_bytes()
    with pytest.raises(ImageError, match='one channel for each name.*3 channels.*expected 2'): split_4d(tmp_path/f'four{ending}', [tmp_path/'a.nrrd', tmp_path/'b.nrrd'])


# ---- pictures ----

def pictures(folder):
    "The same 13 by 11 picture in many kinds of file"
    from PIL import Image
    grey = np.random.default_rng(0).integers(0, 250, (13, 11)).astype(np.uint8)
    rgb = np.stack([grey, 255 - grey, grey // 2], -1)
    few = Image.fromarray(grey % 4).convert('L')
    palette = Image.fromarray(grey % 4, 'L'); palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [0]*756)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])[grey % 4]
    greys = Image.fromarray(grey, 'L').quantize(250)
    for ending in ('png', 'bmp', 'tif'):
        Image.fromarray(grey).save(folder/f'grey.{ending}'); Image.fromarray(rgb).save(folder/f'rgb.{ending}')
        palette.save(folder/f'palette.{ending}'); Image.fromarray(grey > 100).save(folder/f'bit.{ending}')
        Image.fromarray(np.dstack([rgb, grey])).save(folder/f'rgba.{ending}')
    palette.save(folder/'clear.png', transparency=0)
    few.save(folder/'few.png', bits=2)
    Image.fromarray(np.dstack([grey, grey]), 'LA').save(folder/'la.png')
    Image.fromarray(grey.astype(np.uint16)*200).save(folder/'deep.png'); Image.fromarray(grey.astype(np.uint16)*200).save(folder/'deep.tif')
    Image.fromarray(grey.astype(np.float32)/7).save(folder/'float.tif'); Image.fromarray(grey.astype(np.int32)*1000 - 5).save(folder/'int.tif')
    for packing in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits'): Image.fromarray(grey).save(folder/f'{packing}.tif', compression=packing)
    Image.fromarray(grey).save(folder/'pages.tif', save_all=True, append_images=[Image.fromarray(grey + 1), Image.fromarray(grey + 2)])
    Image.fromarray(grey).save(folder/'uneven.tif', save_all=True, append_images=[Image.fromarray(grey[:5, :5])])
    Image.fromarray(np.dstack([rgb, grey]), 'CMYK').save(folder/'inks.tif')
    Image.fromarray(grey).save(folder/'lossy.jpg', quality=95)
    return grey, rgb, colours, greys


def test_pictures_of_every_kind(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        grey, rgb, colours, _ = pictures(tmp_path)
    def channels(name, **k):
        array, geometry = read_image(tmp_path/name, **k)
        assert geometry.spacing == (999, 1, 1) and geometry == read_geometry(tmp_path/name)
        return array[:, 0]
    def last(a): return np.moveaxis(a, -1, 0)
    for ending in ('png', 'bmp', 'tif'):
        assert np.array_equal(channels(f'grey.{ending}'), grey[None]) and np.array_equal(channels(f'rgb.{ending}'), last(rgb))
        assert np.array_equal(channels(f'palette.{ending}'), last(colours)) and np.array_equal(channels(f'bit.{ending}'), (grey > 100)[None]*255)
        refused('transparency', "alpha='drop'", file=tmp_path/f'rgba.{ending}')
        with pytest.warns(UserWarning, match='transparency left out'): assert np.array_equal(channels(f'rgba.{ending}', alpha='drop'), last(rgb))
        with pytest.warns(UserWarning, match='numbers of the colours'): assert np.array_equal(read_label_map(tmp_path/f'palette.{ending}')[0][0], grey % 4)
        assert np.array_equal(read_label_map(tmp_path/f'grey.{ending}')[0][0], grey)
        refused('one number per voxel', call=read_label_map, file=tmp_path/f'rgb.{ending}')
    for name, expected in (('la.png', grey[None]), ('clear.png', last(colours))):
        refused('transparency', file=tmp_path/name)
        with pytest.warns(UserWarning, match='transparency left out'): assert np.array_equal(channels(name, alpha='drop'), expected)
    assert np.array_equal(channels('few.png')[0] % 85, grey*0) or np.array_equal(channels('few.png')[0], grey % 4)
    for name in ('deep.png', 'deep.tif'): assert np.array_equal(channels(name)[0], grey.astype(float)*200)
    assert np.array_equal(channels('float.tif')[0], grey.astype(np.float32)/7) and np.array_equal(channels('int.tif')[0], grey.astype(float)*1000 - 5)
    for packing in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits'): assert np.array_equal(channels(f'{packing}.tif')[0], grey)
    pages, geometry = read_image(tmp_path/'pages.tif')
    assert np.array_equal(pages[0], [grey, grey + 1, grey + 2]) and geometry.spacing == (1, 1, 1)
    refused(file=tmp_path/'uneven.tif')
    refused('inks', file=tmp_path/'inks.tif')
    refused('JPEG', call=read_label_map, file=tmp_path/'lossy.jpg')
    with pytest.warns(UserWarning, match='JPEG is lossy'): assert np.abs(read_image(tmp_path/'lossy.jpg')[0][0, 0] - grey).mean() < 9


# ---- DICOM ----

def dicom(folder, places, voxels=None, uid='1.2.3.4', axes=(1, 0, 0, 0, 1, 0), spacing=(.7, .8), name='a', description='CT', normal=None, **tags):
    "Write a DICOM series with SimpleITK, one slice a file, its files in no order"
    folder.mkdir(exist_ok=True)
    normal = np.cross(axes[:3], axes[3:]) if normal is None else normal
    for i, place in enumerate(places):
        itk = sitk.GetImageFromArray((VOXELS[i] if voxels is None else voxels[i]))
        itk.SetSpacing(spacing)
        where = place if np.ndim(place) else np.array([1., -2, 3]) + np.array(normal)*place
        for tag, value in {'0008|0060': 'CT', '0008|0016': '1.2.840.10008.5.1.4.1.1.2', '0020|000d': '1.2.3', '0020|000e': uid, '0008|103e': description, '0020|0013': str(99 - i),
                           '0018|0050': '2.5', '0020|0032': '\\'.join(f'{v:.10g}' for v in where), '0020|0037': '\\'.join(f'{v:.10g}' for v in axes),
                           '0028|1052': '-1024', '0028|1053': '1', '0008|0018': f'{uid}.{i + 1}', **tags}.items(): itk.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn(); writer.SetFileName(str(folder/f'{name}{(i*7) % 10}{i}.dcm')); writer.Execute(itk)
    return folder


TILT = tuple(v for c, s in [(np.cos(.3), np.sin(.3))] for v in (c, 0, -s, 0, 1, 0))


@pytest.mark.parametrize('axes', [(1, 0, 0, 0, 1, 0), TILT, (0, 1, 0, 0, 0, -1)])
def test_a_dicom_series(axes, tmp_path):
    folder = dicom(tmp_path/'series', np.arange(6)*2.5, axes=axes)
    (folder/'readme.txt').write_text('no image')
    array, geometry = read_image(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    itk = reader.Execute()
    assert np.array_equal(array[0], sitk.GetArrayFromImage(itk)) and np.array_equal(array[0] - array[0, 0, 0, 0], VOXELS)
    assert np.allclose(geometry.spacing, (2.5, .8, .7)) and not header_findings(folder) and geometry == read_geometry(folder)
    assert np.allclose(geometry.spacing, itk.GetSpacing()[::-1]) and np.allclose(geometry.origin, itk.GetOrigin()) and np.allclose(geometry.direction, itk.GetDirection())
    for ending in ('.mha',):
        write_image(array[0], geometry, tmp_path/f'a{ending}')
        assert read_geometry(tmp_path/f'a{ending}') == geometry
    one = read_image(dicom(tmp_path/'one', [0.], axes=axes))
    assert one[0].shape == (1, 1, 5, 4) and one[1].spacing[0] == 2.5
    file = next((tmp_path/'one').iterdir())
    assert np.array_equal(read_image(file)[0], one[0]) and read_image(file)[1] == one[1] == read_geometry(file) and not header_findings(file)


def test_dicom_series_that_are_no_volume(tmp_path):
    steps = np.arange(6)*2.5
    refused('slices missing: 1 after slice 1', file=dicom(tmp_path/'gap', [0, 2.5, 7.5, 10, 12.5]))
    assert 'slices missing' in header_findings(tmp_path/'gap')[0]
    refused('uneven distances, 2.5 to 3.5 mm', file=dicom(tmp_path/'uneven', [0, 2.5, 6, 8.5]))
    refused('lie where another lies', file=dicom(tmp_path/'double', [0, 2.5, 2.5, 5]))
    refused('shifted against each other', 'sheared', file=dicom(tmp_path/'gantry', [(0, i*.6, i*2.5) for i in range(6)]))
    both = dicom(tmp_path/'both', steps, description='thin')
    dicom(both, steps[:3], uid='1.2.3.5', name='b', description='thick')
    refused('several DICOM series', '1.2.3.4', 'thin', '6 files', '1.2.3.5', 'thick', '3 files', file=both)
    refused('not one DICOM series', file=both, series='1.2.3.6')
    for series, n in (('1.2.3.4', 6), ('1.2.3.5', 3), ('thick', 3)):
        assert read_image(both, series=series)[0].shape == (1, n, 5, 4) and read_geometry(both, series=series).shape == (n, 5, 4)
    mixed = dicom(tmp_path/'mixed', steps[:3])
    dicom(mixed, steps[3:], axes=TILT, name='b')
    refused('differ in axes', file=mixed)
    sizes = dicom(tmp_path/'sizes', steps[:3])
    dicom(sizes, steps[3:5], voxels=np.zeros((2, 7, 7), np.int16), name='b')
    refused('differ in size', file=sizes)
    (tmp_path/'none').mkdir()
    refused('no DICOM series', file=tmp_path/'none')
    cut = dicom(tmp_path/'cut', steps)
    victim = sorted(cut.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:-20])
    refused(file=cut)
    with pytest.warns(UserWarning, match='packed with loss'): read_image(dicom(tmp_path/'lossy', steps, **{'0028|2110': '01'}))


def test_dicom_slices_that_are_damaged_are_not_left_out(tmp_path, monkeypatch):
    for name, which, keep in (('first', 0, 0), ('last', -1, 0), ('header', -1, 200), ('voxels', -1, -20)):  # a volume that lacks its end looks like a sound one
        folder = dicom(tmp_path/name, np.arange(6)*2.5)
        victim = sorted(folder.iterdir(), key=lambda f: f.name[2:])[which]
        victim.write_bytes(victim.read_bytes()[:keep])
        refused('cannot be read', victim.name, '1 in all', file=folder)
    folder = dicom(tmp_path/'report', np.arange(6)*2.5)
    (folder/'report.dcm').write_bytes(bytes(128) + b'DICM' + b'1.2.840.10008.5.1.4.1.1.88.11' + bytes(50))  # a structured report is no slice
    (folder/'.hidden.dcm').write_bytes(b'')
    assert read_image(folder)[0].shape == (1, 6, 5, 4)
    monkeypatch.chdir(folder)
    for here in ('.', '../report', './'): assert read_image(here)[0].shape == (1, 6, 5, 4)


# ---- real odd files ----

@real
def test_every_odd_real_file_is_read_right_or_refused(tmp_path):
    odd = REAL/'odd_geometry'
    refused('contradicts itself', 'sheared', 'cosine of 0.317', "header='qform'", file=odd/'ct_shear.nii.gz')
    same_as_simpleitk(odd/'ct_shear.nii.gz', *read_image(odd/'ct_shear.nii.gz', header='qform'))
    refused('no sform to go by', file=odd/'ct_shear.nii.gz', header='sform')
    refused('different sizes of a voxel', '0.398 voxels', "header='sform'", call=read_label_map, file=odd/'label_pixdim_ne_sform.nii.gz')
    assert np.allclose(read_label_map(odd/'label_pixdim_ne_sform.nii.gz', header='sform')[1].spacing, (1.00285, 1.00285, 1), atol=1e-5)
    for name in ('axes_AIL.nii.gz', 'oblique_lesion_label.nii.gz', 'oblique_FLAIR.nrrd', 'plain.mha'):
        same_as_simpleitk(odd/name, *read_image(odd/name))
        assert not header_findings(odd/name)
    refused('52, 68, 20, 10', 'split_4d', file=odd/'asl_4d_oblique.nii.gz')
    array, geometry = read_image(odd/'asl_4d_oblique.nii.gz', split=True)
    itk = sitk.ReadImage(str(odd/'asl_4d_oblique.nii.gz'))
    assert np.array_equal(array, sitk.GetArrayFromImage(itk)) and geometry.spacing == itk.GetSpacing()[2::-1] and geometry.origin == itk.GetOrigin()[:3]
    files = split_4d(odd/'asl_4d_oblique.nii.gz', tmp_path)
    assert len(files) == 10 and read_geometry(files[9]) == geometry and np.array_equal(read_image(files[9])[0][0], array[9])
    assert read_image(odd/'rgb_2d_slice.nii.gz')[0].shape == (3, 1, 1244, 1201)
