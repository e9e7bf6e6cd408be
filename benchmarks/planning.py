"""Planning: 1,000 random fingerprints by segnb (seconds a plan), and one data set by nnU-Net v2's planner.

The goal is 1,000 plans with all their configurations in less than 10 s.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')

import numpy as np
from common import HERE, entry, main, measure
import v2


def fingerprints(n, seed=0):
    "Random data sets, from thick slices to isotropic, 10 to 200 cases"
    from segnb.fingerprint import Fingerprint
    rng = np.random.default_rng(seed)
    for _ in range(n):
        cases, mm = int(rng.integers(10, 200)), rng.uniform(.4, 2, 3) * (rng.choice([1, 1, 4]), 1, 1)
        size = np.exp(rng.uniform(np.log(24), np.log(500), 3)) * (rng.choice([1, .3]), 1, 1)
        yield Fingerprint(mm * rng.uniform(.9, 1.1, (cases, 3)), np.maximum(size * rng.uniform(.8, 1.2, (cases, 3)), 8).astype(int),
                          ['CT', 'T1', 'T2', 'FLAIR'][:int(rng.integers(1, 5))], range(1, int(rng.integers(2, 20))), [1.]*cases)


@entry('plans', 'segnb')
def _():
    from segnb.planning import plan_experiment
    many = list(fingerprints(1000))
    return measure(lambda: [plan_experiment(f) for f in many], 2, slow=30, per=len(many))


@entry('plans', 'nnunetv2', 'peers')
def _():
    task = HERE.parent/'data_samples'/'Task101_PhantomCT'
    v2.planned(task)
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    return measure(lambda: [ExperimentPlanner(v2.number(task)).plan_experiment() for _ in range(20)], 2, per=20)


if __name__ == '__main__': main(__doc__)
