"""The recorded trial of a cascade against full resolution alone: scores follow from the label maps, budgets are equal, and what the chapter says holds."""
import json

import numpy as np
import pytest
from scipy import ndimage

from segnb.cascade import phantom_trunk
from segnb.viewer import recorded
from segnb.workers import keyed_rng

RECORD = recorded('80_cascade_phantom.npz')
ABOUT = json.loads(str(RECORD['about']))
NAMES, RUNS = ('3d_lowres', '3d_fullres', '3d_cascade_fullres'), ABOUT['runs']


def overlap(a, b): return 2*(a & b).sum()/(a.sum() + b.sum())


def largest(mask):
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())[1:]
    return np.isin(pieces, 1 + np.flatnonzero(sizes == sizes.max())) if len(sizes) else mask


def scored(phantom, name):
    "A row a case: near gland, far gland, both as one, near and far gland when only the largest piece of each is kept"
    return np.concatenate([[*r['dice'][name].values()] for r in RUNS.values() if r['phantom'] == phantom and name in r['dice']])


@pytest.mark.parametrize('run', RUNS)
def test_scores_of_the_example_follow_from_its_label_maps(run):
    truth, said = RECORD[f'truth/{run}'], RUNS[run]
    for name in said['dice']:
        m = RECORD[f'{name}/{run}']
        assert m.shape == truth.shape and m.max() <= 2
        by_hand = [overlap(m == 1, truth == 1), overlap(m == 2, truth == 2), overlap(m > 0, truth > 0), *(overlap(largest(m == k), truth == k) for k in (1, 2))]
        np.testing.assert_allclose(said['dice'][name][said['example']['case']], by_hand, atol=6e-5)


@pytest.mark.parametrize('run', RUNS)
def test_the_example_is_the_phantom_that_the_chapter_makes_today(run):
    said = RUNS[run]
    case = phantom_trunk(keyed_rng(said['seed'], 'trunk', int(said['example']['case'][-3:])), alike=said['phantom'] == 'alike')
    assert said['example']['case'] == f"trunk_{ABOUT['train']:03d}" # the first of the test cases, none of the training cases
    np.testing.assert_array_equal(case.label, RECORD[f'truth/{run}'])
    np.testing.assert_array_equal(case.image[0, :, said['example']['y']], RECORD[f'plane/{run}'])


def test_both_ways_had_the_same_number_of_batches_of_the_same_size():
    assert ABOUT['epochs']['3d_fullres'] == 2*ABOUT['epochs']['3d_lowres'] + ABOUT['epochs']['3d_cascade_fullres']
    for said in RUNS.values():
        assert said['patch'] == said['patch_full'] and said['batch'] == 2
        assert {name: len(cases) for name, cases in said['dice'].items()} == dict.fromkeys(NAMES + ('large_balls',)*(said == RUNS['alike_0']), ABOUT['test'])


def test_where_a_far_end_decides_the_cascade_wins_in_every_case():
    low, alone, both = (scored('alike', name) for name in NAMES)
    assert len(low) >= ABOUT['test']
    assert (both[:, :2] > alone[:, :2]).all() and (both[:, :2].mean(0) > alone[:, :2].mean(0) + .3).all()
    assert ((both[:, :2] > low[:, :2]).mean(0) >= .9).all() and (both[:, :2].mean(0) > low[:, :2].mean(0) + .1).all()
    assert abs(both[:, 2].mean() - alone[:, 2].mean()) < .05 < both[:, 2].mean() - low[:, 2].mean() # the glands are found as well without a first stage; only not named


def test_where_a_look_at_the_gland_decides_full_resolution_alone_draws_better_once_stray_pieces_are_gone():
    low, alone, both = (scored('unlike', name) for name in NAMES)
    assert len(low) >= ABOUT['test']
    assert (both[:, :2].mean(0) > alone[:, :2].mean(0)).all() # stray pieces
    assert ((alone[:, 3:] > both[:, 3:]).mean(0) >= .8).all() and ((alone[:, 3:] > low[:, 3:]).mean(0) >= .9).all()


def test_balls_as_large_as_the_glands_spoil_the_hint():
    large, small = (np.array([*RUNS['alike_0']['dice'][name].values()]) for name in ('large_balls', '3d_cascade_fullres'))
    assert ABOUT['balls'] == [1, 2] and (large.mean(0) < small.mean(0)).all()
