"Data flows forward: a module imports only modules of earlier chapters, and every module has one chapter."
import ast, json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def chapters():
    "Module name -> chapter file name"
    found = {}
    for file in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')):
        for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
            m = re.search(r'^#\|\s*default_exp\s+(\S+)', ''.join(cell['source']), re.M)
            if cell['cell_type'] == 'code' and m:
                assert m.group(1) not in found, f'{file.name} and {found[m.group(1)]} both export {m.group(1)}'
                found[m.group(1)] = file.name
    return found

def imports(file):
    "Names of the package's modules that `file` imports, at any depth of its code"
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'segnb'):
            module = (node.module or '').removeprefix('segnb').lstrip('.')
            names |= {module.split('.')[0]} if module else {a.name for a in node.names}
        elif isinstance(node, ast.Import): names |= {a.name.split('.')[1] for a in node.names if a.name.startswith('segnb.')}
    return names

def backward(order, graph):
    "Pairs (module, imported) that point to a later chapter or to no chapter; a module may name itself, as what goes to another process must"
    return sorted((m, i) for m, found in graph.items() for i in found - {m} if i not in order or order[i] >= order[m])

def test_every_module_has_its_chapter_of_the_same_name():
    order = chapters()
    modules = {f.stem for f in (ROOT/'segnb').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(order)
    assert all(file[3:-6] == module for module, file in order.items())

def test_imports_point_back_in_the_book():
    order = chapters()
    graph = {m: imports(ROOT/'segnb'/f'{m}.py') - {'__version__'} for m in order}
    assert any(graph.values())
    assert backward(order, graph) == []

def test_an_arrow_that_points_back_is_found():
    order = {'image': '10_image.ipynb', 'labels': '12_labels.ipynb'}
    assert backward(order, {'image': {'labels'}, 'labels': {'image'}}) == [('image', 'labels')]
    assert backward(order, {'labels': {'nowhere'}}) == [('labels', 'nowhere')]
