#!/usr/bin/env python3
"""A plain PyTorch loop that borrows three things from segnb: the loader, the augmentation and the loss.

    python plain_loop.py PREPROCESSED --epochs 3

PREPROCESSED is what `segnb preprocess` wrote: plans.json, dataset.json and a folder of cases.
"""
import argparse
from pathlib import Path

import torch
from torch import nn

from segnb.augmentation import default_parameters, device_transforms
from segnb.batches import BatchStream
from segnb.image import SegnbError
from segnb.labels import Labels
from segnb.loader import PatchLoader
from segnb.loss import DiceCELoss
from segnb.planning import Plans
from segnb.preprocessing import PreprocessedCase
from segnb.workers import read_json


def small_unet(channels, classes, width=8):
    "Two levels written by hand"
    def twice(a, b): return nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU(), nn.Conv3d(b, b, 3, padding=1), nn.InstanceNorm3d(b, affine=True), nn.LeakyReLU())
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.deep = twice(channels, width), twice(width, 2*width)
            self.up, self.last, self.head = nn.ConvTranspose3d(2*width, width, (1, 2, 2), (1, 2, 2)), twice(2*width, width), nn.Conv3d(width, classes, 1)
        def forward(self, x):
            fine = self.first(x)
            coarse = self.deep(nn.functional.max_pool3d(fine, (1, 2, 2)))
            return self.head(self.last(torch.cat([fine, self.up(coarse)], 1)))
    return Net()


def batches(preprocessed, configuration='3d_fullres', patch_size=None, batch_size=2, per_epoch=10, workers=0, seed=0):
    "Borrowed: patches with foreground oversampling, augmented as nnU-Net does; everything follows from the seed"
    preprocessed = Path(preprocessed)
    plans, labels = Plans.load(preprocessed/'plans.json'), Labels.from_dict(read_json(preprocessed/'dataset.json'))
    c = plans.configuration(configuration)
    patch, recipe = tuple(patch_size or c.patch_size), default_parameters(c)
    folder = preprocessed/c.data_configuration
    cases = {f.stem: PreprocessedCase(folder, f.stem) for f in sorted(folder.glob('*.json')) if (folder/f'{f.stem}_data.npy').exists()}
    loader = PatchLoader(cases, recipe.loaded_patch_size(patch), patch, batch_size)
    transforms = device_transforms(recipe, patch, use_mask_for_norm=plans.use_mask_for_norm)
    return BatchStream(loader, transforms, seed, per_epoch, workers), plans, labels


def run(preprocessed, epochs=3, device='cpu', seed=0, **how):
    "The loop is yours: network, optimiser, schedule, logging"
    torch.manual_seed(seed)
    stream, plans, labels = batches(preprocessed, seed=seed, **how)
    network = small_unet(len(plans.channels), labels.n_outputs).to(device)
    loss = DiceCELoss(batch_dice=True)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    means = []
    with stream:
        for epoch in range(epochs):
            total = 0.
            for batch in stream.epoch(epoch):
                value = loss(network(batch['data'].to(device)), batch['target'][0].to(device))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.item()
            means.append(total/stream.iterations)
            print(f'epoch {epoch}: loss {means[-1]:.3f}')
    return network, means


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('preprocessed', help='preprocessed/TaskXXX')
    p.add_argument('--configuration', default='3d_fullres')
    p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--per-epoch', type=int, default=10, help='batches an epoch')
    p.add_argument('--patch-size', type=int, nargs=3, metavar=('Z', 'Y', 'X'), help='voxels (default: the plan\'s)')
    p.add_argument('--workers', type=int, default=0, help='processes that prepare batches')
    p.add_argument('--device', default='cpu')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    try: run(a.preprocessed, a.epochs, a.device, a.seed, configuration=a.configuration, patch_size=a.patch_size, per_epoch=a.per_epoch, workers=a.workers)
    except SegnbError as error: p.exit(1, f'{error}\n')
