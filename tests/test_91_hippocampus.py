"""The hippocampus, really: the archive from its public address, and five folds from raw data to a table."""
import os, urllib.request
from pathlib import Path

import pytest

from conftest import ROOT
from segnb import cli
from segnb.samples import PUBLIC, download_task

DATA = Path(os.environ.get('SEGNB_REAL_DATA', ROOT.parent/'shared'/'data'))/'Task004_Hippocampus'


def reachable(url):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=5): return True
    except OSError: return False


def test_the_archive_comes_from_its_address(tmp_path):
    if not reachable(PUBLIC['Task04_Hippocampus'].url): pytest.skip('the public address cannot be reached from here')
    dataset = download_task('Task04_Hippocampus', tmp_path/'raw', progress=False)
    assert (dataset.folder.name, len(dataset.cases), len(dataset.test_cases)) == ('Task004_Hippocampus', 260, 130)


@pytest.mark.skipif(not os.environ.get('SEGNB_SLOW'), reason='five trainings: set SEGNB_SLOW=1')
def test_five_folds_from_raw_data_to_a_table(tmp_path):
    if not DATA.exists(): pytest.skip('the real data is not here (SEGNB_REAL_DATA)')
    quiet = dict(say=lambda *a: None)
    cli.plan(DATA, tmp_path, planner='cpu', **quiet)
    cli.preprocess('Task004_Hippocampus', tmp_path, ['3d_fullres'], **quiet)
    for fold in range(5): cli.train('Task004_Hippocampus', tmp_path, '3d_fullres', str(fold), epochs=2, iterations=60, val_iterations=2, mirror_axes=(), mirror=False, device='cpu', progress=False, **quiet)
    from segnb.postprocessing import consolidate_folds
    from segnb.workers import read_json
    model = tmp_path/'models'/'Task004_Hippocampus'/'3d_fullres'
    consolidate_folds(model, DATA/'labelsTr')
    pooled = read_json(model/'cross_validation.json')
    assert len(pooled['cases']) == len(list((DATA/'labelsTr').glob('*.nii.gz'))) and pooled['foreground_mean']['dice'] > .5
