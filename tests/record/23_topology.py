"""Record what nnU-Net 1.7.1 computes for chapter topology: pooling, kernels and the memory estimate.

Needs python 3.11 with nnunet==1.7.1 and the constraints of tests/record/README.md.
Usage, from the project's root: python tests/record/23_topology.py
"""
import contextlib, io, os, sys, tempfile
from pathlib import Path

import numpy as np

for name in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ.setdefault(name, tempfile.mkdtemp())
with contextlib.redirect_stdout(io.StringIO()):
    from nnunet.experiment_planning.common_utils import get_pool_and_conv_props
    from nnunet.network_architecture.generic_UNet import Generic_UNet

N, STEPS = 600, 9
rng = np.random.default_rng(2301)
spacing, size = np.ones((N, 3)), np.ones((N, 3), int)
for i in range(N):
    if i % 3 == 0: spacing[i] = rng.choice([.5, .75, 1, 1.5, 2, 3, 4, 6], 3)        # exact factors of 2 and 3
    elif i % 3 == 1: spacing[i] = np.round(rng.uniform(.3, 6, 3), 3)
    else: spacing[i, 0] = np.round(rng.uniform(.5, 12), 2)                          # one coarse axis
    size[i] = rng.integers(2, [40, 300, 300]) if i % 2 else rng.choice([5, 7, 8, 9, 15, 16, 17, 28, 32, 56, 57, 64, 112, 128, 160], 3)
spacing[0], size[0] = (1, 1, 1), (5, 60, 60)                                        # the textbook cases first
spacing[1], size[1] = (1, 1.8, 3.4), (64, 64, 64)
spacing[2], size[2] = (1, 1, 1), (28, 48, 43)
channels, outputs, features = rng.integers(1, 5, N), rng.integers(2, 15, N), rng.choice([16, 30, 32], N)
number, divisor, padded, memory = np.zeros((N, 3), int), np.zeros((N, 3), int), np.zeros((N, 3), int), np.zeros(N, np.int64)
pools, kernels = np.zeros((N, STEPS, 3), np.int8), np.zeros((N, STEPS, 3), np.int8)
for i in range(N):
    n, p, k, padded[i], divisor[i] = get_pool_and_conv_props(spacing[i].tolist(), size[i].tolist(), 4, 999)
    number[i], kernels[i, :len(k)] = n, k
    if p: pools[i, :len(p)] = p
    memory[i] = Generic_UNet.compute_approx_vram_consumption(padded[i].copy(), n, int(features[i]), 320, int(channels[i]), int(outputs[i]), p)


out = Path(__file__).resolve().parents[1]/'recorded'/'23_topology.npz'
np.savez_compressed(out, command='python tests/record/23_topology.py', versions=f'nnunet 1.7.1, numpy {np.__version__}, python {sys.version.split()[0]}',
                    spacing=spacing, size=size.astype(np.int16), channels=channels.astype(np.int8), outputs=outputs.astype(np.int8),
                    features=features.astype(np.int8), number=number.astype(np.int8), divisor=divisor.astype(np.int16),
                    padded=padded.astype(np.int16), pools=pools, kernels=kernels, memory=memory)
print(out.name, out.stat().st_size, 'bytes')
