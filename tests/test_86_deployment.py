"Exported networks give the mask of the predictor: kinds of models, odd images, no torch at hand, refusals."
import dataclasses
import gzip
import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('onnx'), pytest.importorskip('onnxscript'), pytest.importorskip('onnxruntime')
import torch

from segnb import deployment as d
from segnb.deployment import DeploymentError, Runner, export_onnx, pipeline_of, runner_source
from segnb.image import Geometry, read_image, read_label_map, write_image
from segnb.labels import Labels
from segnb.network import build_network
from segnb.planning import Configuration, Plans
from segnb.postprocessing import Postprocessing, keep_largest_component
from segnb.prediction import Predictor

CLASSES = Labels({0: 'background', 1: 'liver', 2: 'tumour'}, values={0: 0, 1: 3, 2: 700})
REGIONS = Labels({0: 'background', 1: 'edema', 2: 'core', 3: 'enhancing'}, regions={'whole': (1, 2, 3), 'core': (2, 3), 'enhancing': (3,)}, region_order=(1, 2, 3))
STATISTICS = {'mean': 40., 'sd': 30., 'percentile_00_5': -30., 'percentile_99_5': 150., 'median': 40., 'min': -100., 'max': 300.}


def plans_for(labels, schemes=('CT',), forward=(0, 1, 2), mask=False, **changes):
    "A plan as small as can be"
    flat = changes.pop('flat', False)
    cut = slice(1, None) if flat else slice(None)
    c = dict(name='2d' if flat else '3d_fullres', patch_size=(8, 16, 16)[cut], batch_size=2, spacing=(3., 1., 1.), median_shape=(20, 40, 40), num_pool_per_axis=(1, 2, 2)[cut],
             pool_op_kernel_sizes=tuple(k[cut] for k in ((1, 2, 2), (2, 2, 2))), conv_kernel_sizes=tuple(k[cut] for k in ((1, 3, 3), (3, 3, 3), (3, 3, 3))),
             do_dummy_2d_data_aug=False, base_num_features=8, max_num_features=32, batch_dice=False) | changes
    configurations = {c['name']: Configuration(**c)}
    if c.get('previous_stage'): configurations['3d_lowres'] = Configuration(**c | dict(name='3d_lowres', previous_stage=None))
    back = tuple(forward.index(a) for a in range(3))
    return Plans(dataset_name='', planner='test', memory_gb=1, channels=tuple(f'c{i}' for i in range(len(schemes))), labels=labels.foreground, original_spacing_target=(3., 1., 1.),
                 transpose_forward=forward, transpose_backward=back, normalization_schemes=schemes, use_mask_for_norm=(mask,)*len(schemes),
                 intensities={i: STATISTICS for i in range(len(schemes))}, configurations=configurations, trace={})


def predictor_of(plans, labels, n=1, **options):
    name = next(iter(plans.configurations))
    networks = [build_network(plans.configuration(name), plans.n_inputs(name), labels.n_outputs, deep_supervision=False, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    return Predictor(networks, plans, name, labels, device='cpu', **options)


def an_image(channels=1, shape=(11, 37, 30), seed=0):
    "A body in air with blobs inside"
    from scipy import ndimage
    rng = np.random.default_rng(seed)
    image = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 2)*400 + 60 for _ in range(channels)]).astype(np.float32)
    image[:, :1] = image[:, -2:] = 0
    image[:, :, :4] = image[:, :, :, -3:] = 0
    image[:, 4:6, 14:17, 12:16] = 0 # a hole
    return image


def same_but_at_ties(found, predictor, image, spacing, most=1e-3, **how):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        wanted, p = predictor.predict(image, spacing, True, **how)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert len(np.unique(wanted)) > 1, 'nothing to compare'
    margin = np.abs(p - .5).min(0) if predictor.labels.regions else np.diff(np.sort(p, 0)[-2:], axis=0)[0]
    differs = found != wanted
    assert not (differs & (margin > most)).any(), f'{differs.sum()} voxels differ, up to a margin of {margin[differs].max():.2g}'
    assert differs.mean() < 2e-3
    return differs


TORCH = {'data': dict(function='torch'), 'seg': dict(function='torch'), 'probabilities': dict(function='torch')}
SPLINES = {'data': dict(function='spline', order=3, order_z=1, separate=None, threshold=2.), 'seg': dict(function='spline', order=1, order_z=0), 'probabilities': dict(function='spline', order=1, order_z=0, separate=True)}

KINDS = {
    'plain': (CLASSES, {}, {}, 1),
    'two folds': (CLASSES, dict(n=2), {}, 1),
    'other axes, coarse': (CLASSES, {}, dict(forward=(2, 0, 1), spacing=(4., 1., 1.1)), 1),
    'z-score in the mask': (CLASSES, {}, dict(schemes=('nonCT', 'nonCT'), mask=True), 2),
    'CT in the mask, z-score not': (CLASSES, {}, dict(schemes=('CT', 'nonCT'), mask=True), 2),
    'CT2': (CLASSES, {}, dict(schemes=('CT2',)), 1),
    'rescaled and untouched': (CLASSES, {}, dict(schemes=('rescale01', 'noNorm')), 2),
    'regions': (REGIONS, {}, dict(schemes=('nonCT',)*2), 2),
    'slices': (CLASSES, {}, dict(flat=True), 1),
    'residual': (CLASSES, {}, dict(architecture='residual', blocks_per_stage_encoder=(1, 2, 2), blocks_per_stage_decoder=(1, 1)), 1),
    'as nnU-Net v2': (CLASSES, dict(n=2, export_order_z=1), dict(schemes=('zscore_v2', 'CT'), mask=True, normalize_first=True, resampling=SPLINES, aggregate='logits_half'), 2),
    'regions, logits': (REGIONS, {}, dict(schemes=('zscore_v2',)*2, normalize_first=True, aggregate='logits'), 2),
    'as nnU-Net v2 with torch': (CLASSES, dict(n=2), dict(schemes=('zscore_v2',), mask=True, normalize_first=True, resampling=TORCH, aggregate='logits_half'), 1),
    'torch, other axes, coarse': (CLASSES, {}, dict(schemes=('CT', 'nonCT'), mask=True, forward=(2, 0, 1), spacing=(4., 1., 1.1), resampling=TORCH), 2),
    'regions by torch': (REGIONS, {}, dict(schemes=('zscore_v2',)*2, normalize_first=True, resampling=TORCH, aggregate='logits_half'), 2),
    'slices by torch': (CLASSES, {}, dict(flat=True, normalize_first=True, resampling=TORCH, aggregate='logits_half'), 1),
    'a mask that the most votes resample': (CLASSES, {}, dict(schemes=('nonCT',), mask=True, resampling=SPLINES), 1),
    'no mirror, large step, cubic home': (CLASSES, dict(mirror=False, step_size=1., export_order=3), {}, 1),
    'two mirror axes, slices mixed': (CLASSES, dict(mirror=(1, 2), step_size=.3, export_order_z=1), {}, 1),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('spacing', [(5., .8, .9), (2., 1., 1.)])
def test_the_same_mask(kind, spacing, tmp_path):
    labels, options, changes, channels = KINDS[kind]
    predictor, image = predictor_of(plans_for(labels, **changes), labels, **options), an_image(channels)
    runner = Runner(export_onnx(predictor, tmp_path/'onnx'), threads=1)
    found = runner.predict(image, spacing)
    same_but_at_ties(found, predictor, image, spacing)
    assert (runner.predict(image, spacing, batch=5) != found).mean() < 1e-3
    if spacing[0] == 5.:
        quick = dict(step_size=1., mirror_axes=[])
        assert (Runner(tmp_path/'onnx', engine='numpy').predict(image, spacing, **quick) != runner.predict(image, spacing, **quick)).mean() < 1e-3


STAGES = {
    'v1': {}, 'v1, whole': dict(previous_whole=True), 'other axes': dict(forward=(2, 0, 1)),
    'v2': dict(previous_like_seg=True, normalize_first=True, resampling=SPLINES, aggregate='logits_half'),
    'v2, its mask for the intensities': dict(previous_like_seg=True, normalize_first=True, resampling=SPLINES, aggregate='logits_half', schemes=('zscore_v2',), mask=True),
    'v2, other axes': dict(previous_like_seg=True, normalize_first=True, resampling=SPLINES, forward=(1, 2, 0)),
    'v2 with torch': dict(previous_like_seg=True, normalize_first=True, resampling=TORCH, aggregate='logits_half'),
    'its own map, resampled images by torch': dict(resampling=TORCH)}


@pytest.mark.parametrize('spacing', [(2., .8, .9), (7., .8, .9)])
@pytest.mark.parametrize('kind', STAGES)
def test_the_second_stage_of_a_cascade(kind, spacing, tmp_path):
    plans = plans_for(CLASSES, name='3d_cascade_fullres', previous_stage='3d_lowres', **STAGES[kind])
    predictor, image = predictor_of(plans, CLASSES), an_image()
    previous = np.array([0, 3, 700], np.uint16)[np.random.default_rng(1).integers(0, 3, (4, 10, 8))].repeat(4, 0)[:11].repeat(4, 1)[:, :37].repeat(4, 2)[:, :, :30]
    runner = Runner(export_onnx(predictor, tmp_path/'onnx'), threads=1)
    same_but_at_ties(runner.predict(image, spacing, previous), predictor, image, spacing, previous=previous)
    with pytest.raises(ValueError, match='3d_lowres'): runner.predict(image, spacing)
    with pytest.raises(ValueError, match='3d_lowres'): runner.predict(image, spacing, previous[1:])
    with pytest.raises(ValueError, match='this model knows'): runner.predict(image, spacing, previous + 1)


@pytest.mark.parametrize('kind', STAGES)
@pytest.mark.parametrize('spacing', [(2., .8, .9), (7., .8, .9), (3., 1., 1.)])
def test_what_the_network_sees_is_what_preprocessing_makes(kind, spacing):
    "Voxel for voxel: the image but for rounding, the masks of the stage before exactly"
    from segnb.preprocessing import preprocess_case
    plans = plans_for(CLASSES, name='3d_cascade_fullres', previous_stage='3d_lowres', **STAGES[kind])
    predictor, image, rng = predictor_of(plans, CLASSES), an_image(), np.random.default_rng(3)
    previous = np.array([0, 3, 700], np.uint16)[rng.integers(0, 3, image.shape[1:])]
    data, _, properties = preprocess_case(image, None, spacing, plans, '3d_cascade_fullres', previous=CLASSES.encode(previous))
    how = pipeline_of(predictor)
    ready, way = d._prepare(image, spacing, how, d._class_indices(previous, image.shape[1:], how))
    assert np.abs(ready[:1] - data).max() < 1e-4
    unlike = ready[1:] != np.stack([properties['previous'] == c for c in (1, 2)])
    assert unlike.mean() <= (2e-4 if 'torch' in kind and kind != 'its own map, resampled images by torch' else 0), unlike.mean()   # torch counts votes in half precision


@pytest.mark.parametrize('how', ['torch', 'half', 'most'])
@pytest.mark.parametrize('axis', [None, 0, 1, 2])
def test_votes_as_in_their_chapter(how, axis):
    from segnb.resampling import resample_as, resample_label_map
    rng, mm = np.random.default_rng(4), [1., 1., 1.]
    if axis is not None: mm[axis] = 9.
    for shape in ((7, 33, 20), (13, 11, 15), (4, 20, 29), (14, 40, 30), (7, 20, 8)):
        labels = rng.integers(-1, 5, (7, 20, 15)).astype(np.int16)
        labels = labels if shape[0] != 13 else labels[::-1, ::2, ::2].repeat(2, 1).repeat(2, 2)[:, :20, :15]
        ours = d._vote(labels, shape, axis, dict(function='torch' if how == 'torch' else 'spline', vote=how))
        if how == 'half': wanted = resample_label_map(labels, shape, separate_axis=axis)
        else: wanted = resample_as(dict(function='torch') if how == 'torch' else dict(function='spline', order=1, order_z=0, vote='most'), labels, shape, mm, (1., 1., 1.), labels=True)
        assert (ours != wanted).mean() <= (1e-3 if how == 'torch' else 0)


@pytest.mark.parametrize('axis', [None, 0, 1, 2])
def test_interpolation_as_torch_does_it(axis):
    from segnb.resampling import resample_as
    rng, mm = np.random.default_rng(5), [1., 1., 1.]
    if axis is not None: mm[axis] = 9.
    for old, new in (((7, 20, 15), (7, 33, 20)), ((7, 20, 15), (13, 11, 15)), ((1, 20, 15), (3, 7, 31)), ((41, 5, 6), (82, 3, 1)), ((6, 9, 14), (9, 6, 21))):
        image = rng.normal(0, 100, old).astype(np.float32)
        wanted = resample_as(dict(function='torch'), image[None], new, mm, (1., 1., 1.))[0]
        assert np.abs(d._resample(image, new, dict(function='torch'), axis) - wanted).max() < 1e-4 # of values of 100


def test_an_image_that_is_not_resampled(tmp_path):
    nothing = {what: dict(function='none') for what in ('data', 'seg', 'probabilities')}
    plans = plans_for(CLASSES, normalize_first=True, resampling=nothing, schemes=('zscore_v2',), mask=True)
    predictor, image = predictor_of(plans, CLASSES), an_image()
    runner = Runner(export_onnx(predictor, tmp_path/'onnx'), threads=1)
    same_but_at_ties(runner.predict(image, (3., 1., 1.)), predictor, image, (3., 1., 1.))
    same_but_at_ties(runner.predict(image, (5., .8, 1.)), predictor, image, (5., .8, 1.))


def test_post_processing_goes_along(tmp_path):
    rule = Postprocessing(which=((3, 700), 3), min_sizes={(3, 700): 900., 3: 40.})
    plans, image = plans_for(CLASSES), an_image()
    predictor = predictor_of(plans, CLASSES, postprocess=rule)
    assert pipeline_of(predictor)['postprocess'] == [{'labels': [3, 700], 'smaller_than_mm3': 900.}, {'labels': [3], 'smaller_than_mm3': 40.}]
    runner = Runner(export_onnx(predictor, tmp_path/'onnx'), threads=1)
    before = predictor_of(plans, CLASSES)
    wanted = rule.apply(Runner(export_onnx(before, tmp_path/'plain'), threads=1).predict(image, (5., .8, .9)), (5., .8, .9))
    assert np.array_equal(runner.predict(image, (5., .8, .9)), wanted)


@pytest.mark.parametrize('seed', range(4))
def test_pieces_and_holes_as_in_their_chapters(seed):
    from scipy import ndimage
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.normal(size=(9, 25, 31)), 1) > (.0, .1, .25, -.1)[seed]
    assert np.array_equal(d._fill_holes(mask), ndimage.binary_fill_holes(mask))
    labels = (mask*rng.integers(1, 4, (3, 5, 4)).repeat(3, 0).repeat(5, 1).repeat(8, 2)[:9, :25, :31]).astype(np.uint8)
    for which, rules in (([1, 2, 3], [[1], [2], [3]]), ([(1, 2, 3)], [[1, 2, 3]]), ([(1, 3), 1], [[1, 3], [1]])):
        ours = d._keep_largest(labels.copy(), [dict(labels=r, smaller_than_mm3=None) for r in rules], 1.)
        assert np.array_equal(ours, keep_largest_component(labels, which))


@pytest.mark.parametrize('size', [0, 5, 40, 1000])
def test_a_small_region_after_the_pieces(size):
    from segnb.regions import RegionPostprocessing, SmallRegion
    labels = np.random.default_rng(size).choice(4, (6, 7, 8), p=[.5, .2, .2, .1]).astype(np.uint8)
    rule = RegionPostprocessing(which=((1, 2, 3),), small=SmallRegion(3, 2, size))
    assert np.array_equal(d._keep_largest(labels.copy(), d._rules(rule), 1.), rule(labels, (1, 1, 1)))


@pytest.mark.parametrize('order', [0, 1, 2, 3])
@pytest.mark.parametrize('axis', [None, 0, 2])
def test_resampling_as_in_its_chapter(order, axis):
    from segnb.resampling import resample_image, resample_label_map
    rng = np.random.default_rng(0)
    image = rng.normal(0, 100, (7, 20, 15)).astype(np.float32)
    for shape in ((7, 33, 20), (13, 11, 15), (4, 20, 29)):
        for order_z in (0, 1, 3):
            wanted = resample_image(image[None], shape, order, order_z, axis)[0]
            assert np.abs(d._resample(image, shape, dict(function='spline', order=order, order_z=order_z), axis) - wanted).max() < 2e-3 # of values of 100
        labels = rng.integers(0, 4, (7, 20, 15)).astype(np.uint8)
        assert np.array_equal(d._vote(labels, shape, axis, dict(function='spline', vote='half')), resample_label_map(labels, shape, separate_axis=axis))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    predictor = predictor_of(plans_for(CLASSES), CLASSES, mirror=(2,))
    return export_onnx(predictor, folder/'onnx'), predictor


def script(folder, *words, without=('torch', 'segnb', 'scipy', 'skimage', 'SimpleITK', 'numba')):
    "run.py in a process that cannot import these"
    block = f'import sys, runpy; sys.modules.update(dict.fromkeys({without!r})); sys.argv = {[str(folder/"run.py"), *map(str, words)]!r}; runpy.run_path(sys.argv[0], run_name="__main__")'
    return subprocess.run([sys.executable, '-c', block], capture_output=True, text=True, timeout=300, cwd=folder.parent, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def files_of(folder, dtype=np.int16):
    image = an_image()[0].astype(dtype)
    geometry = Geometry((5., .8, .9), (-31.5, 12.25, 700.1), (1, 0, 0, 0, .8, -.6, 0, .6, .8), image.shape)
    write_image(image, geometry, folder/'image.nii.gz')
    return image[None].astype(np.float32), geometry


@pytest.mark.parametrize('engine', ['onnxruntime', 'numpy'])
def test_the_script_needs_numpy_alone(exported, engine, tmp_path):
    folder, predictor = exported
    image, geometry = files_of(tmp_path)
    blocked = ('torch', 'segnb', 'scipy', 'skimage', 'SimpleITK', 'numba', 'fastcore', 'onnx') + (('onnxruntime',) if engine == 'numpy' else ())
    done = script(folder, tmp_path/'image.nii.gz', tmp_path/'labels.nii.gz', without=blocked)
    assert done.returncode == 0, done.stderr
    found, where = read_label_map(tmp_path/'labels.nii.gz')
    assert not where.differences(geometry)
    same_but_at_ties(found.astype(np.uint16), predictor, image, geometry.spacing)


def test_arrays_need_a_spacing(exported, tmp_path):
    folder, predictor = exported
    image, geometry = files_of(tmp_path)
    np.save(tmp_path/'image.npy', image)
    done = script(folder, tmp_path/'image.npy', tmp_path/'labels.npy')
    assert done.returncode == 1 and '--spacing' in done.stderr and 'Traceback' not in done.stderr
    assert script(folder, tmp_path/'image.npy', tmp_path/'labels.npy', '--spacing', 5, .8, .9).returncode == 0
    same_but_at_ties(np.load(tmp_path/'labels.npy'), predictor, image, geometry.spacing)


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('kind, dtype, slope', [(4, 'i2', 0.), (512, 'u2', .5), (16, 'f4', 2.), (64, 'f8', 1.), (2, 'u1', 1.)])
def test_nifti_is_read_as_segnb_reads_it(order, kind, dtype, slope, tmp_path):
    header, voxels = bytearray(352), np.random.default_rng(0).integers(0, 200, (3, 5, 7)).astype(order + dtype)
    for at, form, values in ((0, 'i', [348]), (40, '8h', [3, 7, 5, 3, 1, 1, 1, 1]), (70, '2h', [kind, voxels.itemsize*8]), (76, '8f', [1, .7, .8, 2.5, 0, 0, 0, 0]), (108, '3f', [352, slope, -7 if slope else 0])):
        struct.pack_into(order + form, header, at, *values)
    header[123], header[344:348] = 2, b'n+1\0'
    (tmp_path/'a.nii.gz').write_bytes(gzip.compress(bytes(header) + voxels.tobytes()))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        wanted, geometry = read_image(tmp_path/'a.nii.gz')
    found, spacing, kept = d._read_file(tmp_path/'a.nii.gz', None)
    assert np.array_equal(found.astype(np.float32), wanted) and np.allclose(spacing, geometry.spacing, rtol=1e-6)
    d._write_file(np.arange(105, dtype=np.uint16).reshape(3, 5, 7), tmp_path/'b.nii.gz', kept)
    labels, where = read_label_map(tmp_path/'b.nii.gz')
    assert np.array_equal(labels.ravel(), np.arange(105)) and not where.differences(geometry)


@pytest.mark.parametrize('damage, words', [(lambda b: b[:len(b)//2], 'cut short|damaged'), (lambda b: b'nonsense', 'no NIfTI'), (lambda b: b'', 'no NIfTI'),
                                           (lambda b: gzip.compress(gzip.decompress(b)[:400]), 'cut short'), (lambda b: gzip.compress(gzip.decompress(b)[:70] + b'\x20\0' + gzip.decompress(b)[72:]), 'kind')])
def test_damaged_files_are_one_sentence(exported, damage, words, tmp_path):
    import re
    files_of(tmp_path)
    (tmp_path/'bad.nii.gz').write_bytes(damage((tmp_path/'image.nii.gz').read_bytes()))
    with pytest.raises(ValueError) as caught: d._read_file(tmp_path/'bad.nii.gz', None)
    assert re.search(words, str(caught.value)) and 'bad.nii.gz' in str(caught.value)


@pytest.mark.parametrize('image, spacing, words', [(np.ones((2, 4, 4, 4)), (1, 1, 1), 'channels c0'), (np.ones((4, 4, 4)), (1, 1, 1), 'expected'), (np.full((1, 4, 4, 4), np.nan), (1, 1, 1), 'NaN'),
                                                   (np.zeros((1, 4, 4, 4)), (1, 1, 1), 'empty'), (np.ones((1, 4, 4, 4)), (1, 0, 1), 'positive'), (np.ones((1, 4, 4, 4)), (1, 1), 'three')])
def test_images_that_cannot_be(exported, image, spacing, words):
    with pytest.raises(ValueError, match=words): Runner(exported[0], threads=1).predict(image, spacing)


def test_a_changed_network_is_noticed(exported, tmp_path):
    import shutil
    shutil.copytree(exported[0], tmp_path/'copy')
    file = tmp_path/'copy'/'network_0.onnx'
    data = bytearray(file.read_bytes())
    data[len(data)//2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match='damaged'): Runner(tmp_path/'copy')


def test_exports_are_whole_and_never_hide_others(exported, tmp_path):
    folder, predictor = exported
    assert sorted(f.name for f in folder.iterdir()) == ['network_0.onnx', 'pipeline.json', 'run.py'] and len(list(folder.parent.iterdir())) == 1
    with pytest.raises(DeploymentError, match='overwrite'): export_onnx(predictor, folder)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('years')
    with pytest.raises(DeploymentError, match='something else'): export_onnx(predictor, tmp_path/'mine', overwrite=True)
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'years'
    export_onnx(predictor, folder, overwrite=True)
    assert json.loads((folder/'pipeline.json').read_text())['networks'][0]['difference_from_torch'] < 1e-4


class Strange(torch.nn.Module):
    "A network that no file format can hold: it asks the operating system"
    def forward(self, x): return torch.tensor(np.fft.fftn(x.detach().numpy()).real, dtype=torch.float32)[:, :1].repeat(1, 3, 1, 1, 1)*os.getpid()


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    plans = plans_for(CLASSES)
    for options, words in ((dict(mode='fast'), 'fast'), (dict(whole_image=True), 'whole_image'), (dict(mirror=('left-right',)), 'left-right'), (dict(postprocess=lambda labels, mm: labels), 'your own')):
        with pytest.raises(DeploymentError, match=words): export_onnx(predictor_of(plans, CLASSES, **options), tmp_path/'x')
    with pytest.raises(DeploymentError): export_onnx(Predictor([Strange()], plans, '3d_fullres', CLASSES, device='cpu'), tmp_path/'x')
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(DeploymentError, match='pip install onnx'): export_onnx(predictor_of(plans, CLASSES), tmp_path/'x')
    assert not any(tmp_path.iterdir())


OFFICIAL, RECORDED = Path(__file__).parent/'recorded'/'official', Path(__file__).parent/'recorded'
BARE = ('torch', 'segnb', 'scipy', 'skimage', 'SimpleITK', 'numba', 'nibabel', 'fastcore', 'onnx')


@pytest.mark.parametrize('name', ['v1_plain', 'v1_2d', 'v1_residual', 'v1_regions', 'v1_cascade', 'v2_plain', 'v2_2d', 'v2_residual', 'v2_regions', 'v2_cascade', 'v2_torchres'])
def test_official_models(name, tmp_path):
    "run.py, where neither torch nor segnb can be imported, finds the masks that nnU-Net itself has found, and those of the predictor"
    from segnb.exchange import load_nnunet
    version, kind = name.split('_')
    made, r, words = load_nnunet(OFFICIAL/f'{name}.zip', tmp_path/'model'), dict(np.load(RECORDED/f'84_official_{version}.npz')), []
    image, spacing, how = r[f'{kind}/data'].astype(np.float32), tuple(float(mm) for mm in r[f'{kind}/spacing']), {}
    np.save(tmp_path/'image.npy', image)
    for model in [made/'3d_lowres', made/'3d_cascade_fullres'] if kind == 'cascade' else [made]:
        predictor = Predictor.from_folder(model, device='cpu')
        folder = export_onnx(predictor, tmp_path/f'onnx_{model.name}')
        done = script(folder, tmp_path/'image.npy', tmp_path/'labels.npy', '--spacing', *spacing, '--threads', 1, *words, without=BARE)
        assert done.returncode == 0, done.stderr
        found, c = np.load(tmp_path/'labels.npy'), predictor.configuration.name
        theirs, close = r[f'{kind}/{c}/mask'], r[f'{kind}/{c}/close']
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            wanted = predictor.predict(image, spacing, **how)
        assert not ((found != wanted) & ~close).any() and (found != wanted).sum() < 4 and len(np.unique(wanted)) > 1
        assert not ((found != theirs) & ~close).any()
        np.save(tmp_path/'before.npy', theirs)
        words, how = ['--previous', tmp_path/'before.npy'], {'previous': theirs}


@pytest.mark.parametrize('name', ['v1_cascade', 'v2_cascade', 'v2_torchres', 'v2_regions'])
def test_official_models_on_other_grids(name, tmp_path):
    "Another image, another spacing: every step of resampling is taken"
    from segnb.exchange import load_nnunet
    folder = load_nnunet(OFFICIAL/f'{name}.zip', tmp_path/'model')
    predictor = Predictor.from_folder(folder/'3d_cascade_fullres' if 'cascade' in name else folder, device='cpu')
    image, previous = an_image(len(predictor.plans.channels), (13, 41, 35), 3), {}
    if 'cascade' in name:
        previous['previous'] = np.zeros(image.shape[1:], np.uint8)
        previous['previous'][3:9, 10:25, 8:22] = predictor.labels.values[1]
    runner = Runner(export_onnx(predictor, tmp_path/'onnx'), threads=1)
    for factors in ((1.1, .9, .95), (4.1, .7, 1.3)):
        spacing = tuple(float(mm*f) for mm, f in zip(predictor.plans.original_spacing_target, factors))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            wanted = predictor.predict(image, spacing, **previous)
        assert (runner.predict(image, spacing, **previous) != wanted).sum() < 10 and len(np.unique(wanted)) > 1


class Backwards(torch.nn.Module):
    "Axes counted from the end, and a size that is fixed when it is written"
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 1)
    def forward(self, x):
        y = self.conv(x).movedim(1, -1)
        return y.reshape(len(y), -1, 3).reshape(y.shape).movedim(-1, 1)


@pytest.mark.parametrize('kind', ['Swin', 'Swin, slices', 'SegResNet', 'DynUNet', 'axes from the end'])
def test_networks_of_ones_own(kind, tmp_path):
    from segnb.custom_network import build_monai, build_swin_unet
    plans = plans_for(CLASSES, flat='slices' in kind)
    torch.manual_seed(0)
    c = plans.configuration(name := next(iter(plans.configurations)))
    if 'Swin' in kind: network = build_swin_unet(c, 1, 3)
    elif kind == 'axes from the end': network = Backwards()
    else:
        pytest.importorskip('monai')
        network = build_monai(c, 1, 3, network=kind)
    predictor = Predictor([network], plans, name, CLASSES, device='cpu', mirror=(0,), step_size=1.)
    folder = export_onnx(predictor, tmp_path/'onnx')
    same_but_at_ties(Runner(folder, threads=1).predict(an_image(), (2., 1., 1.), batch=3), predictor, an_image(), (2., 1., 1.))
    if 'Swin' in kind:
        with pytest.raises(ValueError, match='pip install onnxruntime'): Runner(folder, engine='numpy')


class Dreaming(torch.nn.Module):
    "A network that answers by chance"
    def forward(self, x): return x.repeat(1, 3, 1, 1, 1) + torch.randn(3, 1, 1, 1)


def test_a_network_that_answers_otherwise_is_refused(tmp_path):
    with pytest.raises(DeploymentError, match='does not answer as torch does'): export_onnx(Predictor([Dreaming()], plans_for(CLASSES), '3d_fullres', CLASSES, device='cpu'), tmp_path/'x')
    assert not any(tmp_path.iterdir())


def test_a_plan_that_predicts_otherwise_is_refused(tmp_path):
    plans = plans_for(CLASSES)
    c = plans.configuration('3d_fullres')
    cubic = {'data': {}, 'seg': {'order': 3}, 'probabilities': {}}
    other = dataclasses.replace(plans, configurations={'3d_fullres': dataclasses.replace(c, normalize_first=True, resampling=cubic)})
    with pytest.raises(DeploymentError, match=r'splines of order \(3, 0\) for seg'): export_onnx(predictor_of(other, CLASSES), tmp_path/'x')
    with pytest.raises(DeploymentError, match='found opset 99'): export_onnx(predictor_of(plans, CLASSES), tmp_path/'x', opset=99)
    assert not any(tmp_path.iterdir())


def test_the_script_is_made_of_the_module():
    text = runner_source()
    compile(text, 'run.py', 'exec')
    imported = {line.split()[1].split('.')[0].rstrip(',') for line in text.splitlines() if line.strip().startswith(('import ', 'from '))}
    assert imported <= {'contextlib', 'itertools', 'pathlib', 'numpy', 'onnxruntime', 'argparse'} and len(text.splitlines()) < 610
