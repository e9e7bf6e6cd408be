"Write README.md from nbs/index.ipynb: prose, code, and pictures as files in nbs/images/."
import base64, json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

def readme(root=ROOT):
    "Markdown of the index notebook, with links as seen from the project's root; writes the pictures it shows"
    parts, pictures = [], 0
    for cell in json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        hidden = re.match(r'#\|\s*(hide|default_exp)', source)
        if cell['cell_type'] == 'markdown': parts.append(source)
        elif not hidden: parts.append(f'```python\n{source}\n```')
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'image/png' not in data: continue
            pictures += 1
            file = root/'nbs'/'images'/f'index_{pictures}.png'
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(base64.b64decode(''.join(data['image/png'])))
            alt = ''.join(output.get('metadata', {}).get('image/png', {}).get('alt', '') or ''.join(data.get('text/plain', '')))
            parts.append(f'![{alt}](images/{file.name})')
    text = '\n\n'.join(parts) + '\n'
    text = re.sub(r'\]\((?!https?:|#|\.\./)', '](nbs/', text)
    return text.replace('](../', '](')

if __name__ == '__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
