"""What the processes of test_46_distributed.py do: fresh processes import it, so it stands in a file of its own and holds no test."""
import json, os, sys, time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from segnb.distributed import DistributedError, all_gather, all_sum, check_weights, copy_weights, from_main, only_main, start_world, sum_gradients, wait_for_all
from segnb.workers import keyed_rng


def batch(iteration, positions):
    "Samples that belong to iteration and position, whoever makes them"
    x = torch.stack([torch.from_numpy(keyed_rng(0, iteration, p).normal(size=(1, 6, 10, 10)).astype('float32')) for p in positions])
    level = torch.tensor([.05 + .2*(p % 3) for p in positions]).view(-1, 1, 1, 1, 1)
    return x, (F.avg_pool3d(x, 3, 1, 1) > level).long() + (x > 2).long()


def loss_of(logits, target):
    "Batch Dice without background, its sums over all processes, and cross-entropy"
    log_p = logits.log_softmax(1)
    one_hot = torch.zeros_like(log_p).scatter_(1, target, 1)
    axes = [0, *range(2, logits.ndim)]
    tp, sizes = all_sum((log_p.exp()*one_hot).sum(axes)), all_sum((log_p.exp() + one_hot).sum(axes))
    return F.nll_loss(log_p, target[:, 0]) - ((2*tp + 1e-5)/(sizes + 1e-5))[1:].mean()


def train(size=4, iterations=20, precision='single'):
    torch.set_num_threads(1)
    with start_world('cpu', timeout=60) as world:
        torch.manual_seed(world.rank)
        network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(.01), nn.Conv3d(8, 3, 1))
        if precision == 'double': network.double()
        copy_weights(network)
        optimizer, curve = torch.optim.SGD(network.parameters(), .01, momentum=.99, nesterov=True, weight_decay=3e-5), []
        for i in range(iterations):
            x, target = batch(i, world.share(size))
            optimizer.zero_grad()
            loss = loss_of(network(x.double() if precision == 'double' else x), target) * world.weight(size)
            loss.backward()
            sum_gradients(network)
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
            curve.append(float(all_sum(loss.detach())))
        check_weights(network)
    return curve


def slopes():
    "The gradient that tests/record/46_distributed.py recorded, and the loss"
    draw = np.random.RandomState(0)
    x, y = torch.tensor(draw.randn(4, 1, 4, 4, 4), dtype=torch.float32), draw.randint(0, 2, (4, 1, 4, 4, 4))
    y[2:, :, :2] = 2
    with start_world('cpu', timeout=60) as world:
        mine = slice(world.share(4).start, world.share(4).stop)
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.tensor([.1, .2, .3]))
        logits = torch.cat([x[mine]*w for w in holder.weight], 1)
        loss = loss_of(logits, torch.tensor(y[mine])) * world.weight(4)
        loss.backward()
        sum_gradients(holder)
        return holder.weight.grad.tolist(), float(all_sum(loss.detach()))


def share():
    "Try everything that processes can give each other"
    with start_world('cpu', timeout=60) as world:
        me, network = world.rank, nn.Linear(1, 1)
        found = {'rank': me, 'sum': all_sum(torch.tensor([1. + me, 10. + 10*me])).tolist(), 'integers': int(all_sum(torch.tensor(2**40*me + (1 - me)))), 'gathered': all_gather({'rank': me}),
                 'main': from_main(f'of {me}'), 'writer': only_main(lambda: f'written by {me}')()}
        with torch.no_grad(): network.weight.fill_(me + 1); network.bias.fill_(me + 1)
        try: check_weights(network)
        except DistributedError as error: found['drifted'] = str(error)
        copy_weights(network)
        check_weights(network)
        found['weights'] = [network.weight.item(), network.bias.item()]
        many = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(500)])
        for p in many: p.grad = torch.ones(1)*(me + 1)
        sum_gradients(many, bucket_mb=1e-5)
        found['many'] = [p.grad.item() for p in many]
        strided = nn.Conv2d(1, 1, (2, 3), bias=False).to(memory_format=torch.channels_last)
        strided.weight.grad = torch.full_like(strided.weight, me + 1.)
        sum_gradients(strided)
        found['strided'] = strided.weight.grad.flatten().tolist()
        sum_gradients(nn.Linear(1, 1))
        found['none'] = True
        began = time.monotonic()
        if me: time.sleep(4) # long enough for a busy machine to bring the other one here
        wait_for_all('slept')
        found['waited'] = time.monotonic() - began > .5 and me == 0
    with start_world('cpu', timeout=60) as world: found['again'] = int(all_sum(torch.ones(())))
    return found


def full_disk(): raise OSError('no space left, the disk is full')


def fail(how):
    with start_world('cpu', timeout=12 if how == 'hang' else 60) as world: # they also wait so long for each other's start
        all_sum(torch.ones(1))
        if how == 'main': only_main(full_disk)()
        if how == 'networks':
            network = nn.Linear(1 + world.rank, 1)
            network(torch.ones(1, 1 + world.rank)).sum().backward()
            sum_gradients(network)
        if world.rank == 1:
            if how in ('raise', 'waiting'): raise ValueError('case ct_003 is broken')
            if how == 'kill': os.kill(os.getpid(), 9)
            if how == 'hang': time.sleep(120)
        if how == 'waiting': wait_for_all('never')
        all_sum(torch.ones(1))


if __name__ == '__main__':
    if sys.argv[1] == 'fail': fail(sys.argv[2])
    curves = {'equal': train(4), 'unequal': train(5)}
    if os.environ['RANK'] == '0': print(json.dumps(curves))
