#!/usr/bin/env python3
"""Preprocess with segnb, train a model of one's own, and let segnb bring its answers back to the images.

    python own_model.py ../../data_samples/Task101_PhantomCT results --steps 300
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segnb.dataset import Dataset
from segnb.export import export_case
from segnb.fingerprint import extract_fingerprint
from segnb.image import SegnbError
from segnb.metrics import evaluate_case
from segnb.planning import plan_experiment
from segnb.preprocessing import PreprocessedCase, preprocess_case, preprocess_dataset
from segnb.splits import propose_splits, split_for_fold
from segnb.workers import write_json

CONFIGURATION = '3d_fullres'


class Dilated(nn.Module):
    "A model that has nothing to do with a U-Net: every layer looks further, none makes the image smaller"
    def __init__(self, channels, classes, width=12):
        super().__init__()
        steps, layers = (1, 2, 4), []
        for before, d in zip((channels, width, width), steps):
            layers += [nn.Conv3d(before, width, (1, 3, 3), padding=(0, d, d), dilation=(1, d, d)), nn.BatchNorm3d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, classes, 1))

    def forward(self, x): return self.layers(x)


def with_place(image):
    "The image and three more channels that say where in the body a voxel lies, from -1 to 1"
    return np.concatenate([image, np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[1:]), indexing='ij'))], dtype=np.float32)


def random_crop(case, size, rng):
    "A crop of image and label map around a voxel of a random class, so that small structures are seen"
    shape, seen = case.seg.shape, [v for v in case.class_locations.values() if len(v)]
    centre = rng.choice(seen[rng.integers(len(seen))]) if seen else [n//2 for n in shape]
    start = [int(np.clip(c - s//2, 0, max(n - s, 0))) for c, s, n in zip(centre, size, shape)]
    box = tuple(slice(a, a + s) for a, s in zip(start, size))
    pad = [(0, max(s - n, 0)) for s, n in zip(size, shape)]
    image, label = np.pad(with_place(case.data)[(slice(None), *box)], [(0, 0), *pad]), np.pad(case.seg[box], pad)
    return torch.from_numpy(image), torch.from_numpy(np.maximum(label, 0).astype(np.int64)) # -1 is outside the body


def train(model, cases, size, steps, seed):
    "Ordinary training: random crops, cross-entropy, Adam"
    rng, optimizer = np.random.default_rng(seed), torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(steps):
        images, labels = zip(*(random_crop(cases[rng.integers(len(cases))], size, rng) for _ in range(2)))
        loss = nn.functional.cross_entropy(model(torch.stack(images)), torch.stack(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(task, out, steps=300, seed=0):
    "Do everything; gives the Dice of every label in every held-out case, and the losses"
    torch.manual_seed(seed)
    out, dataset = Path(out), Dataset(task)
    plans = plan_experiment(extract_fingerprint(dataset, 0), planner='cpu')
    preprocess_dataset(dataset, plans, out/'preprocessed', CONFIGURATION, n_workers=0)
    folder = out/'preprocessed'/plans.configuration(CONFIGURATION).data_configuration
    training, held_out = split_for_fold(propose_splits(dataset.cases), dataset.cases, 0)
    model = Dilated(len(plans.channels) + 3, dataset.labels.n_outputs)
    losses = train(model, [PreprocessedCase(folder, c) for c in training], (8, 48, 48), steps, seed)
    model.eval()
    scores = {}
    for name in held_out:
        case = dataset.read(name)
        data, _, properties = preprocess_case(case.image, None, case.geometry.spacing, plans, CONFIGURATION, name, case.geometry)
        with torch.inference_mode(): probabilities = model(torch.from_numpy(with_place(data))[None]).softmax(1)[0].numpy()
        found = export_case(probabilities, properties, dataset.labels, case.geometry, out/'predictions'/f'{name}.nii.gz')
        judged = evaluate_case(dataset.labels.decode(case.label), found, [dataset.labels.values[k] for k in dataset.labels.foreground])
        scores[name] = {dataset.labels.names[k]: judged[dataset.labels.values[k]]['dice'] for k in dataset.labels.foreground}
    write_json({'dice': scores, 'losses': losses}, out/'scores.json')
    return scores, losses


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('task', help='raw data set: folder with dataset.json')
    p.add_argument('out', help='folder for everything that is written')
    p.add_argument('--steps', type=int, default=300, help='training steps')
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    try: scores, losses = run(a.task, a.out, a.steps, a.seed)
    except SegnbError as error: p.exit(1, f'{error}\n')
    print(f'loss {losses[0]:.3f} at first, {np.mean(losses[-10:]):.3f} at last')
    for name, dice in scores.items(): print(name, {k: round(v, 3) for k, v in dice.items()})
