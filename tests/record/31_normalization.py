"""Record how nnU-Net 1.7.1 normalises five channels of one small image, with and without the mask.

Needs python 3.11 with nnunet==1.7.1 (README.md beside this file). Writes tests/recorded/31_normalization.npz.
Usage: python tests/record/31_normalization.py
"""
import contextlib, importlib.metadata, io, json
from pathlib import Path

import numpy as np

SCHEMES = ('CT', 'CT2', 'nonCT', 'nonCT', 'noNorm')
MASKS = {'plain': (False, False, False, False, False), 'masked': (True, True, True, False, True)}
STATISTICS = {'mean': np.float32(101.7), 'sd': np.float32(27.3), 'median': np.float32(99.), 'mn': np.float32(-40), 'mx': np.float32(260),
              'percentile_00_5': 31.25, 'percentile_99_5': 188.6}


def main():
    rng = np.random.default_rng(31)
    data = (rng.normal(100, 45, (5, 9, 14, 13)) + np.arange(5).reshape(5, 1, 1, 1) * 40).round(1).astype(np.float32)
    seg = rng.integers(-1, 3, (9, 14, 13)).astype(np.int16)
    data[:, seg < 0] *= rng.random((seg < 0).sum()) < .3
    out = {'data': data, 'seg': seg, 'schemes': np.array(SCHEMES), 'statistics': json.dumps({k: float(v) for k, v in STATISTICS.items()})}
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunet.preprocessing.preprocessing import GenericPreprocessor
        for name, masks in MASKS.items():
            preprocessor = GenericPreprocessor(dict(enumerate(SCHEMES)), dict(enumerate(masks)), [0, 1, 2], {c: STATISTICS for c in range(5)})
            spacing = np.ones(3)
            new, _, _ = preprocessor.resample_and_normalize(data.copy(), spacing, {'original_spacing': spacing}, seg[None].astype(np.float32))
            out[f'{name}/use_mask'], out[f'{name}/new'] = np.array(masks), new
    out['command'] = 'python tests/record/31_normalization.py'
    out['versions'] = json.dumps({p: importlib.metadata.version(p) for p in ('nnunet', 'numpy')})
    np.savez_compressed(Path(__file__).parents[1] / 'recorded' / '31_normalization.npz', **out)


if __name__ == '__main__': main()
