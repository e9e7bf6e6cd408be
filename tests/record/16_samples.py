"""Record whether nnU-Net 1.7.1 accepts the sample data sets, and what it reads from them.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md, and data_samples/.
Usage, from the project root: python tests/record/16_samples.py
Writes tests/recorded/16_samples.json: for the two NIfTI tasks the outcome of the original's integrity check and, per
training case, shape, spacing, mean of every channel and number of voxels of every label, as its loader gives them.
"""
import contextlib, json, os, platform, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ.update(MPLBACKEND='agg', nnUNet_def_n_proc='1')
import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def read(task):
    from nnunet.experiment_planning.utils import create_lists_from_splitted_dataset
    from nnunet.preprocessing.cropping import get_case_identifier, load_case_from_list_of_files
    from nnunet.preprocessing.sanity_checks import verify_dataset_integrity
    verify_dataset_integrity(str(task))  # raises if it finds something
    lists, modalities = create_lists_from_splitted_dataset(str(task))
    cases = {}
    for files in lists:
        data, seg, properties = load_case_from_list_of_files(files[:-1], files[-1])
        cases[get_case_identifier(files)] = {
            'shape': list(data.shape), 'spacing': [round(float(s), 6) for s in properties['original_spacing']],
            'means': [round(float(c.mean(dtype=np.float64)), 4) for c in data], 'voxels': np.bincount(seg.astype(int).ravel(), minlength=4).tolist()}
    return {'accepted': True, 'channels': list(modalities.values()), 'cases': dict(sorted(cases.items()))}


if __name__ == '__main__':
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        found = {t: read(ROOT/'data_samples'/t) for t in ('Task101_PhantomCT', 'Task102_PhantomMR')}
    about = {'command': 'python tests/record/16_samples.py', 'versions': {'python': platform.python_version(), **{p: version(p) for p in ('nnunet', 'numpy', 'SimpleITK')}}}
    (ROOT/'tests'/'recorded'/'16_samples.json').write_text(json.dumps(about | {'tasks': found}) + '\n')
    print('wrote tests/recorded/16_samples.json')
