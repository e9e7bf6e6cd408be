"""Record nnU-Net v2's losses on the inputs of 51_loss.npz, for the loss chapter: clipped smoothing, ignored voxels.

Needs Python 3.11 with nnunetv2==2.8.1.
Usage, from the project root, after 51_loss.py: python tests/record/51_loss_v2.py
Writes tests/recorded/51_loss_v2.npz: `<name>/<loss><batch_dice>/value` and `/gradient`.
"""
import json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'): os.environ[key] = tempfile.mkdtemp()
import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

RECORDED = Path(__file__).resolve().parents[1]/'recorded'
OUT = RECORDED/'51_loss_v2.npz'


def main():
    inputs, arrays = np.load(RECORDED/'51_loss.npz'), {}

    def record(key, loss, target):
        logits = torch.tensor(inputs[f"{key.split('/')[0]}/logits"], requires_grad=True)
        value = loss(logits, target)
        value.backward()
        arrays[f'{key}/value'], arrays[f'{key}/gradient'] = value.detach().numpy(), logits.grad.numpy()

    for b in (0, 1):
        dice = {'batch_dice': bool(b), 'smooth': 1e-5, 'do_bg': False, 'ddp': False}
        for name in ('ordinary', 'absent_class', 'only_background', 'slices'):
            record(f'{name}/dice_ce{b}', DC_and_CE_loss(dict(dice), {}, dice_class=MemoryEfficientSoftDiceLoss), torch.tensor(inputs[f'{name}/target']))
        for name in ('ignored', 'ignored_slices'):
            target = torch.tensor(inputs[f'{name}/target'])
            record(f'{name}/dice_ce{b}', DC_and_CE_loss(dict(dice), {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss), target)
            record(f'{name}/dice_topk{b}', DC_and_topk_loss(dict(dice), {'k': 10}, ignore_label=3), target)
        for name in ('regions', 'regions_slices'):
            masks = torch.tensor(inputs[f'{name}/target'])
            ignored = (torch.arange(masks.shape[-1]) == 0).float().expand_as(masks[:, :1])
            target = torch.cat([masks, ignored], 1)
            for part, w in (('dice', 0.), ('bce', 1.)):
                record(f'{name}/{part}{b}', DC_and_BCE_loss({}, dice | {'do_bg': True}, weight_ce=w, weight_dice=1 - w, use_ignore_label=True), target)
    about = dict(command='python tests/record/51_loss_v2.py', versions={'python': platform.python_version(), **{p: version(p) for p in ('nnunetv2', 'numpy', 'torch')}})
    np.savez_compressed(OUT, **arrays, about=json.dumps(about))
    print(OUT.name, OUT.stat().st_size, 'bytes')


if __name__ == '__main__': main()
