"""Raw data sets as nnU-Net v2 wants them, by links, in a scratch folder that is reused."""
import json, os, tempfile
from pathlib import Path

SCRATCH = Path(os.environ.get('SEGNB_BENCH_SCRATCH', Path(tempfile.gettempdir())/'segnb_bench'))


def prepare():
    "Point nnU-Net v2 at the scratch folder; to be called before it is imported"
    os.environ.update(nnUNet_def_n_proc='2', nnUNet_compile='false', MPLBACKEND='agg', nnUNet_raw=str(SCRATCH/'raw'),
                      nnUNet_preprocessed=str(SCRATCH/'preprocessed'), nnUNet_results=str(SCRATCH/'results'))


def number(task): return int(task.name.split('_')[0].removeprefix('Task'))


def linked(task):
    "Make (once) DatasetXXX_Name in the scratch folder from a v1 raw task; gives its folder"
    folder = SCRATCH/'raw'/f'Dataset{number(task):03d}_{task.name.split("_", 1)[1]}'
    known = json.loads((task/'dataset.json').read_text())
    count = 0
    for part in ('imagesTr', 'labelsTr'):
        (folder/part).mkdir(parents=True, exist_ok=True)
        for file in sorted((task/part).glob('*.nii.gz')):
            count += part == 'labelsTr'
            if not (folder/part/file.name).exists(): (folder/part/file.name).symlink_to(file.resolve())
    new = dict(channel_names=known['modality'], labels={v: int(k) for k, v in known['labels'].items()}, numTraining=count, file_ending='.nii.gz')
    (folder/'dataset.json').write_text(json.dumps(new))
    return folder


def cases(task):
    "[(identifier, image files, label file)]"
    folder = linked(task)
    names = sorted(f.name[:-7] for f in (folder/'labelsTr').glob('*.nii.gz'))
    return [(n, sorted(map(str, (folder/'imagesTr').glob(f'{n}_????.nii.gz'))), str(folder/'labelsTr'/f'{n}.nii.gz')) for n in names]


def planned(task):
    "Plans of a task, made once; gives (plans, dataset_json)"
    prepare()
    folder = linked(task)
    at = SCRATCH/'preprocessed'/folder.name
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
    if not (at/'nnUNetPlans.json').exists():
        extract_fingerprints([number(task)], num_processes=2, clean=True)
        plan_experiments([number(task)])
    return json.loads((at/'nnUNetPlans.json').read_text()), json.loads((folder/'dataset.json').read_text())
