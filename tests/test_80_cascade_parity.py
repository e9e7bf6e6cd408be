"""Cascade: with the original's weights, the maps handed on and the answers of both stages are the original's."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.cascade import CascadePredictor, prepare_next_stage
from segnb.checkpoints import save_checkpoint
from segnb.dataset import Dataset
from segnb.image import Geometry, write_image, write_label_map
from segnb.network import v1_key_map
from segnb.planning import Plans
from segnb.preprocessing import load_preprocessed, preprocess_dataset
from segnb.workers import write_json

torch.set_num_threads(1)
RECORDED = np.load(Path(__file__).parent/'recorded'/'80_cascade.npz')
ABOUT = json.loads(str(RECORDED['about']))
CASES = ['c0', 'c1', 'c2', 'c3']
EXACT = dict(device='cpu', precision='fp32')


def plans():
    "The plan that the original was given, in our words"
    found = {}
    for name, stage, before in (('3d_lowres', '0', None), ('3d_fullres', '1', None), ('3d_cascade_fullres', '1', '3d_lowres')):
        s = ABOUT['stages'][stage]
        found[name] = dict(name=name, patch_size=s['patch_size'], batch_size=2, spacing=s['current_spacing'], median_shape=s['median_patient_size_in_voxels'], num_pool_per_axis=s['num_pool_per_axis'],
                           pool_op_kernel_sizes=s['pool_op_kernel_sizes'], conv_kernel_sizes=s['conv_kernel_sizes'], do_dummy_2d_data_aug=False, base_num_features=ABOUT['base_num_features'],
                           max_num_features=320, batch_dice=stage == '1', previous_stage=before)
    return Plans('Task001_Cascade', 'hand', 8, ['MRI'], [1, 2], ABOUT['spacing'], ABOUT['transpose_forward'], ABOUT['transpose_backward'], ['nonCT'], [True], None, found, {})


def model(folder, name, part, plan, description):
    "A model folder with weights of the original"
    keys = v1_key_map(2)
    weights = {keys[k[len(part) + 1:]]: torch.from_numpy(RECORDED[k]) for k in RECORDED if k.startswith(f'{part}/') and k[len(part) + 1:] in keys}
    assert len(weights) == sum(k.startswith(f'{part}/') for k in RECORDED)
    (folder/name/'fold_all').mkdir(parents=True)
    save_checkpoint(dict(format='segnb checkpoint 1', plans=plan.to_dict(), plans_identity=plan.identity(name), configuration=name, fold='all', epoch=2, network=weights, train_cases=CASES, val_cases=CASES),
                    folder/name/'fold_all'/'checkpoint_final.pt')
    plan.save(folder/name/'plans.json')
    write_json(description, folder/name/'dataset.json')


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "Data set, preprocessed folder and models of both stages"
    folder = tmp_path_factory.mktemp('cascade')
    for case in CASES:
        image = RECORDED[f'image/{case}']
        geometry = Geometry(tuple(ABOUT['spacing']), (0., 0., 0.), (1., 0., 0., 0., 1., 0., 0., 0., 1.), image.shape)
        for part, array, write in (('images', image, write_image), ('labels', RECORDED[f'label/{case}'], write_label_map)):
            (folder/'Task001_Cascade'/f'{part}Tr').mkdir(parents=True, exist_ok=True)
            write(array, geometry, folder/'Task001_Cascade'/f'{part}Tr'/(f'{case}_0000.nii.gz' if part == 'images' else f'{case}.nii.gz'))
    write_json({'modality': {'0': 'MRI'}, 'labels': {'0': 'background', '1': 'one', '2': 'two'}, 'training': [{'image': f'./imagesTr/{c}.nii.gz', 'label': f'./labelsTr/{c}.nii.gz'} for c in CASES]}, folder/'Task001_Cascade'/'dataset.json')
    dataset, plan = Dataset(folder/'Task001_Cascade'), plans()
    preprocess_dataset(dataset, plan, folder/'pre', ['3d_lowres', '3d_cascade_fullres'], n_workers=0)
    for name, part in (('3d_lowres', 'low'), ('3d_cascade_fullres', 'high')): model(folder/'models', name, part, plan, dataset.json)
    return folder


def test_the_maps_handed_on_are_those_of_the_original(both):
    assert prepare_next_stage(both/'pre', both/'models'/'3d_lowres', ['all'], progress=False, **EXACT) == tuple(CASES)
    for case in CASES:
        ours, theirs = load_preprocessed(both/'pre'/'3d_fullres')[case].previous, RECORDED[f'previous/{case}']
        assert ours.shape == theirs.shape and set(np.unique(theirs)) == {0, 1, 2}
        assert (ours != theirs).sum() <= 1, f'{(ours != theirs).sum()} voxels differ, more than ties'


def predictor(both): return CascadePredictor.from_folder(both/'models'/'3d_cascade_fullres', folds=['all'], **EXACT)


def answers(both, name):
    high, low = predictor(both).predict(RECORDED[f'image/{name}'][None].astype(np.float32), ABOUT['spacing'], return_first=True)
    return {'low': low, 'high': high}


def test_both_stages_answer_as_the_original_where_nothing_is_cropped(both):
    for stage, ours in answers(both, 'whole').items(): assert (ours != RECORDED[f'answer/whole/{stage}']).sum() <= 2


def test_a_cropped_image_is_answered_as_by_the_original_with_the_right_box(both):
    found = answers(both, 'cropped')
    assert (found['low'] != RECORDED['answer/cropped/low']).sum() <= 2
    assert (found['high'] != RECORDED['answer/cropped/high_boxed']).sum() <= 2
    assert (RECORDED['answer/cropped/high'] != RECORDED['answer/cropped/high_boxed']).sum() > 20  # the defect is no small thing


def test_a_plan_that_asks_for_the_originals_way_gets_its_answer(both):
    cascade = predictor(both)
    second = cascade.second
    second.configuration = replace(second.configuration, previous_whole=True)
    second.plans = replace(second.plans, configurations=second.plans.configurations | {second.configuration.name: second.configuration})
    found = cascade.predict(RECORDED['image/cropped'][None].astype(np.float32), ABOUT['spacing'])
    assert (found != RECORDED['answer/cropped/high']).sum() <= 2


def test_files_give_the_same_as_arrays(both, tmp_path):
    image = RECORDED['image/cropped']
    geometry = Geometry(tuple(ABOUT['spacing']), (0., 0., 0.), (1., 0., 0., 0., 1., 0., 0., 0., 1.), image.shape)
    (tmp_path/'in').mkdir()
    write_image(image, geometry, tmp_path/'in'/'x_0000.nii.gz')
    expected = answers(both, 'cropped')
    cascade = predictor(both)
    assert np.array_equal(cascade.predict_files([tmp_path/'in'/'x_0000.nii.gz'], tmp_path/'high.nii.gz', first_file=tmp_path/'low.nii.gz'), expected['high'])
    [file] = cascade.predict_folder(tmp_path/'in', tmp_path/'out', progress=False)
    assert file.read_bytes() == (tmp_path/'high.nii.gz').read_bytes()
    assert (tmp_path/'out'/'3d_lowres_predictions'/'x.nii.gz').read_bytes() == (tmp_path/'low.nii.gz').read_bytes()
