"""Workers where cells cannot look: real signals, orphans, terminals, both ways to start a process."""
import ctypes, json, multiprocessing, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from segnb.image import SegnbError, whole_file
from segnb import workers
from segnb.workers import (Estimate, JsonError, OutputError, ResourceError, WorkerError, WorkerWarning, check_writable, keyed_rng, parallel_map,
                           preflight, read_json, remove_stale_parts, worthwhile_workers, write_json)

RECORDED = Path(__file__).parent/'recorded'
METHODS = [m for m in ('fork', 'spawn', 'forkserver') if m in multiprocessing.get_all_start_methods()]


def wait_then(job):
    "Note the process, then sleep, fail, refuse, or die"
    folder, name, what, seconds = job
    if what == 'long at first' and not (Path(folder)/name).exists(): seconds = 90 # until it is killed
    (Path(folder)/name).write_text(str(os.getpid()))
    if what == 'fail late': # when the other one writes
        what, end = 'fail', time.monotonic() + 60
        while len(os.listdir(folder)) < 4 and time.monotonic() < end: time.sleep(.02)
    if what == 'write':
        with whole_file(Path(folder)/'result.txt') as part:
            part.write_text('half')
            time.sleep(seconds)
    time.sleep(seconds)
    if what == 'fail': raise KeyError('no such organ')
    if what == 'refuse': raise SegnbError('spacing is wrong', file=f'{name}.nii.gz', found=0)
    if what == 'exit': sys.exit(3)
    if what == 'unpicklable': return lambda: 0
    return name


def large(i):
    "Fail at once, or return 40 MB at the same time"
    if i == 0:
        time.sleep(.1)
        raise ValueError('no')
    return np.zeros(5_000_000) if i == 1 else np.zeros(5)


def die_while_large(i):
    if i == 1: threading.Timer(.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return np.zeros(60_000_000) if i == 1 else i


def random_sum(i): return float(keyed_rng(1, 'sum', i).normal(size=100).sum())


def jobs(folder, what, n=4, at=1):
    return [(str(folder), f'ct_{i:03d}', what if i == at else 'sleep', .2 if i <= at else 90) for i in range(n)]


def pids(folder):
    "Processes that noted themselves in `folder`; one that was ended while it wrote its note counts for none"
    return [int(text) for p in Path(folder).glob('ct_*') if (text := p.read_text())]


def alive(pid):
    try: return 'Z' not in Path(f'/proc/{pid}/stat').read_text().split(')')[1]
    except OSError: return False


def gone(pids, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(p) for p in pids): time.sleep(.05)
    return not any(alive(p) for p in pids)


@pytest.mark.parametrize('method', METHODS)
def test_every_number_of_workers_gives_the_same(method):
    here = parallel_map(random_sum, range(7), 0)
    for n in (1, 2, 9)[:3 if method == 'fork' else 2]: assert parallel_map(random_sum, range(7), n, start_method=method) == here


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('what, kind, text', [('fail', WorkerError, "KeyError: 'no such organ'"), ('refuse', SegnbError, 'ct_001.nii.gz: spacing is wrong'),
                                              ('exit', WorkerError, 'SystemExit: 3'), ('unpicklable', WorkerError, 'cannot travel')])
def test_an_error_arrives_while_others_still_work(tmp_path, method, what, kind, text):
    start = time.monotonic()
    with pytest.raises(kind) as e: parallel_map(wait_then, jobs(tmp_path, what), 2, names=[f'ct_{i:03d}' for i in range(4)], step='cropping', start_method=method)
    assert time.monotonic() - start < 60, 'the others, who sleep for 90 s, were waited for'
    assert 'cropping' in str(e.value) and 'ct_001' in str(e.value) and text in str(e.value)
    if kind is WorkerError: assert e.value.task == 'ct_001' and {'ct_001', 'ct_003'} <= set(e.value.unfinished)
    if what == 'fail': assert 'wait_then' in e.value.traceback
    assert gone(pids(tmp_path))


def deaths(told): return [w for w in told if w.category is WorkerWarning]  # Python 3.12 also warns of forks beside threads


class Assassin:
    "Kill the worker of one task as often as asked, each time it has noted itself"
    def __init__(self, note, number, times):
        self.note, self.number, self.times, self.killed = note, number, times, []
        self.thread = threading.Thread(target=self.work, daemon=True); self.thread.start()

    def work(self):
        while len(self.killed) < self.times:
            time.sleep(.02)
            text = self.note.read_text() if self.note.exists() else ''
            if not text or int(text) in [p for p, _ in self.killed]: continue
            time.sleep(.15)
            os.kill(int(text), self.number)
            self.killed.append((int(text), time.monotonic()))


@pytest.mark.parametrize('number, method', [(signal.SIGKILL, m) for m in METHODS] + [(n, METHODS[0]) for n in (signal.SIGUSR1, signal.SIGTERM)])
def test_a_worker_killed_once_is_told_and_its_task_tried_again_alone(tmp_path, method, number):
    names = [f'ct_{i:03d}' for i in range(5)]
    work = [(str(tmp_path), n, 'long at first' if n == 'ct_001' else 'sleep', .6) for n in names]
    assassin = Assassin(tmp_path/'ct_001', number, 1)
    with pytest.warns(WorkerWarning, match='tried again alone') as told: assert parallel_map(wait_then, work, 2, names=names, step='cropping', start_method=method) == names
    told = deaths(told)
    text = str(told[0].message)
    assert len(told) == 1 and 'while cropping ct_001' in text and (number.name in text or 'exit code 143' in text) and told[0].filename == __file__
    others = [(tmp_path/n).stat().st_mtime for n in names if n != 'ct_001']
    assert (tmp_path/'ct_001').stat().st_mtime > max(others) + .5, 'others worked beside the suspect'
    assert gone(pids(tmp_path) + [p for p, _ in assassin.killed])


@pytest.mark.parametrize('method', METHODS)
def test_a_worker_killed_twice_is_named_with_its_numbers(tmp_path, method):
    names = [f'ct_{i:03d}' for i in range(4)]
    work = [(str(tmp_path), n, 'sleep', 90 if n == 'ct_002' else .3) for n in names]
    assassin = Assassin(tmp_path/'ct_002', signal.SIGKILL, 2)
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError) as e:
        parallel_map(wait_then, work, 2, names=names, step='resampling', start_method=method, memory=[9_000_000_000]*4)
    noticed = time.monotonic() - assassin.killed[-1][1]
    assert noticed < 30, f'noticed after {noticed:.1f} s, and not at once' # a machine may be busy; the task would last for 90 s
    error, text = e.value, str(e.value)
    assert (error.task, error.step, error.unfinished, error.traceback) == ('ct_002', 'resampling', ('ct_002',), '')
    for part in ('SIGKILL while resampling ct_002', 'needed about 9.0 GB', 'when last seen', 'free', 'memory', 'died again'): assert part in text
    assert gone(pids(tmp_path))


def test_a_large_result_on_its_way_blocks_nobody():
    for _ in range(4):
        with pytest.raises(WorkerError, match='no'): parallel_map(large, range(4), 2)
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError, match='SIGKILL'): parallel_map(die_while_large, range(3), 2)
    assert [r.shape for r in parallel_map(large, [1, 2, 1], 2)] == [(5_000_000,), (5,), (5_000_000,)]


def test_a_stopped_writer_leaves_no_half_file(tmp_path):
    (tmp_path/'result.txt').write_text('old')
    work = [(str(tmp_path), 'ct_000', 'fail late', .1), (str(tmp_path), 'ct_001', 'write', 90)]
    with pytest.raises(WorkerError): parallel_map(wait_then, work, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ct_000', 'ct_001', 'result.txt']
    assert (tmp_path/'result.txt').read_text() == 'old'


SCRIPT = '''
import sys, time
sys.path.insert(0, {tests!r})
from test_13_workers import wait_then
from segnb.workers import parallel_map
if __name__ == '__main__':
    jobs = [({folder!r}, f'ct_{{i:03d}}', 'sleep', 60) for i in range(4)]
    try: parallel_map(wait_then, jobs, 2, start_method={method!r})
    except KeyboardInterrupt: print('interrupted'); sys.exit(7)
'''


def start(tmp_path, method):
    "Run a script with two sleeping workers; return it and the workers' process ids"
    run = subprocess.Popen([sys.executable, '-c', SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), method=method)] if method == 'fork' else
                           [sys.executable, str(write_script(tmp_path, method))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 120
    while len(pids(tmp_path)) < 2 and time.monotonic() < end: time.sleep(.05)
    assert len(pids(tmp_path)) == 2, run.communicate(timeout=60)
    return run, pids(tmp_path)


def write_script(tmp_path, method):
    file = tmp_path/'script.py'
    file.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), method=method))
    return file


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_ctrl_c_stops_all(tmp_path, method):
    run, there = start(tmp_path, method)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all at once
    out, err = run.communicate(timeout=60)
    assert run.returncode == 7 and out == 'interrupted\n' and 'Traceback' not in err, (run.returncode, out, err)
    assert gone(there)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_workers_do_not_outlive_a_killed_parent(tmp_path, method):
    run, there = start(tmp_path, method)
    run.kill(); run.communicate(timeout=60)
    assert gone(there)


def stubborn(job):
    "Note the process, then ignore every request to end: in C code that holds the interpreter, in Python, or asleep"
    folder, name, how = job
    (Path(folder)/name).write_text(str(os.getpid()))
    if how == 'ignores SIGTERM':
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if how == 'stuck in C': ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the interpreter's lock: no Python code runs meanwhile, handlers included
    if how == 'swallows':
        while True:
            try: time.sleep(60)
            except BaseException: pass
    if how == 'nested': parallel_map(stubborn, [(folder, f'{name}_{i}', 'sleeps') for i in range(2)], 2)
    time.sleep(60)


STUBBORN = '''
import sys, time
sys.path.insert(0, {tests!r})
from test_13_workers import stubborn
from segnb.workers import parallel_map
if __name__ == '__main__':
    jobs = [({folder!r}, f'ct_{{i:03d}}', {how!r}) for i in range(4)]
    try: parallel_map(stubborn, jobs, 2, start_method={method!r})
    except BaseException as e: print(type(e).__name__); raise
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize('method, how', [('fork', 'stuck in C'), ('fork', 'ignores SIGTERM'), ('fork', 'swallows'), ('fork', 'nested'),
                                         ('spawn', 'stuck in C'), ('forkserver', 'ignores SIGTERM'), ('forkserver', 'nested')])
def test_everything_is_gone_at_once(tmp_path, method, how, number):
    if method not in METHODS: pytest.skip(f'no {method} here')
    file = tmp_path/'script.py'
    file.write_text(STUBBORN.format(tests=str(Path(__file__).parent), folder=str(tmp_path), method=method, how=how))
    run = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    n, end = 6 if how == 'nested' else 2, time.monotonic() + 120
    while len(pids(tmp_path)) < n and time.monotonic() < end: time.sleep(.05)
    assert len(pids(tmp_path)) == n, run.communicate(timeout=60)
    there, sent = pids(tmp_path), time.monotonic()
    os.kill(run.pid, number)  # to the parent alone, as `kill` does
    assert gone(there), 'a worker outlives its parent'
    seconds = time.monotonic() - sent
    out, err = run.communicate(timeout=60)
    assert time.monotonic() - sent < 30, f'{seconds:.2f} s' # one on an idle machine; the tasks would last for 60
    name, code = {signal.SIGINT: ('KeyboardInterrupt\n', {-signal.SIGINT, 1, 130}), signal.SIGTERM: ('SystemExit\n', {143}), signal.SIGKILL: ('', {-9})}[number]
    assert out == name and run.returncode in code, (run.returncode, out, err)


def leave(task):
    "Leave the process without a word, once or always"
    note, times = task
    if note is None: return 'stayed'
    note = Path(note)
    seen = len(note.read_text()) if note.exists() else 0
    if seen < times:
        note.write_text('x'*(seen + 1))
        os._exit(seen + 5)
    return 'stayed'


@pytest.mark.parametrize('method', METHODS)
def test_a_worker_that_leaves_by_os_exit(tmp_path, method):
    with pytest.warns(WorkerWarning, match='exit code 5'):
        assert parallel_map(leave, [(None, 0), (tmp_path/'a', 1), (None, 0)], 2, names='xyz', start_method=method) == ['stayed']*3
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError, match='exit code 6 while working y.*died again') as e:
        parallel_map(leave, [(None, 0), (tmp_path/'b', 9), (None, 0)], 2, names='xyz', start_method=method)
    assert e.value.task == 'y' and e.value.unfinished == ('y',)


def test_the_system_is_named_if_it_says_that_memory_ran_out(monkeypatch):
    counts = iter([4, 4, 5, 5, 5])
    monkeypatch.setattr(workers, '_memory_kills', lambda: next(counts))
    with pytest.warns(WorkerWarning, match='killed by SIGKILL while'), pytest.raises(WorkerError, match='killed by the system while .*Memory ran out'):
        parallel_map(signal.raise_signal, [9], 1)


def test_many_deaths_are_not_waited_for(tmp_path):
    notes = [tmp_path/str(i) for i in range(40)]
    with pytest.warns(WorkerWarning) as told, pytest.raises(WorkerError, match='died again'): parallel_map(leave, [(n, 99) for n in notes], 2)
    assert len(deaths(told)) < 7 and sum(n.exists() for n in notes) < 7
    good = [(None, 0)]*40
    for i in (3, 4, 5, 20, 21, 22): good[i] = (tmp_path/f'once{i}', 1)
    with pytest.warns(WorkerWarning) as told: assert parallel_map(leave, good, 2, names=range(40)) == ['stayed']*40
    assert len(deaths(told)) == 6


class Heavy:
    "A result that takes its time to be sent, and whose worker dies meanwhile as often as asked"
    def __init__(self, note, times): self.note, self.times = Path(note), times
    def __reduce__(self):
        seen = len(self.note.read_text()) if self.note.exists() else 0
        if seen < self.times:
            self.note.write_text('x'*(seen + 1))
            threading.Timer(.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes, (200_000_000,)


def heavy(task): return (np.zeros(60_000_000), Heavy(*task))


def test_a_worker_killed_while_it_writes_its_result(tmp_path):
    with pytest.warns(WorkerWarning, match='SIGKILL'): (a, _), = parallel_map(heavy, [(tmp_path/'a', 1)], 1)
    assert a.shape == (60_000_000,)
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError, match='died again'): parallel_map(heavy, [(tmp_path/'b', 2)], 1)


def test_the_reader_of_half_a_result_is_not_blocked():
    "A worker stopped in the middle of a message and then killed: the rest never comes"
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError, match='died again'): parallel_map(half_a_message, [0], 1)


def half_a_message(_):
    threading.Timer(.3, os._exit, (9,)).start()
    frame = sys._getframe()
    while 'pipe' not in frame.f_locals: frame = frame.f_back
    pipe = frame.f_locals['pipe']
    os.write(pipe.fileno(), b'\x00\x01\x00\x00' + b'x'*100)  # a header that promises 65,536 bytes
    time.sleep(9)


def nested(i): return parallel_map(abs, [-i, i + 1], 2)
def nested_spawn(i): return parallel_map(abs, [-i, i + 1], 2, start_method='spawn')


@pytest.mark.parametrize('method', METHODS)
def test_workers_may_have_workers(method):
    assert parallel_map(nested, range(3), 2, start_method=method) == [[0, 1], [1, 2], [2, 3]]
    if method == 'fork': assert parallel_map(nested_spawn, [1], 1) == [[1, 2]]


def test_maps_in_threads_do_not_meet():
    got = {}
    def work(k): got[k] = [parallel_map(random_sum, range(k, k + 5), 2) for _ in range(3)]
    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 100)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    for k in (0, 100): assert got[k] == [[random_sum(i) for i in range(k, k + 5)]]*3


def test_an_error_of_the_tasks_themselves_comes_before_any_worker(tmp_path):
    def tasks():
        yield str(tmp_path), 'ct_000', 'sleep', 0
        raise LookupError('no more cases')
    with pytest.raises(LookupError, match='no more cases'): parallel_map(wait_then, tasks(), 2)
    assert not pids(tmp_path) and not multiprocessing.active_children()


class NoTask:
    def __reduce__(self): return int, ('no number',)


def test_tasks_and_functions_that_cannot_travel():
    with pytest.raises(WorkerError, match='b failed: the task cannot travel'): parallel_map(str, [1, lambda: 0], 2, names='ab')
    with pytest.raises(WorkerError, match='b failed: the task cannot travel.*no number'): parallel_map(str, [1, NoTask()], 2, names='ab')
    with pytest.raises(WorkerError, match='top level'): parallel_map(lambda x: x, [1], 2)


def draw(task, rng): return task, rng.random()


def die_or_draw(task, rng):
    value = rng.random()
    return leave(task), value


def test_numbers_belong_to_the_task(tmp_path):
    here = parallel_map(draw, range(6), 0, seed=7, step='drawing')
    assert here[2] == (2, keyed_rng(7, 'drawing', '2').random()) and len({v for _, v in here}) == 6
    for method in METHODS: assert parallel_map(draw, range(6), 3, seed=7, step='drawing', start_method=method) == here
    whole = parallel_map(die_or_draw, [(None, 0)]*3, 2, names='abc', seed=7)
    with pytest.warns(WorkerWarning): assert parallel_map(die_or_draw, [(None, 0), (tmp_path/'a', 1), (None, 0)], 2, names='abc', seed=7) == whole
    with pytest.raises(ValueError, match='name of its own'): parallel_map(draw, [1, 2], 0, names='aa', seed=7)
    for n in (0, 2):
        with pytest.raises(WorkerError, match=r"keyed_rng\(7, 'drawing', '1'\)") as e: parallel_map(fail_with, [1], n, seed=7, step='drawing')
        assert (e.value.task, e.value.step, e.value.seed) == ('1', 'drawing', 7)


def fail_with(task, rng): raise KeyError(task)


def span(job):
    "When this task ran"
    start = time.monotonic()
    time.sleep(job)
    return start, time.monotonic()


@pytest.mark.parametrize('needs, free, most', [([4, 4, 4, 4], 10, 2), ([4, 4, 4, 4], 3, 1), ([1, 1, 1, 1], 10, 4), ([9, 1, 1, 1], 10, 3), ([9, 9, 1, 1], 10, 2)])
def test_tasks_that_do_not_fit_wait(monkeypatch, needs, free, most):
    monkeypatch.setattr(workers, '_usable_bytes', lambda: free*10**9)
    spans = parallel_map(span, [.6]*4, 4, memory=[n*10**9 for n in needs])
    for at, _ in spans:
        beside = [n for n, (a, b) in zip(needs, spans) if a <= at < b]
        assert len(beside) == 1 or sum(beside) <= free
    crowd = max(sum(a <= at < b for a, b in spans) for at, _ in spans)
    assert 2*(most > 1) <= crowd <= most


def grow(job):
    "Take memory, note that it is taken, and hold it"
    size, seconds = job
    data = np.ones(size, np.uint8)
    time.sleep(seconds)
    return time.monotonic(), int(data[0])


def test_what_a_running_task_has_taken_is_not_counted_twice(monkeypatch):
    "1.5 GB are free. Task 0 needs 0.8 and takes it; 0.7 are left, and task 1 needs 0.6: it must not wait"
    import psutil
    monkeypatch.setattr(workers, '_usable_bytes', lambda: 1_500_000_000 - sum(p.memory_info().rss - base for p in psutil.Process().children() if p.memory_info().rss > 5e8))
    base = psutil.Process().memory_info().rss
    (a, _), (b, _) = parallel_map(grow, [(800_000_000, 2.), (1000, 0)], 2, memory=[800_000_000, 600_000_000])
    assert b < a, 'the second waited for the first'


def groups(root, v2, limit, held, inactive):
    "A control group as Linux shows it, and the line that names it"
    folder = root/('a/b' if v2 else 'memory/a/b')
    folder.mkdir(parents=True)
    for name, text in zip(('memory.max', 'memory.current') if v2 else ('memory.limit_in_bytes', 'memory.usage_in_bytes'), (limit, held)): (folder/name).write_text(f'{text}\n')
    prefix = '' if v2 else 'total_'
    (folder/'memory.stat').write_text(f'anon 5\n{prefix}inactive_file {inactive}\n{prefix}active_file 0\n')
    own = root/'own'
    own.write_text('0::/a/b\n' if v2 else '4:cpu:/x\n3:memory:/a/b\n')
    return workers._memory_groups(str(root), str(own))


@pytest.mark.parametrize('v2', [True, False])
def test_a_container_limits_memory(tmp_path, monkeypatch, v2):
    found = groups(tmp_path, v2, 4*2**30, 3*2**30, 2**30)
    assert len(found) == 1 and workers._left_in(*found[0]) == 2*2**30  # files kept in memory can be dropped
    monkeypatch.setattr(workers, '_memory_groups', lambda: found)
    assert workers._usable_bytes() <= 2*2**30
    with pytest.raises(ResourceError, match='case big.*found 2.1 GB free within the limit of this container; expected about 3.0 GB; raise that limit'): preflight({'small': Estimate(1000), 'big': Estimate(3*10**9)})


def test_no_limit_is_no_limit(tmp_path):
    for v2, none in ((True, 'max'), (False, 9223372036854771712)):
        found = groups(tmp_path/str(v2), v2, none, 5, 0)
        assert [workers._left_in(*g) for g in found] == [float('inf')]
    assert workers._memory_groups('/nowhere', '/nowhere/own') == ()


def test_preflight_in_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, '_usable_bytes', lambda: 10*10**9)
    monkeypatch.setattr(workers, '_usable_cores', lambda: 4)
    cases = {f'ct_{i:03d}': Estimate(3*10**9, 10**9, 20.) for i in range(9)} | {'ct_big': Estimate(5*10**9, 2*10**9, 30.)}
    said = []
    assert preflight(cases, tmp_path, step='resampling', say=said.append) == 2            # 5 + 3 GB fit, 5 + 3 + 3 do not
    assert said[0].splitlines()[0] == 'resampling: 10 tasks, 2 workers'
    for part in ('8.0 GB at most', '10.0 GB free', 'ct_big, 5.0 GB', '11.0 GB', 'ct_big, 2.0 GB', 'about 105 s', 'ct_big, 30 s'): assert part in said[0], said[0]
    assert preflight(cases, n_workers=1) == 1 and preflight(cases, n_workers=0) == 0 and preflight({}) == 0
    monkeypatch.setattr(workers.multiprocessing, 'get_start_method', lambda: 'fork')
    assert preflight({c: Estimate(10**6, 0, .001) for c in cases}) == 0                   # done before a pool has started
    assert preflight({c: Estimate(10**6) for c in cases}) == 4                            # time unknown
    with pytest.raises(OutputError, match='too little space'): preflight({'a': Estimate(1, 10**18)}, tmp_path)
    with pytest.raises(ResourceError, match='2 other tasks|1 other task'): preflight({c: Estimate(11*10**9) for c in 'ab'})


def test_workers_only_where_they_pay():
    assert worthwhile_workers(.01, 8, 'fork') == 0 and worthwhile_workers(.4, 2, 'fork') == 2 and worthwhile_workers(100, 8, 'fork') == 8
    assert worthwhile_workers(.4, 2, 'spawn') == 0 and worthwhile_workers(100, 1, 'fork') == 0
    for method in METHODS:
        chosen = [worthwhile_workers(s, 8, method) for s in np.logspace(-3, 3, 50)]
        assert chosen == sorted(chosen)  # more work, never fewer workers


def stopped_writer(folder):
    with whole_file(Path(folder)/'map.npy') as part:
        part.write_text('half')
        os.kill(os.getpid(), signal.SIGKILL)


def test_parts_of_killed_writers_are_removed_and_live_ones_kept(tmp_path):
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError): parallel_map(stopped_writer, [str(tmp_path)], 1)
    left = sorted(tmp_path.iterdir())
    assert len(left) == 2 and remove_stale_parts(tmp_path) == [] and remove_stale_parts(tmp_path, 'other.npy', 0) == []
    os.utime(left[0], (time.time() - 86401,)*2)
    assert remove_stale_parts(tmp_path) == left[:1] and remove_stale_parts(tmp_path, 'map.npy', 0) == left[1:] and not list(tmp_path.iterdir())
    assert remove_stale_parts(tmp_path/'none') == []


def test_a_pool_is_cheap():
    "300 empty tasks may not cost much more than two; in processor time, since a machine may be busy"
    def took(n):
        start = sum(os.times()[:4])
        parallel_map(abs, range(n), 2, start_method=METHODS[0])
        return sum(os.times()[:4]) - start
    assert min(took(302) for _ in range(5)) - min(took(2) for _ in range(5)) < 300*.0003*3


def test_progress_goes_to_stderr_when_asked_or_on_a_terminal(capfd):
    parallel_map(abs, [1, 2, 3], 0, step='cropping')
    assert capfd.readouterr() == ('', '')  # stderr is no terminal here
    parallel_map(abs, [1, 2, 3], 2, step='cropping', progress='always')
    out, err = capfd.readouterr()
    assert out == '' and 'cropping' in err and '3/3' in err
    if not hasattr(os, 'openpty'): return
    import fcntl, struct, termios
    leader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    code = "from segnb.workers import parallel_map; parallel_map(abs, [1, 2], 0, step='cropping')"
    subprocess.run([sys.executable, '-c', code], stderr=terminal, check=True)
    os.close(terminal)
    assert b'cropping' in os.read(leader, 10000)
    os.close(leader)


def test_json_round_trip_and_parity(tmp_path):
    theirs = json.loads((RECORDED/'13_workers.json').read_text())
    assert theirs['returns_after_kill'] is None and theirs['default_processes'] == 8
    write_json(theirs['object'], tmp_path/'a.json')
    assert read_json(tmp_path/'a.json') == json.loads(theirs['text'])
    odd = {'text': 'a [\n 1,\n 2\n] {"b"} \u00e4', 'empty': [[], {}], 'deep': [[1, [2, [3]]], ['x', None, True]], 'ragged': [[1], [1, 2]],
           'numpy': [np.float32(.1), np.bool_(True), np.array(3), np.zeros((0, 3)), np.arange(4).reshape(2, 2)], 'big': 10**30, 'path': Path('a/b')}
    write_json(odd, tmp_path/'b.json')
    back = read_json(tmp_path/'b.json')
    assert back['text'] == odd['text'] and back['deep'] == odd['deep'] and back['ragged'] == odd['ragged'] and back['big'] == 10**30 and back['path'] == str(Path('a/b'))
    assert back['numpy'] == [float(np.float32(.1)), True, 3, [], [[0, 1], [2, 3]]]
    assert [p.name for p in tmp_path.glob('.*')] == []


def test_json_names_what_it_cannot_hold_and_keeps_the_old_file(tmp_path):
    write_json({'old': 1}, tmp_path/'a.json')
    for bad in ({'x': [1, object()]}, {'x': {1, 2}}, {'x': 1j}):
        with pytest.raises(TypeError, match='a.json/x'): write_json(bad, tmp_path/'a.json')
    assert read_json(tmp_path/'a.json') == {'old': 1}
    (tmp_path/'cut.json').write_text('{"spacing": [3.0, 0.')
    with pytest.raises(JsonError, match='cut.json.*line 1'): read_json(tmp_path/'cut.json')


def test_where_one_cannot_write(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OutputError, match='file'): check_writable(tmp_path/'file')
    with pytest.raises(OutputError, match='too little space'): check_writable(tmp_path, 10**18)
    if os.name == 'posix' and os.geteuid():  # root may write anywhere
        locked = tmp_path/'locked'; locked.mkdir(mode=0o500)
        with pytest.raises(OutputError, match='locked.*[Pp]ermission'): check_writable(locked/'new')


def test_keys_are_the_same_on_every_machine():
    assert keyed_rng(0, 'train', 7).integers(0, 2**31, 3).tolist() == [124690210, 1162223706, 1753494079]


class Unreadable:
    "Travels, but cannot be put together again"
    def __reduce__(self): return int, ('no number',)


def unreadable(task): return Unreadable() if task == 3 else task


@pytest.mark.parametrize('method', METHODS)
def test_a_result_that_cannot_be_read_names_its_task(method):
    with pytest.raises(WorkerError, match='testing: 3 failed: the result cannot travel between processes: ValueError') as caught:
        parallel_map(unreadable, range(6), 2, step='testing', start_method=method)
    assert caught.value.task == '3' and '3' in caught.value.unfinished


@pytest.mark.skipif(sys.platform != 'linux', reason='ulimit -v holds on Linux only')
def test_a_limit_of_the_process_counts_as_memory():
    code = ('import resource, psutil; from segnb.workers import Estimate, ResourceError, preflight, default_workers\n'
            'resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 10**9,)*2)\n'
            'print(default_workers(2**31, 4), preflight({"small": Estimate(10**8)}, n_workers=1))\n'
            'try: preflight({"large": Estimate(2*10**9)}, n_workers=1)\n'
            'except ResourceError as e: print(e)')
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert said.startswith('1 1\n') and 'case large' in said and 'about 2.0 GB' in said, said
    assert 'GB free within the limit of this process (ulimit -v)' in said and 'raise that limit' in said, said


def test_missing_space_is_told_even_where_it_is_little(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(OutputError, match='too little space: 4 MB are missing'): check_writable(tmp_path, 5*10**6)
