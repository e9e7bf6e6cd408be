"""Photograph the page of a small model in headless Chromium: tests/recorded/73_report.npz.

Runs in segnb's own environment, with playwright (PyPI) and Chromium beside it. It trains five folds of a tiny network
on the phantom CT, about two minutes; with the folders of a model and of a raw data set as arguments it takes those."""
import dataclasses, shutil, sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from segnb.dataset import Dataset
from segnb.fingerprint import extract_fingerprint
from segnb.planning import plan_experiment
from segnb.preprocessing import preprocess_dataset
from segnb.report import write_report
from segnb.training import Trainer
from segnb.validation import validate_fold

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']


def trained(work):
    "Five folds, eight epochs of twenty batches each"
    dataset = Dataset(ROOT/'data_samples'/'Task101_PhantomCT')
    fingerprint = extract_fingerprint(dataset, n_workers=0)
    plans = plan_experiment(fingerprint, planner='cpu', dataset_name=dataset.name)
    small = dataclasses.replace(plans.configuration('3d_fullres'), spacing=(5, 3.2, 3.2), median_shape=(20, 29, 30), patch_size=(16, 24, 24), num_pool_per_axis=(2, 2, 2),
                                pool_op_kernel_sizes=((2, 2, 2),)*2, conv_kernel_sizes=((3, 3, 3),)*3, do_dummy_2d_data_aug=False, base_num_features=8)
    preprocessed, model = work/'preprocessed'/dataset.name, work/'models'/dataset.name/'3d_fullres'
    preprocess_dataset(dataset, dataclasses.replace(plans, configurations={'3d_fullres': small}), preprocessed, n_workers=0)
    fingerprint.save(preprocessed/'fingerprint.json')
    for k in range(5):
        Trainer(preprocessed, model, fold=k, epochs=8, iterations=20, val_iterations=3, n_workers=0, device='cpu', progress=False, initial_lr=.05, momentum=.9).fit()
        validate_fold(model, k, preprocessed, device='cpu', mirror=False, progress=False)
    return model, dataset.folder


def photographed(page, folder):
    "{name: colours by number, name_palette: their red, green and blue}"
    found = {}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')))), args=FLAGS)
        for name, width, height, scheme in (('wide', 1280, 1450, 'light'), ('phone', 375, 1150, 'light'), ('dark', 1280, 1450, 'dark')):
            tab = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
            tab.goto(page.resolve().as_uri())
            tab.screenshot(path=str(folder/f'{name}.png'))
            picture = Image.open(folder/f'{name}.png').convert('RGB')
            small = picture.resize((round(width*460/height), 460), Image.Resampling.LANCZOS).quantize(64)
            found[name], found[f'{name}_palette'] = np.asarray(small), np.array(small.getpalette()[:192], np.uint8).reshape(-1, 3)
        browser.close()
    return found


if __name__ == '__main__':
    with TemporaryDirectory() as work:
        model, raw = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else trained(Path(work))
        found = photographed(write_report(model, Path(work)/'page.html', raw=raw, n_workers=0), Path(work))
        file = ROOT/'tests'/'recorded'/'73_report.npz'
        np.savez_compressed(file, **found)
        print(file.name, f'{file.stat().st_size/1000:.0f} kB', {k: v.shape for k, v in found.items()})
