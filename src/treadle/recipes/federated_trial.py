"""How the rows of a simulated federation are dealt to its clients."""

import math
from collections.abc import Sequence

import numpy as np


def split(labels: Sequence[int], clients: int, concentration: float, *, seed: int) -> list[list[int]]:
    """The places of each client's rows: of every label, the shares of the clients are one draw of a Dirichlet.

    No client is left with fewer than a tenth of an equal share; draws that would are drawn again.

    Args:
        labels: of all rows.
        clients: at least 1, and at most the number of rows.
        concentration: of the Dirichlet, above 0; inf for equal shares.
        seed: of shares and order.

    Reference: arXiv 1909.06335 §2.
    """
    draw = np.random.default_rng(seed)
    least = len(labels) // (10 * clients)
    while True:
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in sorted(set(labels)):
            places = draw.permutation([place for place, each in enumerate(labels) if each == label])
            shares = (
                np.full(clients, 1 / clients)
                if concentration == math.inf
                else draw.dirichlet(np.full(clients, concentration))
            )
            ends = np.round(np.cumsum(shares)[:-1] * len(places)).astype(int)
            for part, mine in zip(parts, np.split(places, ends), strict=True):
                part.extend(int(place) for place in mine)
        if min(map(len, parts)) >= max(1, least):
            return [sorted(part) for part in parts]
