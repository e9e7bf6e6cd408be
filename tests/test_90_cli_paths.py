"""Paths that are not there, of the wrong kind, not writable, or the same for input and output: for every verb one message that names the path, and status 2."""
import contextlib, io, json, re, shutil
from pathlib import Path

import pytest

from conftest import files
from segnb.cli import main, parser

QUIET = ('-q', '-j', 0, '--device', 'cpu')

# Per line: which of its words is wrong and in what way. {gone}: nothing there; {file}: a file where a folder is meant;
# {folder}: a folder where a file is meant;
# {empty}: an empty folder; {inside}: a path below a file, which nobody can write to; {out}: a fresh place; the others are good.
LINES = '''
plan {gone} -w {out}
plan {file} -w {out}
plan {empty} -w {out}
plan {raw} -w {inside}
plan {raw} -w {file}
plan {raw} -w {out} --overwrite-plans {gone}
plan {raw} -w {out} --overwrite-plans {folder}
plan {raw} -w {out} --overwrite-plans {text}
plan {task} -w {gone} --edit 3d_fullres batch_size=2
plan {task} -w {gone} --edit 3d_fullres batch_size=2 --draw
preprocess {gone} -w {workspace}
preprocess {task} -w {gone}
preprocess {task} -w {file}
split {task} -w {gone}
split {task} -w {copy} --overwrite --file {gone}
split {task} -w {copy} --overwrite --file {folder}
split {task} -w {copy} --overwrite --file {text}
split {task} -w {copy} --overwrite --patients {gone}.json
split {task} -w {copy} --overwrite --patients {text}.json
train {task} 0 -w {gone}
train {task} 0 -w {file}
train {gone} 0 -w {workspace}
train {task} 1 -w {copy} --from {gone} -q
train {task} 1 -w {copy} --from {empty} -q
train {task} 1 -w {copy} --from {text} -q
train {task} 1 -w {copy} --network {gone}:build -q
train {task} 1 -w {copy} --network {text}.py:build -q
train {task} 1 -w {copy} --continue --device cpu -q
predict -i {gone} -o {out} -m {model} --device cpu -q
predict -i {file} -o {out} -m {model} --device cpu -q
predict -i {empty} -o {out} -m {model} --device cpu -q
predict -i {images} -o {inside} -m {model} --device cpu -q
predict -i {images} -o {file} -m {model} --device cpu -q
predict -i {images} -o {images} -m {model} --device cpu -q
predict -i {images} -o {out} -m {gone} --device cpu -q
predict -i {images} -o {out} -m {file} --device cpu -q
predict -i {images} -o {out} -m {empty} --device cpu -q
predict -i {images} -o {out} -m {models} --device cpu -q
predict -i {images} -o {out} -d {gone} -w {workspace} -q
predict -i {images} -o {out} -d {task} -w {gone} -q
predict -i {images} -o {out} -m {model} --postprocessing {gone} -q
predict -i {images} -o {out} -m {model} --postprocessing {folder} -q
predict -i {images} -o {out} -m {model} --postprocessing {text} -q
predict -i {images} -o {out} -m {model} --network {gone}:build --device cpu -q
evaluate -r {gone} -p {maps} -q
evaluate -r {file} -p {maps} -q
evaluate -r {empty} -p {maps} -l 1 -q
evaluate -r {labels} -p {gone} -q
evaluate -r {labels} -p {file} -q
evaluate -r {labels} -p {empty} -q
evaluate -r {labels} -p {strange} -q
evaluate -r {labels} -p {labels} -o {inside}/s.json -q
evaluate -r {labels} -p {labels} -o {folder} -q
evaluate -r {labels} -p {labels} -l {gone} -o {out} -q
evaluate -r {labels} -p {labels} -l {folder} -o {out} -q
evaluate -r {labels} -p {labels} -l {text} -o {out} -q
evaluate -r {labels} -p {labels} --v1-summary {inside}/v1.json -o {out} -q
evaluate -r {labels} -p {labels} --v1-summary {folder} -o {out} -q
evaluate -r {labels} -p {labels} --compare {gone} -q
evaluate -r {labels} -p {labels} --compare {empty} -q
evaluate -r {labels} -p {labels} --compare {labels} --picture {inside}/p.png -q
evaluate -r {labels} -p {labels} --compare {labels} --picture {folder} -q
evaluate -r {labels} -p {labels} -o {out} --json {inside}/a.json -q
evaluate -r {labels} -p {labels} -o {out} --json {folder} -q
postprocess determine {task} -w {gone} -q
postprocess determine {gone} -w {workspace} -q
postprocess apply {gone} -i {maps} -o {out} -q
postprocess apply {folder} -i {maps} -o {out} -q
postprocess apply {text} -i {maps} -o {out} -q
postprocess apply {rule} -i {gone} -o {out} -q
postprocess apply {rule} -i {file} -o {out} -q
postprocess apply {rule} -i {empty} -o {out} -q
postprocess apply {rule} -i {maps} -o {inside} -q
ensemble {gone} {maps} -o {out} -q
ensemble {file} {maps} -o {out} -q
ensemble {empty} {maps} -o {out} -q
ensemble {maps} {maps} -o {out} -q
ensemble {kept} {kept} -o {inside} -q
ensemble {kept} {kept} -o {kept} -q
ensemble {kept} {kept} -o {out} -l {gone} -q
ensemble {kept} {kept} -o {out} -l {text} -q
ensemble {kept} {kept} -o {out} --postprocessing {gone} -q
ensemble {kept} {kept} -o {out} --postprocessing {folder} -q
select {task} -w {gone} -q
select {gone} -w {workspace} -q
report {gone} -w {workspace}
report {file} -w {workspace}
report {empty}
report {task} -w {gone}
report {raw} -o {inside}/r.html
report {raw} -o {folder}.html
overlay {gone} -o {out} -q
overlay {raw} -o {inside} -q
overlay {raw} -o {out} --prediction {gone} -q
overlay {raw} -o {out} --prediction {file} -q
overlay {raw} -o {out} --prediction {empty} -q
overlay {raw} -o {out} --prediction {strange} -q
cascade {gone} -w {workspace} -q
cascade {task} -w {gone} -q
export-model {gone}
export-model {empty}
export-model {file}
export-model {model} -o {inside}/m.segnb
export-model {model} -o {folder}
export-model {task} -w {gone}
import-model {gone} -w {out}
import-model {empty} -w {out}
import-model {text} -w {out}
import-model {raw} -w {out}
import-model {packed} -o {inside}
import-model {packed} -o {file}
import-model {packed} -w {file}
import-model {packed} -o {folder}
export-onnx {gone} -o {out}
export-onnx {empty} -o {out}
export-onnx {model} -o {inside}
export-onnx {model} -o {file}
export-onnx {model} -o {full}
jobs train {gone} -w {workspace} -o {out}
jobs train {task} -w {gone} -o {out}
jobs train {task} -w {workspace} -o {inside}
jobs train {task} -w {workspace} -o {file}
jobs predict -i {gone} -l {out} -m {model} -n 2 -o {out}
jobs predict -i {empty} -l {out} -m {model} -n 2 -o {out}
jobs predict -i {file} -l {out} -m {model} -n 2 -o {out}
jobs predict -i {images} -l {out} -m {gone} -n 2 -o {out}
jobs predict -i {images} -l {out} -m {empty} -n 2 -o {out}
jobs predict -i {images} -l {out} -m {model} -n 2 -o {inside}
jobs predict -i {images} -l {images} -m {model} -n 2 -o {out}
jobs run {gone}
jobs run {empty}
jobs show {gone}
jobs show {file}
doctor {gone} -q
doctor {file} -q
doctor {raw} --repair {inside} -q -j 0
doctor {raw} --repair {file} -q -j 0
doctor {raw} --repair {raw} -q -j 0
doctor {raw} --html {inside}/p.html -q -j 0
doctor {raw} --html {folder} -q -j 0
doctor {raw} --json {inside}/p.json -q -j 0
doctor {raw} --json {folder} -q -j 0
doctor {raw} --undo -q
convert decathlon {gone} {out}
convert decathlon {file} {out}
convert decathlon {empty} {out}
convert decathlon {msd} {inside}
convert decathlon {msd} {file}
convert decathlon {msd} {msd}
convert brats {gone} {out}
convert brats {empty} {out}
convert nnunet {gone} {out}
convert nnunet {empty} {out}
convert nnunet {raw} {inside}
convert nnunet {raw} {raw}
convert pairs {gone} {labels} {out} --classes background=0 a=1
convert pairs {images} {gone} {out} --classes background=0 a=1
convert pairs {empty} {labels} {out} --classes background=0 a=1
convert pairs {train} {labels} {inside} --classes background=0 a=1 b=2 c=3 --channels CT
convert pairs {train} {labels} {labels} --classes background=0 a=1 b=2 c=3 --channels CT
convert pictures {gone} {labels} {out} --classes background=0 a=1
convert pictures {empty} {empty} {out} --classes background=0 a=1
convert regions {gone} {out} --classes all=1,2,3 core=2,3 tip=3
convert regions {file} {out} --classes all=1,2,3 core=2,3 tip=3
convert regions {empty} {out} --classes all=1,2,3 core=2,3 tip=3
convert regions {raw} {inside} --classes all=1,2,3 core=2,3 tip=3
convert regions {raw} {raw} --classes all=1,2,3 core=2,3 tip=3
convert sparse {gone} {out} -j 0
convert sparse {raw} {inside} -j 0
convert sparse {raw} {raw} -j 0
convert to-brats {gone} {out}
convert to-brats {empty} {out}
convert to-brats {maps} {inside} -l {glioma}
convert to-brats {maps} {maps} -l {glioma}
convert to-brats {maps} {out} -l {gone}
demo -o {inside} --samples {gone} -q
demo -o {file} --samples {gone} -q
'''.strip().splitlines()

WRONG = 'gone', 'file', 'text', 'folder', 'empty', 'full', 'strange', 'inside'


@pytest.fixture(scope='module')
def places(ct, tmp_path_factory):
    "Good and bad paths, by their names in the lines"
    base = tmp_path_factory.mktemp('places')
    p = {name: base/name for name in ('gone', 'file', 'text', 'folder', 'empty', 'full', 'strange', 'kept', 'msd')}
    for name in ('file', 'text'): p[name].write_text('no such thing')
    for ending in ('.json', '.py'): shutil.copy(p['text'], base/f'text{ending}')
    for name in ('folder', 'empty', 'full', 'strange', 'kept', 'msd', 'folder.html'): (base/name).mkdir()
    for name in ('folder', 'full', 'folder.html'): (base/name/'of mine.txt').write_text('dear')
    shutil.copy(next((ct.raw/'labelsTr').glob('*.nii.gz')), p['strange']/'another_case.nii.gz')
    for part in ('imagesTr', 'labelsTr'): (p['msd']/part).mkdir()
    known = json.loads((ct.raw/'dataset.json').read_text(encoding='utf-8'))
    for entry in known['training']:
        for part in ('image', 'label'): shutil.copy(ct.raw/(entry[part] if part == 'label' else entry[part].replace('.nii.gz', '_0000.nii.gz')),
                                                    p['msd']/entry[part])
    (p['msd']/'dataset.json').write_text(json.dumps({**known, 'test': []}))
    shutil.copytree(ct.workspace/'preprocessed', base/'copy'/'preprocessed')
    (base/'glioma.json').write_text(json.dumps({**known, 'labels': {'0': 'background', '1': 'necrotic core', '2': 'edema', '3': 'enhancing'}}))
    (base/'rule.json').write_text('{"for_which_classes": [1]}')
    p |= dict(copy=base/'copy', rule=base/'rule.json', glioma=base/'glioma.json', inside=p['file']/'below', raw=ct.raw, task=ct.raw.name,
              workspace=ct.workspace, model=ct.model, models=ct.model.parent, images=ct.raw/'imagesTs',
              train=ct.raw/'imagesTr', labels=ct.raw/'labelsTr', maps=ct.predictions, json=ct.raw/'dataset.json', packed=base/'packed.segnb', out=base/'out',
              base=base)
    for line in (f"predict -i {p['images']} -o {p['kept']} -m {p['model']} --save-probabilities --disable-tta --device cpu -q",
                 f"export-model {p['model']} -o {p['packed']}"):
        with contextlib.redirect_stdout(io.StringIO()): assert main(line.split()) == 0
    return p


def run(line, places):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = main([word.format(**places) for word in line.split()])
        except SystemExit as stop: status = stop.code
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize('line', LINES)
def test_a_path_that_is_wrong_is_named(line, places, ct):
    places['out'].unlink() if places['out'].is_file() else shutil.rmtree(places['out'], ignore_errors=True)
    before = {place: files(places[place]) for place in ('folder', 'full', 'empty', 'strange', 'kept', 'msd', 'raw', 'maps', 'models')}
    status, _, err = run(line, places)
    assert status == 2 and 'Traceback' not in err and err.startswith('segnb: '), (status, err)
    named = re.findall(r'{(\w+)}', line)
    wrong = [name for name in named if name in WRONG] or [name for name in named if name not in ('out', 'task', 'workspace')]
    assert any(str(places['file' if name == 'inside' else name]) in err for name in wrong), err
    assert {place: files(places[place]) for place in before} == before, 'something was written or removed'
    assert not places['gone'].exists()
    assert not places['out'].is_file() and not files(places['out']), files(places['out']) # an empty folder may have been made


def test_the_lines_know_every_verb():
    verbs = next(a for a in parser()._actions if a.dest == 'run' or a.choices and 'plan' in a.choices).choices
    assert set(verbs) - {line.split()[0] for line in LINES} == {'download', 'v1', 'completion'} # they take no path that must be there
