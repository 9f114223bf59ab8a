"""Make `routing.json`: who a small fixed bank chooses, decided in rational arithmetic.

    PYTHONPATH=src python tests/golden/make_routing.py

Every number is a small dyadic fraction from an integer generator, so that the squared norms below are exact and the
same on every machine. Calibrations are small fractions too. Nothing of `treadle.routing` is used.
"""

import json
import math
from fractions import Fraction
from pathlib import Path

from treadle import randomness

RANK, INNER, OUTER, ADAPTERS, TOKENS = 4, 12, 10, 6, 40
ROOT_BITS = 80


def grid(name: str, shape: tuple[int, ...]) -> list[list[Fraction]]:
    """Multiples of 1/16 between -2 and 2."""
    draws = randomness.uniform(7, name, shape)
    return [[Fraction(int(64 * value) - 32, 16) for value in row] for row in draws]


def root(value: Fraction) -> Fraction:
    """√value, correct to 2^-ROOT_BITS."""
    scale = 1 << ROOT_BITS
    return Fraction(math.isqrt(value.numerator * scale * scale // value.denominator), scale)


def product(matrix: list[list[Fraction]], vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def main() -> None:
    A = grid("A", (RANK, INNER))
    Bs = [grid(f"B{i}", (OUTER, RANK)) for i in range(ADAPTERS)]
    Bs[4] = Bs[1]  # a twin: ties go to the one that stands first
    x = grid("x", (TOKENS, INNER))
    mean = [Fraction(20 + 3 * i) for i in range(ADAPTERS)]
    std = [Fraction(8 + i, 2) for i in range(ADAPTERS)]
    mean[4], std[4] = mean[1], std[1]
    norms = [[root(sum((v * v for v in product(B, product(A, row))), Fraction(0))) for B in Bs] for row in x]
    scores = [[(n - m) / s for n, m, s in zip(row, mean, std, strict=True)] for row in norms]
    content = {
        "norm": [max(range(ADAPTERS), key=lambda i: (row[i], -i)) for row in norms],
        "seqr": [max(range(ADAPTERS), key=lambda i: (row[i], -i)) for row in scores],
        "seqr_without_1_and_4": [max((0, 2, 3, 5), key=lambda i: (row[i], -i)) for row in scores],
        "first_norms": [float(value) for value in norms[0]],
        "first_scores": [float(value) for value in scores[0]],
    }
    Path(__file__).with_name("routing.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
