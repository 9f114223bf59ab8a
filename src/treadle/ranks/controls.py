"""Scores that know less than a probe's: to see whether its ranks, or merely unequal ranks, are worth something.

Each permutes or levels a probe's scores; ranks are allocated from them again at the same budget.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from treadle import randomness
from treadle.ranks.scores import ProbeScores

Control = Literal["uniform", "shuffled", "shuffled-in-shape", "reversed"]
CONTROLS: tuple[Control, ...] = get_args(Control)


def uniform_scores(scores: ProbeScores) -> dict[str, float]:
    """Module → 1."""
    return dict.fromkeys(scores.modules, 1.0)


def shuffled_scores(scores: ProbeScores, *, seed: int, among: Literal["shape", "all"] = "all") -> dict[str, float]:
    """Module → the score of a module drawn without replacement, among all or among those of its own shape.

    Which module gets which is a function of the seed and of the modules' names, not of their order.
    """
    means = scores.means()
    groups: dict[object, list[str]] = {}
    for name, shape in scores.shapes().items():
        groups.setdefault(shape if among == "shape" else None, []).append(name)
    dealt: dict[str, float] = {}
    for group in groups.values():
        names = sorted(group)
        keys = [float(randomness.uniform(seed, f"shuffled/{name}", (1,))[0]) for name in names]
        dealt |= {name: means[names[int(place)]] for name, place in zip(names, np.argsort(keys), strict=True)}
    return {name: dealt[name] for name in means}


def reversed_scores(scores: ProbeScores) -> dict[str, float]:
    """Module → the score that stands as far from the top as its own from the bottom; equal scores go by name."""
    means = scores.means()
    names = sorted(means, key=lambda name: (means[name], name))
    turned = {name: means[other] for name, other in zip(names, reversed(names), strict=True)}
    return {name: turned[name] for name in means}


def controls(scores: ProbeScores, *, seed: int) -> Mapping[Control, dict[str, float]]:
    """Every control by name: all equal, shuffled over all modules and over those of a shape, reversed."""
    return {
        "uniform": uniform_scores(scores),
        "shuffled": shuffled_scores(scores, seed=seed),
        "shuffled-in-shape": shuffled_scores(scores, seed=seed, among="shape"),
        "reversed": reversed_scores(scores),
    }


def shared_scores(scores: ProbeScores, control: Control | None, *, seed: int) -> dict[str, float]:
    """Module → what is shared out: the control's score or, without a control, the probe's."""
    return scores.means() if control is None else controls(scores, seed=seed)[control]
