"""Record how nnU-Net v2 scales channels to 0..1, which v1 does not do.

Needs python 3.11 with nnunetv2==2.8.1. Writes tests/recorded/31_normalization_v2.npz.
Usage: python tests/record/31_normalization_v2.py
"""
import importlib.metadata, json
from pathlib import Path

import numpy as np


def main():
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import RescaleTo01Normalization, RGBTo01Normalization
    rng = np.random.default_rng(312)
    inputs = {'rescale01': (rng.normal(100, 45, (3, 5, 9, 8)) * [[[[1]]], [[[-300]]], [[[1e-3]]]]).astype(np.float32),
              'rgb': rng.uniform(0, 255, (3, 5, 9, 8)).astype(np.float32)}
    inputs['rescale01'][2] = 7 # one value only
    inputs['rgb'][0] = inputs['rgb'][0].round()
    out = {}
    for (name, data), scheme in zip(inputs.items(), (RescaleTo01Normalization, RGBTo01Normalization)):
        out[f'{name}/data'], out[f'{name}/new'] = data, np.stack([scheme(intensityproperties={}).run(c.copy(), None) for c in data])
    out['command'] = 'python tests/record/31_normalization_v2.py'
    out['versions'] = json.dumps({p: importlib.metadata.version(p) for p in ('nnunetv2', 'numpy')})
    np.savez_compressed(Path(__file__).parents[1] / 'recorded' / '31_normalization_v2.npz', **out)


if __name__ == '__main__': main()
