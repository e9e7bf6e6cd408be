"""Write RECORD.md, the tables of the figures in record.json and hippocampus.json."""
import json
from common import HERE, RECORD


def table(group, kept):
    ours = kept['figures'].get('segnb', {}).get('seconds')
    yield f'### {group}\n'
    yield '| implementation | ms | CPU ms | peak MB | of segnb | rounds |\n|---|---:|---:|---:|---:|---:|'
    for name, f in kept['figures'].items():
        if 'error' in f: yield f'| {name} | failed: {f["error"].splitlines()[-1][:80]} | | | | |'
        else:
            ratio = f'{f["seconds"]/ours:.2f} ' if ours else ''
            yield f'| {name} | {f["seconds"]*1e3:.3g} {f["unit"]} | {f["cpu_seconds"]*1e3:.3g} | {f["peak_mb"]} | {ratio}| {f["rounds"]} |'
    for m in kept['marks']: yield f'\n{m["what"]}: **{m["ratio"]:.2f}**, goal {m["goal"]}: {"reached" if m["reached"] else "missed"}.'
    yield ''


def accuracy(rows):
    "The runs of hippocampus.py, one row each"
    yield '## hippocampus: accuracy\n\nTask004_Hippocampus, fold 0: Dice of the validation cases, whole images. Each row is one training.\n'
    yield '| who | training | precision | steps of batch | Dice by class | mean Dice | cases | machine | command |\n|---|---|---|---|---|---:|---:|---|---|'
    for r in rows:
        *classes, mean = r['dice'].values()
        where = r.get('hardware', {}).get('gpu') or f"{r.get('hardware', {}).get('threads', '')} threads of {r['cpu']}"
        yield (f"| {r['who']} | {r['training_seconds']/60:.1f} min, {r['taken']} | {r.get('computed_in', '')} | {r['steps']} of {r['batch_size']} | {' / '.join(f'{d:.4f}' for d in classes)} "
               f"| **{mean:.4f}** | {r['cases']} | {where} | `{r['command'].removeprefix('python benchmarks/')}` |")
    yield ''


def main():
    record = json.loads(RECORD.read_text())
    lines = ['# The record of the benchmarks\n', 'Written by `report.py` from `record.json`; how the figures are taken: [README.md](README.md).\n']
    for stage, groups in record.items():
        lines.append(f'## {stage}\n')
        for group, kept in groups.items(): lines += table(group, kept)
    runs = RECORD.with_name('hippocampus.json')
    if runs.exists(): lines += accuracy(json.loads(runs.read_text()))
    one = next(iter(next(iter(record.values())).values()))
    where = {(g['cpu'], g['cores'], g['python']) for groups in record.values() for g in groups.values()}
    lines.append('## Machine\n\n' + '\n'.join(f'{cpu}, {cores} cores, Python {python}.' for cpu, cores, python in sorted(where)) + '\n')
    for who, packages in one['packages'].items(): lines.append(f'{who}: ' + ', '.join(f'{k} {v}' for k, v in packages.items()) + '.\n')
    (HERE/'RECORD.md').write_text('\n'.join(lines))


if __name__ == '__main__': main()
