"""Record which faults of a data set nnU-Net 1.7.1 notices, for the parity checks of the dataset chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/14_dataset.py
Writes tests/recorded/14_dataset.json: per fault, the type of what verify_dataset_integrity raises (null: it passes) and the start of its text;
and per file that split_4d makes of a small Decathlon task, its shape, geometry and a hash of its voxels.
The faults are made by `spoil`, which tests/test_14_dataset.py imports from here.
"""
import contextlib, hashlib, io, json, os, shutil, tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SEED = 14
OUT = Path(__file__).resolve().parents[1]/'recorded'/'14_dataset.json'


def write(file, array, spacing=(.8, .8, 2.5), origin=(1., 2., 3.)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing); image.SetOrigin(origin)
    sitk.WriteImage(image, str(file))


def make(folder, ending='.nii.gz'):
    "A small sound data set: three training cases and one to predict, two channels, labels 0, 1, 2"
    rng = np.random.default_rng(SEED)
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (folder/part).mkdir(parents=True)
    for i in range(4):
        for c in range(2): write(folder/('imagesTr' if i < 3 else 'imagesTs')/f'c{i}_{c:04d}{ending}', rng.normal(100, 20, (6, 20, 16)).astype(np.float32))
        if i < 3:
            label = np.zeros((6, 20, 16), np.uint8)
            label[2:4, 5:10, 4:9] = 1; label[3, 6:8, 5:7] = 2
            write(folder/'labelsTr'/f'c{i}{ending}', label)
    description = {'name': 'small', 'modality': {'0': 'T1', '1': 'T2'}, 'labels': {'0': 'background', '1': 'organ', '2': 'lesion'},
                   'training': [{'image': f'./imagesTr/c{i}{ending}', 'label': f'./labelsTr/c{i}{ending}'} for i in range(3)], 'test': [f'./imagesTs/c3{ending}']}
    (folder/'dataset.json').write_text(json.dumps(description))
    return folder


def decathlon(folder):
    "A small Decathlon task: two training cases and one to predict, three channels along the fourth axis, lying obliquely"
    rng = np.random.default_rng(SEED)
    for part in ('imagesTr', 'labelsTr', 'imagesTs'): (folder/part).mkdir(parents=True)
    c, s = np.cos(.3), np.sin(.3)
    for i in range(3):
        channels = []
        for _ in range(3):
            channels.append(sitk.GetImageFromArray(rng.normal(100, 20, (5, 9, 8)).astype(np.float32)))
            channels[-1].SetSpacing((.8, .7, 2.5)); channels[-1].SetOrigin((1., -2., 3.)); channels[-1].SetDirection((c, -s, 0., s, c, 0., 0., 0., 1.))
        sitk.WriteImage(sitk.JoinSeries(channels), str(folder/('imagesTr' if i < 2 else 'imagesTs')/f'p_{i}.nii.gz'))
        if i == 2: continue
        label = sitk.GetImageFromArray((rng.random((5, 9, 8)) > .7).astype(np.uint8))
        label.CopyInformation(channels[0])
        sitk.WriteImage(label, str(folder/'labelsTr'/f'p_{i}.nii.gz'))
    description = {'name': 'Small', 'modality': {'0': 'T1', '1': 'T2', '2': 'FLAIR'}, 'labels': {'0': 'background', '1': 'organ'}, 'licence': 'none',
                   'training': [{'image': f'./imagesTr/p_{i}.nii.gz', 'label': f'./labelsTr/p_{i}.nii.gz'} for i in range(2)], 'test': ['./imagesTs/p_2.nii.gz']}
    (folder/'dataset.json').write_text(json.dumps(description))
    return folder


def seen(folder):
    "Of every image below a folder: shape, geometry, hash of the voxels"
    out = {}
    for file in sorted(folder.rglob('*.nii.gz')):
        image = sitk.ReadImage(str(file))
        voxels = np.ascontiguousarray(sitk.GetArrayFromImage(image), np.float32)
        out[file.relative_to(folder).as_posix()] = [list(voxels.shape), [round(v, 5) for v in (*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection())],
                                                    hashlib.sha256(voxels.tobytes()).hexdigest()[:16]]
    return out


def converted():
    "What the original makes of the Decathlon task"
    from nnunet.experiment_planning import utils
    with tempfile.TemporaryDirectory() as folder:
        utils.nnUNet_raw_data = folder + '/raw'
        os.makedirs(utils.nnUNet_raw_data)
        utils.split_4d(str(decathlon(Path(folder)/'Task03_Small')), 1)
        return {'folder': os.listdir(utils.nnUNet_raw_data), 'files': seen(Path(utils.nnUNet_raw_data)/'Task003_Small')}


def changed(file, change):
    "Rewrite an image file with `change(array, image)` applied"
    image = sitk.ReadImage(str(file))
    array = change(sitk.GetArrayFromImage(image))
    new = sitk.GetImageFromArray(array)
    new.SetOrigin(image.GetOrigin()); new.SetSpacing(image.GetSpacing()); new.SetDirection(image.GetDirection())
    sitk.WriteImage(new, str(file))


def header(file, **changes):
    "Rewrite an image file with another spacing, origin or direction"
    image = sitk.ReadImage(str(file))
    for name, value in changes.items(): getattr(image, f'Set{name}')(value)
    sitk.WriteImage(image, str(file))


def put(value, where=(3, 6, 6)):
    def change(array):
        array[where] = value
        return array
    return change


def description(folder, **changes):
    file = folder/'dataset.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file, fraction):
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * fraction)])


SPOIL = {
    'nothing': lambda d: None,
    'missing channel': lambda d: (d/'imagesTr/c1_0001.nii.gz').unlink(),
    'missing label': lambda d: (d/'labelsTr/c1.nii.gz').unlink(),
    'missing test channel': lambda d: (d/'imagesTs/c3_0001.nii.gz').unlink(),
    'image of no case': lambda d: shutil.copy(d/'imagesTr/c1_0000.nii.gz', d/'imagesTr/c9_0000.nii.gz'),
    'label of no case': lambda d: shutil.copy(d/'labelsTr/c1.nii.gz', d/'labelsTr/c9.nii.gz'),
    'shape of a channel': lambda d: changed(d/'imagesTr/c1_0001.nii.gz', lambda a: a[:-1]),
    'shape of the label': lambda d: changed(d/'labelsTr/c1.nii.gz', lambda a: a[:, 1:]),
    'spacing of the label': lambda d: header(d/'labelsTr/c1.nii.gz', Spacing=(.8, .8, 3.)),
    'origin of a channel': lambda d: header(d/'imagesTr/c1_0001.nii.gz', Origin=(1., 7., 3.)),
    'direction of the label': lambda d: header(d/'labelsTr/c1.nii.gz', Direction=(-1., 0., 0., 0., -1., 0., 0., 0., 1.)),
    'undeclared label': lambda d: changed(d/'labelsTr/c1.nii.gz', put(3)),
    'label between whole numbers': lambda d: changed(d/'labelsTr/c1.nii.gz', lambda a: put(1.5)(a.astype(np.float32))),
    'NaN in a label': lambda d: changed(d/'labelsTr/c1.nii.gz', lambda a: put(np.nan)(a.astype(np.float32))),
    'NaN in an image': lambda d: changed(d/'imagesTr/c1_0001.nii.gz', put(np.nan)),
    'infinity in an image': lambda d: changed(d/'imagesTr/c1_0001.nii.gz', put(np.inf)),
    'image of zeros': lambda d: [changed(d/f'imagesTr/c1_{c:04d}.nii.gz', np.zeros_like) for c in range(2)],
    'image cut in half': lambda d: cut(d/'imagesTr/c1_0001.nii.gz', .5),
    'image without its last bytes': lambda d: cut(d/'imagesTr/c1_0001.nii.gz', .97),
    'no training cases': lambda d: ([f.unlink() for part in ('imagesTr', 'labelsTr') for f in (d/part).iterdir()], description(d, training=[])),
    'case listed twice': lambda d: description(d, training=json.loads((d/'dataset.json').read_text())['training'] * 2),
    'gap in the labels': lambda d: description(d, labels={'0': 'background', '1': 'organ', '3': 'lesion'}),
    'no dataset.json': lambda d: (d/'dataset.json').unlink(),
    'broken dataset.json': lambda d: (d/'dataset.json').write_text((d/'dataset.json').read_text()[:-20]),
    'no channels declared': lambda d: (d/'dataset.json').write_text((d/'dataset.json').read_text().replace('"modality"', '"modalities"')),
}


def main():
    for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
    os.environ |= {'MPLBACKEND': 'agg', 'nnUNet_def_n_proc': '1'}
    from nnunet.preprocessing.sanity_checks import verify_dataset_integrity
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    verdicts = {}
    for name, fault in SPOIL.items():
        with tempfile.TemporaryDirectory() as folder:
            data = make(Path(folder)/'Task001_Small')
            fault(data)
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(said): verify_dataset_integrity(str(data))
                verdicts[name] = None
            except Exception as e: verdicts[name] = [type(e).__name__, str(e).replace(folder, '...').strip().split('\n')[0][:90]]
    out = dict(command='python tests/record/14_dataset.py', versions=[f'{p} {version(p)}' for p in ('nnunet', 'numpy', 'SimpleITK')], verdicts=verdicts, decathlon=converted())
    OUT.write_text(json.dumps(out, indent=1) + '\n')
    for name, verdict in verdicts.items(): print(f'{name:32}{verdict}')


if __name__ == '__main__':
    main()
