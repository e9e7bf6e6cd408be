"""Reading beside nnU-Net 1.7.1 (recorded by tests/record/10_image.py)."""
from pathlib import Path

import numpy as np
import pytest

from segnb.image import read_geometry, read_image

with np.load(Path(__file__).parent/'recorded'/'10_image.npz') as file: RECORDED = {k: file[k] for k in file.files}
NAMES = sorted({k.split('/')[0] for k in RECORDED if '/' in k})


@pytest.mark.parametrize('name', NAMES)
def test_reads_as_the_original(name, tmp_path):
    files = []
    while (key := f'{name}/file{len(files)}') in RECORDED:
        files.append(tmp_path/f'{name}_{len(files):04d}.nii.gz')
        files[-1].write_bytes(RECORDED[key].tobytes())
    array, geometry = read_image(files)
    assert array.dtype == np.float32 and np.array_equal(array, RECORDED[f'{name}/data'].astype(np.float32))
    assert geometry.spacing == tuple(RECORDED[f'{name}/spacing']) and geometry.shape == tuple(RECORDED[f'{name}/size'])
    assert geometry.origin == tuple(RECORDED[f'{name}/origin'])
    assert np.allclose(geometry.direction, RECORDED[f'{name}/direction'], rtol=0, atol=1e-12)
    assert read_geometry(files[0]) == geometry
