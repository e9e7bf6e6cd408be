"Label maps on the original grid equal those that nnU-Net 1.7.1 wrote (recorded by tests/record/63_export.py)."
import numpy as np
import pytest
from segnb.cropping import uncrop
from segnb.export import probabilities_to_original_grid, to_original_grid
from segnb.labels import Labels
from segnb.viewer import recorded

INFO, ARRAYS = recorded('63_export.json')['properties'], recorded('63_export.npz')
MORE, MORE_ARRAYS = recorded('63_export_more.json'), recorded('63_export_more.npz')
SLIP = 'target_coarse_transposed'  # the original resamples along the wrong axis here

def labels(n, regions=None):
    if not regions: return Labels.from_dict(dict(labels={str(i): f'class {i}' if i else 'background' for i in range(n)}))
    return Labels.from_dict(dict(labels={'background': 0, **{f'region {i}': [r, n] if r < n else n for i, r in enumerate(regions)}}, regions_class_order=regions))

@pytest.mark.parametrize('name', [n for n in INFO if n != SLIP])
def test_label_map(name):
    probabilities, theirs = ARRAYS[name + '/probabilities'], ARRAYS[name + '/labels']
    ours = to_original_grid(probabilities, INFO[name], labels(len(probabilities)))
    assert ours.dtype == np.uint8 and np.array_equal(ours, theirs)
    full = probabilities_to_original_grid(probabilities, INFO[name])
    assert np.array_equal(full.argmax(0), ours) and np.allclose(full.sum(0), 1, atol=1e-5)

def test_the_axis_that_is_coarse_is_found_in_the_axes_of_the_file():
    probabilities, case = ARRAYS[SLIP + '/probabilities'], INFO[SLIP]
    ours = to_original_grid(probabilities, case, labels(len(probabilities)))
    # the same case written with axes that need no turning: there the original agrees with us
    unturned = {**case, 'transpose_forward': (0, 1, 2), 'transpose_backward': (0, 1, 2),
                **{k: [case[k][i] for i in case['transpose_backward']] for k in ('shape_after_resampling', 'spacing_after_resampling')}}
    turned = probabilities.transpose([0] + [b + 1 for b in case['transpose_backward']])
    assert np.array_equal(ours, to_original_grid(turned, unturned, labels(len(probabilities))))
    assert .005 < np.mean(ours != ARRAYS[SLIP + '/labels']) < .3

def near_ties(probabilities, case, regions, orders):
    "Where rounding may decide: the two highest probabilities, or a region and one half, differ by less than 1e-6"
    full = probabilities_to_original_grid(probabilities, case, bool(regions), **orders)
    if regions: return (abs(full - .5) < 1e-6).any(0)
    first, second = np.sort(full, 0)[:-3:-1]
    return first - second < 1e-6

@pytest.mark.parametrize('slabs', [False, True])
@pytest.mark.parametrize('name', MORE['properties'])
def test_regions_other_orders_and_random_geometries(name, slabs):
    probabilities, theirs, case = MORE_ARRAYS[name + '/probabilities'], MORE_ARRAYS[name + '/labels'], MORE['properties'][name]
    orders = dict(MORE['options'][name])
    regions = orders.pop('regions', None)
    given = ((z, probabilities[:, z:z + 3]) for z in range(0, probabilities.shape[1], 3)) if slabs else probabilities
    ours = to_original_grid(given, case, labels(len(probabilities), regions), **orders)
    tie = near_ties(probabilities, case, regions, orders)
    assert np.array_equal(ours[~tie], theirs[~tie]) and tie.mean() < 1e-2
