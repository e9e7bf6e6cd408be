"""Record how nnU-Net 1.7.1 reads image files, for the parity checks of the image chapter.

Needs Python 3.11 with nnunet==1.7.1 and the versions in tests/record/README.md.
Usage, from the project root: python tests/record/10_image.py
Writes tests/recorded/10_image.npz: per case `<name>/file0`, `<name>/file1`, ... (the bytes of the .nii.gz files given in)
and `<name>/data`, `<name>/spacing`, `<name>/size`, `<name>/origin`, `<name>/direction` (what the original makes of them).
"""
import gzip, os, struct, tempfile
from importlib.metadata import version
from pathlib import Path

for key in ('nnUNet_raw_data_base', 'nnUNet_preprocessed', 'RESULTS_FOLDER'): os.environ[key] = tempfile.mkdtemp()
os.environ['MPLBACKEND'] = 'agg'
import numpy as np
import SimpleITK as sitk

SEED = 10
OUT = Path(__file__).resolve().parents[1]/'recorded'/'10_image.npz'


def rotation(rng):
    "A random right-handed rotation, row-major"
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return (q * np.sign(np.linalg.det(q))).ravel().tolist()


def write(file, array, spacing=(1., 1., 1.), origin=(0., 0., 0.), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing); image.SetOrigin(origin); image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


def inputs(folder):
    rng = np.random.default_rng(SEED)
    def ints(shape): return rng.integers(-1000, 1500, shape).astype(np.int16)

    write(folder/'ct_0000.nii.gz', ints((5, 6, 7)), (.7, .8, 2.5), (-101.3, 55.1, 7.25))
    yield 'ct', [folder/'ct_0000.nii.gz']

    tilt, files = rotation(rng), [folder/f'oblique_{i:04d}.nii.gz' for i in range(2)]
    for file in files: write(file, rng.normal(size=(4, 5, 6)).astype(np.float32), (1.1, .9, 3.3), (12.5, -3.1, 40.7), tilt)
    yield 'oblique', files

    write(folder/'permuted_0000.nii.gz', ints((3, 4, 5)), (2., 3., 4.), (1., 2., 3.), (0, 0, 1, -1, 0, 0, 0, -1, 0))
    yield 'permuted', [folder/'permuted_0000.nii.gz']

    write(folder/'slice_0000.nii.gz', rng.integers(0, 255, (1, 9, 8)).astype(np.uint8), (1., 1., 999.))
    yield 'slice', [folder/'slice_0000.nii.gz']

    file = folder/'scaled_0000.nii.gz'  # stored as bytes; the header's slope and intercept give HU
    write(file, rng.integers(0, 255, (4, 4, 4)).astype(np.uint8), (.5, .5, 5.))
    data = bytearray(gzip.decompress(file.read_bytes()))
    data[112:120] = struct.pack('<2f', 7.11, -1024.)
    file.write_bytes(gzip.compress(bytes(data), mtime=0))
    yield 'scaled', [file]


def main():
    from nnunet.preprocessing.cropping import load_case_from_list_of_files
    out = {'command': np.array('python tests/record/10_image.py'),
           'versions': np.array([f'{p} {version(p)}' for p in ('nnunet', 'numpy', 'SimpleITK')])}
    with tempfile.TemporaryDirectory() as folder:
        for name, files in inputs(Path(folder)):
            data, _, properties = load_case_from_list_of_files([str(f) for f in files])
            for i, f in enumerate(files): out[f'{name}/file{i}'] = np.frombuffer(f.read_bytes(), np.uint8)
            out |= {f'{name}/data': data, f'{name}/spacing': properties['original_spacing'], f'{name}/size': properties['original_size_of_raw_data'],
                    f'{name}/origin': np.array(properties['itk_origin']), f'{name}/direction': np.array(properties['itk_direction'])}
    np.savez_compressed(OUT, **out)
    print(f'{OUT.name}: {len(out)} entries, {OUT.stat().st_size/1e3:.0f} kB')


if __name__ == '__main__':
    main()
