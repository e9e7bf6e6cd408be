"""Measure how preprocessed cases should be stored: numpy memory maps against blosc2, size and time of a random patch.

For each folder of preprocessed cases (preprocessed/<task>/<configuration>, as segnb writes them) a few cases are written again in
both ways on the same disk. A patch of the given size (the whole axis where a case is smaller) is read from a random place, as the
loader does: warm, and cold after the file was dropped from the page cache (posix_fadvise). blosc2 uses zstd with bit shuffling, chunks
and blocks near the patch as nnU-Net v2 chooses them, one thread. Needs numpy and blosc2 (`pip install blosc2`), Linux for the cold
reads. Writes tests/recorded/32_storage.json.
Usage: python tests/record/32_storage.py NAME=FOLDER:PATCH ...   e.g. hippocampus=workspace/preprocessed/Task004_Hippocampus/3d_fullres:40,56,40
"""
import importlib.metadata, json, os, platform, sys, tempfile, time
from pathlib import Path

import blosc2
import numpy as np

READS, CASES = 200, 6


def drop(file):
    "Write the file to the disk and forget its pages"
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def write_numpy(array, file): np.save(file, array)


def write_blosc2(array, file, patch, level):
    "Blocks of about 64 KB shaped like the patch, chunks of several blocks, one channel each"
    size = [min(p, n) for p, n in zip(patch, array.shape[1:])]
    block, chunk = list(size), [min(2 * s, n) for s, n in zip(size, array.shape[1:])]
    while np.prod(block) * 4 > 2**16: block[int(np.argmax(block))] = -(-max(block) // 2)
    blosc2.asarray(np.ascontiguousarray(array), urlpath=str(file), mode='w', chunks=(1, *chunk), blocks=(1, *block),
                   cparams={'codec': blosc2.Codec.ZSTD, 'clevel': level, 'nthreads': 1, 'filters': [blosc2.Filter.BITSHUFFLE]})


def open_numpy(file): return np.load(file, mmap_mode='r')
def open_blosc2(file): return blosc2.open(str(file), mode='r', dparams={'nthreads': 1})


def read(opened, start, patch):
    return np.array(opened[(slice(None), *(slice(a, a + p) for a, p in zip(start, patch)))], np.float32)


def measure(files, shapes, open_file, patch, cold, rng):
    "Median and 95th percentile of opening a case and reading a patch, in ms, and the processor's part"
    wall, cpu = [], []
    for i in range(READS):
        which = int(rng.integers(len(files)))
        start = [int(rng.integers(0, max(1, n - p + 1))) for n, p in zip(shapes[which][1:], patch)]
        if cold: drop(files[which])
        else: read(open_file(files[which]), start, patch)
        t, c = time.perf_counter(), time.process_time()
        read(open_file(files[which]), start, patch)
        wall.append(time.perf_counter() - t); cpu.append(time.process_time() - c)
    return dict(median_ms=round(1e3 * float(np.median(wall)), 3), p95_ms=round(1e3 * float(np.percentile(wall, 95)), 3),
                cpu_ms=round(1e3 * float(np.mean(cpu)), 3))


def one_task(folder, patch, rng):
    cases, out = sorted(folder.glob('*_data.npy'))[:CASES], {}
    ways = {'numpy': (write_numpy, open_numpy), 'blosc2 level 1': (lambda a, f: write_blosc2(a, f, patch, 1), open_blosc2),
            'blosc2 level 8': (lambda a, f: write_blosc2(a, f, patch, 8), open_blosc2)}
    arrays = [np.load(f) for f in cases]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for name, (write, open_file) in ways.items():
            files = [Path(work)/f'{name.replace(" ", "_")}_{i}{".npy" if name == "numpy" else ".b2nd"}' for i in range(len(arrays))]
            t = time.process_time()
            for array, file in zip(arrays, files): write(array, file)
            t = time.process_time() - t
            out[name] = dict(mb_per_case=round(sum(f.stat().st_size for f in files) / 1e6 / len(files), 3), write_cpu_ms_per_case=round(1e3 * t / len(files), 2))
            out[name]['warm'] = measure(files, [a.shape for a in arrays], open_file, patch, False, rng)
            out[name]['cold'] = measure(files, [a.shape for a in arrays], open_file, patch, True, rng)
            for array, file in zip(arrays, files): assert np.array_equal(open_file(file)[:], array)
    return dict(cases=len(arrays), shape=list(arrays[0].shape), patch=list(patch), formats=out)


def main():
    blosc2.set_nthreads(1)
    tasks = {}
    for word in sys.argv[1:]:
        name, rest = word.split('=')
        folder, patch = rest.rsplit(':', 1)
        tasks[name] = one_task(Path(folder), tuple(int(n) for n in patch.split(',')), np.random.default_rng(0))
        print(name, json.dumps(tasks[name]['formats'], indent=1), file=sys.stderr)
    if not tasks: raise SystemExit(__doc__)
    versions = {p: importlib.metadata.version(p) for p in ('numpy', 'blosc2')}
    out = dict(command='python tests/record/32_storage.py NAME=FOLDER:PATCH ...', versions=versions, reads=READS,
               processor=platform.processor() or platform.machine(), cores=os.cpu_count(), tasks=tasks)
    (Path(__file__).parents[1]/'recorded'/'32_storage.json').write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__': main()
