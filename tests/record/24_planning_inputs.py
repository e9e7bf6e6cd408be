"""Made-up fingerprints of every kind, from a seed and a number; used by tests/record/24_planning_all.py and by the test that reads its record.

Needs numpy only. A fingerprint is (spacings, shapes, number of channels, number of foreground labels), one row a case.
"""
import numpy as np

ROUND_MM, ROUND_VOXELS = [.5, .625, .75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6], [8, 16, 20, 24, 32, 48, 64, 96, 128, 160, 256, 320, 512]
KINDS = 'isotropic', 'one coarse axis', 'two coarse axes', 'one slice', '2D file', 'tiny', 'huge', 'round numbers', 'all different'


def _base(kind, rng):
    "Spacing in mm and shape in voxels of the typical case"
    if kind == 'isotropic': return [rng.uniform(.4, 2)] * 3, rng.integers(30, 420, 3)
    if kind == 'one coarse axis': return [rng.uniform(2, 12), *[rng.uniform(.3, 1.8)] * 2], [rng.integers(8, 70), *rng.integers(96, 640, 2)]
    if kind == 'two coarse axes':
        coarse = rng.uniform(2, 6)
        return [coarse, coarse * rng.uniform(.9, 1.1), rng.uniform(.4, 1)], [*rng.integers(8, 80, 2), rng.integers(64, 512)]
    if kind == 'one slice': return [rng.uniform(1, 10), *[rng.uniform(.2, 1.2)] * 2], [1, *rng.integers(64, 1024, 2)]
    if kind == '2D file': return [999, 1, 1], [1, *rng.integers(64, 1500, 2)]
    if kind == 'tiny': return rng.uniform(.3, 3, 3), rng.integers(3, 40, 3)
    if kind == 'huge': return rng.uniform(.2, 1.2, 3), rng.integers(300, 1400, 3)
    if kind == 'round numbers': return rng.choice(ROUND_MM, 3), rng.choice(ROUND_VOXELS, 3)
    return rng.uniform(.3, 6, 3), rng.integers(12, 500, 3)


def fingerprint(seed, i):
    "Fingerprint number `i` of a seed: 1 to 300 cases, 1 to 4 channels, 1 to 61 labels"
    rng, kind = np.random.default_rng([seed, i]), KINDS[i % len(KINDS)]
    n_cases, flat = int(rng.integers(1, 301)), kind in ('one slice', '2D file')
    base, size = (np.array(v, float) for v in _base(kind, rng))
    order = np.arange(3) if kind == '2D file' else rng.permutation(3)
    base, size = base[order], size[order]
    exact, rows = kind == 'round numbers', min(n_cases, int(rng.integers(1, 6)))
    spacings = np.round(base * np.exp(rng.normal(0, 0 if exact else rng.choice([0, .05, .4]), (rows, 3))), 4)
    shapes = np.maximum(1, np.round(size * np.exp(rng.normal(0, 0 if exact else .15, (rows, 3))))).astype(int)
    if flat: shapes[:, np.argmin(size)] = 1
    if kind == '2D file': spacings[:] = base
    copies = -(-n_cases // rows)
    labels = int(rng.choice([1, 2, 3, 13, 61]) if i % 2 else rng.integers(1, 62))
    return np.tile(spacings, (copies, 1))[:n_cases], np.tile(shapes, (copies, 1))[:n_cases], int(rng.integers(1, 5)), labels
