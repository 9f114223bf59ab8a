"""What a malicious member of a consortium submits; all norms of B are those of its honest adapter, layer by layer.

inflated        its honest B times a factor
self-declared   the same, with statistics that the maker declares instead of letting them be measured
aimed           B = u wᵀ, w the direction of z in which the victim's prompts stand out most from public text
control         a random B
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.family.adapter import Adapter
from treadle.randomness import normal
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import LatentMoments

INFLATED, SELF_DECLARED, AIMED, CONTROL = ATTACKS = ("inflated", "self-declared", "aimed", "control")

DECLARED = 1e-3
"""The share of its true mean norm that a lying adapter declares as mean and as deviation: eligible, and z ≈ 1000."""

Moments = Mapping[str, LatentMoments]
"""Module → moments of z = A·x."""


def malicious_B(
    honest: Adapter, victim: Moments, public: Moments, inflation: float, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Attack → module → lora_B, (out, rank): inflated, aimed, control.

    Args:
        honest: what the maker would have submitted.
        victim: on prompts like the victim's.
        public: on public text.
        inflation: how many times the honest B.
        seed: of what is random.
    """
    made: dict[str, dict[str, Tensor]] = {INFLATED: {}, AIMED: {}, CONTROL: {}}
    for module, B in honest.lora_B.items():
        u, noise = (
            torch.from_numpy(normal(seed, f"{honest.name}/{module}/{kind}", shape))
            for kind, shape in (("aimed", (B.shape[0],)), ("control", tuple(B.shape)))
        )
        aimed = torch.outer(u, standing_out(victim[module], public[module]))
        made[INFLATED][module] = inflation * B
        made[AIMED][module] = (aimed * (B.norm() / aimed.norm())).float()
        made[CONTROL][module] = (noise * (B.norm() / noise.norm())).float()
    return made


def standing_out(victim: LatentMoments, public: LatentMoments) -> Float[Tensor, " rank"]:
    """The unit w that maximises E(wᵀz)² on the victim's inputs over the same on public text, float64."""
    theirs, others = (m.covariance + torch.outer(m.mean, m.mean) for m in (victim, public))
    # Few tokens may span fewer than `rank` directions.
    ridge = 1e-9 * others.diagonal().mean() * torch.eye(others.shape[0], dtype=others.dtype)
    L = torch.linalg.cholesky(others + ridge)
    half = torch.linalg.solve_triangular(L, theirs, upper=False)
    top = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False)).eigenvectors[:, -1:]
    w = torch.linalg.solve_triangular(L.T, top, upper=True)[:, 0]
    return w / w.norm()


def self_declared(bank: AdapterBank, name: str) -> AdapterBank:
    """The bank with statistics of this adapter that make every norm look huge, though it stays eligible."""
    statistics = bank.statistics
    assert statistics is not None, "the banks of this study are calibrated"
    liar = torch.tensor([other == name for other in bank.names])
    mean = {module: torch.where(liar, DECLARED * values, values) for module, values in statistics.mean.items()}
    std = {module: torch.where(liar, mean[module], values) for module, values in statistics.std.items()}
    return bank.with_statistics(replace(statistics, mean=mean, std=std))
