"""Checkpoints under fire: processes killed while they save, damage at every place, locks of the dead."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from segnb import checkpoints
from segnb.checkpoints import CHECKPOINTS, CheckpointError, copy_checkpoint, fold_lock, load_checkpoint, newest_checkpoint, plain_state, save_checkpoint

SAVES = '''
import sys, torch
from pathlib import Path
from segnb.checkpoints import CHECKPOINTS, copy_checkpoint, fold_lock, save_checkpoint
folder, epoch = Path(sys.argv[1]), int(sys.argv[2])
with fold_lock(folder):
    print('ready', *folder.glob('.*.pt'), flush=True)
    while True:
        epoch += 1
        save_checkpoint({'format': 'segnb checkpoint 1', 'epoch': epoch, 'network': {'w': torch.full((200_000,), float(epoch))}}, folder/CHECKPOINTS['latest'], keep=folder/CHECKPOINTS['previous'])
        if epoch % 3 == 0: copy_checkpoint(folder/CHECKPOINTS['latest'], folder/CHECKPOINTS['best'])
        print(epoch, flush=True)
'''


def state(epoch): return {'format': 'segnb checkpoint 1', 'epoch': epoch, 'network': {'w': torch.full((10,), float(epoch))}}


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
def test_a_process_killed_at_any_moment_of_its_saves_leaves_a_whole_latest(tmp_path):
    "Four processes in turn, each killed while it does nothing but save; each goes on where the last one was killed"
    epoch = 0
    for delay in (0., .013, .037, .071):
        run = subprocess.Popen([sys.executable, '-c', SAVES, tmp_path, str(epoch)], stdout=subprocess.PIPE, text=True)
        assert run.stdout.readline() == 'ready\n', 'the dead process holds no lock, and its half-written file is swept'
        run.stdout.readline()
        time.sleep(delay)
        run.kill()
        told = [int(line) for line in run.communicate()[0].splitlines() if line.strip()]
        found, file, problems = newest_checkpoint(tmp_path)
        assert file.name == CHECKPOINTS['latest'] and problems == [] and torch.equal(found['network']['w'], torch.full((200_000,), float(found['epoch'])))
        assert found['epoch'] - max(told, default=epoch + 1) in (0, 1), 'at most the save at work is lost'
        if found['epoch'] > 1: assert load_checkpoint(tmp_path/CHECKPOINTS['previous'])['epoch'] >= found['epoch'] - 1
        epoch = found['epoch']


def test_the_newest_of_those_that_can_be_read(tmp_path):
    for name, epoch in (('latest', 5), ('previous', 4), ('best', 5), ('final', 2)): save_checkpoint(state(epoch), tmp_path/CHECKPOINTS[name])
    assert newest_checkpoint(tmp_path)[1].name == CHECKPOINTS['latest']
    (tmp_path/CHECKPOINTS['latest']).write_bytes(b'PK')
    found, file, problems = newest_checkpoint(tmp_path)
    assert file.name == CHECKPOINTS['best'] and len(problems) == 1 and 'damaged' in problems[0]
    (tmp_path/CHECKPOINTS['best']).unlink()
    assert newest_checkpoint(tmp_path)[0]['epoch'] == 4


@pytest.mark.parametrize('share', [0, .1, .5, .9, .999])
def test_a_cut_file_is_damaged(tmp_path, share):
    save_checkpoint(state(1), tmp_path/'a.pt')
    whole = (tmp_path/'a.pt').read_bytes()
    (tmp_path/'a.pt').write_bytes(whole[:int(len(whole)*share)])
    with pytest.raises(CheckpointError, match='damaged'): load_checkpoint(tmp_path/'a.pt')


def test_links_are_not_needed(tmp_path, monkeypatch):
    def no_links(*a, **k): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(os, 'link', no_links)
    for epoch in (1, 2): save_checkpoint(state(epoch), tmp_path/'latest.pt', keep=tmp_path/'previous.pt')
    assert [load_checkpoint(tmp_path/f)['epoch'] for f in ('latest.pt', 'previous.pt')] == [2, 1]
    with fold_lock(tmp_path):
        with pytest.raises(CheckpointError, match='another training'):
            with fold_lock(tmp_path): pass


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save_checkpoint(state(1), tmp_path/'latest.pt')
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(path): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoints, '_reach_the_disk', full)
    with pytest.raises(CheckpointError, match='could not be written.*No space left'): save_checkpoint(state(2), tmp_path/'latest.pt', keep=tmp_path/'previous.pt')
    with pytest.raises(CheckpointError, match='could not be written.*No space left'): copy_checkpoint(tmp_path/'latest.pt', tmp_path/'final.pt')
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    import numpy as np
    with pytest.raises(CheckpointError, match="'callbacks.pages.1' cannot be kept in a checkpoint; found a ndarray"): save_checkpoint(state(1) | {'callbacks': {'pages': [1, np.zeros(2)]}}, tmp_path/'a.pt')
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(state(np.int64(3)) | {'settings': {'lr': np.float64(.1)}}, tmp_path/'a.pt')
    found = load_checkpoint(tmp_path/'a.pt')
    assert type(found['epoch']) is int and found['settings'] == {'lr': .1}
    assert plain_state(torch.Size([1, 2])) == (1, 2)


def test_locks(tmp_path):
    dead = subprocess.run([sys.executable, '-c', 'import os, psutil, socket; print(socket.gethostname(), os.getpid(), psutil.Process().create_time())'], capture_output=True, text=True).stdout
    lock = tmp_path/'training.lock'
    for text in (dead, f'{dead.split()[0]} 1 0'):
        lock.write_text(text)
        with fold_lock(tmp_path): assert lock.read_text().split()[1] == str(os.getpid())
        assert not lock.exists()
    lock.write_text(f'elsewhere {os.getpid()} 0')
    with pytest.raises(CheckpointError, match='process .* on elsewhere'):
        with fold_lock(tmp_path): pass
    lock.write_text('')  # of an older version, killed between making and filling it
    with pytest.raises(CheckpointError, match='about to start'):
        with fold_lock(tmp_path): pass
    os.utime(lock, (0, 0))
    with fold_lock(tmp_path): pass
