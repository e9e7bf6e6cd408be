"""What the benchmarks share: fresh processes, implementations in turn, medians, peak memory, one record.

A script registers entries with `@entry(group, implementation, python)`; entries of one group do the same work, so their
figures may be divided by each other. `python` says whose interpreter runs it: 'segnb' (this one) or 'peers' (the one given
by --peers). Every figure comes from a process of its own, and the implementations of a group take turns, so that a busy
minute of the machine hits all of them. An entry returns what `measure` gives, perhaps with more.
"""
import argparse, ctypes, gc, json, os, platform, resource, statistics, subprocess, sys, threading, time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD = HERE/'record.json'
DATA = Path(os.environ.get('SEGNB_REAL_DATA', HERE.parent.parent/'shared'/'data'))
TASKS = {t.name: t for t in (DATA/'Task004_Hippocampus', DATA/'Task010_SarcomaCT', HERE.parent/'data_samples'/'Task101_PhantomCT') if t.exists()}
PACKAGES = ('segnb', 'torch', 'numpy', 'scipy', 'scikit-image', 'SimpleITK', 'nnunetv2', 'monai', 'medpy', 'batchgenerators', 'blosc2')
entries, marks = {}, {}


def entry(group, implementation, python='segnb'):
    "Register a function without arguments that does the work of `group` once and measures it"
    def keep(function):
        entries[group, implementation] = function, python
        return function
    return keep


def mark(group, peer, at_least, figure='seconds', of='segnb'):
    "State the goal: `peer`'s figure divided by that of `of` is at least this"
    marks.setdefault(group, []).append((peer, at_least, figure, of))


def data_sets(ours, in_process, two):
    "Register segnb (default, in process, two workers) and nnU-Net v2 (in process, two processes) for every data set that is there"
    for name, task in TASKS.items():
        for implementation, workers in (('segnb', None), ('segnb_in_process', 0), ('segnb_two', 2)):
            entry(name, implementation)(lambda t=task, n=workers: ours(t, n))
        entry(name, 'nnunetv2_in_process', 'peers')(lambda t=task: in_process(t))
        entry(name, 'nnunetv2_two', 'peers')(lambda t=task: two(t))


def _status(key):
    "A line of this process's status, in MB (1e6 bytes)"
    with open('/proc/self/status') as f: return next(int(line.split()[1]) for line in f if line.startswith(key))*1.024e-3


def _cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class TreeMemory(threading.Thread):
    "Sample the memory of this process and its children together (shared pages counted once)"
    def __init__(self, every=.02):
        super().__init__(daemon=True)
        self.every, self.done, self.peak = every, threading.Event(), 0.

    def now(self):
        total, todo = 0, [os.getpid()]
        while todo:
            pid = todo.pop()
            try:
                for task in os.listdir(f'/proc/{pid}/task'): todo += map(int, Path(f'/proc/{pid}/task/{task}/children').read_text().split())
                rollup = Path(f'/proc/{pid}/smaps_rollup').read_text()
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith('Pss:'))
            except (OSError, StopIteration): pass
        return total*1.024e-3

    def run(self):
        while not self.done.wait(self.every): self.peak = max(self.peak, self.now())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


def measure(work, repeats=5, slow=8., memory='own', per=1, before=lambda: None):
    "Median seconds of `work()`, `before()` not counted, after one call that is thrown away (a call above `slow` seconds stands alone)"
    gc.collect()
    try: ctypes.CDLL('libc.so.6').malloc_trim(0)
    except OSError: pass
    if memory == 'own': Path('/proc/self/clear_refs').write_text('5')   # the peak counts from here
    walls, cpus = [], []
    while len(walls) < repeats + 1:
        before()   # not timed
        wall, cpu = time.perf_counter(), _cpu_seconds()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(_cpu_seconds() - cpu)
        if walls[0] > slow: break
    peak = _status('VmHWM')
    if memory == 'tree':
        before()
        with TreeMemory() as tree: work()   # once more: looking costs time
        peak = tree.peak
    walls, cpus = (walls[1:], cpus[1:]) if len(walls) > 1 else (walls, cpus)
    return dict(seconds=statistics.median(walls)/per, fastest=min(walls)/per, cpu_seconds=statistics.median(cpus)/per, calls=len(walls),
                peak_mb=round(peak), unit='a case' if per > 1 else 'a call')


def _child(script, key, python, limit):
    env = {**os.environ, 'PYTHONPATH': str(HERE), 'PYTHONWARNINGS': 'ignore'}
    run = subprocess.run([python, script, '--one', *key], capture_output=True, text=True, timeout=limit, env=env)
    found = [line[7:] for line in run.stdout.splitlines() if line.startswith('FIGURE ')]
    return json.loads(found[-1]) if found else dict(error=(run.stderr.strip() or f'exit code {run.returncode}')[-500:])


def _middle(runs):
    "The run whose time is the median of the rounds"
    good = sorted((r for r in runs if 'error' not in r), key=lambda r: r['seconds'])
    return {**good[len(good)//2], 'rounds': len(good)} if good else runs[0]


def machine(python):
    "What the figures were taken on, as that interpreter sees it"
    script = ('import json;from importlib import metadata as m\ndef v(p):\n try: return m.version(p)\n except m.PackageNotFoundError: return None\n'
              f'print(json.dumps({{p: v(p) for p in {PACKAGES!r}}}))')
    known = json.loads(subprocess.run([python, '-c', script], capture_output=True, text=True, check=True).stdout)
    return {k: v for k, v in known.items() if v}


def _cpu_name():
    try: return next(line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def verdict(group, figures):
    "The ratios of a group against its marks: (peer, ratio, goal, reached)"
    out = []
    for peer, goal, figure, of in marks.get(group, ()):
        ours, theirs = (figures.get(k, {}).get(figure) for k in (of, peer))
        if ours and theirs: out.append((f'{peer} / {of}, {figure}', theirs/ours, goal, theirs/ours >= goal))
    return out


def main(doc):
    "Run the entries of this script and keep the figures in record.json"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('only', nargs='*', help='groups to run; default: all')
    p.add_argument('--peers', help='interpreter of the peers (see README.md); without it only segnb runs')
    p.add_argument('--rounds', type=int, default=3, help='how often the implementations of a group take turns')
    p.add_argument('--limit', type=int, default=900, help='seconds that one process may take')
    p.add_argument('--no-record', action='store_true', help='print only')
    p.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        print('\nFIGURE ' + json.dumps(entries[tuple(a.one)][0]()))
        return
    script, interpreters = sys.argv[0], dict(segnb=sys.executable, peers=a.peers)
    stage, record = Path(script).stem, json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for group in dict.fromkeys(g for g, _ in entries if not a.only or g in a.only):
        keys = [k for k in entries if k[0] == group and interpreters[entries[k][1]]]
        runs = {k: [] for k in keys}
        for _ in range(a.rounds):
            for k in keys: runs[k].append(_child(script, k, interpreters[entries[k][1]], a.limit))
        figures = {k[1]: _middle(r) for k, r in runs.items()}
        base = figures.get('segnb', {}).get('seconds')
        for name, f in figures.items():
            if 'error' in f: print(f'{group:24} {name:24} FAILED: {f["error"].splitlines()[-1][:150]}')
            else: print(f'{group:24} {name:24} {f["seconds"]*1e3:10.2f} ms {f["unit"]:6} {f["cpu_seconds"]*1e3:10.2f} ms CPU '
                        f'{f["peak_mb"]:6} MB' + (f'  x{f["seconds"]/base:.2f}' if base else ''), flush=True)
        for what, ratio, goal, reached in verdict(group, figures):
            print(f'{"":24} {what}: {ratio:.2f}, goal {goal}: {"reached" if reached else "MISSED"}', flush=True)
        record.setdefault(stage, {})[group] = dict(
            figures=figures, marks=[dict(zip(('what', 'ratio', 'goal', 'reached'), v)) for v in verdict(group, figures)],
            taken=time.strftime('%Y-%m-%d'), cpu=_cpu_name(), cores=os.cpu_count(), python=platform.python_version(),
            packages={k: machine(v) for k, v in interpreters.items() if v})
        if not a.no_record: RECORD.write_text(json.dumps(record, indent=1) + '\n')
