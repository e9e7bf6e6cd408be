"""Measure every transform beside the plain way to write it: processor seconds on one thread, one channel of 64 x 96 x 96 voxels.

Runs in segnb's own environment (with batchgenerators), prints a table and writes tests/recorded/39_transforms_cost.json. The figures
belong to the machine that the file names; nothing asserts them.
Usage, from the project root: python tests/record/39_transforms_cost.py
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
import json, platform, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT/'benchmarks')]
import inputs
import numpy as np
import torch
from batchgenerators.augmentations import color_augmentations as color, resample_augmentations as lower
from scipy import ndimage
from segnb import transforms as T

LARGE, SIZE, TURN = (121, 154, 135), (64, 96, 96), .35


def turned():
    c, s = np.cos(TURN), np.sin(TURN)
    return np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def scipy_image(x, matrix, order):
    offset = (np.array(LARGE) - 1)/2 - matrix @ ((np.array(SIZE) - 1)/2)
    return ndimage.affine_transform(x, matrix, offset, SIZE, np.float32, order=order, mode='constant')


def scipy_labels(seg, matrix):
    out = np.zeros(SIZE, np.float32)
    for label in np.unique(seg): out[scipy_image((seg == label).astype(float), matrix, 1) >= .5] = label
    return out


def seconds(work, repeats=7):
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return float(np.median(taken))


def main():
    torch.set_num_threads(1)
    matrix, rng, exact = turned(), np.random.default_rng(0), (1.2, 1.2)
    large, seg = (inputs.image(LARGE)[0]/300).astype(np.float32), inputs.labels(LARGE, 3)[None]
    part = np.ascontiguousarray(large[28:92, 29:125, 19:115])[None]
    x, big, few = torch.from_numpy(part), torch.from_numpy(large)[None], torch.from_numpy(seg.astype(np.int8))
    half = dict(order_downsample=0, order_upsample=3)
    pairs = {
        'turn, order 3': (lambda: scipy_image(large, matrix, 3), lambda: T.warp_images(big, matrix, SIZE)),
        'turn, order 1': (lambda: scipy_image(large, matrix, 1), lambda: T.warp_images(big, matrix, SIZE, 1)),
        'turn labels': (lambda: scipy_labels(seg[0], matrix), lambda: T.warp_label_maps(few, matrix, SIZE)),
        'noise': (lambda: part + rng.normal(0, .1, part.shape), lambda: T.add_noise(x, .1, rng)),
        'blur': (lambda: ndimage.gaussian_filter(part[0], .8), lambda: T.blur(x, .8)),
        'low resolution': (lambda: lower.augment_linear_downsampling_scipy(part.copy(), (.7, .7), **half), lambda: T.low_resolution(x, .7)),
        'brightness': (lambda: color.augment_brightness_multiplicative(part.copy(), exact), lambda: T.brightness(x, 1.2)),
        'contrast': (lambda: color.augment_contrast(part.copy(), exact), lambda: T.contrast(x, 1.2)),
        'gamma': (lambda: color.augment_gamma(part.copy(), exact, per_channel=True, retain_stats=True), lambda: T.gamma(x, 1.2)),
        'mirror': (lambda: part[:, ::-1, ::-1, ::-1].copy(), lambda: T.mirror(x, (0, 1, 2)))}
    rows = {name: dict(plain_ms=round(1e3*seconds(plain, 3), 3), segnb_ms=round(1e3*seconds(ours), 3)) for name, (plain, ours) in pairs.items()}
    cpu = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), platform.machine())
    record = dict(cpu=cpu, voxels=int(np.prod(SIZE)), torch=torch.__version__.split('+')[0], numpy=np.__version__, rows=rows)
    (ROOT/'tests'/'recorded'/'39_transforms_cost.json').write_text(json.dumps(record, indent=1) + '\n')
    for name, row in rows.items(): print(f'{name:16} {row["plain_ms"]:9.2f} {row["segnb_ms"]:9.2f} ms  x{row["plain_ms"]/row["segnb_ms"]:.1f}')


if __name__ == '__main__': main()
