"The benchmarks' bookkeeping: marks are judged by ratio, the record is readable and its page in step; no times are asserted"
import json, subprocess, sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent/'benchmarks'
sys.path.insert(0, str(FOLDER))
import common, report


def test_a_mark_compares_the_peer_with_segnb(monkeypatch):
    monkeypatch.setattr(common, 'marks', {'g': [('peer', 3, 'seconds', 'segnb'), ('peer', 2, 'peak_mb', 'segnb')]})
    figures = dict(segnb=dict(seconds=2., peak_mb=100), peer=dict(seconds=8., peak_mb=150))
    assert common.verdict('g', figures) == [('peer / segnb, seconds', 4., 3, True), ('peer / segnb, peak_mb', 1.5, 2, False)]
    assert common.verdict('g', dict(segnb=figures['segnb'], peer=dict(error='not installed'))) == []


def test_the_median_round_is_kept_and_failures_are_not_averaged():
    runs = [dict(seconds=3., calls=1), dict(seconds=1., calls=2), dict(error='x'), dict(seconds=2., calls=3)]
    assert common._middle(runs) == dict(seconds=2., calls=3, rounds=3)
    assert common._middle([dict(error='x')]) == dict(error='x')


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_measure_takes_time_cpu_and_memory():
    def work(): return bytearray(30_000_000)
    figures = common.measure(work, 2)
    assert figures['calls'] == 2 and 0 < figures['fastest'] <= figures['seconds'] and figures['peak_mb'] > 30


@pytest.mark.parametrize('stage', ['reading', 'fingerprint', 'planning', 'resampling', 'preprocessing', 'augmentation', 'training', 'metrics', 'sliding_window', 'export', 'prediction', 'components', 'exchange', 'hippocampus'])
def test_every_stage_can_be_asked_for_help(stage):
    run = subprocess.run([sys.executable, FOLDER/f'{stage}.py', '--help'], capture_output=True, text=True)
    assert run.returncode == 0 and '--peers' in run.stdout


def test_one_group_runs_in_processes_of_its_own():
    run = subprocess.run([sys.executable, FOLDER/'resampling.py', 'image_small', '--rounds', '1', '--no-record'], capture_output=True, text=True)
    assert run.returncode == 0 and 'FAILED' not in run.stdout and 'segnb' in run.stdout, run.stdout + run.stderr


def test_the_page_of_the_record_is_in_step(tmp_path, monkeypatch):
    record = json.loads(common.RECORD.read_text())
    assert all(set(g) >= {'figures', 'marks', 'cpu', 'packages'} for groups in record.values() for g in groups.values())
    monkeypatch.setattr(report, 'HERE', tmp_path)
    report.main()
    assert (tmp_path/'RECORD.md').read_text() == (FOLDER/'RECORD.md').read_text()
