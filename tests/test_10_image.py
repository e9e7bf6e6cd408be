"""Image files: geometry kept to the last bit, damage never silent, errors that name the file; and real files of odd kinds."""
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segnb.image import (Geometry, ImageError, SegnbError, read_geometry, read_image, read_label_map, whole_file, write_image,
                         write_label_map)

REAL = Path(os.environ.get('SEGNB_REAL_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))
real = pytest.mark.skipif(not (REAL/'odd_geometry').is_dir(), reason=f'no real data in {REAL} (set SEGNB_REAL_DATA)')
UPRIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)


def grid(rng, shape=(3, 4, 5)):
    return Geometry(rng.uniform(.1, 9, 3), rng.uniform(-500, 500, 3), np.linalg.qr(rng.normal(size=(3, 3)))[0].ravel(), shape)


def known(array, geometry, file):
    "Write with SimpleITK alone"
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.spacing[::-1]); image.SetOrigin(geometry.origin); image.SetDirection(geometry.direction)
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha'])
def test_geometry_of_a_file_survives_to_the_last_bit(ending, tmp_path):
    rng = np.random.default_rng(int.from_bytes(ending.encode(), 'big') % 1000)
    for _ in range(60):
        known(np.zeros((3, 4, 5), np.uint8), grid(rng), tmp_path/f'a{ending}')
        first = read_geometry(tmp_path/f'a{ending}')
        write_label_map(np.zeros(first.shape, int), first, tmp_path/f'b{ending}')
        assert read_geometry(tmp_path/f'b{ending}') == first
        other = sitk.ReadImage(str(tmp_path/f'b{ending}'))
        assert (other.GetSpacing()[::-1], other.GetOrigin(), other.GetDirection()) == (first.spacing, first.origin, first.direction)


@pytest.mark.parametrize('ending', ['.nii.gz', '.nrrd', '.mha'])
def test_any_geometry_settles_after_one_round_trip(ending, tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(60):
        given = grid(rng)
        write_label_map(np.zeros(given.shape, int), given, tmp_path/f'a{ending}')
        once = read_geometry(tmp_path/f'a{ending}')
        assert not once.differences(given, 1e-4)
        if ending != '.nii.gz': assert np.allclose(once.direction, given.direction, rtol=0, atol=1e-15)
        write_label_map(np.zeros(given.shape, int), once, tmp_path/f'b{ending}')
        assert read_geometry(tmp_path/f'b{ending}') == once


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha'])
def test_values_and_axes(dtype, ending, tmp_path):
    rng = np.random.default_rng(2)
    array = rng.integers(0, 250, (3, 4, 5)).astype(dtype)
    given = grid(rng)
    write_image(array, given, tmp_path/f'a{ending}')
    itk = sitk.ReadImage(str(tmp_path/f'a{ending}'))
    back, geometry = read_image(tmp_path/f'a{ending}')
    for index in np.ndindex(array.shape):
        assert back[(0, *index)] == itk[index[::-1]] == array[index]
        assert np.allclose(geometry.to_world(index), itk.TransformIndexToPhysicalPoint(index[::-1]), rtol=0, atol=1e-9)
    assert np.array_equal(read_label_map(tmp_path/f'a{ending}')[0], array)


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha', '.tif', '.png'])
@pytest.mark.parametrize('noisy', [True, False])
def test_no_truncation_passes(ending, noisy, tmp_path):
    rng = np.random.default_rng(3)
    shape = (1, 40, 30) if ending in ('.tif', '.png') else (6, 20, 30)
    array = rng.integers(0, 250, shape).astype(np.uint8) if noisy else np.zeros(shape, np.uint8)
    write_image(array, Geometry((2, 1, 1), (0, 0, 0), UPRIGHT, shape), tmp_path/f'whole{ending}')
    data = (tmp_path/f'whole{ending}').read_bytes()
    for cut in sorted({*range(0, len(data), max(1, len(data)//60)), *range(max(0, len(data) - 24), len(data))}):
        (tmp_path/f'cut{ending}').write_bytes(data[:cut])
        try: back, _ = read_image(tmp_path/f'cut{ending}')
        except ImageError as e: assert f'cut{ending}' in str(e)
        else: assert ending == '.nrrd' and np.array_equal(back[0], array), f'{cut} of {len(data)} bytes read as an image'


def test_flipped_bits_of_a_packed_file_are_found(tmp_path):
    rng = np.random.default_rng(4)
    array = rng.integers(-1000, 1000, (6, 20, 30)).astype(np.int16)
    write_image(array, Geometry((2, 1, 1), (0, 0, 0), UPRIGHT, array.shape), tmp_path/'whole.nii.gz')
    data = (tmp_path/'whole.nii.gz').read_bytes()
    for at in rng.integers(10, len(data), 60):
        flipped = bytearray(data); flipped[at] ^= 1 << int(rng.integers(8))
        (tmp_path/'flipped.nii.gz').write_bytes(flipped)
        with pytest.raises(ImageError, match='flipped.nii.gz'): read_image(tmp_path/'flipped.nii.gz')


def test_a_whole_stream_with_too_few_voxels_is_found(tmp_path):
    import gzip
    write_image(np.ones((3, 4, 5), np.int16), Geometry((1, 1, 1), (0, 0, 0), UPRIGHT, (3, 4, 5)), tmp_path/'a.nii.gz')
    plain = gzip.decompress((tmp_path/'a.nii.gz').read_bytes())
    (tmp_path/'b.nii.gz').write_bytes(gzip.compress(plain[:-2]))
    with pytest.raises(ImageError, match='470 bytes.*472 bytes'): read_image(tmp_path/'b.nii.gz')
    (tmp_path/'c.nii.gz').write_bytes(gzip.compress(plain[:100]) + gzip.compress(plain[100:]))   # two members: sound
    assert struct.unpack('<i', plain[:4]) == (348,)
    (tmp_path/'d.nii.gz').write_bytes(plain)                                                     # not packed in spite of its name
    assert read_image(tmp_path/'d.nii.gz')[0].sum() == 60


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('ending', ['.nii.gz', '.nii', '.nrrd', '.mha'])
def test_nan_and_infinity_arrive(dtype, ending, tmp_path):
    array = np.random.default_rng(5).normal(size=(9, 70, 80)).astype(dtype)
    array[0, 0, 0], array[4, 5, 6], array[8, 69, 79], array[8, 69, 78] = np.nan, np.inf, -np.inf, np.nan
    write_image(array, Geometry((1, 1, 1), (0, 0, 0), UPRIGHT, array.shape), tmp_path/f'a{ending}')
    assert np.array_equal(read_image(tmp_path/f'a{ending}')[0][0], array.astype(np.float32), equal_nan=True)


def test_refusals_name_the_file(tmp_path):
    a = np.zeros((3, 4, 5), np.int16)
    one = Geometry((1, 1, 1), (0, 0, 0), UPRIGHT, a.shape)
    write_image(a, one, tmp_path/'a.nii.gz')
    for name, changes in (('spacing', dict(spacing=(1, 1, 1.1))), ('origin', dict(origin=(0, 0, 1))), ('direction', dict(direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1)))):
        write_image(a, replace(one, **changes), tmp_path/'b.nii.gz')
        with pytest.raises(ImageError, match=f'b.nii.gz.*{name}.*a.nii.gz'): read_image([tmp_path/'a.nii.gz', tmp_path/'b.nii.gz'])
    write_image(a[:2], replace(one, shape=(2, 4, 5)), tmp_path/'b.nii.gz')
    with pytest.raises(ImageError, match=r'b.nii.gz.*shape \(2, 4, 5\) instead of \(3, 4, 5\)'): read_image([tmp_path/'a.nii.gz', tmp_path/'b.nii.gz'])
    with pytest.raises(ImageError, match='none.nii.gz.*no such file'): read_image(tmp_path/'none.nii.gz')
    with pytest.raises(ImageError, match='no such file'): read_image(tmp_path)
    with pytest.raises(ImageError, match='no files'): read_image([])
    write_image(a + .5, one, tmp_path/'half.nii.gz')
    with pytest.raises(ImageError, match='half.nii.gz.*0.5, 60 such voxels'): read_label_map(tmp_path/'half.nii.gz')
    write_image(np.full((3, 4, 5), 40000, np.uint16), one, tmp_path/'high.nii.gz')
    with pytest.raises(ImageError, match='40000'): read_label_map(tmp_path/'high.nii.gz')
    for wrong in (a - 1, a + .5, np.full(a.shape, 70000), np.full(a.shape, np.nan)):
        with pytest.raises(ImageError, match='whole numbers'): write_label_map(wrong, one, tmp_path/'no.nii.gz')
    for ending in ('.mhd', '.nhdr', '.hdr'):
        with pytest.raises(ImageError, match='two files'): write_label_map(a, one, tmp_path/f'no{ending}')
    with pytest.raises(ImageError, match='no.xyz'): write_label_map(a, one, tmp_path/'no.xyz')
    with pytest.raises(ImageError, match='does not exist'): write_label_map(a, one, tmp_path/'none'/'no.nii.gz')
    assert not list(tmp_path.glob('no.*')) and not list(tmp_path.glob('.*'))


def test_pictures(tmp_path):
    rng = np.random.default_rng(6)
    for ending in ('.png', '.tif'):
        for dtype in (np.uint8, np.uint16):
            for channels in (1, 3):
                array = rng.integers(0, 200, (channels, 1, 13, 11)).astype(dtype)
                write_image(array, Geometry((999, 1, 1), (0, 0, 0), UPRIGHT, (1, 13, 11)), tmp_path/f'p{ending}')
                back, geometry = read_image(tmp_path/f'p{ending}')
                assert np.array_equal(back, array) and geometry == Geometry((999, 1, 1), (0, 0, 0), UPRIGHT, (1, 13, 11))
    sitk.WriteImage(sitk.GetImageFromArray(rng.integers(0, 200, (13, 11, 4)).astype(np.uint8), isVector=True), str(tmp_path/'rgba.png'))
    with pytest.raises(ImageError, match='rgba.png.*found 4.*transparency'): read_image(tmp_path/'rgba.png')
    stack = rng.integers(0, 200, (5, 13, 11)).astype(np.uint8)
    write_image(stack, Geometry((1, 1, 1), (0, 0, 0), UPRIGHT, stack.shape), tmp_path/'stack.tif')
    assert np.array_equal(read_image(tmp_path/'stack.tif')[0][0], stack)


def test_wide_labels_and_small_ones(tmp_path):
    g = Geometry((1, 1, 1), (0, 0, 0), UPRIGHT, (1, 1, 3))
    for top, kind in ((255, '8-bit unsigned integer'), (256, '16-bit unsigned integer'), (32767, '16-bit unsigned integer')):
        write_label_map(np.array([[[0, 1, top]]]), g, tmp_path/'a.nii.gz')
        assert sitk.ReadImage(str(tmp_path/'a.nii.gz')).GetPixelIDTypeAsString() == kind
        assert read_label_map(tmp_path/'a.nii.gz')[0].tolist() == [[[0, 1, top]]]
    write_label_map(np.array([[[True, False, True]]]), g, tmp_path/'a.nii.gz')
    assert read_label_map(tmp_path/'a.nii.gz')[0].tolist() == [[[1, 0, 1]]]


def test_the_same_bytes_again(tmp_path):
    g, a = grid(np.random.default_rng(7)), np.arange(60).reshape(3, 4, 5)
    for ending in ('.nii.gz', '.nrrd', '.mha'):
        for name in 'ab': write_label_map(a, g, tmp_path/f'{name}{ending}')
        assert (tmp_path/f'a{ending}').read_bytes() == (tmp_path/f'b{ending}').read_bytes()


def test_whole_file_keeps_the_old_file(tmp_path):
    (tmp_path/'a.txt').write_text('old')
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path/'a.txt') as part:
        part.write_text('new'); 1/0
    assert (tmp_path/'a.txt').read_text() == 'old' and [f.name for f in tmp_path.iterdir()] == ['a.txt']
    with whole_file(tmp_path/'a.txt') as part: part.write_text('new')
    assert (tmp_path/'a.txt').read_text() == 'new'


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageError('bad', case='c', file='f', found=1, expected=2, fix='do')))
    assert isinstance(error, SegnbError) and str(error) == 'case c, file f: bad; found 1; expected 2; do'
    g = grid(np.random.default_rng(8))
    assert Geometry.from_dict(json.loads(json.dumps(g.to_dict()))) == g == pickle.loads(pickle.dumps(g))


def test_warnings_stay_on_for_others(tmp_path):
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    with pytest.raises(ImageError): read_image(tmp_path/'none.nii.gz')
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


@real
@pytest.mark.parametrize('name', ['axes_AIL.nii.gz', 'oblique_FLAIR.nrrd', 'oblique_lesion_label.nii.gz', 'plain.mha'])
def test_odd_real_files_keep_their_grid(name, tmp_path):
    image, geometry = read_image(REAL/'odd_geometry'/name)
    itk = sitk.ReadImage(str(REAL/'odd_geometry'/name))
    assert np.array_equal(image[0], sitk.GetArrayFromImage(itk).astype(np.float32))
    for index in ((0, 0, 0), tuple(n - 1 for n in geometry.shape)):
        assert np.allclose(geometry.to_world(index), itk.TransformIndexToPhysicalPoint(index[::-1]), rtol=0, atol=1e-9)
    ending = ''.join(Path(name).suffixes)
    write_label_map(np.zeros(geometry.shape, np.uint8), geometry, tmp_path/f'a{ending}')
    assert read_geometry(tmp_path/f'a{ending}') == geometry


@real
def test_odd_real_files_of_other_kinds():
    odd = REAL/'odd_geometry'
    with pytest.raises(ImageError, match='asl_4d_oblique.nii.gz.*52, 68, 20, 10'): read_image(odd/'asl_4d_oblique.nii.gz')
    assert read_image(odd/'rgb_2d_slice.nii.gz')[0].shape == (3, 1, 1244, 1201)
    with pytest.raises(ImageError, match='one number per voxel'): read_label_map(odd/'rgb_2d_slice.nii.gz')
    assert set(np.unique(read_label_map(odd/'oblique_lesion_label.nii.gz')[0])) == {0, 1, 2, 3}
    image, label = read_geometry(odd/'oblique_FLAIR.nrrd'), read_geometry(odd/'oblique_lesion_label.nii.gz')
    assert image != label and not label.differences(image)   # NRRD in float64, NIfTI in float32: one grid
