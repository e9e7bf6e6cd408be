"""From networks to a decision by the command: options of predict, failed cases, what is decided, answers for programs, the table from v1, completion."""
import json, shlex, shutil, subprocess, sys
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT, command, files
from segnb import cli
from segnb.image import read_label_map, write_label_map

FEW = ('--device', 'cpu', '-q', '-j', 0)


def succeeded(said):
    assert said.returncode == 0 and 'Traceback' not in said.stderr, said.stdout + said.stderr
    return said.stdout


def maps(folder): return {f.name: read_label_map(f)[0] for f in sorted(folder.glob('*.nii.gz'))}


def same(a, b): return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


@pytest.fixture(scope='session')
def pair(ct, tmp_path_factory):
    "The tiny CT task with two configurations, one fold each"
    work = tmp_path_factory.mktemp('pair')
    shutil.copytree(ct.workspace, work, dirs_exist_ok=True)
    said = command('train', ct.raw.name, 0, '-w', work, '-c', '2d', '--epochs', 1, '--iterations', 2, '--val-iterations', 1, '--no-validation', '--device',
                   'cpu', '-q', '-j', 0)
    assert said.returncode == 0, said.stderr
    return SimpleNamespace(raw=ct.raw, workspace=work, models=work/'models'/ct.raw.name, model=work/'models'/ct.raw.name/'3d_fullres')


def predict(segnb, ct, out, *more): return segnb('predict', '-i', ct.raw/'imagesTs', '-o', out, '-m', ct.model, *FEW, *more)


@pytest.mark.parametrize('args, made', [
    (('--step-size', 1, '--disable-tta', '--save-probabilities'), dict(step_size=1, mirror_axes=[])),
    (('--mirror-axes', 2, 1, '--mode', 'fast', '--batch-size', 3, '--precision', 'fp32'), dict(mirror_axes=[2, 1], mode='fast', precision='fp32')),
    (('--mirror-axes', 'left-right', '--mode', 'fastest', '--checkpoint', 'best', '-f', 0), dict(mirror_axes=['left-right'], mode='fastest')),
    (('--whole-image', '--disable-tta', '--export-order', 0, '--accumulate', 'cpu'), dict(whole_image=True, export_order=0))])
def test_options_of_predict_reach_the_network(ct, segnb, tmp_path, args, made):
    said = predict(segnb, ct, tmp_path/'out', *args)
    succeeded(said)
    noted = json.loads((tmp_path/'out'/'made_with.json').read_text(encoding='utf-8'))
    assert {k: noted[k] for k in made} == made and len(maps(tmp_path/'out')) == 2
    assert ('dataset.json' in files(tmp_path/'out')) == ('--save-probabilities' in args) == bool(list((tmp_path/'out').glob('*.npz')))


def test_parts_share_the_cases(ct, segnb, tmp_path):
    written = [json.loads(succeeded(predict(segnb, ct, tmp_path/'out', '--part-id', i, '--num-parts', 2, '--json', '-')))['label_maps'] for i in (0, 1)]
    assert [len(w) for w in written] == [1, 1] and same(maps(tmp_path/'out'), maps(ct.predictions))
    said = predict(segnb, ct, tmp_path/'out', '--part-id', 2, '--num-parts', 2)
    assert said.returncode == 2 and 'part 2 of 2' in said.stderr


def test_maps_are_images_of_their_own(ct, segnb, tmp_path):
    succeeded(predict(segnb, ct, tmp_path/'out', '--maps', 'entropy', 'margin', '--disable-tta'))
    assert sum('entropy' in f for f in files(tmp_path/'out')) == 2 == sum('margin' in f for f in files(tmp_path/'out'))


def test_a_failed_case_is_named_the_others_are_there_and_the_status_is_1(ct, segnb, tmp_path):
    images = shutil.copytree(ct.raw/'imagesTs', tmp_path/'in')
    bad, good = (f.name.removesuffix('_0000.nii.gz') for f in sorted(images.iterdir()))
    (images/f'{bad}_0000.nii.gz').write_bytes(b'no image')
    said = segnb('predict', '-i', images, '-o', tmp_path/'out', '-m', ct.model, *FEW, '--json', '-')
    answer = json.loads(said.stdout)
    assert said.returncode == 1 and bad in said.stderr and 'Traceback' not in said.stderr
    assert list(answer['failed']) == [bad] and [f.split('/')[-1] for f in answer['label_maps']] == [f'{good}.nii.gz']
    assert list(maps(tmp_path/'out')) == [f'{good}.nii.gz'] and (maps(tmp_path/'out')[f'{good}.nii.gz'] == maps(ct.predictions)[f'{good}.nii.gz']).all()


def test_what_is_stored_with_a_model_is_applied_unless_told_otherwise(ct, segnb, tmp_path):
    model = shutil.copytree(ct.model, tmp_path/'model')
    ask = lambda out, *more: segnb('predict', '-i', ct.raw/'imagesTs', '-o', tmp_path/out, '-m', model, *FEW, *more)
    (tmp_path/'other.json').write_text(json.dumps({'for_which_classes': [1, 2, 3]}))         # as nnU-Net v1 writes it
    shutil.copy(tmp_path/'other.json', model/'postprocessing.json')
    assert 'postprocessing.json' in succeeded(ask('cleaned'))
    succeeded(ask('plain', '--no-postprocessing'))
    assert same(maps(tmp_path/'plain'), maps(ct.predictions))
    succeeded(segnb('postprocess', 'apply', '-i', tmp_path/'plain', '-o', tmp_path/'after', model/'postprocessing.json', '-q', '-j', 0))
    assert same(maps(tmp_path/'after'), maps(tmp_path/'cleaned'))
    (model/'postprocessing.json').unlink()
    succeeded(ask('named', '--postprocessing', tmp_path/'other.json'))
    assert same(maps(tmp_path/'named'), maps(tmp_path/'cleaned'))


def test_the_first_stage_of_a_cascade_is_predicted_before_the_second(tmp_path, monkeypatch):
    asked = []
    class Fake:
        def __init__(self, model): self.configuration = SimpleNamespace(previous_stage='3d_lowres' if 'cascade' in str(model) else None)
        @classmethod
        def from_folder(cls, model, **options): return cls(model)
        def predict_folder(self, source, out, ending, **options):
            asked.append((str(out.relative_to(tmp_path)), options.get('previous'), options.get('part_id'), options.get('save_probabilities')))
            return []
    import segnb.prediction
    monkeypatch.setattr(segnb.prediction, 'Predictor', Fake)
    for name in ('3d_cascade_fullres', '3d_lowres'):
        (tmp_path/'models'/'T'/name).mkdir(parents=True)
        (tmp_path/'models'/'T'/name/'dataset.json').write_text('{}')
    said = []
    cli.predict('in', tmp_path/'out', tmp_path/'models'/'T'/'3d_cascade_fullres', say=said.append, part_id=1, num_parts=2, save_probabilities=True)
    first = tmp_path/'out'/'3d_lowres_predictions'
    assert asked == [('out/3d_lowres_predictions', None, 1, None), ('out', first, 1, True)] and '3d_lowres' in said[0]
    asked.clear()
    cli.predict('in', tmp_path/'out', tmp_path/'models'/'T'/'3d_cascade_fullres', say=said.append, previous='there')
    assert asked == [('out', 'there', None, None)]


def test_a_failed_case_of_the_first_stage_does_not_stop_the_others_in_the_second(ct, tmp_path, monkeypatch):
    import segnb.prediction
    from segnb.planning import Plans
    images = shutil.copytree(ct.raw/'imagesTs', tmp_path/'in')
    bad, good = sorted(f.name.removesuffix('_0000.nii.gz') for f in images.iterdir())
    asked = []
    class Fake:
        plans = Plans.load(ct.model/'plans.json')
        def __init__(self, model): self.configuration = SimpleNamespace(previous_stage='3d_lowres' if 'cascade' in str(model) else None)
        @classmethod
        def from_folder(cls, model, **options): return cls(model)
        def predict_folder(self, source, out, ending, **options):
            asked.append((list(source) if isinstance(source, dict) else source, options.get('num_parts')))
            if self.configuration.previous_stage: return [out/f'{case}.nii.gz' for case in source]
            error = segnb.prediction.PredictionError('1 of 2 cases failed')
            error.failed, error.written = {bad: f'{bad}: no image'}, (out/f'{good}.nii.gz',)
            raise error
    monkeypatch.setattr(segnb.prediction, 'Predictor', Fake)
    for name in ('3d_cascade_fullres', '3d_lowres'):
        (tmp_path/'models'/name).mkdir(parents=True)
        shutil.copy(ct.model/'dataset.json', tmp_path/'models'/name)
    with pytest.raises(segnb.prediction.PredictionError, match='1 of 2 cases failed') as said:
        cli.predict(images, tmp_path/'out', tmp_path/'models'/'3d_cascade_fullres', say=lambda text: None, part_id=0, num_parts=1)
    assert asked == [(images, 1), ([good], None)] and list(said.value.failed) == [bad] and said.value.written == (tmp_path/'out'/f'{good}.nii.gz',)


@pytest.mark.parametrize('args, words', [(('--mode', 'fast', '--save-probabilities'), 'forgets probabilities'), (('--previous', '.'), 'no second stage'),
                                         (('--batch-size', 0), 'whole number from 1'), (('--export-order', 9), 'choose from 0, 1, 2, 3'),
                                         (('--no-postprocessing', '--postprocessing', 'x.json'), 'not allowed with'),
                                         (('--disable-tta', '--mirror-axes', 1), 'not allowed with')])
def test_options_of_predict_that_cannot_be_leave_nothing(ct, segnb, capsys, tmp_path, args, words):
    try: said = predict(segnb, ct, tmp_path/'out', *args)
    except SystemExit as stop: said = SimpleNamespace(returncode=stop.code, stderr=capsys.readouterr().err)
    assert said.returncode == 2 and words in said.stderr.replace("'", '') and not files(tmp_path)


def test_label_maps_are_not_written_among_the_images(ct, segnb):
    said = predict(segnb, ct, ct.raw/'imagesTs')
    assert said.returncode == 2 and 'holds the images' in said.stderr and len(files(ct.raw/'imagesTs')) == 2


@pytest.mark.parametrize('args, words', [(('--planner', 'nnunet'), 'no such planner'), (('--overwrite-plans', 'nowhere.json'), 'nowhere.json')])
def test_a_slip_in_a_line_for_a_plan_shows_before_the_data_is_read(ct, segnb, tmp_path, args, words):
    said = segnb('plan', ct.raw, '-w', tmp_path/'w', '-j', 0, *args)
    assert said.returncode == 2 and words in said.stderr and not said.stdout and not (tmp_path/'w').exists()


def test_scores_of_all_kinds_and_what_they_are_compared_with(ct, segnb, tmp_path):
    reference, worse = ct.raw/'labelsTr', tmp_path/'worse'
    worse.mkdir()
    for file in sorted(reference.iterdir()):
        labels, geometry = read_label_map(file)
        write_label_map(np.roll(labels, 1, 1), geometry, worse/file.name)
    shared = ('-r', reference, '-p', worse, '-q', '-j', 0)
    said = succeeded(segnb('evaluate', *shared, '-o', tmp_path/'all.json', '--metrics', 'all', '--tolerance', 3, '--connectivity', 6, '--convention',
                           'absent=1', '--v1-summary', tmp_path/'v1.json'))
    result = json.loads((tmp_path/'all.json').read_text(encoding='utf-8'))
    assert {'hd95', 'surface_dice', 'lesion_f1'} <= set(result['mean']['1']) and result['settings']['tolerance_mm'] == 3
    assert result['settings']['absent'] == 1 and 'hd95' in said
    v1 = json.loads((tmp_path/'v1.json').read_text(encoding='utf-8'))
    assert abs(v1['results']['mean']['1']['Dice'] - result['mean']['1']['dice']) < 1e-9 and v1['results']['all'][0]['test'].startswith(str(worse))
    one = json.loads(succeeded(segnb('evaluate', *shared, '-o', tmp_path/'one.json', '-l', 1, '--cases', 'ct_001', '--json', '-')))
    assert list(one['cases']) == ['ct_001'] and list(one['labels']) == ['1'] and not (worse/'summary.json').exists()
    answer = json.loads(succeeded(segnb('evaluate', *shared, '--compare', reference, '--picture', tmp_path/'c.png', '--json', '-')))
    assert answer['names'] == ['labelsTr', 'worse'] and answer['rows']['foreground']['difference'] < 0 and (tmp_path/'c.png').stat().st_size > 5000


@pytest.mark.parametrize('args, words', [(('-l', 'a', 'b'), 'one dataset.json or numbers'), (('--convention', 'absent=x'), 'absent=NUMBER'),
                                         (('--metrics', 'dyce'), 'dyce'), (('--picture', 'x.png'), '--compare')])
def test_scores_that_cannot_be_had(ct, segnb, capsys, args, words):
    try: said = segnb('evaluate', '-r', ct.raw/'labelsTr', '-p', ct.raw/'labelsTr', '-q', *args)
    except SystemExit as stop: said = SimpleNamespace(returncode=stop.code, stderr=capsys.readouterr().err)
    assert said.returncode == 2 and words in said.stderr and not (ct.raw/'labelsTr'/'summary.json').exists()


def test_the_whole_way_from_folds_to_a_chosen_prediction(pair, segnb, tmp_path):
    "select makes what is missing, and the lines it prints predict with the choice"
    name, where = pair.raw.name, ('-w', pair.workspace, '-f', 0)
    said = segnb('postprocess', 'determine', name, *where, '-q', '-j', 0, '--json', '-')
    assert json.loads(succeeded(said))['postprocessing'] == json.loads((pair.model/'postprocessing.json').read_text(encoding='utf-8'))
    assert (pair.model/'cross_validation.json').exists()
    answer = json.loads(succeeded(segnb('select', name, *where, *FEW, '--json', tmp_path/'answer.json'))
                        and (tmp_path/'answer.json').read_text(encoding='utf-8'))
    assert [c['name'] for c in answer['candidates']] == ['2d', '3d_fullres', '2d+3d_fullres'] and answer['chosen'] in said.stdout + answer['chosen']
    assert list((pair.models/'2d'/'fold_0'/'validation').glob('*.npz')) and (pair.models/'selection.json').exists()
    single = segnb('select', name, *where, *FEW, '--no-ensembling', '--no-postprocessing', '-c', '2d', '3d_fullres')
    assert 'segnb predict' in succeeded(single) and '+' not in [line for line in single.stdout.splitlines() if '->' in line][0]
    parts = []
    for configuration in ('2d', '3d_fullres'): # the lines of a chosen ensemble
        parts.append(tmp_path/'out'/configuration)
        succeeded(segnb('predict', '-i', pair.raw/'imagesTs', '-o', parts[-1], '-d', name, '-w', pair.workspace, '-c', configuration, *FEW, '--disable-tta',
                        '--save-probabilities', '--no-postprocessing'))
    answer = json.loads(succeeded(segnb('ensemble', *parts, '-o', tmp_path/'out'/'both', '--postprocessing', pair.model/'postprocessing.json',
                                        '--save-probabilities', '-q', '-j', 0, '--json', '-')))
    assert len(answer['label_maps']) == 2 == len(maps(tmp_path/'out'/'both'))
    succeeded(segnb('ensemble', *parts, '-o', tmp_path/'out'/'first', '--weights', 1, 0, '-q', '-j', 0))
    for name, alone in maps(parts[0]).items(): assert (maps(tmp_path/'out'/'first')[name] == alone).mean() > .98  # kept as float16: ties may fall otherwise


def test_the_lines_that_select_prints_can_be_run(pair, segnb, tmp_path):
    from segnb.selection import Selection
    if not (pair.models/'selection.json').exists(): succeeded(segnb('select', pair.raw.name, '-w', pair.workspace, '-f', 0, *FEW))
    for line in Selection.load(pair.models).commands(pair.raw/'imagesTs', tmp_path/'new'):
        words = shlex.split(line)
        assert words[0] == 'segnb'
        succeeded(segnb(*words[1:], *(FEW[:2] if words[1] == 'predict' else ()), '-q'))
    assert any(len(maps(folder)) == 2 for folder in (tmp_path/'new', tmp_path/'new'/'ensemble'))


def test_a_page_of_a_model_and_of_a_data_set(pair, segnb, tmp_path):
    page = json.loads(succeeded(segnb('report', pair.raw.name, '-w', pair.workspace, '-c', '3d_fullres', '-o', tmp_path/'model.html', '--title', 'Mine',
                                      '--json', '-')))['report']
    assert page == str(tmp_path/'model.html') and '<title>Mine' in (tmp_path/'model.html').read_text(encoding='utf-8')
    succeeded(segnb('report', pair.raw, '-o', tmp_path/'data.html'))
    assert (tmp_path/'data.html').stat().st_size > 10_000
    said = segnb('report', pair.raw.name, '-w', pair.workspace, '-c', '3d_lowres')
    assert said.returncode == 2 and '3d_lowres' in said.stderr and '2d, 3d_fullres' in said.stderr


def test_pictures_of_cases(ct, segnb, tmp_path):
    succeeded(segnb('overlay', ct.raw, '-o', tmp_path/'all', '-q'))
    assert files(tmp_path/'all') == {f'ct_{i:03d}.png' for i in range(5)}
    answer = json.loads(succeeded(segnb('overlay', ct.raw, '-o', tmp_path/'held', '--prediction', ct.fold/'validation', '-q', '--json', '-')))
    assert len(answer['pictures']) == 1 and len(files(tmp_path/'held')) == 1
    for wrong, words in ((('--channel', 1), 'no channel 1'), (('--prediction', ct.predictions), 'no label map of a training case')):
        said = segnb('overlay', ct.raw, '-o', tmp_path/'none', '-q', *wrong)
        assert said.returncode == 2 and words in said.stderr and not files(tmp_path).intersection({'none'})


def test_answers_for_programs_are_json_and_nothing_else(ct, segnb, tmp_path):
    plan = json.loads(succeeded(segnb('plan', ct.raw, '-w', tmp_path, '--planner', 'cpu', '-j', 0, '--json', '-')))
    assert plan['plans'] == json.loads((tmp_path/'preprocessed'/ct.raw.name/'plans.json').read_text(encoding='utf-8'))
    findings = segnb('doctor', ct.raw, '-q', '-j', 0, '--json', '-')
    assert findings.returncode == 0 and json.loads(findings.stdout)['counts']['error'] == 0 and findings.stderr
    succeeded(segnb('doctor', ct.raw, '-q', '-j', 0, '--json', tmp_path/'findings.json'))
    assert json.loads((tmp_path/'findings.json').read_text(encoding='utf-8')) == json.loads(findings.stdout)
    shutil.copytree(ct.workspace, tmp_path, dirs_exist_ok=True)
    answer = json.loads(succeeded(segnb('train', ct.raw.name, 0, '-w', tmp_path, '--validation-only', '--continue', '--device', 'cpu', '-q', '--json', '-')))
    assert answer['validation']['mean'] == json.loads((ct.fold/'validation'/'summary.json').read_text(encoding='utf-8'))['mean']
    assert answer['model'].endswith('3d_fullres')


def test_the_recorded_flags_of_v1_are_all_in_the_table():
    known = json.loads((ROOT/'tests'/'recorded'/'90_cli.json').read_text(encoding='utf-8'))['flags']
    assert len(known) == 18 and {c: set(flags) for c, (_, flags) in cli.V1.items() if c != 'variables'} == {c: set(flags) for c, flags in known.items()}


@pytest.mark.parametrize('v1', cli.V1)
def test_each_form_of_the_table_is_a_line_or_a_reason(v1, capsys):
    known = cli.parser()
    for flag in ('', *cli.V1[v1][1]):
        said = cli.v1_form(v1, flag)
        if said.startswith('segnb '): assert callable(known.parse_args(said.split(';')[0].split()[1:]).run)
        else: assert said.startswith(('not needed', 'not yet')) and len(said) > 20
    assert cli.main(['v1', v1]) == 0 and capsys.readouterr().out.startswith(f'{v1}: ')


def test_a_line_of_v1_can_be_pasted(segnb):
    said = succeeded(segnb('v1', 'nnUNet_train', '3d_fullres', 'nnUNetTrainerV2', '4', '0', '--npz'))
    assert said.splitlines()[0] == 'nnUNet_train: segnb train 4 0' and 'nnUNet_train_DP' not in said and '--save-probabilities' in said
    assert '--find-lr' not in said
    wrong = segnb('v1', 'nnUNet_predict', '-i', 'IN', '--foo')
    assert wrong.returncode == 2 and 'has no --foo' in wrong.stderr


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_bash_completes_every_verb_and_every_option():
    script = cli.completion('bash')
    lines = [['segnb', ''], *(['segnb', verb, '--'] for verb in cli._VERBS), ['segnb', 'convert', 'pairs', '--'], ['segnb', 'predict', '--mode', '']]
    asked = '\n'.join(f'COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _shtab_segnb; echo "${{COMPREPLY[@]}}"' for words in lines)
    said = subprocess.run(['bash', '-c', f'{script}\n{asked}'], capture_output=True, text=True)
    offered = [set(line.split()) for line in said.stdout.splitlines()]
    assert not said.stderr and set(cli._VERBS) <= offered[0] and {'normal', 'fast', 'fastest'} <= offered[-1] and {'--pattern', '--classes'} <= offered[-2]
    for verb, options in zip(cli._VERBS, offered[1:]):
        own = {o for action in cli.parser()._subparsers._group_actions[0].choices[verb]._actions for o in action.option_strings if o.startswith('--')}
        assert own <= options, verb


@pytest.mark.parametrize('shell', ['zsh', 'tcsh'])
def test_other_shells_get_a_script(shell, segnb):
    assert all(verb in succeeded(segnb('completion', shell)) for verb in cli._VERBS)


def test_the_help_loads_neither_torch_nor_pictures():
    code = ("import sys, contextlib, io\nfrom segnb.cli import main\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])\nprint([m for m in ('torch', 'scipy', 'matplotlib', 'numba', 'skimage', 'pandas', 'shtab', 'batchgenerators') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == '[]'
