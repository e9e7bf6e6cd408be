"Losses, their gradients and the weights equal nnU-Net 1.7.1's (recorded by tests/record/51_loss.py)."
from functools import partial
from types import SimpleNamespace
import numpy as np
import pytest, torch
from segnb import loss as module
from segnb.loss import (LOSSES, DeepSupervisionLoss, DiceBCELoss, DiceCELoss, FocalLoss, GeneralisedDiceLoss, LossError, LossSchedule,
                        RobustCrossEntropy, SegmentationLoss, SoftDiceLoss, SumLoss, TopKLoss, ce_to_dice, deep_supervision_weights,
                        make_loss, region_terms, share_sums, soft_dice, softmax_terms)
from segnb.viewer import recorded

ARRAYS = recorded('51_loss.npz')
MAKE = LOSSES | dict(dice_ce_weights=partial(DiceCELoss, weight_ce=2, weight_dice=.5), gdl_square=partial(GeneralisedDiceLoss, square=True),
                     topk_37=partial(TopKLoss, k=37), focal_other=partial(FocalLoss, alpha=.25, gamma=1, smooth=1e-4))
INPUTS = 'ordinary', 'confident', 'absent_class', 'only_background', 'slices'
KEYS = [k[:-6] for k in ARRAYS if k.endswith('/value') and k.split('/')[0] in INPUTS and k.split('/')[1][-1] in '01']
# Where a class is absent the original squares a Dice of 2, divides 0 by 0, or weighs the class by a million: see the chapter
DIFFER = ('dice_squared', 'mcc', 'gdl')

def differs(key):
    name, loss = key.split('/')
    return name in ('absent_class', 'only_background') and loss.startswith(DIFFER)

def relative(a, b): return np.abs(a - b).max()/max(np.abs(b).max(), 1e-30)

def value_and_gradient(loss, logits, target):
    logits = torch.as_tensor(logits).detach().clone().requires_grad_()
    value = loss(logits, torch.as_tensor(target))
    value.backward()
    return value.detach().double().numpy(), logits.grad.float().numpy()

def check(key, loss, target=None):
    name = key.split('/')[0]
    value, grad = value_and_gradient(loss, ARRAYS[f'{name}/logits'], ARRAYS[f'{name}/target'] if target is None else target)
    near = 1e-6 if 'mcc' in key else 0 # of noise it is nearly 0, and the original subtracts in single precision
    assert np.allclose(value, ARRAYS[f'{key}/value'], rtol=1e-5, atol=near)
    assert relative(grad, ARRAYS[f'{key}/gradient']) <= 1e-5

@pytest.mark.parametrize('gpu_way', [False, True])
@pytest.mark.parametrize('key', [k for k in KEYS if not differs(k)])
def test_value_and_gradient(key, gpu_way, monkeypatch):
    if gpu_way: monkeypatch.setattr(module, '_on_cpu', lambda t: False)
    loss = key.split('/')[1]
    check(key, MAKE[loss[:-1]](batch_dice=loss[-1] == '1'))

def test_nothing_was_left_out():
    assert len(KEYS) == len(INPUTS)*31 and {k.split('/')[1][:-1] for k in KEYS} == set(MAKE) - {'dice_bce', 'tversky', 'tversky_ce', 'ce_to_dice'}

@pytest.mark.parametrize('key', [k for k in KEYS if differs(k)])
def test_absent_classes_stay_finite(key):
    name, loss = key.split('/')
    value, grad = value_and_gradient(MAKE[loss[:-1]](batch_dice=loss[-1] == '1'), ARRAYS[f'{name}/logits'], ARRAYS[f'{name}/target'])
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert value < 10

@pytest.mark.parametrize('dtype', [torch.float32, torch.int64, torch.uint8, torch.int16])
def test_types_of_the_target(dtype):
    for key in ('ordinary/dice_ce0', 'slices/dice_topk1'):
        check(key, MAKE[key.split('/')[1][:-1]](key[-1] == '1'), torch.as_tensor(ARRAYS[f"{key.split('/')[0]}/target"]).to(dtype))

@pytest.mark.parametrize('gpu_way', [False, True])
@pytest.mark.parametrize('b', [0, 1])
@pytest.mark.parametrize('kind', ['dice_ce', 'log_dice_ce'])
@pytest.mark.parametrize('name', ['ignored', 'ignored_slices'])
def test_ignored(name, kind, b, gpu_way, monkeypatch):
    if gpu_way: monkeypatch.setattr(module, '_on_cpu', lambda t: False)
    target = torch.as_tensor(ARRAYS[f'{name}/target'])
    before = target.clone()
    check(f'{name}/{kind}{b}', LOSSES[kind](batch_dice=bool(b), ignore=3), target)
    assert torch.equal(target, before)
    assert not np.array_equal(ARRAYS[f'odd/{name}_target_afterwards'], before) # the original writes into what it was given

@pytest.mark.parametrize('b', [0, 1])
@pytest.mark.parametrize('name', ['regions', 'regions_slices'])
def test_regions(name, b): check(f'{name}/dice_bce{b}', DiceBCELoss(bool(b)))

EVERY = [k for k in MAKE if k != 'dice_bce']

@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('regions', [False, True])
def test_ignored_voxels_count_nowhere(name, regions):
    "The loss of a patch whose margin is ignored is that of the patch without the margin; the margin gets no gradient"
    rng = torch.Generator().manual_seed(3)
    logits = 2*torch.randn(2, 3, 4, 6, 5, generator=rng)
    if regions: target = torch.cat([(torch.rand(2, 3, 4, 6, 5, generator=rng) < .4).float(), torch.zeros(2, 1, 4, 6, 5)], 1)
    else: target = torch.randint(0, 3, (2, 1, 4, 6, 5), generator=rng).float()
    inner = target[..., 1:].clone()
    if regions: target[:, -1, ..., 0], inner = 1, inner[:, :-1]
    else: target[..., 0] = 3
    make = partial(MAKE[name], batch_dice=True, regions=regions)
    value, grad = value_and_gradient(make(ignore=3), logits, target)
    expected, inner_grad = value_and_gradient(make(), logits[..., 1:], inner)
    assert relative(value, expected) <= 1e-6 and relative(grad[..., 1:], inner_grad) <= 1e-5 and not grad[..., 0].any()

@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('regions', [False, True])
def test_all_ignored(name, regions):
    target = torch.full((2, 4 if regions else 1, 4, 4), 1. if regions else 3.)
    value, grad = value_and_gradient(MAKE[name](ignore=3, regions=regions), torch.randn(2, 3, 4, 4), target)
    assert np.isfinite(value) and not grad.any()
    assert np.isnan(ARRAYS['odd/nothing_judged'])

@pytest.mark.parametrize('energy', [False, True])
@pytest.mark.parametrize('gpu_way', [False, True])
def test_gradients_by_hand(energy, gpu_way, monkeypatch):
    "Random slopes through every output of the terms, against finite differences in double precision of the same sums"
    if gpu_way: monkeypatch.setattr(module, '_on_cpu', lambda t: False)
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 3, 5, generator=rng), torch.randint(0, 5, (2, 1, 3, 5), generator=rng)
    masks = (torch.rand(2, 5, 3, 5, generator=rng) < .4).float()
    def naive_softmax(x):
        judged, log_p = (y < 4), x.log_softmax(1)
        p, one_hot = log_p.exp()*judged, torch.nn.functional.one_hot(y[:, 0], 5)[..., :4].movedim(-1, 1)
        return -(log_p*one_hot).sum(1, True), (p*one_hot).sum((2, 3)), p.sum((2, 3)), (p*p).sum((2, 3))
    def naive_regions(x):
        m, judged = masks[:, :-1].double(), 1 - masks[:, -1:].double()
        p = x.sigmoid()*judged
        return -(m*x.sigmoid().log() + (1 - m)*(1 - x.sigmoid()).log())*judged, (p*m).sum((2, 3)), p.sum((2, 3)), (p*p).sum((2, 3))
    for ours, naive, target in ((softmax_terms, naive_softmax, y), (region_terms, naive_regions, masks)):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        t = ours(a, target, ignore=4, energy=energy)
        outs, wanted = [v for v in (t.surprise, t.overlap, t.predicted, t.energy) if v is not None], naive(b)
        slopes = [torch.randn(o.shape, generator=rng) for o in outs]
        assert len(outs) == 3 + energy
        for o, w in zip(outs, wanted): assert relative(o.detach().numpy(), w.detach().numpy()) <= 1e-6
        sum((o*s).sum() for o, s in zip(outs, slopes)).backward()
        sum((o*s).sum() for o, s in zip(wanted, slopes)).backward()
        assert relative(a.grad.numpy(), b.grad.numpy()) <= 1e-6

def test_backward_twice():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = DiceCELoss()(logits, torch.randint(0, 3, (1, 1, 4, 4)))
    value.backward(retain_graph=True)
    once = logits.grad.clone()
    value.backward()
    assert torch.equal(logits.grad, 2*once)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('regions', [False, True])
@pytest.mark.parametrize('name', list(MAKE))
def test_half_precision_and_extreme_logits(name, regions, dtype):
    "A million voxels, logits of +-10,000, right and wrong, with an absent class: finite value and gradient"
    if name == 'dice_bce' and not regions: return
    rng = torch.Generator().manual_seed(1)
    logits = (torch.randint(0, 2, (1, 3, 100, 100, 100), generator=rng)*20000. - 10000).to(dtype)
    target = torch.randint(0, 2, (1, 3 if regions else 1, 100, 100, 100), generator=rng).float()
    if regions: target[:, 2] = 0
    loss = MAKE[name](**dict(regions=True) if regions else {})
    if isinstance(loss, LossSchedule): loss.set_epoch(600)
    value, grad = value_and_gradient(loss, logits, target)
    assert np.isfinite(value) and np.isfinite(grad).all()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_equals_single_of_the_same_logits(dtype):
    rng = torch.Generator().manual_seed(2)
    logits, target = torch.randn(1, 3, 64, 128, 128, generator=rng).to(dtype), torch.randint(0, 3, (1, 1, 64, 128, 128), generator=rng)
    for name in ('dice_ce', 'dice_topk', 'gdl_ce', 'mcc'):
        half, single = (value_and_gradient(LOSSES[name](), x, target) for x in (logits, logits.float()))
        assert half[0] == single[0]
        assert np.abs(half[1] - single[1]).max() <= 2**-7*np.abs(single[1]).max() + 6e-8 # rounding of the gradient itself

@pytest.mark.parametrize('n', range(1, 8))
def test_weights(n):
    assert np.allclose(deep_supervision_weights(n), ARRAYS[f'weights/{n}'], rtol=1e-12, atol=0)
    kept = deep_supervision_weights(n, keep_lowest=True)
    assert np.isclose(sum(kept), 1) and np.allclose(np.divide(kept[:-1], kept[1:]), 2)

def test_deep_supervision():
    logits = [torch.from_numpy(ARRAYS[f'deep/logits{i}']).requires_grad_() for i in range(3)]
    targets = [torch.from_numpy(ARRAYS[f'deep/target{i}']) for i in range(3)]
    value = DeepSupervisionLoss(DiceCELoss(False), deep_supervision_weights(3))(logits, targets)
    value.backward()
    assert relative(value.detach().numpy(), ARRAYS['deep/value']) <= 1e-5
    for i in range(2): assert relative(logits[i].grad.numpy(), ARRAYS[f'deep/gradient{i}']) <= 1e-5
    assert logits[2].grad is None and 'deep/gradient2' not in ARRAYS

@pytest.mark.parametrize('epoch', [0, 500, 501, 600, 625, 750, 751, 999])
def test_transition(epoch):
    loss = DeepSupervisionLoss(ce_to_dice(), (1.,))
    loss.set_epoch(epoch)
    inner, rng = loss.loss, torch.Generator().manual_seed(0)
    assert np.allclose([2*(1 - inner.share), 2*inner.share], ARRAYS[f'transition/{epoch}'], atol=1e-12)
    x, y = torch.randn(1, 3, 4, 4, generator=rng), torch.randint(0, 3, (1, 1, 4, 4), generator=rng)
    ce, dice = ARRAYS[f'transition/{epoch}']
    assert torch.isclose(loss([x], [y]), ce*RobustCrossEntropy()(x, y) + dice*SoftDiceLoss()(x, y))

@pytest.mark.parametrize('kind,found,ours', [('dice', -.99900103, 'same'), ('dice_squared', -2., -1.), ('gdl', -1., -1.), ('mcc', np.nan, 0.), ('mcc_foreground', np.nan, 0.)])
def test_odd_values_of_the_original(kind, found, ours):
    "A class that is absent and that the network is sure about"
    assert np.allclose(ARRAYS[f'odd/{kind}'], found, equal_nan=True)
    sure = torch.zeros(1, 2, 4, 4, 4)
    sure[:, 1] = -50
    assert np.isclose(float(LOSSES[kind]()(sure, torch.zeros(1, 1, 4, 4, 4))), found if ours == 'same' else ours, atol=1e-3)

def test_small_patches_and_hopeless_voxels():
    assert np.isnan(ARRAYS['odd/topk_of_8_voxels'])
    value, grad = value_and_gradient(TopKLoss(k=10), torch.randn(1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2))
    assert np.isfinite(value) and np.count_nonzero(np.abs(grad).sum(1)) == 1
    hopeless = torch.zeros(1, 2, 4, 4, 4)
    hopeless[:, 1] = -50
    pulls = [np.abs(value_and_gradient(FocalLoss(smooth=s), hopeless, torch.ones(1, 1, 4, 4, 4))[1]).max() for s in (1e-5, 0.)]
    assert pulls[0] < 1e-15 and pulls[1] > 1e-3 and ARRAYS['odd/focal_pull_on_hopeless_voxels'] < 1e-15

@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('regions', [False, True])
def test_two_processes(name, regions):
    "Two processes that see half of the batch each, with sums shared: the loss and the gradient of the whole batch"
    if name.startswith(('topk', 'dice_topk')): return # the hardest voxels are those of each process
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(3, 3, 4, 5, generator=rng)
    y = (torch.rand(3, 3, 4, 5, generator=rng) < .4).float() if regions else torch.randint(0, 3, (3, 1, 4, 5), generator=rng)
    how = dict(batch_dice=True, regions=regions)
    value, grad = value_and_gradient(MAKE[name](**how), x, y)
    asked = [[], []]
    for part, note in zip((slice(0, 2), slice(2, 3)), asked): # first round: what each process would tell the others
        MAKE[name](reduce=lambda t: note.append(t.detach()) or t, **how)(x[part], y[part])
    for part, other in zip((slice(0, 2), slice(2, 3)), (asked[1], asked[0])):
        heard = iter(other)
        loss = share_sums(MAKE[name](**how), lambda t: t + next(heard))
        v, g = value_and_gradient(loss, x[part], y[part])
        assert relative(v, value) <= 1e-5 and relative(g, grad[part]) <= 2e-5

def test_make_loss():
    both = {b: SimpleNamespace(batch_dice=b) for b in (False, True)}
    plain, ignoring = SimpleNamespace(ignore=None, regions={}), SimpleNamespace(ignore=3, regions={})
    regions = SimpleNamespace(ignore=4, regions={'whole': (1, 2), 'core': (2,)})
    for b, configuration in both.items():
        loss = make_loss(None, configuration, plain)
        assert type(loss) is DiceCELoss and loss.parts[1].batch_dice is b and loss.ignore is None
        assert make_loss('gdl_ce', configuration, ignoring).ignore == 3
        loss = make_loss(None, configuration, regions)
        assert type(loss) is DiceBCELoss and not loss.parts[1].batch_dice and loss.ignore == 4 and loss.regions and loss.parts[1].smooth == 0
        assert make_loss('dice_bce', configuration, regions, batch_dice=True).parts[1].batch_dice
        for name in LOSSES:
            if name != 'dice_bce': assert torch.isfinite(make_loss(name, configuration, plain)(torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))))
            assert torch.isfinite(make_loss(name, configuration, regions)(torch.randn(2, 2, 4, 4), torch.randint(0, 2, (2, 3, 4, 4)).float()))
    def own(logits, target): return logits.mean()
    assert make_loss(own, both[True], plain) is own
    with pytest.raises(LossError, match='no loss of that name; found dice_cee'): make_loss('dice_cee', both[True], plain)
    with pytest.raises(LossError, match='for regions'): make_loss('dice_bce', both[True], plain)

@pytest.mark.parametrize('call,word', [
    (lambda: DiceCELoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 5)), 'do not fit'),
    (lambda: DiceCELoss()(torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), 2.)), 'no output for; found 2'),
    (lambda: DiceCELoss(ignore=2)(torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), 3.)), r'0 to 1, or 2 \(ignored\)'),
    (lambda: DiceCELoss()(torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), float('nan'))), 'no output for; found nan'),
    (lambda: DiceCELoss()(torch.zeros(1, 2, 4, 4), torch.full((1, 1, 4, 4), -1)), 'no output for; found -1'),
    (lambda: DiceBCELoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)), 'masks and the logits'),
    (lambda: DiceBCELoss(ignore=3)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)), 'the last channel 1 where ignored'),
    (lambda: DiceBCELoss()(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 2.)), 'hold 0 and 1; found 2'),
    (lambda: RobustCrossEntropy(class_weights=(1, 2, 3))(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)), 'one class weight'),
    (lambda: SumLoss(TopKLoss(ignore=3), SoftDiceLoss()), 'different targets'),
    (lambda: SumLoss(TopKLoss(), SoftDiceLoss(), weights=(1,)), 'do not fit the parts'),
    (lambda: DiceCELoss(weight_ce=0, weight_dice=0), 'not all 0'),
    (lambda: TopKLoss(k=0), 'percentage'), (lambda: FocalLoss(gamma=.5), 'endless'), (lambda: LossSchedule(None, None, 9, 8), 'before it begins')])
def test_refusals(call, word):
    with pytest.raises(LossError, match=word): call()

def test_class_weights():
    rng = torch.Generator().manual_seed(0)
    x, y, w = torch.randn(2, 3, 4, 5, generator=rng), torch.randint(0, 3, (2, 1, 4, 5), generator=rng), torch.tensor([1., 10., 0.])
    assert torch.isclose(RobustCrossEntropy(class_weights=w)(x, y), torch.nn.functional.cross_entropy(x, y[:, 0], weight=w))
    m = (y == 1).float().expand(-1, 3, -1, -1)
    expected = (torch.nn.functional.binary_cross_entropy_with_logits(x, m, reduction='none')*w.view(1, 3, 1, 1)).sum()/(40*w.sum())
    assert torch.isclose(RobustCrossEntropy(class_weights=w, regions=True)(x, m), expected)

def test_a_loss_of_ones_own():
    class Mine(SegmentationLoss):
        energy = True
        def score(self, terms): return terms.surprise.mean() + terms.energy.mean()
    value, grad = value_and_gradient(SumLoss(Mine(), SoftDiceLoss(), weights=(1, 2)), torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    assert np.isfinite(value) and grad.any()
    with pytest.raises(NotImplementedError, match='SegmentationLoss needs a method score'): SegmentationLoss()(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2))

V2 = recorded('51_loss_v2.npz')

@pytest.mark.parametrize('key', [k[:-6] for k in V2 if k.endswith('/value') and 'topk' not in k and '/bce' not in k])
def test_nnunet_v2(key):
    "nnU-Net v2 clips the denominator; its ignored voxels and ours count nowhere"
    name, kind, b = *key.split('/')[0:1], key.split('/')[1][:-1], key[-1] == '1'
    target = torch.as_tensor(ARRAYS[f'{name}/target'])
    if name.startswith('regions'):
        target = torch.cat([target, (torch.arange(target.shape[-1]) == 0).float().expand_as(target[:, :1])], 1)
        loss = SoftDiceLoss(b, clip=True, regions=True, ignore=4)
    else: loss = DiceCELoss(b, clip=True, ignore=3 if 'ignored' in name else None)
    value, grad = value_and_gradient(loss, ARRAYS[f'{name}/logits'], target)
    assert relative(value, V2[f'{key}/value']) <= 1e-5 and relative(grad, V2[f'{key}/gradient']) <= 1e-5

def test_where_nnunet_v2_counts_differently():
    "Its cross-entropy of regions is a sum over regions once voxels are ignored; its hardest voxels are a share of all voxels, ignored too"
    for name in ('regions', 'regions_slices'):
        target = torch.as_tensor(ARRAYS[f'{name}/target'])
        target = torch.cat([target, (torch.arange(target.shape[-1]) == 0).float().expand_as(target[:, :1])], 1)
        value, _ = value_and_gradient(RobustCrossEntropy(regions=True, ignore=4), ARRAYS[f'{name}/logits'], target)
        assert relative(3*value, V2[f'{name}/bce0/value']) <= 1e-5
    value, _ = value_and_gradient(LOSSES['dice_topk'](ignore=3), ARRAYS['ignored/logits'], ARRAYS['ignored/target'])
    assert value > V2['ignored/dice_topk0/value'] + .1

def test_strange_labels_on_a_gpu(monkeypatch):
    "There nobody looks at the labels, for that would mean waiting: the loss is nan, and the training names the case"
    monkeypatch.setattr(module, '_on_cpu', lambda t: False)
    for bad in (3., -1., float('nan'), 300.):
        target = torch.zeros(1, 1, 4, 4)
        target[..., 0] = 9
        target[..., 1] = bad
        for name in ('dice_ce', 'dice', 'ce', 'tversky', 'dice_topk'): assert torch.isnan(LOSSES[name](ignore=9)(torch.zeros(1, 3, 4, 4), target))

def test_little_is_kept_for_the_way_back():
    "Bytes that PyTorch keeps beyond logits and target: less than half of what the readable formula keeps; on a GPU next to nothing"
    def kept(loss, logits, target):
        found = {}
        def note(x): found[x.data_ptr()] = x.untyped_storage().nbytes(); return x
        logits = logits.detach().clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): loss(logits, target)
        return sum(n for pointer, n in found.items() if pointer not in (logits.data_ptr(), target.data_ptr()))/logits.nbytes
    def readable(x, y): return torch.nn.functional.cross_entropy(x, y[:, 0]) - soft_dice(x.softmax(1), y, False)
    x, y = torch.randn(1, 14, 16, 32, 32), torch.randint(0, 14, (1, 1, 16, 32, 32))
    much, little = kept(readable, x, y), kept(DiceCELoss(), x, y)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, '_on_cpu', lambda t: False)
        least = kept(DiceCELoss(), x, y)
    assert little < .5*much and least < .1*much

def test_an_absent_class_does_not_drown_the_present_one():
    "Weighed by one over a millionth, as in the original, the present class would learn nothing any more"
    rng = torch.Generator().manual_seed(4)
    x, y = torch.randn(1, 3, 4, 8, 8, generator=rng), (torch.rand(1, 1, 4, 8, 8, generator=rng) < .2).float() # class 2 is absent
    def original(x, y):
        t = softmax_terms(x, y)
        w = 1/(t.true + 1e-6)
        return -(2*w*t.overlap)[:, 1:].sum()/(w*(t.predicted + t.true))[:, 1:].sum()
    ours, theirs = (np.abs(value_and_gradient(loss, x, y)[1]).sum((0, 2, 3, 4)) for loss in (GeneralisedDiceLoss(), original))
    assert ours[1] > 1e4*theirs[1]

@pytest.mark.parametrize('loss', [DiceCELoss, FocalLoss, TopKLoss])
def test_a_network_of_slices_that_is_asked_twice(loss):
    "Two calls in one graph, as deep supervision makes them, and logits that are not contiguous"
    rng = torch.Generator().manual_seed(6)
    x, y = torch.randn(2, 5, 7, 3, generator=rng).movedim(-1, 1), torch.randint(0, 3, (2, 1, 5, 7), generator=rng)
    assert not x.is_contiguous()
    apart = value_and_gradient(loss(), x.contiguous(), y)
    both = value_and_gradient(lambda a, b: loss()(a, b) + loss()(a, b), x, y)
    assert relative(both[0], 2*apart[0]) <= 1e-6 and relative(both[1], 2*apart[1]) <= 1e-6
