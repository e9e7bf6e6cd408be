"""Reading one case (image and label map) from .nii.gz: segnb beside a plain SimpleITK read and nnU-Net v2's reader.

segnb also looks for NaN, for files that end early and for headers that contradict themselves, which the others do not.
"""
import os
os.environ.update(OMP_NUM_THREADS='1', ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS='1')

from common import TASKS, entry, main, mark, measure
import v2


def files(task, most=40):
    cases = sorted(f.name[:-7] for f in (task/'labelsTr').glob('*.nii.gz'))[:most]
    return [(task/'imagesTr'/f'{c}_0000.nii.gz', task/'labelsTr'/f'{c}.nii.gz') for c in cases]


def ours(task):
    from segnb.image import read_image, read_label_map
    pairs = files(task)
    return measure(lambda: [(read_image(i), read_label_map(l)) for i, l in pairs], per=len(pairs))


def plain(task):
    import SimpleITK as sitk
    pairs = files(task)
    return measure(lambda: [sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for pair in pairs for f in pair], per=len(pairs))


def v2_reader(task):
    v2.prepare()
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    reader, pairs = SimpleITKIO(), files(task)
    return measure(lambda: [(reader.read_images([str(i)]), reader.read_seg(str(l))) for i, l in pairs], per=len(pairs))


for name, task in TASKS.items():
    entry(name, 'segnb')(lambda t=task: ours(t))
    entry(name, 'SimpleITK')(lambda t=task: plain(t))
    entry(name, 'nnunetv2', 'peers')(lambda t=task: v2_reader(t))
    mark(name, 'SimpleITK', 1)

if __name__ == '__main__': main(__doc__)
