"""Golden data: how many vectors this library's rules miss by more than 1e-6, and how many printed numbers do not agree with the data.

python benchmarks/golden.py [--out FILE]

golden_wrong      vectors that differ from their provenance, printed numbers included (to half a unit of their last digit)
golden_vectors    vectors in all
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from common import emit
from paretune.testing import check_golden, golden
from paretune.testing.golden import own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    data = golden()
    vectors = [(case["name"], rule, one) for case in data["cases"] for rule, one in case["expected"].items()]
    wrong = {(d.case, d.rule): d.largest for rule in data["rules"] for d in check_golden(own(rule), rule)}
    for case, rule, one in vectors:
        if "printed" in one and np.abs(np.subtract(one["printed"], one["advantages"])).max() > 5e-4:
            wrong[case, rule] = float(np.abs(np.subtract(one["printed"], one["advantages"])).max())
    for (case, rule), largest in wrong.items():
        print(f"{rule} {case}: differs by {largest:g}", flush=True)
    said = Counter(one["provenance"] for _, _, one in vectors)
    emit({"golden_wrong": len(wrong), "golden_vectors": len(vectors)}, out=given.out, provenance=dict(said))


if __name__ == "__main__":
    main()
