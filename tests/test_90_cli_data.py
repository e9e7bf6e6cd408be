"""The verbs before training, by the real program: convert, doctor, plan and its edits, preprocess of every configuration."""
import json, shutil

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import ROOT, command, files
from segnb.dataset import Dataset
from segnb.doctor import Report
from segnb.image import read_label_map, write_label_map
from segnb.planning import Plans
from segnb.preprocessing import load_preprocessed

SAMPLE = ROOT/'data_samples'/'Task101_PhantomCT'


def succeeded(said):
    assert said.returncode == 0 and 'Traceback' not in said.stderr, said.stdout + said.stderr
    return said.stdout


@pytest.fixture
def decathlon(ct, tmp_path):
    "The tiny CT task as the Decathlon would store it: one image file a case, no channel number"
    source = tmp_path/'Task77_Tiny'
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (source/part).mkdir(parents=True)
    for file in ct.raw.rglob('*.nii.gz'): shutil.copy(file, source/file.parent.name/file.name.replace('_0000', ''))
    known = json.loads((ct.raw/'dataset.json').read_text(encoding='utf-8'))
    listed = [dict(image=f'./imagesTr/{f.name}', label=f'./labelsTr/{f.name}') for f in sorted((source/'labelsTr').iterdir())]
    (source/'dataset.json').write_text(json.dumps({**known, 'training': listed,
                                                   'test': [f'./imagesTs/{f.name}' for f in sorted((source/'imagesTs').iterdir())]}))
    return source


def test_convert_says_first_and_links_then(segnb, decathlon, tmp_path):
    before = files(decathlon)
    said = succeeded(segnb('convert', 'decathlon', decathlon, tmp_path/'raw', '--dry-run'))
    assert 'ct_000_0000.nii.gz' in said and not (tmp_path/'raw').exists()
    succeeded(segnb('convert', 'decathlon', decathlon, tmp_path/'raw'))
    made = tmp_path/'raw'/'Task077_Tiny'
    assert Dataset(made).cases == tuple(f'ct_00{i}' for i in range(5)) and all(f.is_symlink() for f in (made/'imagesTr').iterdir())
    assert files(decathlon) == before
    again = segnb('convert', 'decathlon', decathlon, tmp_path/'raw')
    assert again.returncode == 2 and 'Task077_Tiny' in again.stderr and 'Traceback' not in again.stderr


def test_convert_pairs_with_classes_and_plan_what_came_out(ct, segnb, tmp_path):
    heap = tmp_path/'heap'
    heap.mkdir()
    for case in Dataset(ct.raw).cases:
        shutil.copy(ct.raw/'imagesTr'/f'{case}_0000.nii.gz', heap/f'{case}_ct.nii.gz')
        labels, geometry = read_label_map(ct.raw/'labelsTr'/f'{case}.nii.gz')
        write_label_map(np.array([0, 205, 420, 500])[labels], geometry, heap/f'{case}_seg.nii.gz')  # the hospital's own numbers
    work = tmp_path/'w'
    succeeded(segnb('convert', 'pairs', heap, heap, work/'raw'/'Task078_Heap', '--pattern', '{case}_ct.nii.gz', '--label-pattern', '{case}_seg.nii.gz',
                      '--channels', 'CT', '--classes', 'background=0', 'organ=205', 'lesion=420', 'other=500'))
    succeeded(segnb('plan', '78', '-w', work))
    succeeded(segnb('preprocess', '78', '-w', work, '-c', '3d_fullres'))
    cases = load_preprocessed(work/'preprocessed'/'Task078_Heap'/'3d_fullres')
    assert set(np.unique(cases['ct_000'].seg)) <= {-1, 0, 1, 2, 3} and set(cases['ct_000'].class_locations) == {1, 2, 3}


@pytest.mark.parametrize('args, words', [
    (('decathlon', 'nowhere', 'out'), ['nowhere', 'not there']),
    (('pairs', '.', '.', 'out', '--classes', 'liver'), ['liver', 'NAME=NUMBER']),
    (('zip', 'a', 'b'), ['zip', 'decathlon'])])
def test_conversions_that_cannot_be(args, words, tmp_path):
    said = command('convert', *args, cwd=tmp_path)
    assert said.returncode == 2 and 'Traceback' not in said.stderr and all(w in said.stderr for w in words), said.stderr
    assert not list(tmp_path.iterdir())


def test_the_doctor_names_mends_and_takes_back(ct, segnb, tmp_path):
    raw = tmp_path/'Task079_Sick'
    shutil.copytree(ct.raw, raw)
    file = raw/'labelsTr'/'ct_001.nii.gz'
    labels, geometry = read_label_map(file)
    labels[2, 3:6, 3:6] = 9
    write_label_map(labels, geometry, file)
    said = segnb('doctor', raw, '--json', tmp_path/'found.json', '--html', tmp_path/'found.html', '--repair', tmp_path/'Task080_Mended', '--map', '9=0', '-q')
    assert said.returncode == 1 and 'ct_001' in said.stdout and 'Traceback' not in said.stderr, said.stderr
    assert any(f.case == 'ct_001' for f in Report.load(tmp_path/'found.json').findings) and '<img' in (tmp_path/'found.html').read_text(encoding='utf-8')
    assert (read_label_map(file)[0] == 9).any()                                    # the source is as it was
    assert not (read_label_map(tmp_path/'Task080_Mended'/'labelsTr'/'ct_001.nii.gz')[0] == 9).any()
    succeeded(segnb('doctor', tmp_path/'Task080_Mended', '-q'))
    succeeded(segnb('doctor', tmp_path/'Task080_Mended', '--undo'))
    back, grid = read_label_map(tmp_path/'Task080_Mended'/'labelsTr'/'ct_001.nii.gz')
    assert (back == labels).all() and grid == read_label_map(file)[1]


def test_a_plan_that_fails_points_to_the_doctor(ct, segnb, tmp_path):
    raw = tmp_path/'Task081_Sick'
    shutil.copytree(ct.raw, raw)
    (raw/'imagesTr'/'ct_002_0000.nii.gz').write_bytes(b'')
    said = segnb('plan', raw, '-w', tmp_path/'w')
    assert said.returncode == 2 and 'ct_002' in said.stderr and f'segnb doctor {raw}' in said.stderr
    assert 'plans.json' not in files(tmp_path/'w')


def test_plan_for_more_memory_by_presets_and_after_another_data_set(ct, segnb, tmp_path):
    def planned(*args):
        succeeded(segnb('plan', ct.raw, '-w', tmp_path, *args))
        return Plans.load(tmp_path/'preprocessed'/ct.raw.name/'plans.json')
    small, large = (planned('--memory-gb', gb) for gb in (4, 80))
    def cost(p): return np.prod(p.configuration('3d_fullres').patch_size) * p.configuration('3d_fullres').batch_size
    assert cost(small) <= cost(large) and (small.memory_gb, large.memory_gb) == (4, 80)
    residual = planned('--planner', 'resenc_l')
    assert residual.configuration('3d_fullres').architecture == 'residual_v2' and residual.memory_gb == 24
    imposed = planned('--overwrite-plans', ct.preprocessed/'plans.json')
    mine = Plans.load(ct.preprocessed/'plans.json').configuration('3d_fullres')
    assert imposed.configuration('3d_fullres').patch_size == mine.patch_size and imposed.configuration('3d_fullres').spacing == mine.spacing


def test_edit_and_draw_a_plan(ct, segnb, tmp_path):
    succeeded(segnb('plan', ct.raw, '-w', tmp_path))
    out = tmp_path/'preprocessed'/ct.raw.name
    before = Plans.load(out/'plans.json')
    said = succeeded(segnb('plan', ct.raw.name, '-w', tmp_path, '--edit', '3d_fullres', 'batch_size=3', '--draw'))
    after = Plans.load(out/'plans.json')
    assert after.configuration('3d_fullres').batch_size == 3 != before.configuration('3d_fullres').batch_size and 'batch_size' in said
    assert after.identity('3d_fullres') != before.identity('3d_fullres') and after.identity('2d') == before.identity('2d')
    assert {'fingerprint.png', 'plan_2d.png', 'plan_3d_fullres.png'} <= files(out)
    for change in ('patch_size=1000,1000,1000', 'colour=3', 'batch_size'):
        refused = segnb('plan', ct.raw.name, '-w', tmp_path, '--edit', '3d_fullres', change)
        assert refused.returncode == 2 and 'Traceback' not in refused.stderr and change.split('=')[0].split('_')[0] in refused.stderr, refused.stderr
    assert Plans.load(out/'plans.json').to_dict() == after.to_dict()


def test_every_configuration_is_preprocessed_and_damage_is_mended(ct, segnb, tmp_path):
    out = tmp_path/'preprocessed'/ct.raw.name
    succeeded(segnb('plan', ct.raw, '-w', tmp_path, '--memory-gb', 8))
    said = succeeded(segnb('preprocess', ct.raw.name, '-w', tmp_path))
    assert '2d' in said and set(load_preprocessed(out/'2d')) == set(load_preprocessed(out/'3d_fullres')) == set(Dataset(ct.raw).cases)
    victim = out/'3d_fullres'/'ct_002_data.npy'
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    again = segnb('preprocess', ct.raw.name, '-w', tmp_path)
    assert again.returncode == 0 and 'ct_002_data.npy' in again.stderr and 'Warning' not in again.stderr, again.stderr
    assert victim.read_bytes() == whole


def test_other_formats_go_all_the_way(ct, segnb, tmp_path):
    raw = tmp_path/'Task083_Nrrd'
    for part in ('imagesTr', 'labelsTr'): (raw/part).mkdir(parents=True)
    for case in Dataset(ct.raw).cases:
        sitk.WriteImage(sitk.ReadImage(str(ct.raw/'imagesTr'/f'{case}_0000.nii.gz')), str(raw/'imagesTr'/f'{case}_0000.nrrd'))
        sitk.WriteImage(sitk.ReadImage(str(ct.raw/'labelsTr'/f'{case}.nii.gz')), str(raw/'labelsTr'/f'{case}.mha'))
    (raw/'dataset.json').write_text(json.dumps({'channel_names': {'0': 'CT'}, 'labels': {'background': 0, 'organ': 1, 'lesion': 2, 'other': 3},
                                                'file_ending': '.nrrd'}))
    succeeded(segnb('doctor', raw, '-q'))
    succeeded(segnb('plan', raw, '-w', tmp_path))
    succeeded(segnb('preprocess', raw.name, '-w', tmp_path, '-c', '3d_fullres'))
    mine, same = (load_preprocessed(w/'preprocessed'/t/'3d_fullres')['ct_001'] for w, t in ((tmp_path, raw.name), (ct.workspace, ct.raw.name)))
    assert (np.asarray(mine.seg) == np.asarray(same.seg)).all() and np.abs(mine.data - same.data).max() < 1e-5
    assert {f.suffix for f in (tmp_path/'preprocessed'/raw.name/'gt_segmentations').iterdir()} == {'.mha'}
