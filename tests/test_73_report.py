"""The report in a real browser, and what it does with folders that are half empty, damaged or hostile."""
import json, math, os, re, shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT, tiny_task
from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.image import read_label_map, write_label_map
from segnb.metrics import evaluate_folder
from segnb.planning import plan_experiment
from segnb.report import ReportError, write_report
from segnb.splits import five_folds
from segnb.workers import write_json

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
REAL = Path(os.environ.get('SEGNB_REAL_DATA', ROOT.parent/'shared'/'data'))
CHROMIUM = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)


def made_up_model(base, plans, data, configuration='3d_fullres', n_folds=5, seed=0):
    "A folder as training and validation leave it, without either: answers are references with a rim gnawed off"
    rng, model, truth = np.random.default_rng(seed), base/'models'/data.name/configuration, base/'preprocessed'/data.name/'gt_segmentations'
    folds = five_folds(data.cases, n_folds=n_folds)
    model.mkdir(parents=True)
    plans.save(model/'plans.json')
    write_json(data.json, model/'dataset.json')
    for k, fold in enumerate(folds):
        out = model/f'fold_{k}'/'validation'
        out.mkdir(parents=True)
        for case in fold['val']:
            labels, geometry = read_label_map(truth/f'{case}.nii.gz')
            labels[rng.random(labels.shape) < .1 + .1 * k] = 0
            write_label_map(labels, geometry, out/f'{case}.nii.gz')
        write_json(evaluate_folder(truth, out, data.labels, cases=fold['val'], n_workers=0, progress=False) | {'held_back': True}, out/'summary.json')
        write_json({'checkpoint': 'checkpoint_final.pt', 'epoch': 4, 'step_size': .5, 'mirror_axes': [0, 1, 2], 'precision': 'fp32'}, out/'made_with.json')
        rows = [dict(epoch=e, lr=.01 * (1 - e/4), train_loss=-.2 * e, val_loss=-.1 * e, dice=[.2 * e] * 3, mean_dice=.2 * e, moving_dice=.2 * e, best=True, iterations=3, seconds=1., elapsed=1. + e) for e in range(4)]
        (model/f'fold_{k}'/'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
        run = dict(started='2026-01-01 10:00:00', finished='2026-01-01 10:01:00', settings={'epochs': 4, 'minutes': None, 'mirror_axes': [0, 1]}, hardware={'cpu': 'a cpu', 'threads': 1, 'gpu': None}, software={'torch': '2'})
        write_json(dict(epochs_done=4, training_batches=12, training_seconds=60., train_cases=fold['train'], val_cases=fold['val'], segnb_version='0', runs=[run]), model/f'fold_{k}'/'record.json')
    return model


def workspace(base, n_train=7):
    "Raw data, plan, references and one model of five folds"
    data = Dataset(tiny_task('Task101_PhantomCT', base/'raw'/'Task201_TinyCT', (2, 3, 3), n_train))
    fingerprint = extract_fingerprint(data, n_workers=0)
    plans = plan_experiment(fingerprint, planner='cpu', dataset_name=data.name)
    preprocessed = base/'preprocessed'/data.name
    (preprocessed/'gt_segmentations').mkdir(parents=True)
    plans.save(preprocessed/'plans.json')
    fingerprint.save(preprocessed/'fingerprint.json')
    write_json(data.json, preprocessed/'dataset.json')
    for case in data.cases: shutil.copy(data.label_file(case), preprocessed/'gt_segmentations')
    return SimpleNamespace(base=base, raw=data.folder, data=data, plans=plans, preprocessed=preprocessed, model=made_up_model(base, plans, data))


@pytest.fixture(scope='module')
def made(tmp_path_factory): return workspace(tmp_path_factory.mktemp('report'))


@pytest.fixture(scope='module')
def page_file(made): return write_report(made.model, made.base/'page.html', n_workers=0)


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if CHROMIUM is None: pytest.skip('there is no chromium here')
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def visit(browser):
    "Open a file; every word on the console and every request to elsewhere fails the test"
    opened, said = [], []
    def go(file, **options):
        page = browser.new_page(**options)
        page.on('console', lambda m: said.append(m.text))
        page.on('pageerror', lambda e: said.append(str(e)))
        page.on('request', lambda r: said.append(r.url) if not r.url.startswith(('file:', 'data:')) else None)
        page.goto(Path(file).resolve().as_uri())
        opened.append(page)
        return page
    yield go
    for page in opened: page.close()
    assert not said, said


def column(page, n): return page.eval_on_selector_all(f'#cases tbody tr > :nth-child({n})', 'cells => cells.map(c => c.dataset.v)')


def test_tables_sort(visit, page_file):
    page = visit(page_file)
    head = page.locator('#cases thead button')
    for i in range(head.count()):
        for way in (1, 2):
            head.nth(i).click()
            sort = page.locator('#cases thead th').nth(i).get_attribute('aria-sort')
            values = column(page, i + 1)
            numbers = [float(v) for v in values] if i else values
            assert numbers == sorted(numbers, reverse=sort == 'descending'), (i, sort)
    assert page.locator('#cases thead th[aria-sort=none]').count() == head.count() - 1
    head.nth(2).focus()
    before = column(page, 3)
    page.keyboard.press('Enter')
    page.keyboard.press('Enter')
    assert column(page, 3) == before[::-1] or sorted(before) == sorted(column(page, 3))


def test_empty_cells_come_last(visit, made, tmp_path):
    model = shutil.copytree(made.model, tmp_path/'m')
    file = model/'fold_0'/'validation'/'summary.json'
    summary = json.loads(file.read_text(encoding='utf-8'))
    case = next(iter(summary['cases']))
    summary['cases'][case]['1']['dice'] = math.nan
    file.write_text(json.dumps(summary))
    page = visit(write_report(model, tmp_path/'p.html', raw=made.raw, preprocessed=made.preprocessed, n_workers=0))
    for _ in range(2):
        page.locator('#cases thead button').nth(3).click()
        assert column(page, 4)[-1] == '' and '' not in column(page, 4)[:-1]


def test_the_slider_moves_the_picture(visit, page_file):
    page = visit(page_file)
    case = page.locator('figure.case').first
    place = lambda: case.locator('.stack img.image').evaluate('e => new DOMMatrix(getComputedStyle(e).transform).f')
    slider, where = case.locator('input[type=range]'), case.locator('.where')
    before, said = place(), where.inner_text()
    slider.focus()
    page.keyboard.press('Home')
    assert place() == 0 and where.inner_text() != said
    page.keyboard.press('End')
    n, height = int(slider.get_attribute('max')) + 1, case.locator('.stack').evaluate('e => e.clientHeight')
    assert place() == pytest.approx(-(n - 1) * height, abs=n)
    slices = json.loads(case.get_attribute('data-about'))['slices']
    assert f'= {slices[-1]} of' in where.inner_text() and 'down' in where.inner_text()


def test_layers_switch(visit, page_file):
    case = visit(page_file).locator('figure.case').first
    errors = case.locator('.stack img.errors')
    assert not errors.is_visible()
    case.locator('input[value=errors]').check()
    assert errors.is_visible()
    case.locator('input[value=reference]').uncheck()
    assert not case.locator('.stack img.reference').is_visible() and case.locator('.stack img.prediction').is_visible()


def test_pointing_at_a_dot_lights_the_case_everywhere(visit, page_file):
    page = visit(page_file)
    dot = page.locator('#result .dot').first
    name = dot.get_attribute('data-c')
    dot.hover(force=True)
    assert page.locator('#result .dot.on').count() == 3
    assert page.locator('tr.on').get_attribute('data-c') == name
    page.mouse.move(2, 2)
    assert page.locator('.on').count() == 0


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [320, 375, 768, 1280])
def test_nothing_sticks_out(visit, page_file, width, scheme):
    page = visit(page_file, viewport=dict(width=width, height=900), color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    small = page.evaluate('''() => [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length
        && !['STYLE', 'SCRIPT', 'TITLE'].includes(e.tagName) && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.className + ' ' + e.textContent.slice(0, 30))''')
    assert not small, small


CONTRAST = '''() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number), lin = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const lum = c => .2126 * lin(c[0]) + .7152 * lin(c[1]) + .0722 * lin(c[2]);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } };
  return [...document.querySelectorAll('main *, header *, nav *, footer')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length && !e.closest('.stack') && !e.closest('svg'))
    .map(e => { const a = lum(parse(getComputedStyle(e).color)), b = lum(ground(e)); return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.slice(0, 40)]; }).filter(([r]) => r < 4.5);
}'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out(visit, page_file, scheme):
    page = visit(page_file, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(CONTRAST) == []


def test_everything_has_a_name(visit, page_file):
    page = visit(page_file)
    nameless = page.evaluate('''() => [...document.querySelectorAll('img, input, button, [role=img], [role=region], nav, summary')].filter(e =>
        !(e.getAttribute('aria-label') || e.hasAttribute('alt') || e.closest('label')?.textContent.trim() || e.textContent.trim())).map(e => e.outerHTML.slice(0, 90))''')
    assert nameless == []
    heads = page.eval_on_selector_all('h1, h2, h3', 'all => all.map(e => +e.tagName[1])')
    assert heads[0] == 1 and heads.count(1) == 1 and all(b - a <= 1 for a, b in zip(heads, heads[1:]))
    ids = page.eval_on_selector_all('[id]', 'all => all.map(e => e.id)')
    assert len(set(ids)) == len(ids)
    assert set(page.eval_on_selector_all('nav a', 'all => all.map(e => e.getAttribute("href").slice(1))')) <= set(ids)
    assert page.locator('html').get_attribute('lang') == 'en'
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'


def test_print(visit, page_file, tmp_path):
    page = visit(page_file, color_scheme='dark')
    page.emulate_media(media='print')
    for hidden in ('nav', '.switches', 'input[type=range]'): assert not page.locator(hidden).first.is_visible()
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    assert page.evaluate(CONTRAST) == []
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator('details:not([open])').count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator('details[open]').count() == 0
    page.pdf(path=tmp_path/'p.pdf', format='A4')
    assert (tmp_path/'p.pdf').read_bytes()[:4] == b'%PDF'


def test_it_says_the_numbers(visit, made, page_file):
    "Headline and table are the means that anybody can compute from the summaries"
    folds = [json.loads((made.model/f'fold_{k}'/'validation'/'summary.json').read_text(encoding='utf-8')) for k in range(5)]
    cases = {c: s for f in folds for c, s in f['cases'].items()}
    per_class = {k: [s[k]['dice'] for s in cases.values()] for k in '123'}
    page = visit(page_file)
    assert f'{np.mean([np.mean(v) for v in per_class.values()]):.2f}' in page.locator('.standfirst').inner_text()
    assert page.locator('#cases tbody tr').count() == len(cases) == 7
    shown = dict(zip(column(page, 1), map(float, column(page, 3))))
    for case, s in cases.items(): assert shown[case] == pytest.approx(np.mean([s[k]['dice'] for k in '123']))
    assert page.locator('figure.case h3').all_inner_texts()[0].split(': ')[1] == max(shown, key=shown.get)


def test_the_same_input_gives_the_same_bytes(made, page_file, tmp_path):
    assert write_report(made.model, tmp_path, n_workers=0).read_bytes() == page_file.read_bytes()


def test_nothing_is_loaded_from_elsewhere(page_file):
    text = page_file.read_text(encoding='utf-8')
    assert not re.search(r'(src|href)="(?!data:|#)', text) and 'url(' not in text and '@import' not in text
    assert "default-src 'none'" in text and str(page_file.parent) not in text


def test_fifty_cases_stay_under_five_megabytes(made, tmp_path):
    "Noise is the worst that can be shown: 512 x 512 pixels of it, 24 slices, three cases"
    from segnb.report import slice_viewer
    rng = np.random.default_rng(0)
    noise, labels = rng.normal(size=(40, 512, 512)).astype(np.float32), np.zeros((40, 512, 512), np.uint8)
    labels[5:35, 100:400, 100:400] = rng.integers(0, 4, (30, 6, 6)).repeat(50, 1).repeat(50, 2)
    viewer = slice_viewer(noise, (2, .7, .7), labels, np.roll(labels, 5, 1))
    plain = re.sub(r'base64,[^"]*', '', write_report(made.model, tmp_path/'p.html', n_workers=0).read_text(encoding='utf-8'))
    assert 3 * len(viewer) + 50 / 7 * len(plain) < 5e6


def test_a_data_set(visit, made, tmp_path):
    page = visit(write_report(made.raw, tmp_path/'data.html', n_workers=0))
    assert page.locator('h1').inner_text() == 'TinyCT' and page.locator('#data .dot').count() == 9 * 7
    assert page.locator('#classes .row .name').all_inner_texts() == ['organ', 'lesion', 'other organ']
    assert page.locator('#cases tbody tr').count() == 7 and page.locator('figure.case').count() == 3
    ml = {c: float(v) for c, v in zip(column(page, 1), column(page, 2))}
    for case in made.data.cases:
        labels, geometry = read_label_map(made.data.label_file(case))
        assert ml[case] == pytest.approx((labels == 1).sum() * np.prod(geometry.spacing) / 1000)


def test_a_data_set_alone(made, tmp_path):
    "No workspace around it: the fingerprint is measured, the plan is said to be missing"
    raw = shutil.copytree(made.raw, tmp_path/'Task201_TinyCT')
    text = write_report(raw, n_workers=0).read_text(encoding='utf-8')
    assert 'Foreground of CT' in text and 'segnb plan' in text and (raw/'report.html').exists()


def test_a_preprocessed_folder(made, tmp_path):
    text = write_report(made.preprocessed, tmp_path/'p.html', n_workers=0).read_text(encoding='utf-8')
    assert 'id="plan"' in text and 'id="data"' in text and 'least foreground' in text.lower()


@pytest.mark.parametrize('gone, told', [('fold_*/validation', 'No case has been validated yet'), ('fold_0/log.jsonl', 'training curves of fold 0'), ('fold_*/record.json', 'id="result"'),
                                        ('fold_2/validation/summary.json', 'validation of fold 2'), ('fold_*/validation/*.nii.gz', 'id="cases"'), ('dataset.json', 'id="result"')])
def test_whatever_is_there(made, tmp_path, gone, told):
    model = shutil.copytree(made.model, tmp_path/'m')
    for f in list(model.glob(gone)): shutil.rmtree(f) if f.is_dir() else f.unlink()
    assert told in write_report(model, tmp_path/'p.html', raw=made.raw, preprocessed=made.preprocessed, n_workers=0).read_text(encoding='utf-8')


def test_a_model_that_left_home(made, tmp_path):
    "Neither raw nor preprocessed data: scores, curves and plan are shown, pictures are said to be missing"
    text = write_report(shutil.copytree(made.model, tmp_path/'3d_fullres'), tmp_path/'p.html').read_text(encoding='utf-8')
    assert all(f'id="{part}"' in text for part in ('result', 'cases', 'training', 'plan', 'made', 'missing')) and 'raw=' in text


@pytest.mark.parametrize('file, content', [('fold_1/log.jsonl', '{"epoch": 0, "train_loss": 1.0}\n{"epo'), ('fold_1/record.json', '{"runs": ['), ('fold_1/validation/summary.json', 'nonsense'), ('postprocessing.json', '['),
                                           ('fold_1/validation/summary.json', '{"a": 1}'), ('fold_1/validation/summary.json', '[1]'), ('fold_1/validation/summary.json', '{"cases": {"x": 3}, "labels": {"1": "a"}}'),
                                           ('fold_1/record.json', '[1]'), ('fold_1/validation/made_with.json', '[1]'), ('fold_1/log.jsonl', '3\n{}\n{"epoch": 1, "val_loss": "y"}\n{"epoch": 2, "val_loss": NaN}')])
def test_damaged_files_are_named(made, tmp_path, file, content):
    model = shutil.copytree(made.model, tmp_path/'m')
    (model/file).write_text(content)
    text = write_report(model, tmp_path/'p.html', preprocessed=made.preprocessed, raw=made.raw, n_workers=0).read_text(encoding='utf-8')
    gone = text.split('id="missing"')[1]
    assert Path(file).name in gone and 'id="result"' in text
    assert not any(str(place) in gone for place in (tmp_path, made.base, Path.home())) # the page tells nobody where it was made


def test_sections_whose_files_hold_something_else_are_left_out_and_said(made, tmp_path):
    from segnb.postprocessing import Postprocessing
    model = shutil.copytree(made.model, tmp_path/'m')
    Postprocessing((1,)).save(model/'postprocessing.json')
    next(model.glob('fold_*/validation/*.nii.gz')).write_bytes(b'no map')
    (model/'fold_0'/'record.json').write_text('{"runs": [{}]}')
    shown, gone = write_report(model, tmp_path/'p.html', preprocessed=made.preprocessed, raw=made.raw, n_workers=0).read_text(encoding='utf-8').split('id="missing"')
    assert 'id="postprocessing"' in shown and 'id="training"' in shown and 'id="made"' not in shown
    assert 'what post-processing removes' in gone and 'the part about the making' in gone


@pytest.mark.parametrize('spoil, told', [
    (lambda w: [f.unlink() for f in w.glob('raw/*/dataset.json')], ''), (lambda w: [f.write_text('{') for f in w.glob('raw/*/dataset.json')], 'the raw data set cannot be read'),
    (lambda w: [f.unlink() for f in w.glob('preprocessed/*/plans.json')], 'the fingerprint'), (lambda w: [f.write_text('{') for f in w.glob('preprocessed/*/fingerprint.json')], 'the fingerprint cannot be read'),
    (lambda w: [f.write_text('{}') for f in w.glob('models/*/2d/plans.json')], 'the configuration 2d')])
def test_spoilt_neighbours_do_not_cost_the_page(made, tmp_path, spoil, told):
    for part in ('preprocessed', 'models'): shutil.copytree(made.base/part, tmp_path/part)
    (tmp_path/'raw'/made.data.name).mkdir(parents=True)
    shutil.copy(made.raw/'dataset.json', tmp_path/'raw'/made.data.name)
    task = tmp_path/'models'/made.data.name
    shutil.copytree(task/'3d_fullres', task/'2d')
    spoil(tmp_path)
    text = write_report(task, n_workers=0).read_text(encoding='utf-8')
    gone = text.split('id="missing"')[1]
    assert 'id="result"' in text and told in gone and str(tmp_path) not in gone and str(made.base) not in gone


@pytest.mark.parametrize('told, shown', [
    ('file {}/models/T/2d/plans.json: bad', 'file models/T/2d/plans.json: bad'), ('{}/raw/T/dataset.json and {}/preprocessed/T/x.npy', 'raw/T/dataset.json and preprocessed/T/x.npy'),
    ('/elsewhere/mine/a.nii.gz is gone', '.../a.nii.gz is gone'), ('read from (/mnt/disk/a.nii.gz)', 'read from (.../a.nii.gz)'), ('found 1/2, CT/MR and T1/', 'found 1/2, CT/MR and T1/')])
def test_paths_begin_at_the_workspace(tmp_path, told, shown):
    from segnb.report import _from_here
    folders = [tmp_path/'models'/'T', None, tmp_path/'raw'/'T']
    assert _from_here(told.format(tmp_path, tmp_path), folders) == shown


def test_more_slices_than_a_picture_can_hold(made, tmp_path):
    "A JPEG has 65500 rows at most"
    from segnb.report import slice_viewer
    for image, slices in ((np.zeros((400, 20, 20)), 400), (np.full((3, 9, 9), np.nan), 0), (np.full((1, 9, 9), 7), 3)):
        about = json.loads(re.search('data-about="(.*?)"', slice_viewer(image, (1, 1, 1), slices=slices))[1].replace('&quot;', '"'))
        assert 0 < len(about['slices']) <= min(len(image), 227) and 0 <= about['start'] < len(about['slices'])


def test_several_configurations(visit, made, tmp_path):
    task = tmp_path/'models'/'Task201_TinyCT'
    shutil.copytree(made.model, task/'3d_fullres')
    shutil.copytree(made.preprocessed, tmp_path/'two'/'preprocessed'/made.data.name)
    second = made_up_model(tmp_path/'two', made.plans, made.data, '2d', seed=1)
    shutil.rmtree(second/'fold_4')
    shutil.copytree(second, task/'2d')
    page = visit(write_report(task, raw=made.raw, preprocessed=made.preprocessed, n_workers=0))
    assert page.locator('#compared .row .name').all_inner_texts() == ['2d', '3d_fullres']
    assert page.locator('#compared .dot').count() == 7 + 6


def test_names_are_text(visit, made, tmp_path):
    "A case, a class or a title may be called what it likes"
    model = shutil.copytree(made.model, tmp_path/'m')
    file = model/'fold_0'/'validation'/'summary.json'
    summary = json.loads(file.read_text(encoding='utf-8'))
    evil = '"><img src=x onerror=alert(1)>&amp;'
    summary['cases'][evil] = summary['cases'].pop(next(iter(summary['cases'])))
    summary['labels']['1'] = evil
    file.write_text(json.dumps(summary))
    page = visit(write_report(model, tmp_path/'p.html', title='<b>bold</b>', raw=made.raw, preprocessed=made.preprocessed, n_workers=0))
    assert page.locator('h1').inner_text() == '<b>bold</b>' and evil in column(page, 1)
    assert page.locator('img[src=x]').count() == 0


@pytest.mark.parametrize('width', [375, 1280])
def test_long_and_foreign_names_and_many_classes(visit, made, tmp_path, width):
    model = shutil.copytree(made.model, tmp_path/'m')
    long = 'unbroken_' * 12 + 'نص_日本語'
    for file in model.glob('fold_*/validation/summary.json'):
        summary = json.loads(file.read_text(encoding='utf-8'))
        case = next(iter(summary['cases']))
        summary['cases'][f'{long} {case} "\\\'</script>'] = summary['cases'].pop(case)
        for scores in summary['cases'].values(): scores |= {str(i): scores['1'] for i in range(4, 40)}
        summary['labels'] |= {'1': long, '2': '</style><b>', **{str(i): f'class {i}' for i in range(4, 40)}}
        file.write_text(json.dumps(summary))
    page = visit(write_report(model, tmp_path/'p.html', title=long, raw=made.raw, preprocessed=made.preprocessed, n_workers=0), viewport=dict(width=width, height=800))
    assert page.evaluate('document.documentElement.scrollWidth') <= width and page.locator('#result .row .name').count() == 39
    page.locator('#cases th button').first.click()
    assert page.locator('#cases th').first.get_attribute('aria-sort') == 'ascending'


def test_refusals(made, tmp_path):
    with pytest.raises(ReportError, match='no such folder'): write_report(tmp_path/'nowhere')
    with pytest.raises(ReportError, match='nothing to report'): write_report(tmp_path)
    with pytest.raises(ReportError, match='no dataset.json'): write_report(made.model, raw=tmp_path)


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_output(made, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError): write_report(made.model, tmp_path/'p.html')


def test_the_choice_and_what_is_removed(visit, made, tmp_path):
    "After consolidation and selection the page says what was chosen, with which commands, and shows what post-processing takes away"
    from segnb.postprocessing import consolidate_folds
    from segnb.selection import select
    task = tmp_path/'models'/'Task201_TinyCT'
    shutil.copytree(made.model, task/'3d_fullres')
    first = next((task/'3d_fullres').glob('fold_*/validation/*.nii.gz'))
    labels, geometry = read_label_map(first)
    labels[0, :2, :3] = 1 # a stray piece
    write_label_map(labels, geometry, first)
    decision = consolidate_folds(task/'3d_fullres', made.preprocessed/'gt_segmentations', n_workers=0, progress=False)
    result = json.loads((task/'3d_fullres'/'cross_validation.json').read_text(encoding='utf-8'))
    select({'3d_fullres': result}, models=task, folds=range(5), labels={1: 'organ', 2: 'lesion', 3: 'other organ'}).save()
    page = visit(write_report(task, raw=made.raw, preprocessed=made.preprocessed, n_workers=0))
    assert page.locator('#compared h2').inner_text() == '3d_fullres is chosen' and 'segnb predict' in page.locator('#compared pre').text_content()
    assert page.locator('#compared .chosen .name').inner_text() == '3d_fullres'
    assert page.locator('#postprocessing tbody tr').count() == 3
    assert page.locator('#postprocessing img.removed').count() == bool(decision.which)
    for stack in page.locator('.stack').all():
        box = stack.bounding_box()
        shown = stack.evaluate('e => getComputedStyle(e).aspectRatio.split("/").map(Number)')
        assert box['width'] / box['height'] == pytest.approx(shown[0] / shown[1], rel=.02) and stack.evaluate('e => getComputedStyle(e).overflow') == 'hidden'
    for damaged in ('selection.json', '3d_fullres/postprocessing.json'): (task/damaged).write_text('{}')
    text = write_report(task, tmp_path/'p.html', raw=made.raw, preprocessed=made.preprocessed, n_workers=0).read_text(encoding='utf-8')
    assert 'id="result"' in text and all(name in text.split('id="missing"')[1] for name in ('selection.json', 'postprocessing.json'))


def test_regions_are_what_is_reported(made, tmp_path):
    model = shutil.copytree(made.model, tmp_path/'m')
    for file in model.glob('fold_*/validation/summary.json'):
        summary = json.loads(file.read_text(encoding='utf-8'))
        summary['regions'] = {'cases': {c: {'whole': {'dice': .5}, 'core': {'dice': None}} for c in summary['cases']}, 'mean': {}}
        file.write_text(json.dumps(summary))
    text = write_report(model, tmp_path/'p.html').read_text(encoding='utf-8')
    assert re.findall('<span class="name">(.*?)</span>', text.split('id="cases"')[0]) == ['whole', 'core'] and 'Dice is <b>0.50</b>' in text


def test_fold_all_is_no_result(made, tmp_path):
    model = tmp_path/'m'
    shutil.copytree(made.model/'fold_0', model/'fold_all')
    shutil.copy(made.model/'plans.json', model)
    file = model/'fold_all'/'validation'/'summary.json'
    file.write_text(json.dumps(json.loads(file.read_text(encoding='utf-8')) | {'held_back': False}))
    text = write_report(model, tmp_path/'p.html').read_text(encoding='utf-8')
    assert 'No case has been validated yet' in text and 'id="result"' not in text and 'id="training"' in text


@pytest.mark.parametrize('task, title', [('Task102_PhantomMR', 'Voxels are nearly cubes'), ('Task103_PhantomCells', 'The cases are single slices')])
def test_other_kinds_of_data(visit, task, title, tmp_path):
    "Four channels of MR; pictures, which have no slider"
    page = visit(write_report(ROOT/'data_samples'/task, tmp_path/'p.html', n_workers=0))
    assert page.locator('#data h2').inner_text() == title
    assert page.locator('figure.case').count() == 3 and (page.locator('input[type=range]').count() == 0) == (task == 'Task103_PhantomCells')


@pytest.mark.skipif(not REAL.is_dir(), reason='no real data here (SEGNB_REAL_DATA)')
def test_real_hippocampi(visit, tmp_path):
    file = write_report(REAL/'Task004_Hippocampus', tmp_path/'p.html', n_workers=0)
    page = visit(file, viewport=dict(width=375, height=900))
    assert file.stat().st_size < 5e6 and page.evaluate('document.documentElement.scrollWidth') <= 375
    assert page.locator('#cases tbody tr').count() == len(Dataset(REAL/'Task004_Hippocampus').cases)
