"""Prediction: folds in the memory of one, modes, what is refused and warned of, folders half done, parts, cases that fail."""
import dataclasses, json, os, resource, shutil, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb import export, prediction
from segnb.checkpoints import save_checkpoint
from segnb.dataset import Dataset
from segnb.export import read_probabilities, to_original_grid
from segnb.fingerprint import extract_fingerprint
from segnb.image import SegnbError, read_geometry, read_image, read_label_map, write_image, write_label_map
from segnb.labels import Labels
from segnb.network import build_network
from segnb.planning import plan_experiment
from segnb.prediction import Folds, PredictionError, PredictionWarning, Predictor, label_map_to_original_grid, unlike_training
from segnb.preprocessing import preprocess_case
from segnb.workers import OutputError, write_json

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
SAMPLE, RECORDED = ROOT/'data_samples'/'Task101_PhantomCT', ROOT/'tests'/'recorded'
QUICK = dict(device='cpu', mirror=False)


def coarse(plans, name='3d_fullres', **changes):
    "A configuration so small that a case takes a moment"
    full = plans.configuration('3d_fullres')
    return dataclasses.replace(full, name=name, spacing=(5, 6.4, 6.4), median_shape=(20, 15, 15), patch_size=(8, 16, 16), num_pool_per_axis=(1, 1, 1), pool_op_kernel_sizes=((2, 2, 2),),
                               conv_kernel_sizes=((3, 3, 3),)*2, do_dummy_2d_data_aug=False, base_num_features=2, **changes)


def save_model(folder, dataset, plans, name='3d_fullres', folds=(0, 1), epoch=2, **state):
    for fold in folds:
        (folder/f'fold_{fold}').mkdir(parents=True, exist_ok=True)
        network = build_network(plans.configuration(name), plans.n_inputs(name), dataset.labels.n_outputs, generator=torch.Generator().manual_seed(int(fold) if fold != 'all' else 9))
        save_checkpoint(dict(format='segnb checkpoint 1', plans=plans.to_dict(), plans_identity=plans.identity(), configuration=name, fold=fold, epoch=epoch, network=network.state_dict(), **state),
                        folder/f'fold_{fold}'/'checkpoint_final.pt')
    plans.save(folder/'plans.json')
    write_json(dataset.json, folder/'dataset.json')
    return folder


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    dataset = Dataset(SAMPLE)
    plans = plan_experiment(extract_fingerprint(dataset, n_workers=0), planner='cpu')
    plans = dataclasses.replace(plans, configurations={'3d_fullres': coarse(plans)})
    return dataset, plans, save_model(tmp_path_factory.mktemp('model'), dataset, plans, folds=(0, 1, 2))


@pytest.fixture
def model(small, tmp_path): return Path(shutil.copytree(small[2], tmp_path/'model'))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path/'in'
    folder.mkdir()
    for case in ('ct_010', 'ct_011'): shutil.copy(SAMPLE/'imagesTs'/f'{case}_0000.nii.gz', folder)
    return folder


def names(folder): return sorted(f.name for f in folder.iterdir())
def stamps(folder): return {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}


# ---- folds ----------------------------------------------------------------------------------------------------------

def test_folds_answer_as_networks_side_by_side(small):
    dataset, plans, model = small
    together = Predictor.from_folder(model, **QUICK)
    alone = [Predictor.from_folder(model, folds=k, **QUICK) for k in range(3)]
    data = np.random.default_rng(0).normal(size=(1, 11, 20, 18)).astype(np.float32)
    mean = np.mean([p.predict_preprocessed(data) for p in alone], 0)
    np.testing.assert_allclose(together.predict_preprocessed(data), mean, atol=1e-6)
    beside = Predictor([build_network(plans.configuration('3d_fullres'), 1, 4, deep_supervision=False) for _ in range(3)], plans, '3d_fullres', dataset.labels, **QUICK)
    for k, network in enumerate(beside.networks): network.load_state_dict(torch.load(model/f'fold_{k}'/'checkpoint_final.pt', weights_only=True)['network'])
    np.testing.assert_allclose(beside.predict_preprocessed(data), mean, atol=1e-6)


def test_one_network_serves_all_folds(small):
    predictor = Predictor.from_folder(small[2], **QUICK)
    assert isinstance(predictor.networks, Folds) and len(predictor.networks) == 3
    assert len({id(n) for n in predictor.networks}) == 1 and len({next(n.parameters()).sum().item() for n in predictor.networks}) == 3
    assert len({id(p) for n in predictor.networks for p in n.parameters()}) == len(list(predictor.networks[0].parameters()))
    with pytest.raises(IndexError): predictor.networks[3]


def test_a_checkpoint_that_changes_meanwhile_is_noticed(model):
    predictor = Predictor.from_folder(model, folds=(0, 1), **QUICK)
    shutil.copy(model/'fold_2'/'checkpoint_final.pt', model/'fold_1'/'checkpoint_final.pt')
    with pytest.raises(PredictionError, match='fold_1.*has changed since'): predictor.predict_preprocessed(np.zeros((1, 8, 16, 16), np.float32))
    (model/'fold_1'/'checkpoint_final.pt').unlink()
    with pytest.raises(PredictionError, match='fold_1.*cannot be read'): predictor.networks[1]


def test_memory_does_not_grow_with_the_folds(small, tmp_path):
    dataset, plans, _ = small
    wide = dataclasses.replace(plans, configurations={'3d_fullres': dataclasses.replace(plans.configuration('3d_fullres'), base_num_features=180, max_num_features=400)})
    model = save_model(tmp_path/'wide', dataset, wide, folds=range(5))
    weights = (model/'fold_0'/'checkpoint_final.pt').stat().st_size
    script = ("import resource, sys, numpy as np; from segnb.prediction import Predictor\n"
              "p = Predictor.from_folder(sys.argv[1], folds=[int(f) for f in sys.argv[2].split(',')], device='cpu', mirror=False)\n"
              "for _ in range(2): p.predict_preprocessed(np.zeros((1, 8, 16, 16), np.float32))\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)")
    peak = [int(subprocess.run([sys.executable, '-c', script, str(model), folds], capture_output=True, text=True, check=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}).stdout)
            for folds in ('0', '0,1,2,3,4')]
    assert weights > 1e7 and peak[1] - peak[0] < 1.5*weights # four more sets of weights would be 4


def test_what_training_mirrored_limits_what_is_mirrored(small, tmp_path):
    dataset, plans, _ = small
    model = save_model(tmp_path/'m', dataset, plans, folds=(0,), mirror_axes=[0, 1])
    save_model(model, dataset, plans, folds=(1,), mirror_axes=[0, 1, 2])
    assert Predictor.from_folder(model, device='cpu').mirror_axes == (0, 1)
    assert Predictor.from_folder(model, device='cpu', mirror=(0,)).mirror_axes == (0,)
    with pytest.warns(PredictionWarning, match=r'mirrored along \[0, 1\] only'): assert Predictor.from_folder(model, device='cpu', mirror=(0, 2)).mirror_axes == (0, 2)
    with pytest.raises(PredictionError, match='no such axis'): Predictor.from_folder(model, device='cpu', mirror=(3,))


def test_axes_by_name_follow_the_patient(small, images):
    dataset, plans, model = small
    named, numbered = (Predictor.from_folder(model, folds=0, device='cpu', mirror=m) for m in ('left-right', (2,)))
    array, geometry = read_image(images/'ct_010_0000.nii.gz')
    upright = (1, 0, 0, 0, 1, 0, 0, 0, 1)
    np.testing.assert_array_equal(named.predict(array, geometry.spacing, direction=upright), numbered.predict(array, geometry.spacing))
    assert named._axes_of((0, 1, 0, 1, 0, 0, 0, 0, 1)) == (1,) # lying on the side
    with pytest.raises(PredictionError, match='nothing says how the image lies'): named.predict(array, geometry.spacing)
    with pytest.raises(SegnbError, match='up-down'): Predictor.from_folder(model, device='cpu', mirror='up-down').predict(array, geometry.spacing, direction=upright)


# ---- modes ----------------------------------------------------------------------------------------------------------

def recorded_modes():
    with np.load(RECORDED/'64_prediction_modes.npz') as arrays: return json.loads(str(arrays['about'])), {k: arrays[k] for k in arrays if k != 'about'}


@pytest.mark.parametrize('case', list(recorded_modes()[0]['cases']))
@pytest.mark.parametrize('mode, order', [('fast', 1), ('fastest', 0)])
def test_label_maps_come_home_as_in_the_original(case, mode, order):
    about, arrays = recorded_modes()
    c = about['cases'][case]
    properties = dict(transpose_backward=(0, 1, 2), spacing=c['old'], spacing_after_resampling=c['spacing'], shape_after_crop=c['cropped'], bbox=tuple(map(tuple, c['bbox'])), shape=c['whole'])
    found = label_map_to_original_grid(arrays[f'{case}/in'], properties, Labels({i: str(i) for i in range(4)}), order)
    np.testing.assert_array_equal(found, arrays[f'{case}/{mode}'])


def test_modes_differ_only_in_the_way_home(small, images):
    dataset, plans, model = small
    array, geometry = read_image(images/'ct_011_0000.nii.gz')
    data, _, properties = preprocess_case(array, None, geometry.spacing, plans, '3d_fullres')
    maps = {mode: Predictor.from_folder(model, mode=mode, **QUICK) for mode in ('normal', 'fast', 'fastest')}
    p = maps['normal'].predict_preprocessed(data)
    np.testing.assert_array_equal(maps['normal'].predict(array, geometry.spacing), to_original_grid(p, properties, dataset.labels))
    for mode, order in (('fast', 1), ('fastest', 0)):
        expected = label_map_to_original_grid(p.argmax(0).astype(np.int16), properties, dataset.labels, order)
        np.testing.assert_array_equal(maps[mode].predict(array, geometry.spacing), expected)
        np.testing.assert_array_equal(maps[mode].predict(array, geometry.spacing, return_probabilities=True)[0], expected)
    with pytest.raises(PredictionError, match='mode fast forgets probabilities'): maps['fast'].predict_folder(images, images/'out', save_probabilities=True)
    assert not (images/'out').exists()
    with pytest.raises(PredictionError, match='no such mode.*expected normal, fast, fastest'): Predictor.from_folder(model, mode='slow', **QUICK)


def test_regions_in_every_mode(small):
    _, plans, _ = small
    nested = Labels.from_dict(dict(labels={'background': 0, 'whole': [1, 2], 'core': 2}, regions_class_order=[1, 2]))
    network = build_network(plans.configuration('3d_fullres'), 1, 2, deep_supervision=False, generator=torch.Generator().manual_seed(0))
    image = np.random.default_rng(0).normal(0, 300, (1, 10, 30, 28)).astype(np.float32)
    spacing = plans.configuration('3d_fullres').spacing # the grid of the plan: nothing is resampled and the modes agree
    found = [Predictor([network], plans, '3d_fullres', nested, mode=mode, **QUICK).predict(image, spacing) for mode in prediction.MODES]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert set(np.unique(found[0])) <= {0, 1, 2}


def test_the_plan_may_say_how_probabilities_go_home(small):
    dataset, plans, _ = small
    said = dataclasses.replace(plans, trace=plans.trace | {'segmentation_export_params': {'force_separate_z': None, 'interpolation_order': 3, 'interpolation_order_z': 1}})
    networks = [build_network(plans.configuration('3d_fullres'), 1, 4)]
    assert [(p.export_order, p.export_order_z) for p in (Predictor(networks, plans, '3d_fullres', dataset.labels, **QUICK), Predictor(networks, said, '3d_fullres', dataset.labels, **QUICK),
            Predictor(networks, said, '3d_fullres', dataset.labels, export_order=0, **QUICK))] == [(1, 0), (3, 1), (0, 1)]


# ---- what is refused and what is warned of --------------------------------------------------------------------------

@pytest.fixture(scope='module')
def first(small): return Predictor.from_folder(small[2], folds=0, **QUICK)


def test_impossible_images(first):
    spacing = (5., 3., 3.)
    for array, words in ((np.zeros((20, 30)), r'image\[None, None\]'), (np.zeros((1, 1, 30, 30)), 'one slice is given to a model of volumes.*2d'), (np.zeros((3, 9, 9, 9)), '3 channels.*expects 1.*CT')):
        with pytest.raises(PredictionError, match=words): first.predict(array, spacing)
    broken = np.random.default_rng(0).normal(size=(1, 9, 30, 30))
    broken[0, 2, 3, 4:7] = np.nan, np.inf, -np.inf
    with pytest.raises(PredictionError, match='3 voxels that are NaN'): first.predict(broken, spacing)


def test_an_image_smaller_than_the_patch(first):
    tiny = np.random.default_rng(0).normal(0, 300, (1, 3, 12, 10)).astype(np.float32)
    found, p = first.predict(tiny, (5., 6.4, 6.4), return_probabilities=True)
    assert found.shape == (3, 12, 10) and p.shape == (4, 3, 12, 10) and np.allclose(p.sum(0), 1, atol=1e-5)


def test_channels_by_name(small, tmp_path):
    wanted = ('T1', 'T2', 'FLAIR')
    image = np.arange(3)[:, None, None, None] + np.zeros((3, 2, 2, 2))
    assert [int(a.flat[0]) for a in prediction._in_order(image, ('FLAIR', 'T1', 'T2'), wanted)] == [1, 2, 0]
    assert prediction._in_order({'T2': 'b', 'FLAIR': 'c', 'T1': 'a', 'T1ce': 'd'}, None, wanted) == ['a', 'b', 'c']
    with pytest.raises(PredictionError, match='channels.*missing.*without FLAIR'): prediction._in_order({'T1': 'a', 'T2': 'b'}, None, wanted)


def test_a_dataset_json_beside_the_images_names_their_channels(small, tmp_path):
    dataset, plans, _ = small
    two = dataclasses.replace(plans, channels=('T1', 'T2'), normalization_schemes=('nonCT',)*2, use_mask_for_norm=(False,)*2, intensities=None)
    folder = tmp_path/'raw'/'imagesTs'
    folder.mkdir(parents=True)
    for c in range(2): shutil.copy(SAMPLE/'imagesTs'/'ct_010_0000.nii.gz', folder/f'a_{c:04d}.nii.gz')
    def found(named):
        (tmp_path/'raw'/'dataset.json').write_text(json.dumps({'channel_names': {str(i): n for i, n in enumerate(named)}}))
        return [f.name for f in prediction.cases_to_predict(folder, two, '.nii.gz')['a']]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert found(['T1', 't2']) == ['a_0000.nii.gz', 'a_0001.nii.gz']
    with pytest.warns(PredictionWarning, match='by their names'): assert found(['T2', 'T1']) == ['a_0001.nii.gz', 'a_0000.nii.gz']
    with pytest.warns(PredictionWarning, match='the images are x, y'): assert found(['x', 'y']) == ['a_0000.nii.gz', 'a_0001.nii.gz']
    with pytest.raises(PredictionError, match='without t2'): found(['T1', 'PD'])
    shutil.copy(folder/'a_0000.nii.gz', folder/'a_0002.nii.gz')
    with pytest.warns(PredictionWarning, match='by their names'): assert found(['FLAIR', 'T2', 'T1']) == ['a_0002.nii.gz', 'a_0001.nii.gz']


@pytest.mark.parametrize('change, words', [(lambda a: (a - a.min())/np.ptp(a), 'from 0 to 1'), (lambda a: a + 1024, 'same kind of image'), (lambda a: np.abs(a) + 500, 'same unit'), (lambda a: a/10, 'same unit')])
def test_another_kind_of_image_is_told_of_with_numbers(small, images, change, words):
    plans = small[1]
    array, _ = read_image(images/'ct_010_0000.nii.gz')
    assert unlike_training(array, plans) == []
    assert any(words in said for said in unlike_training(change(array).astype(np.float32), plans))


def test_every_sample_looks_like_itself(small):
    for file in sorted((SAMPLE/'imagesTr').glob('*.nii.gz')): assert unlike_training(read_image(file)[0], small[1]) == [], file.name


def test_a_constant_channel_is_told_of(small): assert 'is 7 everywhere' in unlike_training(np.full((1, 4, 5, 6), 7.), small[1])[-1]


def test_warnings_reach_the_user_and_the_answer_is_given(first, images):
    array, geometry = read_image(images/'ct_010_0000.nii.gz')
    with pytest.warns(PredictionWarning, match='same kind of image'): assert first.predict(array/1000, geometry.spacing).shape == array.shape[1:]


@pytest.mark.parametrize('spoil, words', [
    (lambda m: shutil.rmtree(m/'fold_1'), 'no checkpoint_final.pt for fold 1; found folds: 0, 2'),
    (lambda m: (m/'plans.json').unlink(), 'no plans.json'),
    (lambda m: (m/'plans.json').write_text((m/'plans.json').read_text().replace('"batch_size": 2', '"batch_size": 5')), 'another plan'),
    (lambda m: (m/'fold_1'/'checkpoint_final.pt').write_bytes((m/'fold_1'/'checkpoint_final.pt').read_bytes()[:5000]), 'fold_1.*damaged')], ids=['fold', 'plans', 'changed', 'damaged'])
def test_model_folders_that_are_not_whole(model, spoil, words):
    spoil(model)
    with pytest.raises(SegnbError, match=words): Predictor.from_folder(model, folds=[0, 1, 2], **QUICK)


# ---- folders --------------------------------------------------------------------------------------------------------

def test_a_folder_is_predicted_as_its_arrays_are(small, first, images, tmp_path):
    out = tmp_path/'out'
    written = first.predict_folder(images, out, progress=False)
    assert written == [out/'ct_010.nii.gz', out/'ct_011.nii.gz'] and names(out) == ['ct_010.nii.gz', 'ct_011.nii.gz', 'made_with.json']
    for file in written:
        source = images/file.name.replace('.nii.gz', '_0000.nii.gz')
        found, geometry = read_label_map(file)
        assert geometry == read_geometry(source)
        np.testing.assert_array_equal(found, first.predict(read_image(source)[0], geometry.spacing))
    assert json.loads((out/'made_with.json').read_text()) == json.loads(json.dumps(first.made_with()))


@pytest.mark.parametrize('n_workers', [None, 1, 2])
def test_overlapping_writes_the_same(first, images, tmp_path, monkeypatch, n_workers):
    first.predict_folder(images, tmp_path/'one', progress=False, save_probabilities=True)
    if n_workers is None: monkeypatch.setattr(Predictor, '_overlaps', lambda self, n: True) # as where a GPU predicts
    first.predict_folder(images, tmp_path/'other', progress=False, save_probabilities=True, n_workers=n_workers)
    assert names(tmp_path/'one') == names(tmp_path/'other')
    for file in (tmp_path/'one').glob('*.nii.gz'): assert file.read_bytes() == (tmp_path/'other'/file.name).read_bytes()
    for file in (tmp_path/'one').glob('*.npz'): np.testing.assert_array_equal(read_probabilities(file)[0], read_probabilities(tmp_path/'other'/file.name)[0])


def test_what_is_done_stays_and_what_is_half_done_is_completed(first, images, tmp_path):
    out = tmp_path/'out'
    first.predict_folder(images, out, progress=False)
    before = stamps(out)
    first.predict_folder(images, out, progress=False)
    assert stamps(out) == before
    (out/'ct_011.nii.gz').unlink()
    first.predict_folder(images, out, progress=False)
    assert stamps(out)['ct_010.nii.gz'] == before['ct_010.nii.gz'] and (out/'ct_011.nii.gz').exists()
    first.predict_folder(images, out, progress=False, save_probabilities=True) # the probabilities are missing: both are done again
    assert {'ct_010.npz', 'ct_011.npz'} <= set(names(out))
    half = stamps(out)
    (out/'ct_010.npz').unlink()
    first.predict_folder(images, out, progress=False, save_probabilities=True)
    assert stamps(out)['ct_011.npz'] == half['ct_011.npz'] and (out/'ct_010.npz').exists()
    p, way_back = read_probabilities(out/'ct_010.npz')
    assert p.dtype == np.float16 and (to_original_grid(p, way_back, first.labels) != read_label_map(out/'ct_010.nii.gz')[0]).mean() < .01


def test_maps_of_how_sure_the_network_was(first, images, tmp_path):
    out = tmp_path/'out'
    first.predict_folder(images, out, progress=False, maps=('entropy', 'probability'))
    assert {'ct_010_entropy.nii.gz', 'ct_010_probability_1_organ.nii.gz'} <= set(names(out))
    array, geometry = read_image(out/'ct_010_probability_1_organ.nii.gz')
    image, _ = read_image(images/'ct_010_0000.nii.gz')
    np.testing.assert_allclose(array[0], first.predict(image, geometry.spacing, return_probabilities=True)[1][1], atol=1e-3) # kept as float16
    before = stamps(out)
    first.predict_folder(images, out, progress=False, maps=('entropy',))
    assert stamps(out) == before
    (out/'ct_011_entropy.nii.gz').unlink()
    first.predict_folder(images, out, progress=False, maps=('entropy',))
    assert (out/'ct_011_entropy.nii.gz').exists() and stamps(out)['ct_010.nii.gz'] == before['ct_010.nii.gz']
    with pytest.raises(SegnbError, match='no such map'): first.predict_folder(images, out, overwrite=True, progress=False, maps=('doubt',))


def test_the_whole_image_at_once(small, first, images, monkeypatch):
    array, geometry = read_image(images/'ct_010_0000.nii.gz')
    whole = Predictor.from_folder(small[2], folds=0, whole_image=True, **QUICK)
    found = whole.predict(array, geometry.spacing)
    assert found.shape == array.shape[1:]
    slabs = prediction.sliding_window_slabs
    def too_large(networks, whole_image=False, **question):
        if not whole_image: return (yield from slabs(networks, **question))
        raise SegnbError('one window alone does not fit') from torch.OutOfMemoryError('CUDA out of memory')
        yield
    monkeypatch.setattr(prediction, 'sliding_window_slabs', too_large)
    with pytest.warns(PredictionWarning, match='window by window'): np.testing.assert_array_equal(whole.predict(array, geometry.spacing), first.predict(array, geometry.spacing))


def test_answers_of_two_models_are_not_mixed(small, first, images, tmp_path):
    out, model = tmp_path/'out', small[2]
    first.predict_folder(images, out, progress=False)
    (out/'ct_011.nii.gz').unlink()
    before = stamps(out)
    for other, what in ((Predictor.from_folder(model, folds=1, **QUICK), 'networks'), (Predictor.from_folder(model, folds=0, step_size=1., **QUICK), 'step_size 0.5 there, 1.0 now'),
                        (Predictor.from_folder(model, folds=0, mode='fast', **QUICK), 'mode normal there, fast now')):
        with pytest.raises(PredictionError, match=f'another model.*{what}.*--overwrite'): other.predict_folder(images, out, progress=False)
        assert stamps(out) == before
    other.predict_folder(images, out, overwrite=True, progress=False)
    assert json.loads((out/'made_with.json').read_text())['mode'] == 'fast' and stamps(out)['ct_010.nii.gz'] != before['ct_010.nii.gz']


def test_label_maps_of_unknown_origin_stay_with_a_word(first, images, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    (out/'ct_010.nii.gz').write_bytes(b'mine')
    with pytest.warns(PredictionWarning, match='nothing says who made them'): first.predict_folder(images, out, progress=False)
    assert (out/'ct_010.nii.gz').read_bytes() == b'mine'


def test_overwriting_touches_its_own_cases_only(first, images, tmp_path):
    out = tmp_path/'out'
    first.predict_folder(images, out, progress=False)
    for name in ('ct_010_b.nii.gz', 'ct_010_b.npz', 'notes.txt'): (out/name).write_text('mine')
    first.predict_folder(images, out, overwrite=True, progress=False)
    assert all((out/name).read_text() == 'mine' for name in ('ct_010_b.nii.gz', 'ct_010_b.npz', 'notes.txt'))


def test_parts_share_the_cases_as_in_the_original(first, images, tmp_path):
    for i in range(5): shutil.copy(images/'ct_010_0000.nii.gz', images/f'more_{i}_0000.nii.gz')
    every = ['ct_010', 'ct_011', *(f'more_{i}' for i in range(5))]
    for part in range(3):
        jobs = first._jobs(images, tmp_path/'out', '.nii.gz', None, part, 3)
        assert [j.case for j in jobs] == every[part::3]
    for part, parts in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(PredictionError, match='no such part'): first.predict_folder(images, tmp_path/'out', part_id=part, num_parts=parts)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('n_workers', [0, 1])
def test_a_failing_case_is_named_and_the_others_go_on(first, images, tmp_path, n_workers):
    (images/'ct_010_0000.nii.gz').write_bytes((images/'ct_010_0000.nii.gz').read_bytes()[:2000])
    with pytest.raises(PredictionError, match='1 of 2 cases failed.*(?s:.)*ct_010.*cut short') as caught: first.predict_folder(images, tmp_path/'out', progress=False, n_workers=n_workers)
    assert list(caught.value.failed) == ['ct_010'] and caught.value.written == (tmp_path/'out'/'ct_011.nii.gz',)
    assert names(tmp_path/'out') == ['ct_011.nii.gz', 'made_with.json']


@pytest.mark.parametrize('n_workers', [0, 1])
def test_a_network_or_a_disk_that_fails_in_the_middle(first, images, tmp_path, monkeypatch, n_workers):
    slabs = Predictor.predict_slabs
    def out_of_memory(self, data, *args):
        for k, slab in enumerate(slabs(self, data, *args)):
            if k == 1 and not (tmp_path/'seen').exists():
                (tmp_path/'seen').touch()
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
            yield slab
    monkeypatch.setattr(Predictor, 'predict_slabs', out_of_memory)
    with pytest.raises(PredictionError, match='1 of 2 cases failed(?s:.)*ct_010: OutOfMemoryError.*predict on the CPU'): first.predict_folder(images, tmp_path/'out', progress=False, n_workers=n_workers)
    assert names(tmp_path/'out') == ['ct_011.nii.gz', 'made_with.json']
    monkeypatch.undo()
    save = export.save_label_map
    def full(labels, geometry, file):
        if 'ct_010' in str(file): raise OSError(28, 'No space left on device')
        save(labels, geometry, file)
    monkeypatch.setattr(export, 'save_label_map', full)
    with pytest.raises(PredictionError, match='ct_010: .*No space left'): first.predict_folder(images, tmp_path/'out', overwrite=True, progress=False, n_workers=n_workers)
    assert names(tmp_path/'out') == ['ct_011.nii.gz', 'made_with.json']


@pytest.mark.parametrize('n_workers', [0, 1])
@pytest.mark.parametrize('where', ['read', 'network', 'disk'])
def test_where_every_case_fails_nothing_half_made_stays(small, first, images, tmp_path, monkeypatch, where, n_workers):
    def broken(*_, **__): raise RuntimeError('no luck')
    whole = {f: f.read_bytes() for f in images.iterdir()}
    if where == 'read':
        for f in whole: f.write_bytes(whole[f][:2000])
    elif where == 'network': monkeypatch.setattr(Predictor, 'predict_slabs', lambda self, *_: (broken() for _ in (0,)))
    else: monkeypatch.setattr(export, 'save_label_map', broken) # the probabilities and maps are written before
    how = dict(progress=False, n_workers=n_workers, save_probabilities=True, maps=('entropy',))
    with pytest.raises(PredictionError, match='2 of 2 cases failed') as caught: first.predict_folder(images, tmp_path/'out', **how)
    assert len(caught.value.failed) == 2 and not caught.value.written and names(tmp_path/'out') == []
    monkeypatch.undo()
    for f in whole: f.write_bytes(whole[f])
    Predictor.from_folder(small[2], folds=0, **QUICK | dict(step_size=.9)).predict_folder(images, tmp_path/'out', **how) # another way of asking is not refused
    assert json.loads((tmp_path/'out'/'made_with.json').read_text())['step_size'] == .9 and {'ct_010.nii.gz', 'ct_011.nii.gz', 'ct_011_entropy.nii.gz'} <= set(names(tmp_path/'out'))


def test_a_note_without_answers_binds_nobody(small, first, images, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'made_with.json').write_text('{"mode": "fast"}')
    first.predict_folder(images, tmp_path/'out', progress=False)
    assert json.loads((tmp_path/'out'/'made_with.json').read_text()) == json.loads(json.dumps(first.made_with()))
    first.predict_folder(images, tmp_path/'out', progress=False)


def test_what_others_made_stays_where_all_of_these_fail(first, images, tmp_path):
    first.predict_folder(images, tmp_path/'out', progress=False)
    before = stamps(tmp_path/'out')
    shutil.copy(images/'ct_010_0000.nii.gz', images/'ct_012_0000.nii.gz')
    (images/'ct_012_0000.nii.gz').write_bytes((images/'ct_012_0000.nii.gz').read_bytes()[:2000])
    with pytest.raises(PredictionError, match='1 of 3'): first.predict_folder(images, tmp_path/'out', progress=False)
    assert stamps(tmp_path/'out') == before


def test_ctrl_c_leaves_whole_files_and_the_next_run_completes_them(first, images, tmp_path, monkeypatch):
    slabs = Predictor.predict_slabs
    def interrupted(self, data, *args):
        if (tmp_path/'out'/'ct_010.nii.gz').exists(): raise KeyboardInterrupt
        return slabs(self, data, *args)
    monkeypatch.setattr(Predictor, 'predict_slabs', interrupted)
    with pytest.raises(KeyboardInterrupt): first.predict_folder(images, tmp_path/'out', progress=False)
    assert names(tmp_path/'out') == ['ct_010.nii.gz', 'made_with.json']
    monkeypatch.undo()
    assert len(first.predict_folder(images, tmp_path/'out', progress=False)) == 2


def test_a_folder_that_cannot_be_written(first, images, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    with pytest.raises(OutputError, match='cannot be written'): first.predict_folder(images, tmp_path/'file'/'out', progress=False)


def test_cases_given_by_name(first, images, tmp_path):
    written = first.predict_folder({'anna': [images/'ct_010_0000.nii.gz'], 'bert': {'CT': images/'ct_011_0000.nii.gz'}}, tmp_path/'out', progress=False)
    assert [f.name for f in written] == ['anna.nii.gz', 'bert.nii.gz']


class OnlyLargest:
    "A post-processing: removes label 2 wherever it is"
    def __call__(self, labels, spacing):
        assert len(spacing) == 3
        return np.where(labels == 2, 0, labels)
    def __repr__(self): return 'OnlyLargest()'


def test_postprocessing_is_applied_and_noted(small, images, tmp_path):
    predictor = Predictor.from_folder(small[2], folds=0, postprocess=OnlyLargest().__call__, **QUICK)
    predictor.predict_folder(images, tmp_path/'out', progress=False)
    assert not (read_label_map(tmp_path/'out'/'ct_010.nii.gz')[0] == 2).any()
    assert json.loads((tmp_path/'out'/'made_with.json').read_text())['postprocess'] == 'OnlyLargest()'


# ---- the stage before -----------------------------------------------------------------------------------------------

@pytest.fixture
def cascade(small, tmp_path):
    dataset, plans, _ = small
    one = plans.configuration('3d_fullres')
    plans = dataclasses.replace(plans, configurations={'3d_fullres': one, '3d_lowres': coarse(plans, '3d_lowres'), '3d_cascade_fullres': dataclasses.replace(one, name='3d_cascade_fullres', previous_stage='3d_lowres')})
    return Predictor.from_folder(save_model(tmp_path/'cascade', dataset, plans, '3d_cascade_fullres', folds=(0,)), **QUICK)


def test_the_second_stage_sees_the_first(cascade, images, tmp_path):
    before = tmp_path/'before'
    before.mkdir()
    with pytest.raises(PredictionError, match='needs the label maps of the first.*3d_lowres'): cascade.predict_folder(images, tmp_path/'out', progress=False)
    with pytest.raises(PredictionError, match='2 case.s. have no label map.*ct_010, ct_011'): cascade.predict_folder(images, tmp_path/'out', previous=before, progress=False)
    assert not (tmp_path/'out').exists()
    answers = []
    for value in (0, 1):
        for case in ('ct_010', 'ct_011'):
            geometry = read_geometry(images/f'{case}_0000.nii.gz')
            write_label_map(np.full(geometry.shape, value, np.uint8), geometry, before/f'{case}.nii.gz')
        cascade.predict_folder(images, tmp_path/'out', previous=before, overwrite=True, progress=False)
        answers.append(read_label_map(tmp_path/'out'/'ct_010.nii.gz')[0])
    assert (answers[0] != answers[1]).any()
    array, geometry = read_image(images/'ct_010_0000.nii.gz')
    np.testing.assert_array_equal(cascade.predict(array, geometry.spacing, previous=np.ones(geometry.shape, np.uint8)), answers[1])
    with pytest.raises(SegnbError, match='label map of the stage before does not fit'): cascade.predict(array, geometry.spacing, previous=np.ones((2, 2, 2), np.uint8))
    with pytest.raises(SegnbError, match='does not declare'): cascade.predict(array, geometry.spacing, previous=np.full(geometry.shape, 77, np.uint8))


def test_a_2d_model_takes_one_slice(small):
    dataset, plans, _ = small
    flat = dataclasses.replace(coarse(plans, '2d'), patch_size=(16, 16), num_pool_per_axis=(1, 1), pool_op_kernel_sizes=((2, 2),), conv_kernel_sizes=((3, 3),)*2)
    plans = dataclasses.replace(plans, configurations={'2d': flat})
    predictor = Predictor([build_network(flat, 1, 4)], plans, '2d', dataset.labels, **QUICK)
    assert predictor.predict(np.random.default_rng(0).normal(0, 300, (1, 1, 30, 34)).astype(np.float32), (5., 3., 3.)).shape == (1, 30, 34)
