"""A small task, ready for the network, that the tests of training share."""
import json

import numpy as np

from segnb.planning import Plans
from segnb.preprocessing import class_locations, region_locations, save_preprocessed

PLAIN = {'labels': {'0': 'background', '1': 'ball', '2': 'core'}}
REGIONS = {'labels': {'background': 0, 'ball': [1, 2], 'core': 2, 'ignore': 3}, 'regions_class_order': [1, 2]}


def make_task(folder, n=6, flat=False, said=PLAIN, **changes):
    "Six blurred balls of 24 cubed voxels and a plan with two features, or changes to it; of regions, half of the background is ignored"
    rng = np.random.default_rng(0)
    name = '2d' if flat else '3d_fullres'
    (folder/name).mkdir(parents=True)
    for i in range(n):
        z, y, x = np.ogrid[:24, :24, :24]
        cz, cy, cx = rng.integers(8, 16, 3)
        r = ((z - cz)**2 + (y - cy)**2 + (x - cx)**2)**.5
        seg = ((r < 7).astype(np.int8) + (r < 4)).astype(np.int8)
        data = (seg + rng.normal(0, .3, seg.shape)).astype(np.float32)[None]
        about = {'identifier': f'c{i}', 'class_locations': class_locations(seg, (1, 2))}
        if said is REGIONS:
            about['region_locations'] = region_locations(seg, {'ball': (1, 2), 'core': (2,)})
            seg[:, :12] = np.where(seg[:, :12] == 0, 3, seg[:, :12])
        save_preprocessed(data, seg, about, folder/name, f'c{i}')
    axes = 2 if flat else 3
    plan = dict(name=name, patch_size=[16]*axes, batch_size=2, spacing=[1, 1, 1], median_shape=[24, 24, 24], num_pool_per_axis=[2]*axes, pool_op_kernel_sizes=[[2]*axes]*2,
                conv_kernel_sizes=[[3]*axes]*3, do_dummy_2d_data_aug=False, base_num_features=2, max_num_features=320, batch_dice=False) | changes
    Plans('Balls', 'hand', 8, ['MR'], [1, 2], [1, 1, 1], [0, 1, 2], [0, 1, 2], ['nonCT'], [False], None, {name: plan}, {}).save(folder/'plans.json')
    (folder/'dataset.json').write_text(json.dumps({'modality': {'0': 'MR'}, **said,
                                                   'training': [{'image': f'./imagesTr/c{i}.nii.gz', 'label': f'./labelsTr/c{i}.nii.gz'} for i in range(n)]}))
    return folder
