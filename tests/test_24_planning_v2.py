"""The presets of residual encoders beside those of nnU-Net 2.8.1, recorded by tests/record/24_planning_v2.py for made-up data of every kind."""
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segnb.fingerprint import Fingerprint
from segnb.network import build_network
from segnb.planning import PLANNERS, Planner, Plans, plan_experiment

HERE = Path(__file__).parent
RECORD = json.loads((HERE/'recorded'/'24_planning_v2.json').read_text())
spec = importlib.util.spec_from_file_location('inputs', HERE/'record'/'24_planning_inputs.py')
INPUTS = importlib.util.module_from_spec(spec)
spec.loader.exec_module(INPUTS)
PRESETS = 'resenc_m', 'resenc_l', 'resenc_xl'


def made(i):
    spacings, shapes, channels, labels = INPUTS.fingerprint(RECORD['about']['seed'], i)
    return Fingerprint(spacings, shapes, ['MRI']*channels, range(1, labels + 1))


def short(rows): return ' '.join(''.join(map(str, row)) if isinstance(row, tuple) else str(row) for row in rows)


def test_the_inputs_are_those_of_the_record():
    plain = lambda v: [plain(x) for x in v] if isinstance(v, (list, tuple, np.ndarray)) else v.item() if isinstance(v, np.generic) else v
    digest = hashlib.sha256()
    for i in range(len(RECORD['plans'])): digest.update(json.dumps([plain(v) for v in INPUTS.fingerprint(RECORD['about']['seed'], i)]).encode())
    assert digest.hexdigest() == RECORD['about']['inputs']


@pytest.mark.parametrize('preset', PRESETS)
def test_a_preset_decides_what_nnunet_v2_decides(preset):
    "Patch, batch, halvings, kernels, features, blocks and spacing of every network, and which networks there are"
    networks = 0
    for i, row in enumerate(RECORD['plans']):
        plans, where = plan_experiment(made(i), planner=preset), f'fingerprint {i} ({INPUTS.KINDS[i % len(INPUTS.KINDS)]})'
        ours = {name: c for name, c in plans.configurations.items() if not c.previous_stage}
        theirs = row[preset]['configurations']
        assert set(ours) == set(theirs) and list(plans.transpose_forward) == row[preset]['transpose'], where
        for name, c in ours.items():
            t = theirs[name]
            found = dict(patch=list(c.patch_size), batch=c.batch_size, batch_dice=c.batch_dice, strides=short(c.strides), kernels=short(c.conv_kernel_sizes), features=short(c.features_per_stage),
                         down=short(c.blocks_per_stage_encoder), up=short(c.blocks_per_stage_decoder), network={'residual_v2': 'ResidualEncoderUNet'}[c.architecture])
            assert found == {k: v for k, v in t.items() if k != 'spacing'}, (where, name)
            assert list(c.spacing)[-len(t['spacing']):] == pytest.approx(t['spacing'], rel=1e-9), (where, name)
            networks += 1
    assert networks > 340


def test_the_network_of_a_preset_is_that_of_v2():
    plans = plan_experiment(Fingerprint([(3., 1, 1)]*20, [(24, 128, 128)]*20, ['T1', 'T2'], [1, 2]), planner='resenc_m')
    for c in plans.configurations.values():
        with torch.device('meta'): network = build_network(c, 2, 3)
        assert type(network).__name__ == 'ResidualUNetV2' and type(network.encoder[1][0].skip[0]).__name__ in ('AvgPool2d', 'AvgPool3d')
        assert [len(stage) for stage in network.encoder] == [n + (i == 0) for i, n in enumerate(c.blocks_per_stage_encoder)]


def test_an_edit_keeps_the_kind_of_network():
    "Also in a plan that was made before the presets planned v2's network"
    plans = plan_experiment(made(0), planner='resenc_m')
    c = plans.configuration('3d_fullres')
    assert plans.edit('3d_fullres', say=None, spacing=tuple(mm/2 for mm in c.spacing)).configuration('3d_lowres').architecture == 'residual_v2'
    earlier = plans.to_dict()
    for one in earlier['configurations'].values(): one['architecture'] = 'residual'
    edited = Plans.from_dict(earlier).edit('3d_fullres', say=None, spacing=tuple(mm/2 for mm in c.spacing))
    assert {one.architecture for one in edited.configurations.values()} == {'residual'} and '3d_lowres' in edited.configurations


def test_a_planner_of_ones_own_says_which_network():
    class Mine(Planner):
        name, architecture = 'mine', 'plain_v2'
        def blocks(self, name, n_stages): return (3,)*n_stages, (1,)*(n_stages - 1)
    plans = plan_experiment(made(0), planner=Mine())
    assert {c.architecture for c in plans.configurations.values()} == {'plain_v2'} and '3 convolutions' in plans.explain() and 'residual' not in plans.explain()
    assert PLANNERS['nnunet_v1_residual'].architecture == 'residual'
