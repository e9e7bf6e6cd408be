"The three small projects of the chapter, run as their users run them: a script, a service over real HTTP, a plain loop."
import concurrent.futures
import contextlib
import dataclasses
import gzip
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT/'nbs'/'downstream'
TASK = ROOT/'data_samples'/'Task101_PhantomCT'
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'Agg'}


def run(script, *args, timeout=300):
    return subprocess.run([sys.executable, str(HERE/script), *map(str, args)], capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    out = tmp_path_factory.mktemp('own')
    return out, run('own_model.py', TASK, out, '--steps', 120)


def test_a_script_trains_a_model_of_its_own(own):
    out, done = own
    assert done.returncode == 0, done.stderr
    from segnb.image import read_geometry
    from segnb.workers import read_json
    scores = read_json(out/'scores.json')
    assert np.mean(scores['losses'][-10:]) < .8*scores['losses'][0]
    assert all(case['organ'] > .5 for case in scores['dice'].values()), scores['dice']
    for case in scores['dice']: # brought home to the voxels of the image
        assert not read_geometry(out/'predictions'/f'{case}.nii.gz').differences(read_geometry(TASK/'imagesTr'/f'{case}_0000.nii.gz'))


def test_a_script_says_in_one_line_what_is_wrong(tmp_path):
    done = run('own_model.py', tmp_path/'nowhere', tmp_path/'out')
    assert done.returncode == 1 and 'Traceback' not in done.stderr and 'nowhere' in done.stderr


def test_a_plain_loop_borrows_loader_augmentation_and_loss(own):
    done = run('plain_loop.py', own[0]/'preprocessed', '--epochs', 3, '--per-epoch', 8, '--patch-size', 8, 48, 48)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rsplit(' ', 1)[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_the_borrowed_batches_follow_from_the_seed(own):
    sys.path.insert(0, str(HERE))
    try: import plain_loop
    finally: sys.path.remove(str(HERE))
    def first(seed):
        stream = plain_loop.batches(own[0]/'preprocessed', patch_size=(8, 32, 32), per_epoch=1, seed=seed)[0]
        with stream: return next(iter(stream.epoch(0)))
    a, b, c = first(0), first(0), first(1)
    assert (a['data'] == b['data']).all() and not (a['data'] == c['data']).all()
    assert a['data'].shape == (2, 1, 8, 32, 32) and a['target'][0].shape == (2, 1, 8, 32, 32)


# the service



@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A tiny trained model folder: weights do not matter here"
    pytest.importorskip('fastapi'), pytest.importorskip('uvicorn'), pytest.importorskip('httpx'), pytest.importorskip('multipart')
    from segnb.dataset import Dataset
    from segnb.fingerprint import extract_fingerprint
    from segnb.planning import plan_experiment
    from segnb.preprocessing import preprocess_dataset
    from segnb.training import Trainer
    root, dataset = tmp_path_factory.mktemp('served'), Dataset(TASK)
    plans = plan_experiment(extract_fingerprint(dataset, 0), planner='cpu')
    c = dataclasses.replace(plans.configuration('3d_fullres'), base_num_features=4, patch_size=(8, 32, 32), num_pool_per_axis=(1, 2, 2),
                            pool_op_kernel_sizes=((1, 2, 2), (2, 2, 2)), conv_kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
    plans = dataclasses.replace(plans, configurations={'3d_fullres': c})
    preprocess_dataset(dataset, plans, root/'preprocessed', '3d_fullres', n_workers=0)
    Trainer(root/'preprocessed', root/'model', epochs=1, iterations=4, val_iterations=1, n_workers=0, device='cpu', progress=False).fit()
    return root/'model'


@contextlib.contextmanager
def serving(model, folder, *options):
    "A real process on a free port; gives its address"
    import httpx
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    environment = {**ENVIRONMENT, 'TMPDIR': str(folder)}
    log = open(folder/'service.log', 'w+')
    process = subprocess.Popen([sys.executable, str(HERE/'service.py'), str(model), '--port', str(port), '--device', 'cpu', '--step-size', '1', '--no-mirror', *options],
                               stdout=log, stderr=log, env=environment)
    try:
        address, until = f'http://127.0.0.1:{port}', time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f'{address}/health').status_code == 200: break
            log.seek(0)
            assert process.poll() is None and time.monotonic() < until, log.read()
            time.sleep(.2)
        yield address
    finally:
        process.terminate()
        try: process.wait(60)
        except subprocess.TimeoutExpired: process.kill(); process.wait()
        log.close()


@pytest.fixture(scope='module')
def service(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('service')
    with serving(model, folder, '--most-mb', '4', '--most-voxels', '2e6', '--waiting', '3') as address: yield address, folder


IMAGE = TASK/'imagesTs'


def image(i=0): return sorted(IMAGE.glob('*.nii.gz'))[i]


def post(address, *files, **kw):
    import httpx
    return httpx.post(f'{address}/predict', files=[(f'channel_{i}' if isinstance(f, tuple) else f[0], f) for i, f in enumerate(files)], timeout=300, **kw)


def test_the_service_gives_the_mask_of_the_predictor(service, model, tmp_path):
    from segnb.image import read_image, read_label_map
    from segnb.prediction import Predictor
    reply = post(service[0], ('patient 7.nii.gz', image().read_bytes()))
    assert reply.status_code == 200, reply.text
    assert reply.headers['content-disposition'] == 'attachment; filename="patient_7_labels.nii.gz"'
    (tmp_path/'labels.nii.gz').write_bytes(reply.content)
    labels, geometry = read_label_map(tmp_path/'labels.nii.gz')
    array, of = read_image(image())
    predictor = Predictor.from_folder(model, device='cpu', step_size=1., mirror=False)
    assert np.array_equal(labels, predictor.predict(array, of.spacing)) and not geometry.differences(of)


def test_the_type_of_an_upload_may_be_written_in_capitals(service):
    import httpx
    body = b'--b\r\nContent-Disposition: form-data; name="channel_0"; filename="x.nii.gz"\r\n\r\n' + image().read_bytes() + b'\r\n--b--\r\n'
    assert httpx.post(f'{service[0]}/predict', content=body, headers={'content-type': 'Multipart/Form-Data; boundary=b'}, timeout=300).status_code == 200


def test_the_service_answers_with_json(service):
    reply = post(service[0], ('scan.nii.gz', image().read_bytes()), data={'answer': 'json'})
    found = reply.json()
    assert reply.status_code == 200 and set(found['volumes']) == {'organ', 'lesion', 'other organ'} and found['picture'].startswith('data:image/png;base64,')
    assert found['name'] == 'scan' and len(found['shape']) == 3


def test_requests_at_the_same_time_get_their_own_answers(service):
    files = [image(i % 2) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool: replies = list(pool.map(lambda f: post(service[0], (f.name, f.read_bytes())), files))
    assert [r.status_code for r in replies] == [200]*4
    assert replies[0].content == replies[2].content and replies[1].content == replies[3].content and replies[0].content != replies[1].content


def test_it_is_alive_while_it_predicts_and_says_when_it_is_full(service):
    import httpx
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(post, service[0], ('a.nii.gz', image().read_bytes())) for _ in range(12)]
        seen = []
        while not all(j.done() for j in jobs): seen.append(httpx.get(f'{service[0]}/health', timeout=60).json())
    codes = [j.result().status_code for j in jobs]
    assert set(codes) <= {200, 503} and codes.count(200) >= 4 and any(s['busy'] for s in seen)
    full = [j.result() for j in jobs if j.result().status_code == 503]
    assert all('Retry-After' in r.headers and 'waiting' in r.json()['error'] for r in full)
    assert httpx.get(f'{service[0]}/health', timeout=60).json() == {'status': 'ok', 'free_places': 4, 'busy': False}


def nifti(shape=(4, 8, 8), kind=16, bits=32, voxels=None, spacing=(1, 1, 1)):
    header = bytearray(352)
    struct.pack_into('<i', header, 0, 348)
    struct.pack_into('<8h', header, 40, len(shape), *shape[::-1], *[1]*(7 - len(shape)))
    struct.pack_into('<2h', header, 70, kind, bits)
    struct.pack_into('<8f', header, 76, 1, *spacing[::-1], 1, 1, 1, 1)
    struct.pack_into('<3f', header, 108, 352, 1, 0)
    header[344:348] = b'n+1\0'
    return bytes(header) + (np.zeros(shape, np.float32).tobytes() if voxels is None else voxels)


def noise(shape=(8, 40, 40), **kw): return gzip.compress(nifti(shape, voxels=np.random.default_rng(0).normal(0, 100, shape).astype(np.float32).tobytes(), **kw), 1)


ONE = image().read_bytes() if IMAGE.exists() else b''
BAD = {
    'no image': ([('a.nii.gz', b'this is no image at all')], 422, 'NIfTI|damaged'),
    'empty': ([('a.nii.gz', b'')], 422, 'empty'),
    'cut short': ([('a.nii.gz', ONE[:len(ONE)//2])], 422, 'cut short|damaged'),
    'damaged in the middle': ([('a.nii.gz', ONE[:5000] + bytes(200) + ONE[5200:])], 422, 'damaged|cut short'),
    'text': ([('notes.txt', b'hello')], 415, 'none of'),
    'a pickle': ([('model.pkl', b'cos\nsystem\n(S"touch /tmp/owned"\ntR.')], 415, 'none of'),
    'no ending': ([('image', ONE)], 415, 'none of'),
    'an ending alone': ([('.nii.gz', ONE)], 415, 'none of'),
    'header that names another file': ([('a.nrrd', b'NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: /etc/passwd\n\n')], 415, 'none of'),
    'two channels': ([('a.nii.gz', ONE), ('b.nii.gz', ONE)], 422, 'channel_0 \\(CT\\)'),
    'a file in no field': ([('scan', ('a.nii.gz', ONE))], 422, 'channel_0'),
    'nothing': ([], 415, 'multipart'),
    'NaN': ([('a.nii.gz', gzip.compress(nifti(voxels=np.full((4, 8, 8), np.nan, np.float32).tobytes())))], 422, 'NaN'),
    'only zeros': ([('a.nii.gz', gzip.compress(nifti()))], 422, 'empty'),
    'negative size': ([('a.nii', nifti((4, 8, 8))[:42] + b'\xff\xff' + nifti((4, 8, 8))[44:])], 422, 'damaged|axes|NIfTI'),
    'huge declared size': ([('a.nii.gz', gzip.compress(nifti((3000, 3000, 3000), voxels=b'')))], 413, 'voxels'),
    'four axes': ([('a.nii.gz', gzip.compress(nifti((2, 4, 8, 8))))], 422, 'axes'),
    'complex numbers': ([('a.nii.gz', gzip.compress(nifti(kind=32, bits=64)))], 422, 'complex'),
    'a colour picture': ([('a.png', (ROOT/'data_samples'/'Task103_PhantomCells'/'imagesTr'/'cells_000_0000.png').read_bytes() if IMAGE.exists() else b'')], 422, 'channel'),
    'packed far beyond its image': ([('a.nii.gz', gzip.compress(nifti() + bytes(300_000_000), 6))], 422, 'packed'),
    'more than the limit': ([('a.nii.gz', bytes(5_000_000))], 413, 'larger than 4 MB'),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_uploads_are_refused_as_json(service, what):
    import httpx
    files, status, words = BAD[what]
    address, folder = service
    fields = [f if isinstance(f[1], tuple) else (f'channel_{i}', f) for i, f in enumerate(files)]
    reply = httpx.post(f'{address}/predict', files=fields, timeout=120)
    assert reply.status_code == status, (reply.status_code, reply.text)
    assert re.search(words, reply.json()['error']), reply.text
    assert set(reply.json()) == {'error'} and str(folder) not in reply.text and 'Traceback' not in reply.text


@pytest.mark.parametrize('name, kept', [('../../etc/passwd.nii.gz', 'passwd'), ('C:\\Users\\x\\scan.nii.gz', 'scan'), ('a"; rm -rf ~; ".nii.gz', 'a'), ('<script>.nii.gz', 'script'),
                                        ('x'*300 + '.nii.gz', 'x'*60), ('..nii.gz', 'image'), ('Ünïcode ✓.nii.gz', 'n_code'), ('case_007_0000.nii.gz', 'case_007')])
def test_hostile_names_never_become_paths(service, name, kept):
    before = {f for f in service[1].iterdir()}
    reply = post(service[0], (name, noise()))
    assert reply.status_code == 200, reply.text
    said = re.fullmatch(r'attachment; filename="([A-Za-z0-9._-]+)_labels\.nii\.gz"', reply.headers['content-disposition'])
    assert said and said[1].startswith(kept.rstrip('_')) and '..' not in said[1]
    assert {f for f in service[1].iterdir()} == before # nothing is left behind


def raw(address, head, pieces=(), wait=60):
    "Talk to the service without a library that keeps the rules"
    host, port = address.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=wait) as s:
        s.sendall(head.replace('\n', '\r\n').encode())
        with contextlib.suppress(OSError):
            for piece in pieces: s.sendall(piece)
        found = b''
        with contextlib.suppress(OSError):
            while part := s.recv(65536):
                found += part
                if b'\r\n\r\n' in found and found.endswith(b'}'): break
    return found


def test_the_limit_counts_bytes_not_promises(service):
    kind = 'Content-Type: multipart/form-data; boundary=x\n'
    start = b'--x\r\nContent-Disposition: form-data; name="channel_0"; filename="a.nii.gz"\r\n\r\n'
    endless = (b'%x\r\n%s\r\n' % (1 << 20, bytes(1 << 20)) for _ in range(64))
    chunks = [b'%x\r\n%s\r\n' % (len(start), start)]
    def body():
        yield from chunks
        yield from endless
    assert b' 413 ' in raw(service[0], f'POST /predict HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n{kind}\n', body())
    assert b' 413 ' in raw(service[0], f'POST /predict HTTP/1.1\nHost: x\nContent-Length: 99999999999\n{kind}\n')


def test_broken_requests_leave_it_alive(service):
    import httpx
    address = service[0]
    assert b' 400 ' in raw(address, 'POST /predict HTTP/1.1\nHost: x\nContent-Length: 9\nContent-Type: multipart/form-data\n\n', [b'no bounds'])
    raw(address, 'POST /predict HTTP/1.1\nHost: x\nContent-Length: 1000\nContent-Type: multipart/form-data; boundary=x\n\n', [b'--x\r\n'], wait=1) # hangs up
    many = httpx.post(f'{address}/predict', files=[(f'channel_{i}', ('a.nii.gz', b'x')) for i in range(40)], timeout=60)
    assert many.status_code == 400 and 'error' in many.json()
    assert httpx.get(f'{address}/nothing', timeout=60).json() == {'error': 'Not Found'} and httpx.get(f'{address}/predict', timeout=60).status_code == 405
    assert httpx.get(f'{address}/health', timeout=60).json()['free_places'] == 4


def test_the_page_is_whole(service):
    import httpx
    page = httpx.get(service[0], timeout=60)
    assert page.status_code == 200 and 'default-src' in page.headers['content-security-policy']
    assert not re.search(r'(src|href)="?https?:', page.text) # nothing from elsewhere
    assert httpx.get(f'{service[0]}/model', timeout=60).json()['channels'] == ['CT']


def test_nothing_is_kept(service):
    until = time.monotonic() + 60
    while len(list(service[1].iterdir())) > 1 and time.monotonic() < until: time.sleep(.1) # who hung up is noticed a moment later
    assert [f.name for f in service[1].iterdir()] == ['service.log']
    assert 'Traceback' not in (service[1]/'service.log').read_text()


def test_a_folder_that_is_no_model_is_one_line(tmp_path):
    pytest.importorskip('fastapi'), pytest.importorskip('uvicorn'), pytest.importorskip('multipart')
    done = run('service.py', tmp_path)
    assert done.returncode == 1 and 'plans.json' in done.stderr and 'Traceback' not in done.stderr


CHROMIUM = next((p for p in ('/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome') if Path(p).exists()), None)


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_the_page_in_a_browser(service, tmp_path):
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        try:
            page, said = browser.new_page(), []
            page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
            page.goto(service[0])
            page.set_input_files('input[type=file]', str(image()))
            page.click('#go')
            page.wait_for_selector('#result:visible', timeout=180_000)
            assert 'organ' in page.inner_text('#volumes') and page.eval_on_selector('#picture', 'i => i.naturalWidth') > 100
            assert page.get_attribute('#save', 'download').endswith('_labels.nii.gz') and not said
            (tmp_path/'bad.nii.gz').write_bytes(b'no image')
            page.set_input_files('input[type=file]', str(tmp_path/'bad.nii.gz'))
            page.click('#go')
            page.wait_for_selector('#said.wrong', timeout=60_000)
            assert 'NIfTI' in page.inner_text('#said') and not page.is_visible('#result')
        finally: browser.close()
