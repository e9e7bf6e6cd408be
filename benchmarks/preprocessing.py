"""Preprocessing whole data sets for 3d_fullres, from NIfTI files to stored arrays: segnb beside nnU-Net v2.

Seconds are per case. Each call starts with an empty result folder. nnU-Net's two processes are what its command does (their
start included); in process, the same function runs case after case. Memory is that of the process and its children together.
`large_ct` is one CT of 512 x 512 x 600 voxels (0.8 x 0.8 x 1 mm) with its label map, brought to 1.5 mm.
"""
import shutil, tempfile
from pathlib import Path

from common import HERE, TASKS, data_sets, entry, main, mark, measure
import v2


def ours(task, n_workers):
    from segnb.dataset import Dataset
    from segnb.fingerprint import extract_fingerprint
    from segnb.planning import plan_experiment
    from segnb.preprocessing import preprocess_dataset
    dataset = Dataset(task)
    plans = plan_experiment(extract_fingerprint(dataset, 0))
    with tempfile.TemporaryDirectory() as folder:
        def work(): preprocess_dataset(dataset, plans, Path(folder)/'out', ['3d_fullres'], n_workers)
        return measure(work, per=len(dataset.cases), memory='tree', before=lambda: shutil.rmtree(Path(folder)/'out', ignore_errors=True))


def _managers(plans):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    manager = PlansManager(plans)
    return manager, manager.get_configuration('3d_fullres')


def v2_in_process(task):
    plans, description = v2.planned(task)
    import torch
    torch.set_num_threads(1)
    (manager, configuration), cases = _managers(plans), v2.cases(task)
    preprocessor, out = configuration.preprocessor_class(verbose=False), v2.SCRATCH/'one_by_one'
    def empty():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    def work():
        for name, images, label in cases: preprocessor.run_case_save(str(out/name), images, label, manager, configuration, description)
    return measure(work, 3, per=len(cases), memory='tree', before=empty)


def v2_two(task):
    v2.planned(task)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    return measure(lambda: preprocess([v2.number(task)], configurations=['3d_fullres'], num_processes=[2]), 3, per=len(v2.cases(task)),
                   memory='tree')


data_sets(ours, v2_in_process, v2_two)
for name in TASKS:
    for peer in ('nnunetv2_in_process', 'nnunetv2_two'): mark(name, peer, 3, of='segnb_two')


def large_case():
    "Write (once) the large CT and its label map"
    import numpy as np
    import SimpleITK as sitk
    import inputs
    folder = v2.SCRATCH/'large_ct'
    if not (folder/'done').exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file, array in ((folder/'ct_0000.nii.gz', inputs.image((600, 512, 512))[0].astype(np.int16)),
                            (folder/'ct.nii.gz', inputs.labels((600, 512, 512), 4).astype(np.uint8))):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((.8, .8, 1.))
            sitk.WriteImage(image, str(file), useCompression=True)
        (folder/'done').touch()
    return folder


@entry('large_ct', 'segnb')
def _():
    from segnb.image import read_image, read_label_map
    from segnb.fingerprint import STATISTICS, Fingerprint
    from segnb.planning import plan_experiment
    from segnb.preprocessing import preprocess_case, save_preprocessed
    folder = large_case()
    row = dict(zip(STATISTICS, (60., 80., 50., -900., 900., -150., 300.)))
    plans = plan_experiment(Fingerprint([(1.5, 1.5, 1.5)]*10, [(400, 273, 273)]*10, ['CT'], [1, 2, 3, 4], [1.]*10, {0: row}))
    def work():
        data, geometry = read_image(folder/'ct_0000.nii.gz')
        seg = read_label_map(folder/'ct.nii.gz')[0]
        with tempfile.TemporaryDirectory() as out: save_preprocessed(*preprocess_case(data, seg, geometry.spacing, plans, '3d_fullres', 'ct'), out, 'ct')
    return measure(work, 1, slow=1)


@entry('large_ct', 'nnunetv2', 'peers')
def _():
    import json
    v2.prepare()
    folder, task = large_case(), HERE.parent/'data_samples'/'Task101_PhantomCT'
    plans, description = v2.planned(task)
    plans = json.loads(json.dumps(plans))
    plans['configurations']['3d_fullres']['spacing'] = [1.5, 1.5, 1.5]
    manager, configuration = _managers(plans)
    preprocessor = configuration.preprocessor_class(verbose=False)
    def work():
        with tempfile.TemporaryDirectory() as out:
            preprocessor.run_case_save(f'{out}/ct', [str(folder/'ct_0000.nii.gz')], str(folder/'ct.nii.gz'), manager, configuration, description)
    return measure(work, 1, slow=1)


mark('large_ct', 'nnunetv2', 1, 'peak_mb')

if __name__ == '__main__': main(__doc__)
