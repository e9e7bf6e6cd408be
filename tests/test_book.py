"The stored book: outputs are there, clean, small and free of what belongs to one machine; links lead somewhere."
import base64, json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
BOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
PLACES = re.compile(r'(?<![\w.:/])/(home|root|Users|tmp|mnt|opt|var|work)/[\w.-]')
ids = [b.stem for b in BOOKS]

def cells(book): return json.loads(book.read_text(encoding='utf-8'))['cells']
def text(x): return ''.join(x) if isinstance(x, list) else (x or '')
def outputs(book): return [o for c in cells(book) if c['cell_type'] == 'code' for o in c['outputs']]

def faults(output):
    "What is wrong with a stored output"
    found = []
    if output['output_type'] == 'error': found.append('an error')
    if output.get('name') == 'stderr': found.append('stderr')
    data = output.get('data', {})
    if any('widget' in k for k in data): found.append('widget state')
    seen = text(output.get('text')) + text(data.get('text/plain')) + text(data.get('text/html'))
    if PLACES.search(seen): found.append('an absolute path')
    if 'Traceback (most recent call last)' in seen: found.append('a traceback')
    if 'image/png' in data:
        size = len(base64.b64decode(text(data['image/png'])))
        if size > 102_400: found.append(f'a picture of {size//1024} KB')
        if not text(output.get('metadata', {}).get('image/png', {}).get('alt')): found.append('a picture without alternative text')
    return found

@pytest.mark.parametrize('book', BOOKS, ids=ids)
def test_stored_outputs_are_clean(book): assert [f for o in outputs(book) for f in faults(o)] == []

@pytest.mark.parametrize('book', [b for b in BOOKS if b.stem[0].isdigit() and b.stem != '99_glossary'], ids=lambda b: b.stem)
def test_chapter_teaches(book):
    words = sum(len(re.findall(r'\w+', text(c['source']))) for c in cells(book) if c['cell_type'] == 'markdown')
    pictures = sum('image/png' in o.get('data', {}) for o in outputs(book))
    checks = sum(len(re.findall(r'^\s*(assert\b|test_\w+\(|with\s+expect_fail|expect_fail\(|np\.testing)', text(c['source']), re.M)) for c in cells(book) if c['cell_type'] == 'code')
    assert words >= 500 and pictures >= 2 and checks >= 3, f'{words} words, {pictures} pictures, {checks} checks'

@pytest.mark.parametrize('book', BOOKS, ids=ids)
def test_every_cell_has_content_and_an_id(book):
    names = [c.get('id') for c in cells(book)]
    assert all(names) and len(set(names)) == len(names)
    assert all(text(c['source']).strip() for c in cells(book))

@pytest.mark.parametrize('book', BOOKS, ids=ids)
def test_links_to_chapters_and_headings_lead_somewhere(book):
    headings = {b.name: {re.sub(r'[^\w\s-]', '', h).strip().replace(' ', '-').lower() for c in cells(b) if c['cell_type'] == 'markdown' for h in re.findall(r'^#+\s+(.*)$', text(c['source']), re.M)} for b in BOOKS}
    for cell in cells(book):
        if cell['cell_type'] != 'markdown': continue
        for target in re.findall(r'\]\(([^)\s]+)\)', text(cell['source'])):
            if target.startswith(('http', 'attachment', 'mailto')): continue
            name, _, anchor = target.partition('#')
            name = name or book.name
            assert (ROOT/'nbs'/name).exists(), f'{target}: no such file'
            if anchor and name in headings: assert anchor.lower() in headings[name], f'{target}: no such heading'

def test_faults_are_found():
    assert faults(dict(output_type='error')) == ['an error']
    assert faults(dict(output_type='stream', name='stderr', text='x')) == ['stderr']
    assert faults(dict(output_type='stream', name='stdout', text='see /' + 'home/me')) == ['an absolute path']
    assert faults(dict(output_type='display_data', data={'application/vnd.jupyter.widget-view+json': '{}'})) == ['widget state']
    assert faults(dict(output_type='display_data', data={'image/png': 'AAAA'})) == ['a picture without alternative text']
    assert faults(dict(output_type='stream', name='stdout', text='fine')) == []

def test_the_whole_book_is_small(): assert sum(b.stat().st_size for b in BOOKS) < 12_000_000
