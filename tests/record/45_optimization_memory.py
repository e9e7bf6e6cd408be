"""Record what a training step costs on the CPU with memory given back and with memory kept, for the optimisation chapter.

Runs in segnb's own environment (Linux, glibc), on one thread, each setting in processes of its own, in turns.
Usage, from the project root: python tests/record/45_optimization_memory.py
Writes tests/recorded/45_optimization_memory.json: page faults and seconds of processor time, in the process and in the
system, of one step (median of six) of a plain U-Net with 32 features, patches of 40 x 56 x 40, batch 2.
"""
import json, os, platform, resource, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


def one(precision, kept):
    "Print the cost of six steps after two that are not counted"
    import torch
    from segnb.loss import DeepSupervisionLoss, DiceCELoss, deep_supervision_weights
    from segnb.network import build_unet
    from segnb.optimization import keep_memory, make_optimizer, training_step
    torch.set_num_threads(1)
    if kept: assert keep_memory()
    plan = SimpleNamespace(pool_op_kernel_sizes=[[2, 2, 2]]*3, conv_kernel_sizes=[[3, 3, 3]]*4, base_num_features=32, max_num_features=320)
    net = build_unet(plan, 1, 3, generator=torch.Generator().manual_seed(0))
    optimizer, loss = make_optimizer(net), DeepSupervisionLoss(DiceCELoss(False), deep_supervision_weights(3))
    random = torch.Generator().manual_seed(1)
    data = torch.randn(2, 1, 40, 56, 40, generator=random)
    targets = [torch.randint(0, 3, (2, 1, 40 >> i, 56 >> i, 40 >> i), generator=random) for i in range(3)]
    rows = []
    for _ in range(8):
        a = resource.getrusage(resource.RUSAGE_SELF)
        training_step(net, loss, optimizer, data, targets, dtype=torch.bfloat16 if precision == 'bf16' else None)
        b = resource.getrusage(resource.RUSAGE_SELF)
        rows.append([b.ru_minflt - a.ru_minflt, b.ru_utime - a.ru_utime, b.ru_stime - a.ru_stime])
    print(json.dumps(rows[2:]))


def main():
    found = {}
    for _ in range(3):
        for key in [(p, k) for p in ('fp32', 'bf16') for k in (False, True)]:
            done = subprocess.run([sys.executable, __file__, key[0], str(int(key[1]))], env=os.environ | {'OMP_NUM_THREADS': '1'}, cwd=ROOT, capture_output=True, text=True, check=True)
            found.setdefault(key, []).extend(json.loads(done.stdout))
    median = lambda values: sorted(values)[len(values)//2]
    rows = [{'precision': p, 'kept': k, **dict(zip(('faults', 'user', 'system'), map(median, zip(*rows))))} for (p, k), rows in found.items()]
    name = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), platform.machine())
    (ROOT/'tests'/'recorded'/'45_optimization_memory.json').write_text(json.dumps({'command': 'python tests/record/45_optimization_memory.py', 'hardware': name, 'rows': rows}, indent=1) + '\n')
    for row in rows: print(row)


if __name__ == '__main__': one(sys.argv[1], sys.argv[2] == '1') if len(sys.argv) > 1 else main()
