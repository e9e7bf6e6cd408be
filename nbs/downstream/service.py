#!/usr/bin/env python3
"""A web service around a trained model: upload the channels of an image, get the label map.

    python service.py models/Task101_PhantomCT/3d_fullres --port 8000

GET /         a page to upload with
GET /health   is it alive, and how many wait
GET /model    channels and labels of the model
POST /predict the files of one image, fields `channel_0`, `channel_1`, ...; gives <name>_labels.nii.gz,
              with `answer=json` volumes, a picture and the label map in one JSON object

Whatever is wrong with an upload is said as JSON: {"error": "..."}. Needs: pip install fastapi uvicorn python-multipart
"""
import argparse
import asyncio
import base64
import contextlib
import gzip
import logging
import re
import tempfile
import threading
import uuid
import warnings
import zlib
from pathlib import Path

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from segnb.export import save_label_map
from segnb.image import SegnbError, image_ending, read_geometry, read_image
from segnb.prediction import Predictor

log = logging.getLogger('segnb.service')
PAGE = Path(__file__).with_name('upload.html')
ENDINGS = ('.nii', '.nii.gz', '.png', '.tif', '.tiff', '.bmp') # not .nrrd or .mha: their headers may name other files of this machine


class TooLarge(Exception):
    "An upload beyond the limit"


class BodyLimit:
    "Count the bytes of every request while they arrive, whatever its header promises, and stop at the limit"
    def __init__(self, app, most): self.app, self.most = app, most

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http': return await self.app(scope, receive, send)
        seen, answered = 0, False
        said = dict(scope['headers']).get(b'content-length', b'0')
        async def refuse():
            text = f'the upload is larger than {self.most/1e6:g} MB'
            await JSONResponse({'error': text}, 413, headers={'connection': 'close'})(scope, receive, send)
        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get('body', b''))
            if seen > self.most: raise TooLarge
            return message
        async def watched(message):
            nonlocal answered
            answered = True
            await send(message)
        if not said.isdigit() or int(said) > self.most: return await refuse()
        try: await self.app(scope, counted, watched)
        except TooLarge:
            if not answered: await refuse()


class Desk:
    "One prediction at a time, for the memory of one; a few may wait, the others are told to come back"
    def __init__(self, waiting): self.free, self.turn = 1 + waiting, threading.Lock()

    def check(self):
        if self.free < 1: raise HTTPException(503, 'too many images are waiting; try again in a minute', {'Retry-After': '60'})

    @contextlib.contextmanager
    def place(self): # only ever used by the one thread that answers requests
        self.check()
        self.free -= 1
        try: yield
        finally: self.free += 1


def safe_name(name):
    "What is left of a file name that a stranger chose: its last part, without its ending and without what is no letter, digit, dot or dash"
    last = re.split(r'[\\/]', name or '')[-1]
    plain = re.sub(r'[^A-Za-z0-9._-]', '_', last.removesuffix(image_ending(last))).strip('._')[:60]
    return re.sub(r'_0000$', '', plain) or 'image'


async def store(upload, channel, folder):
    "Write an upload under a name of our own; only its ending is taken over"
    ending = image_ending(upload.filename or '').lower()
    if ending not in ENDINGS: raise HTTPException(415, f'channel {channel}: {safe_name(upload.filename)} is none of {", ".join(ENDINGS)}')
    file = folder/f'channel_{channel}{ending}'
    with file.open('wb') as f:
        while piece := await upload.read(1 << 20): await run_in_threadpool(f.write, piece)
    if not file.stat().st_size: raise HTTPException(422, f'channel {channel}: the file is empty')
    return file


def read(files, channels, most_voxels):
    "Read the channels, after a look at how large they say they are, and how large they are"
    for name, file in zip(channels, files):
        try: shape = read_geometry(file).shape
        except SegnbError as error: raise HTTPException(422, f'channel {name}: {told(error, file)}') from None
        if np.prod(shape, dtype=float) > most_voxels: raise HTTPException(413, f'channel {name}: {" x ".join(map(str, shape))} voxels are more than this service takes')
        if swells(file, 8*np.prod(shape, dtype=float) + 2**20): raise HTTPException(422, f'channel {name}: the packed file holds much more than its image')
    try: return read_image(files)
    except SegnbError as error: raise HTTPException(422, told(error, *files)) from None


def swells(file, most):
    "Whether a packed file unpacks to more bytes than it should: some are made to fill a machine"
    if file.suffix != '.gz': return False
    with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(file) as f: # damage is told by the reader
        seen = 0
        while piece := f.read(1 << 20):
            if (seen := seen + len(piece)) > most: return True
    return False


def told(error, *files):
    "The sentence of an error without the places of this machine"
    text = str(error)
    for file in files: text = text.replace(str(file), file.name)
    return text.replace(str(files[0].parent) if files else '\0', '')


def answer(predictor, image, geometry, name, folder, as_json):
    "Predict; gives the label map as the bytes of a file, or a JSON object about it"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        labels = predictor.predict(image, geometry.spacing, direction=geometry.direction)
    save_label_map(labels, geometry, file := folder/'labels.nii.gz')
    if not as_json: return file.read_bytes()
    from segnb.viewer import label_color
    of, ml = predictor.labels, float(np.prod(geometry.spacing))/1000
    found = {of.names[k]: (of.values[k], int((labels == of.values[k]).sum())) for k in of.foreground}
    return {'name': name, 'shape': list(labels.shape), 'volumes': {k: {'voxels': n, 'ml': round(n*ml, 3), 'colour': label_color(v)} for k, (v, n) in found.items()},
            'warnings': [str(w.message) for w in said], 'picture': picture(image[0], labels, geometry.spacing), 'labels': base64.b64encode(file.read_bytes()).decode()}


def picture(image, labels, spacing):
    "A data URL: the slice with most of the labels"
    from segnb.viewer import figure, save_fig, show_slice
    z = int((labels > 0).sum((1, 2)).argmax()) if labels.any() else len(labels)//2
    fig, ax = figure(1, 1, 4.5, 4.5)
    show_slice(ax, image[z], spacing[1:], labels=labels[z], title=f'slice {z} of {len(labels)}')
    with tempfile.TemporaryDirectory() as folder:
        save_fig(fig, file := Path(folder)/'slice.png')
        return 'data:image/png;base64,' + base64.b64encode(file.read_bytes()).decode()


def make_app(
    model,                      # Folder of a trained configuration, or a `Predictor`
    *,
    most_bytes=500_000_000,     # Largest upload
    most_voxels=600_000_000,    # Largest image, voxels a channel
    waiting=8,                  # Requests that may wait for their turn
    upload_seconds=600,         # Longest time an upload may take
    **options,                  # For `Predictor.from_folder`: folds, device, step_size, mirror, ...
):                              # The FastAPI application
    "Make the service"
    predictor = model if isinstance(model, Predictor) else Predictor.from_folder(model, **options)
    channels, desk = predictor.plans.channels, Desk(waiting)
    if predictor.configuration.previous_stage: raise ValueError('the second stage of a cascade needs more than an image: serve another configuration')
    app = FastAPI(title='segnb', docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=most_bytes)

    @app.exception_handler(AnyHTTPException)
    async def refused(request, error): return JSONResponse({'error': error.detail}, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request, error):
        number = uuid.uuid4().hex[:8]
        log.error('request %s failed', number, exc_info=error)
        return JSONResponse({'error': f'the service failed; its log says more under {number}'}, 500)

    @app.get('/', response_class=HTMLResponse)
    async def page(): return HTMLResponse(PAGE.read_text(encoding='utf-8'), headers={'Content-Security-Policy': "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"})

    @app.get('/health')
    async def health(): return {'status': 'ok', 'free_places': desk.free, 'busy': desk.turn.locked()}

    @app.get('/model')
    async def about():
        labels = predictor.labels
        return {'configuration': predictor.configuration.name, 'channels': list(channels), 'labels': {labels.names[k]: labels.values[k] for k in labels.foreground}, 'endings': list(ENDINGS), 'most_bytes': most_bytes}

    @app.post('/predict')
    async def predict(request: Request):
        desk.check() # before the upload is taken
        if not request.headers.get('content-type', '').lower().startswith('multipart/form-data'): raise HTTPException(415, 'send the files as multipart/form-data')
        with tempfile.TemporaryDirectory(prefix='segnb_') as folder:
            try:
                async with asyncio.timeout(upload_seconds), request.form(max_files=len(channels) + 4, max_fields=8) as form: files, name, as_json = await unpack(form, Path(folder))
            except ClientDisconnect: raise HTTPException(400, 'the connection broke during the upload') from None
            except TimeoutError: raise HTTPException(408, f'the upload took more than {upload_seconds} s') from None
            with desk.place(): found = await run_in_threadpool(work, files, name, Path(folder), as_json)
        if as_json: return JSONResponse(found)
        return Response(found, media_type='application/gzip', headers={'Content-Disposition': f'attachment; filename="{name}_labels.nii.gz"'})

    async def unpack(form, folder):
        wanted, uploads = [f'channel_{i}' for i in range(len(channels))], [(k, v) for k, v in form.multi_items() if isinstance(v, UploadFile)]
        names = sorted(k for k, _ in uploads)
        if names not in (sorted(wanted), wanted[:1]): # a colour picture has all channels in one file
            raise HTTPException(422, f'this model needs {", ".join(f"{w} ({c})" for w, c in zip(wanted, channels))}; found {", ".join(k[:40] for k in names) or "no file"}')
        files = [await store(upload, int(field[8:]), folder) for field, upload in sorted(uploads, key=lambda u: int(u[0][8:]))]
        return files, safe_name(dict(uploads)['channel_0'].filename), form.get('answer') == 'json'

    def work(files, name, folder, as_json):
        image, geometry = read(files, channels, most_voxels)
        if len(image) != len(channels): raise HTTPException(422, f'the files hold {len(image)} channels, the model expects {len(channels)}: {", ".join(channels)}')
        with desk.turn:
            try: return answer(predictor, image, geometry, name, folder, as_json)
            except SegnbError as error: raise HTTPException(422, told(error, *files)) from None

    return app


if __name__ == '__main__':
    import uvicorn
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('model', help='models/TaskXXX/3d_fullres')
    p.add_argument('--host', default='127.0.0.1', help='0.0.0.0 opens the service to the network: put it behind a server that asks who is there')
    p.add_argument('--port', type=int, default=8000)
    p.add_argument('--device', default='auto')
    p.add_argument('--step-size', type=float, default=.5)
    p.add_argument('--no-mirror', action='store_true')
    p.add_argument('--most-mb', type=float, default=500, help='largest upload')
    p.add_argument('--most-voxels', type=float, default=6e8, help='largest image')
    p.add_argument('--waiting', type=int, default=8, help='requests that may wait')
    a = p.parse_args()
    try: app = make_app(a.model, most_bytes=int(a.most_mb*1e6), most_voxels=a.most_voxels, waiting=a.waiting, device=a.device, step_size=a.step_size, mirror=not a.no_mirror)
    except (SegnbError, ValueError) as error: p.exit(1, f'{error}\n')
    uvicorn.run(app, host=a.host, port=a.port, log_level='warning', timeout_keep_alive=15)
