"""Record how many windows and mirrored copies nnU-Net 1.7.1 predicts for one case of the phantom task.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/64_prediction.py
Writes tests/recorded/64_prediction.json.
"""
import contextlib, json, os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'

IMAGE, PATCH = (41, 124, 128), (20, 64, 64)  # case ct_003 preprocessed, and the patch of the plan for a CPU


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        import torch
        from torch import nn
        from nnunet.network_architecture.neural_network import SegmentationNetwork

    class Counter(SegmentationNetwork):
        "A network that counts how often it is asked"
        def __init__(self):
            super().__init__()
            self.conv_op, self.num_classes, self.do_ds, self.passes = nn.Conv3d, 2, False, 0
            self.inference_apply_nonlin = lambda x: torch.softmax(x, 1)
        def forward(self, x):
            self.passes += 1
            return torch.cat([x, -x], 1)

    import numpy as np
    counted = {}
    for name, axes in (('windows', ()), ('mirrored', (0, 1, 2))):
        net = Counter().eval()
        with contextlib.redirect_stdout(open(os.devnull, 'w')):
            net.predict_3D(np.zeros((1, *IMAGE), np.float32), do_mirroring=bool(axes), mirror_axes=axes, use_sliding_window=True, step_size=.5,
                           patch_size=PATCH, use_gaussian=True, verbose=False, mixed_precision=False)
        counted[name] = net.passes
    record = dict(command='python tests/record/64_prediction.py', versions={p: version(p) for p in ('nnunet', 'numpy', 'torch')}, image=IMAGE, patch=PATCH,
                  windows=counted['windows'], mirrored_copies=counted['mirrored']//counted['windows'])
    out = Path(__file__).resolve().parents[1]/'recorded'/'64_prediction.json'
    out.write_text(json.dumps(record) + '\n')
    print('wrote', out.name, record)


if __name__ == '__main__': main()
