"""Record what the doctor says of real data sets, for the table in its chapter.

Needs segnb, and public data sets in the folder that SEGNB_REAL_DATA names (default: ../shared/data beside the project).
Usage, from the project root: python tests/record/15_doctor.py
Writes tests/recorded/15_doctor.json: per data set the number of cases, and the cases of each kind of finding.
"""
import os
from importlib.metadata import version
from pathlib import Path

from segnb.doctor import examine
from segnb.workers import write_json

HERE = Path(__file__).resolve()
REAL = Path(os.environ.get('SEGNB_REAL_DATA', HERE.parents[3]/'shared'/'data'))
OUT = HERE.parents[1]/'recorded'/'15_doctor.json'


def said(folder):
    "Cases of every kind of finding, without their numbers"
    report, kinds = examine(folder, n_workers=0, progress=False), {}
    for f in report.findings: kinds.setdefault(f'{f.kind} ({f.severity})', []).append(f.case or f'{len(f.numbers.get("cases", ()))} cases')
    return dict(cases=len(report.cases), kinds=kinds)


if __name__ == '__main__':
    tasks = sorted(p.parent for p in REAL.glob('Task*/dataset.json'))
    write_json(dict(command='python tests/record/15_doctor.py', versions={'segnb': version('segnb')}, findings={t.name: said(t) for t in tasks}), OUT)
