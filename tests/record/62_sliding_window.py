"""Record where nnU-Net 1.7.1 places its windows, how it weighs them, and what it predicts with given weights.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/62_sliding_window.py
Writes tests/recorded/62_sliding_window.npz (Gaussians, probabilities, step positions) and .json (weight shapes, settings).
Steps: `steps_asked` (n, 7) holds patch, image and step size, `steps_starts` all starts in a row, `steps_counts` (n, 3) how many an axis.
Weights and images are not stored: `tests/test_62_sliding_window_parity.py` draws the same ones from the same seeds.
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
# shape, step size, mirror axes, and what is unusual: a 2D network, sigmoids for regions, the whole image without a window
IMAGES = {'tiles': ((2, 13, 22, 17), .5, (0, 1, 2)), 'no_mirror_step_0.7': ((2, 11, 19, 18), .7, ()),
          'one_axis': ((2, 9, 16, 18), .5, (2,)), 'smaller_than_patch': ((2, 5, 19, 9), .5, (0, 1, 2)), 'one_tile': ((2, 8, 16, 12), .5, (0, 1)),
          'step_0.25': ((2, 10, 17, 13), .25, ()), 'regions': ((2, 10, 18, 13), .5, (0, 1, 2), 'regions'), 'whole_image': ((2, 9, 17, 13), .5, (0, 1, 2), 'whole'),
          '2d_slices': ((2, 4, 22, 19), .5, (0, 1), '2d'), '2d_smaller_than_patch': ((2, 3, 9, 30), .5, (), '2d'), '2d_one_tile': ((2, 3, 16, 12), .5, (0, 1), '2d'),
          '2d_regions': ((2, 3, 20, 13), .6, (1,), '2d regions'), '2d_whole_image': ((2, 3, 21, 15), .5, (0, 1), '2d whole')}


def cases(n=1000):
    rng = np.random.default_rng(SEED)
    for _ in range(n):
        patch = rng.integers(4, 65, 3)
        image = patch + rng.integers(0, 150, 3)
        yield dict(patch_size=patch.tolist(), image_size=image.tolist(), step_size=float(rng.choice([.25, .5, .5, .6, .75, 1.])))


def unet(dims):
    "A small U-Net as nnUNetTrainerV2.initialize_network builds it, its weights drawn from the seed"
    import torch
    from torch import nn
    from nnunet.network_architecture.generic_UNet import Generic_UNet
    from nnunet.network_architecture.initialization import InitWeights_He
    conv, norm, drop = (nn.Conv3d, nn.InstanceNorm3d, nn.Dropout3d) if dims == 3 else (nn.Conv2d, nn.InstanceNorm2d, nn.Dropout2d)
    pools, kernels = [p[-dims:] for p in POOLS], [k[-dims:] for k in KERNELS]
    net = Generic_UNet(2, 4, 3, len(POOLS), 2, 2, conv, norm, {'eps': 1e-5, 'affine': True}, drop, {'p': 0, 'inplace': True},
                       nn.LeakyReLU, {'negative_slope': 1e-2, 'inplace': True}, True, False, lambda x: x, InitWeights_He(1e-2), pools, kernels, False, True, True)
    rng = np.random.default_rng(SEED)
    state = {k: torch.from_numpy(rng.normal(0, .3, v.shape).astype(np.float32)) for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    net.eval(); net.do_ds = False
    return net, {k: list(v.shape) for k, v in state.items()}


def main():
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        import torch
        from nnunet.network_architecture.neural_network import SegmentationNetwork as S
        from nnunet.utilities.nd_softmax import softmax_helper
    torch.set_num_threads(1)
    asked = list(cases())
    steps = [S._compute_steps_for_sliding_window(tuple(c['patch_size']), tuple(c['image_size']), c['step_size']) for c in asked]
    arrays = {'gaussian_' + 'x'.join(map(str, p)): S._get_gaussian(p, sigma_scale=1/8) for p in ((8, 16, 12), (5, 7, 9), (28, 12, 20), (40, 10, 6), (16, 12), (7, 30))}
    arrays |= dict(steps_asked=np.array([[*c['patch_size'], *c['image_size'], c['step_size']] for c in asked]),
                   steps_starts=np.array([s for grid in steps for line in grid for s in line], np.int16),
                   steps_counts=np.array([[len(line) for line in grid] for grid in steps], np.int16))
    nets, shapes = {}, {}
    for dims in (2, 3): nets[dims], shapes[dims] = unet(dims)
    for name, (shape, step, axes, *unusual) in IMAGES.items():
        how = unusual[0].split() if unusual else []
        net, patch = (nets[2], PATCH[1:]) if '2d' in how else (nets[3], PATCH)
        net.inference_apply_nonlin = torch.sigmoid if 'regions' in how else softmax_helper
        x = np.random.default_rng([SEED, len(name)]).normal(0, 1, shape).astype(np.float32)
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
            _, p = net.predict_3D(x, do_mirroring=bool(axes), mirror_axes=axes, use_sliding_window='whole' not in how, step_size=step, patch_size=patch,
                                  regions_class_order=(1, 2, 3) if 'regions' in how else None, use_gaussian=True, pad_border_mode='constant',
                                  pad_kwargs={'constant_values': 0}, all_in_gpu=False, verbose=False, mixed_precision=False)
        arrays['probabilities_' + name] = p.astype(np.float32)
    OUT.mkdir(exist_ok=True)
    info = dict(command='python tests/record/62_sliding_window.py', seed=SEED, versions={p: version(p) for p in ('nnunet', 'numpy', 'torch', 'scipy')},
                pools=POOLS, kernels=KERNELS, patch=PATCH, base_num_features=4,
                images={k: dict(shape=v[0], step_size=v[1], mirror_axes=v[2], how=v[3] if len(v) > 3 else '') for k, v in IMAGES.items()}, weights=shapes,
                body=S._compute_steps_for_sliding_window((96, 160, 160), (300, 400, 400), .5))
    (OUT/'62_sliding_window.json').write_text(json.dumps(info) + '\n')
    np.savez_compressed(OUT/'62_sliding_window.npz', **arrays)
    for f in ('json', 'npz'): print(f'wrote {OUT.name}/62_sliding_window.{f}', (OUT/f'62_sliding_window.{f}').stat().st_size)


if __name__ == '__main__': main()
