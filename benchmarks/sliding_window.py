"""A volume seen through a window: segnb beside nnU-Net v2's predictor and MONAI, same network, same windows, same mirroring.

`forward*`: a (1, 64, 160, 160) image, patch 48x96x96, 18 windows, a small network (16 to 128 feature maps), two threads; `pure` is nothing
but the passes, one window at a time as the peers do it. `null*`: the network returns stored zeros at once, so that the bookkeeping is
left: 25 classes, (1, 160, 256, 256), 150 windows. `segnb` returns all probabilities; `segnb_slabs` hands them over slab by slab, as the
export takes them, and decides on a label map. nnU-Net v2 and MONAI add up logits, segnb probabilities: it counts an exponential for
every class and voxel more; `segnb_logits` leaves that out, as for models of v2. `added_mb` is what the call adds to the memory of the process.
MONAI runs where the peers' environment has it (`pip install --no-deps monai==1.5.1`).
"""
import os
os.environ.update(nnUNet_compile='false', MPLBACKEND='agg')

import ctypes, gc, itertools
from types import SimpleNamespace

import numpy as np
from common import _status, entry, main, mark, measure

SHAPE, LARGE, PATCH, THREADS = (64, 160, 160), (160, 256, 256), (48, 96, 96), int(os.environ.get('SEGNB_BENCH_THREADS', 2))
MIRRORS = [c for n in range(4) for c in itertools.combinations((0, 1, 2), n)]


def image(shape):
    return np.random.default_rng((0, 2)).normal(0, 1, (1, *shape)).astype(np.float32)


def network(classes=3):
    "A plain U-Net made of torch alone, so that both interpreters build the same one"
    import torch
    from torch import nn
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    def block(a, b, stride=1):
        def unit(a, stride): return nn.Conv3d(a, b, 3, stride, 1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU(inplace=True)
        return nn.Sequential(*unit(a, stride), *unit(b, 1))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = (16, 32, 64, 128)
            self.down = nn.ModuleList(block(a, b, 1 + (a > 1)) for a, b in zip((1, *sizes), sizes))
            self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2, bias=False) for a, b in zip(sizes, sizes[1:]))
            self.join = nn.ModuleList(block(2*a, a) for a in sizes[:-1])
            self.head = nn.Conv3d(sizes[0], classes, 1)

        def forward(self, x):
            skips = []
            for stage in self.down: skips.append(x := stage(x))
            skips.pop()
            for up, join in zip(self.up[::-1], self.join[::-1]): x = join(torch.cat((up(x), skips.pop()), 1))
            return self.head(x)
    return Plain().eval()


def null(classes=25):
    import torch
    torch.set_num_threads(THREADS)

    class Null(torch.nn.Module):
        out = {b: torch.zeros(b, classes, *PATCH) for b in (1, 2, 3, 4)} # zeros: v2 scales the answer in place
        def forward(self, x): return self.out[len(x)]
    return Null()


def added(work):
    "Figures of `work`, which has run once before, and what it adds to the memory that the process holds"
    work()
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    before = _status('VmRSS')
    found = measure(work, repeats=2, slow=60.)
    return {**found, 'added_mb': round(found['peak_mb'] - before)}


def ours(net, shape, classes, mirror=False, slabs=False, aggregate='probabilities'):
    import torch
    from segnb.sliding_window import predict_sliding_window, sliding_window_slabs
    x, axes = image(shape), (0, 1, 2) if mirror else ()
    def labels():
        out = np.empty(shape, np.uint8)
        for start, p in sliding_window_slabs(net, x, PATCH, classes, mirror_axes=axes, aggregate=aggregate): out[start:start + p.shape[1]] = torch.from_numpy(p).argmax(0)
    return added(labels if slabs else lambda: predict_sliding_window(net, x, PATCH, classes, mirror_axes=axes, aggregate=aggregate))


def v2(net, shape, classes, mirror=False):
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    x = torch.from_numpy(image(shape))
    p = nnUNetPredictor(.5, True, mirror, True, torch.device('cpu'), allow_tqdm=False)
    p.network, p.allowed_mirroring_axes = net, (0, 1, 2)
    p.configuration_manager, p.label_manager = SimpleNamespace(patch_size=list(PATCH)), SimpleNamespace(num_segmentation_heads=classes)
    return added(lambda: p.predict_sliding_window_return_logits(x))


def monai(net, shape, classes, mirror=False):
    import torch
    from monai.inferers import sliding_window_inference
    x, combos = torch.from_numpy(image(shape))[None], [[a + 2 for a in c] for c in MIRRORS] if mirror else [[]]
    def ask(t): # mirroring inside the window, as nnU-Net does it
        total = net(t)
        for c in combos[1:]: total = total + net(t.flip(c)).flip(c)
        return total/len(combos) if mirror else total
    def work():
        with torch.inference_mode(): sliding_window_inference(x, PATCH, 1, ask, overlap=.5, mode='gaussian')
    return added(work)


def pure(shape, mirror=False):
    "The passes alone, one window at a time"
    import torch
    from segnb.sliding_window import sliding_steps
    net, x, n = network(), torch.randn(1, 1, *PATCH), int(np.prod([len(s) for s in sliding_steps(shape, PATCH)]))
    def work():
        with torch.inference_mode():
            for _ in range(n*(len(MIRRORS) if mirror else 1)): net(x)
    return added(work)


for mirror in (False, True):
    group = 'forward_mirrored' if mirror else 'forward'
    entry(group, 'segnb')(lambda m=mirror: ours(network(), SHAPE, 3, m))
    entry(group, 'pure')(lambda m=mirror: pure(SHAPE, m))
    entry(group, 'nnunetv2', 'peers')(lambda m=mirror: v2(network(), SHAPE, 3, m))
    entry(group, 'monai', 'peers')(lambda m=mirror: monai(network(), SHAPE, 3, m))
    mark(group, 'pure', .95)
    mark(group, 'nnunetv2', 1.), mark(group, 'monai', 1.)
entry('null_25_classes', 'segnb')(lambda: ours(null(), LARGE, 25))
entry('null_25_classes', 'segnb_slabs')(lambda: ours(null(), LARGE, 25, slabs=True))
entry('null_25_classes', 'segnb_logits')(lambda: ours(null(), LARGE, 25, aggregate='logits'))
entry('null_25_classes', 'nnunetv2', 'peers')(lambda: v2(null(), LARGE, 25))
entry('null_25_classes', 'monai', 'peers')(lambda: monai(null(), LARGE, 25))
mark('null_25_classes', 'monai', 1.), mark('null_25_classes', 'monai', 2., 'added_mb', 'segnb_slabs')

if __name__ == '__main__': main(__doc__)
