"""The fingerprint of whole data sets: segnb (default, one process, two) beside nnU-Net v2 (in process, two processes).

Seconds are per case and include reading. nnU-Net's in-process entry calls its function for one case on every case, without
the pooling of intensities that ends its own command; segnb's entries give the finished fingerprint. Memory is that of the
process and its children together. Data sets that are missing are left out; Task101_PhantomCT comes with segnb.
"""
from common import TASKS, data_sets, main, mark, measure
import v2


def ours(task, n_workers):
    from segnb.dataset import Dataset
    from segnb.fingerprint import extract_fingerprint
    dataset = Dataset(task)
    return measure(lambda: extract_fingerprint(dataset, n_workers), per=len(dataset.cases), memory='tree')


def v2_in_process(task):
    v2.prepare()
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor as Extractor
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    cases = v2.cases(task)
    return measure(lambda: [Extractor.analyze_case(images, label, SimpleITKIO, 10_000_000//len(cases)) for _, images, label in cases],
                   per=len(cases), memory='tree')


def v2_two(task):
    v2.prepare()
    cases = v2.cases(task)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints
    return measure(lambda: extract_fingerprints([v2.number(task)], num_processes=2, clean=True), 3, per=len(cases), memory='tree')


data_sets(ours, v2_in_process, v2_two)
for name in TASKS:
    for peer in ('nnunetv2_in_process', 'nnunetv2_two'): mark(name, peer, 1.5)
    mark(name, 'nnunetv2_in_process', 1, 'peak_mb')

if __name__ == '__main__': main(__doc__)
