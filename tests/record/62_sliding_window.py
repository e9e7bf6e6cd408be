"""Record where nnU-Net 1.7.1 places its windows, how it weighs them, and what it predicts with given weights.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/62_sliding_window.py
Writes tests/recorded/62_sliding_window.npz (Gaussians, probabilities) and .json (step positions, weight shapes).
The weights are not stored: `tests/test_62_sliding_window_parity.py` draws the same ones from the same seed.
"""
import contextlib, json, os, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np

SEED = 62
OUT = Path(__file__).resolve().parents[1]/'recorded'
POOLS, KERNELS, PATCH = [[1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]], (8, 16, 12)
IMAGES = {'tiles': ((2, 13, 22, 17), .5, (0, 1, 2)), 'no_mirror_step_0.7': ((2, 11, 20, 25), .7, ()),
          'one_axis': ((2, 9, 16, 18), .5, (2,)), 'smaller_than_patch': ((2, 5, 19, 9), .5, (0, 1, 2)), 'one_tile': ((2, 8, 16, 12), .5, (0, 1))}


def cases(n=400):
    rng = np.random.default_rng(SEED)
    for _ in range(n):
        patch = rng.integers(4, 65, 3)
        image = patch + rng.integers(0, 150, 3)
        yield dict(patch_size=patch.tolist(), image_size=image.tolist(), step_size=float(rng.choice([.25, .5, .5, .6, .75, 1.])))


def main():
    with contextlib.redirect_stdout(open(os.devnull, 'w')):
        import torch
        from torch import nn
        from nnunet.network_architecture.generic_UNet import Generic_UNet
        from nnunet.network_architecture.initialization import InitWeights_He
        from nnunet.network_architecture.neural_network import SegmentationNetwork as S
        from nnunet.utilities.nd_softmax import softmax_helper
    torch.set_num_threads(1)
    steps = [dict(c, steps=S._compute_steps_for_sliding_window(tuple(c['patch_size']), tuple(c['image_size']), c['step_size'])) for c in cases()]
    arrays = {'gaussian_' + 'x'.join(map(str, p)): S._get_gaussian(p, sigma_scale=1/8) for p in ((8, 16, 12), (5, 7, 9), (28, 12, 20), (40, 10, 6))}
    net = Generic_UNet(2, 4, 3, len(POOLS), 2, 2, nn.Conv3d, nn.InstanceNorm3d, {'eps': 1e-5, 'affine': True}, nn.Dropout3d, {'p': 0, 'inplace': True},
                       nn.LeakyReLU, {'negative_slope': 1e-2, 'inplace': True}, True, False, lambda x: x, InitWeights_He(1e-2), POOLS, KERNELS, False, True, True)
    rng = np.random.default_rng(SEED)
    state = {k: torch.from_numpy(rng.normal(0, .3, v.shape).astype(np.float32)) for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    net.inference_apply_nonlin = softmax_helper
    net.eval(); net.do_ds = False
    for name, (shape, step, axes) in IMAGES.items():
        x = np.random.default_rng([SEED, len(name)]).normal(0, 1, shape).astype(np.float32)
        with contextlib.redirect_stdout(open(os.devnull, 'w')):
            _, p = net.predict_3D(x, do_mirroring=bool(axes), mirror_axes=axes, use_sliding_window=True, step_size=step, patch_size=PATCH,
                                  regions_class_order=None, use_gaussian=True, pad_border_mode='constant', pad_kwargs={'constant_values': 0},
                                  all_in_gpu=False, verbose=False, mixed_precision=False)
        arrays['image_' + name], arrays['probabilities_' + name] = x, p.astype(np.float32)
    OUT.mkdir(exist_ok=True)
    info = dict(command='python tests/record/62_sliding_window.py', seed=SEED, versions={p: version(p) for p in ('nnunet', 'numpy', 'torch', 'scipy')},
                pools=POOLS, kernels=KERNELS, patch=PATCH, base_num_features=4, images={k: dict(step_size=v[1], mirror_axes=v[2]) for k, v in IMAGES.items()},
                weights={k: list(v.shape) for k, v in state.items()}, steps=steps,
                body=S._compute_steps_for_sliding_window((96, 160, 160), (300, 400, 400), .5))
    (OUT/'62_sliding_window.json').write_text(json.dumps(info) + '\n')
    np.savez_compressed(OUT/'62_sliding_window.npz', **arrays)
    for f in ('json', 'npz'): print(f'wrote {OUT.name}/62_sliding_window.{f}', (OUT/f'62_sliding_window.{f}').stat().st_size)


if __name__ == '__main__': main()
