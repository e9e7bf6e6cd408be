"""Seeded inputs for the benchmarks: a noisy body with organs, label maps of few and of many structures."""
import numpy as np

#              from             to               mm before          mm after
SIZES = dict(
    ct_up=((64, 160, 160), (80, 197, 197), (1.25, 1.25, 1.25), (1., 1.015, 1.015)),
    large=((120, 256, 256), (160, 192, 192), (1., .75, .75), (.75, 1., 1.)),
    thick=((30, 320, 320), (36, 256, 256), (6., .8, .8), (5., 1., 1.)),
    small=((36, 50, 35), (45, 62, 44), (1.25, 1.25, 1.25), (1., 1., 1.)))


def _ellipsoid(shape, centre, radii):
    "True inside an ellipsoid; centre and radii as parts of the half width, -1 to 1"
    z, y, x = np.ogrid[tuple(slice(-1, 1, n*1j) for n in shape)]
    return ((z - centre[0])/radii[0])**2 + ((y - centre[1])/radii[1])**2 + ((x - centre[2])/radii[2])**2 < 1


def image(shape, seed=0):
    "A body in air with a dozen organs and noise, HU, (1, Z, Y, X) float32"
    rng = np.random.default_rng(seed)
    volume = np.full(shape, -1000, np.float32)
    volume[_ellipsoid(shape, (0, 0, 0), (1.2, .8, .9))] = 40
    for _ in range(12): volume[_ellipsoid(shape, rng.uniform(-.5, .5, 3), rng.uniform(.1, .3, 3))] = rng.uniform(-100, 300)
    return (volume + rng.normal(0, 12, shape).astype(np.float32))[None]


def labels(shape, n, seed=0):
    "`n` compact structures, later ones over earlier ones, values 0..n, each present, (Z, Y, X) int16"
    rng, out = np.random.default_rng(seed), np.zeros(shape, np.int16)
    for k in range(1, n + 1): out[_ellipsoid(shape, rng.uniform(-.8, .8, 3), rng.uniform(.1, .25, 3))] = k
    for k in sorted(set(range(1, n + 1)) - set(np.unique(out).tolist())):
        corner = [int(rng.integers(0, size - 4)) for size in shape]
        out[tuple(slice(c, c + 4) for c in corner)] = k
    return out
