"""Record how nnU-Net 1.7.1 works with several processes, and how segnb does, for the chapter on workers.

Usage, from the project root:
    python tests/record/13_workers.py original   (needs Python 3.11 with nnunet==1.7.1, see tests/record/README.md)
    python tests/record/13_workers.py timeline   (needs segnb)
    python tests/record/13_workers.py cost       (needs segnb; on a quiet machine)
`original` writes tests/recorded/13_workers.json: the number of processes by default, what becomes of a run whose worker is
killed, what its save_json leaves on disk when it fails, and the text that it writes for a small object.
`timeline` writes tests/recorded/13_workers_timeline.json: which worker held which task from when to when, in seconds.
`cost` writes tests/recorded/13_workers_cost.json: what a pool of two costs, and each task: ms and microseconds, of Python's two pools and ours.
"""
import contextlib, json, multiprocessing, os, platform, signal, subprocess, sys, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

OUT = Path(__file__).resolve().parents[1]/'recorded'
PATIENCE = 20  # seconds that the original gets to notice a killed worker
OBJECT = {'name': 'Task101', 'spacing': [3.0, 0.8, 0.8], 'shape': [34, 124, 128], 'labels': {'1': 'organ', '2': 'lesion'}, 'mean': 0.1, 'cropped': False, 'note': None}


def crop_case(deadly, case, name, overwrite):
    "Stands in for the original's work on one case; the worker of ct_002 may be killed"
    time.sleep(.2)
    if deadly and name == 'ct_002': os.kill(os.getpid(), signal.SIGKILL)


def cropper(deadly):
    "The original's run_cropping over four cases on two processes"
    from nnunet.preprocessing import cropping
    cropping.get_case_identifier = lambda case: case[0]
    folder = tempfile.mkdtemp()
    crop = cropping.ImageCropper(2, folder)
    crop.load_crop_save = partial(crop_case, deadly)
    crop.run_cropping([[f'ct_{i:03d}', None] for i in range(4)], True, folder)


def waits(deadly):
    "Seconds until the original returns, or None if it does not within PATIENCE"
    start = time.monotonic()
    run = subprocess.Popen([sys.executable, __file__, 'crop', str(int(deadly))], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: run.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        return None
    if run.returncode: raise RuntimeError(f'the original ended with {run.returncode}')
    return round(time.monotonic() - start, 1)


def original():
    import numpy as np
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): from nnunet.configuration import default_num_threads
    from batchgenerators.utilities.file_and_folder_operations import save_json
    file = Path(tempfile.mkdtemp())/'plan.json'
    save_json(OBJECT, str(file))
    text, error = file.read_text(), None
    try: save_json({'median': 1.5, 'shape': [34, 124], 'voxels': np.int64(540)}, str(file), sort_keys=False)
    except TypeError as e: error = str(e)
    return {'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'batchgenerators', 'numpy')}},
            'default_processes': default_num_threads, 'patience': PATIENCE, 'returns_after': waits(False), 'returns_after_kill': waits(True),
            'object': OBJECT, 'text': text, 'failed_save': {'error': error, 'left_on_disk': file.read_text()}}


def task(job):
    "Sleep, and note on disk when: a killed worker can return nothing; the deadly task kills its worker once, half way"
    notes, i, seconds, deadly = job
    note = Path(notes)/f'{i}_{os.getpid()}.json'
    dies = deadly and not list(Path(notes).glob(f'{i}_*.json'))
    start = time.monotonic()
    note.write_text(json.dumps([start, start + seconds/2, False]))
    time.sleep(seconds/2 if dies else seconds)
    if dies: os.kill(os.getpid(), signal.SIGKILL)
    note.write_text(json.dumps([start, time.monotonic(), True]))


def run(n_workers, deadly=None):
    from segnb.workers import parallel_map
    notes, told = tempfile.mkdtemp(), []
    parallel_map(abs, [0]*4, n_workers)  # warm
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        parallel_map(task, [(notes, i, s, i == deadly) for i, s in enumerate(DURATIONS)], n_workers, names=[f'ct_{i:03d}' for i in range(len(DURATIONS))], step='cropping')
    stop = time.monotonic()
    read = sorted((*json.loads(p.read_text()), *map(int, p.stem.split('_'))) for p in Path(notes).glob('*.json'))  # start, stop, done, task, process
    life = {pid: [min(a for a, *_, p in read if p == pid), max(b for _, b, *_, p in read if p == pid)] for *_, pid in read}
    seats, seat = [], {}  # a new process takes the place of one that is gone
    for pid, (begin, end) in sorted(life.items(), key=lambda item: item[1]):
        free = [k for k, until in enumerate(seats) if until <= begin and (len(seats) == max(n_workers, 1))]
        seat[pid] = free[0] if free else len(seats)
        if free: seats[free[0]] = end
        else: seats.append(end)
    tasks = [[i, seat[pid], round(a - start, 3), round(b - start, 3), done] for a, b, done, i, pid in read]
    return {'tasks': tasks, 'total': round(stop - start, 3), 'told': [str(w.message).split(';')[0] for w in heard]}


DURATIONS = (.6, .9, .3, 1.2, .6, .3, .9, .6, 1.5, .3)


def timeline():
    return {'versions': {'python': platform.python_version()}, 'durations': DURATIONS,
            'here': run(0), 'three': run(3), 'killed': run(3, deadly=4)}


def by_pool(n):
    with multiprocessing.get_context('fork').Pool(2) as pool: pool.map(abs, range(n), chunksize=1)

def by_executor(n):
    with ProcessPoolExecutor(2, multiprocessing.get_context('fork')) as pool: list(pool.map(abs, range(n)))

def by_us(n):
    from segnb.workers import parallel_map
    parallel_map(abs, range(n), 2, start_method='fork')


def cost():
    "The best of 15 rounds, the three taking turns"
    ways, took = {'multiprocessing.Pool': by_pool, 'ProcessPoolExecutor': by_executor, 'parallel_map': by_us}, {}
    for _ in range(15):
        for name, way in ways.items():
            for n in (2, 2002):
                start = time.perf_counter()
                way(n)
                took[name, n] = min(took.get((name, n), 9), time.perf_counter() - start)
    return {'versions': {'python': platform.python_version()}, 'cores': os.cpu_count(),
            'pool_ms': {k: round(1e3*took[k, 2], 1) for k in ways}, 'task_us': {k: round(1e6*(took[k, 2002] - took[k, 2])/2000, 1) for k in ways}}


if __name__ == '__main__':
    for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
    what = sys.argv[1]
    if what == 'crop': cropper(sys.argv[2] == '1'); sys.exit()
    name = {'original': '13_workers'}.get(what, f'13_workers_{what}')
    found = {'command': f'python tests/record/13_workers.py {what}'} | {'original': original, 'timeline': timeline, 'cost': cost}[what]()
    (OUT/f'{name}.json').write_text(json.dumps(found, indent=1) + '\n')
    print(f'wrote tests/recorded/{name}.json')
