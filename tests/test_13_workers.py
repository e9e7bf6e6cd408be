"""Workers where cells cannot look: real signals, orphans, terminals, both ways to start a process."""
import json, multiprocessing, os, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import pytest

from segnb.image import SegnbError, whole_file
from segnb.workers import JsonError, OutputError, WorkerError, WorkerWarning, check_writable, keyed_rng, parallel_map, read_json, write_json

RECORDED = Path(__file__).parent/'recorded'
METHODS = [m for m in ('fork', 'spawn', 'forkserver') if m in multiprocessing.get_all_start_methods()]


def wait_then(job):
    "Note the process, then sleep, fail, refuse, or die"
    folder, name, what, seconds = job
    (Path(folder)/name).write_text(str(os.getpid()))
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
    return [(str(folder), f'ct_{i:03d}', what if i == at else 'sleep', .2 if i <= at else 30) for i in range(n)]


def pids(folder):
    "Processes that noted themselves in `folder`; one that was ended while it wrote its note counts for none"
    return [int(text) for p in Path(folder).glob('ct_*') if (text := p.read_text())]


def alive(pid):
    try: return 'Z' not in Path(f'/proc/{pid}/stat').read_text().split(')')[1]
    except OSError: return False


def gone(pids, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(p) for p in pids): time.sleep(.05)
    return not any(alive(p) for p in pids)


@pytest.mark.parametrize('method', METHODS)
def test_every_number_of_workers_gives_the_same(method):
    here = parallel_map(random_sum, range(7), 0)
    for n in (1, 2, 9): assert parallel_map(random_sum, range(7), n, start_method=method) == here


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('what, kind, text', [('fail', WorkerError, "KeyError: 'no such organ'"), ('refuse', SegnbError, 'ct_001.nii.gz: spacing is wrong'),
                                              ('exit', WorkerError, 'SystemExit: 3'), ('unpicklable', WorkerError, 'cannot travel')])
def test_an_error_arrives_while_others_still_work(tmp_path, method, what, kind, text):
    start = time.monotonic()
    with pytest.raises(kind) as e: parallel_map(wait_then, jobs(tmp_path, what), 2, names=[f'ct_{i:03d}' for i in range(4)], step='cropping', start_method=method)
    assert time.monotonic() - start < 15, 'the others, who sleep for 30 s, were waited for'
    assert 'cropping' in str(e.value) and 'ct_001' in str(e.value) and text in str(e.value)
    if kind is WorkerError: assert e.value.task == 'ct_001' and {'ct_001', 'ct_003'} <= set(e.value.unfinished)
    if what == 'fail': assert 'wait_then' in e.value.traceback
    assert gone(pids(tmp_path))


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


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM])
def test_a_worker_killed_once_is_told_and_its_task_tried_again_alone(tmp_path, method, number):
    names = [f'ct_{i:03d}' for i in range(5)]
    work = [(str(tmp_path), n, 'sleep', .6) for n in names]
    assassin = Assassin(tmp_path/'ct_001', number, 1)
    with pytest.warns(WorkerWarning, match='tried again alone') as told: assert parallel_map(wait_then, work, 2, names=names, step='cropping', start_method=method) == names
    text = str(told[0].message)
    assert len(told) == 1 and 'while cropping ct_001' in text and (number.name in text or 'exit code 143' in text) and told[0].filename == __file__
    others = [(tmp_path/n).stat().st_mtime for n in names if n != 'ct_001']
    assert (tmp_path/'ct_001').stat().st_mtime > max(others) + .5, 'others worked beside the suspect'
    assert gone(pids(tmp_path) + [p for p, _ in assassin.killed])


@pytest.mark.parametrize('method', METHODS)
def test_a_worker_killed_twice_is_named_with_its_numbers(tmp_path, method):
    names = [f'ct_{i:03d}' for i in range(4)]
    work = [(str(tmp_path), n, 'sleep', 5 if n == 'ct_002' else .3) for n in names]
    assassin = Assassin(tmp_path/'ct_002', signal.SIGKILL, 2)
    with pytest.warns(WorkerWarning), pytest.raises(WorkerError) as e:
        parallel_map(wait_then, work, 2, names=names, step='resampling', start_method=method, memory=[9_000_000_000]*4)
    noticed = time.monotonic() - assassin.killed[-1][1]
    assert noticed < .5, f'noticed after {noticed:.1f} s'
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
    work = [(str(tmp_path), 'ct_000', 'fail', .6), (str(tmp_path), 'ct_001', 'write', 30)]
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
    end = time.monotonic() + 30
    while len(pids(tmp_path)) < 2 and time.monotonic() < end: time.sleep(.05)
    assert len(pids(tmp_path)) == 2, run.communicate(timeout=5)
    return run, pids(tmp_path)


def write_script(tmp_path, method):
    file = tmp_path/'script.py'
    file.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path), method=method))
    return file


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_ctrl_c_stops_all(tmp_path, method):
    run, workers = start(tmp_path, method)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all at once
    out, err = run.communicate(timeout=15)
    assert run.returncode == 7 and out == 'interrupted\n' and 'Traceback' not in err, (run.returncode, out, err)
    assert gone(workers)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_workers_do_not_outlive_a_killed_parent(tmp_path, method):
    run, workers = start(tmp_path, method)
    run.kill(); run.communicate(timeout=15)
    assert gone(workers)


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
