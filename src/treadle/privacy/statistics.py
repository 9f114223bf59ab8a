"""How large an adapter's update is on its own training rows, told under (ε, δ) by one clipped, noised sum.

A row says two numbers a module: by how many of a public text's deviations the mean norm of its tokens lies from that
text's mean, and by how much their squared deviations do. The rows' vectors over all modules are clipped, summed and
noised once, by the plan that trains adapters too: a plain Gaussian, one event in a ledger.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from treadle import files
from treadle.errors import FormatError
from treadle.privacy.gradients import MicroBatch
from treadle.privacy.noise import PrivateRandomness
from treadle.privacy.plan import DPPlan, PrivacySettings

_NARROWEST = 0.1  # of the public deviation: noise alone must not make an adapter look as if its norms never varied


@dataclass(frozen=True)
class StatisticsSettings:
    """What is promised about a release of statistics.

    Attributes:
        epsilon: of the release; inf for no noise and no promise.
        delta: below 1/records.
        records: how many rows there are if that is public, else a public lower bound.
        clip: the root mean square of a row's numbers beyond which it is clipped, in public deviations.
    """

    epsilon: float
    delta: float
    records: int
    clip: float = 1.0

    def plan(self, modules: int) -> DPPlan:
        """The plan of one release about this many modules.

        Raises:
            ConfigError: a value is out of its range, or no noise gives this ε.
        """
        return PrivacySettings(
            epsilon=self.epsilon,
            delta=self.delta,
            records=self.records,
            expected_batch=self.records,
            rounds=1,
            local_steps=1,
            max_grad_norm=self.clip * math.sqrt(2 * modules),
        ).plan()


@dataclass(frozen=True)
class Reference:
    """What a norm is on public text: of one adapter at one module.

    Attributes:
        mean: of ‖B A x‖ over tokens.
        std: likewise, above 0.
    """

    mean: float
    std: float


@dataclass(frozen=True)
class NormStatistics:
    """Plain numbers that may leave a silo.

    Attributes:
        mean: module → mean of ‖B A x‖ over the rows' tokens, every row weighing the same.
        std: module → their deviation, likewise.
        epsilon: what the release cost; None for nothing that an ε accounts for.
        delta: belongs to epsilon.
    """

    mean: Mapping[str, float]
    std: Mapping[str, float]
    epsilon: float | None
    delta: float

    def to_bytes(self) -> bytes:
        """As JSON."""
        return files.canonical_json(asdict(self))

    @staticmethod
    def of_bytes(content: bytes) -> "NormStatistics":
        """What `to_bytes` wrote.

        Raises:
            FormatError: it is something else.
        """
        try:
            found = json.loads(content)
            mean, std = ({str(k): float(v) for k, v in found[name].items()} for name in ("mean", "std"))
            epsilon = None if found["epsilon"] is None else float(found["epsilon"])
            delta = float(found["delta"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"these are no released statistics ({error})", remedy="release them again") from error
        if mean.keys() != std.keys() or not all(map(math.isfinite, (*mean.values(), *std.values()))):
            raise FormatError("released statistics must be finite, mean and std a module", remedy="release them again")
        return NormStatistics(mean, std, epsilon, delta)


def private_statistics(
    norms: Mapping[str, Float64[Tensor, "rows 2"]],
    reference: Mapping[str, Reference],
    plan: DPPlan,
    randomness: PrivateRandomness,
) -> NormStatistics:
    """The rows' statistics, noised as the plan says; one release.

    Args:
        norms: module → for every row the mean norm of its tokens, and the mean squared norm. A row's numbers must not
            depend on other rows: read it in a batch of its own.
        reference: module → what is public, in whose units rows are clipped; the same modules.
        plan: of `StatisticsSettings.plan` for as many modules.
        randomness: of the noise.

    Raises:
        TreadleError: the plan pays for no further release.

    Deviations: arXiv 2509.18093 takes moments over tokens and exact ones; here every row weighs the same, since what
    one row may change must be bounded. Where there are fewer rows than the public number, the missing ones count as
    public text.
    """
    modules = list(reference)
    rows = torch.stack([_in_deviations(norms[module], reference[module]) for module in modules], dim=1)

    def per_example(batch: Sequence[int]) -> Iterator[MicroBatch]:
        yield MicroBatch({"shift": rows[list(batch)]}, torch.ones(len(batch)))

    mechanism = plan.mechanism(len(rows), randomness)
    shifts = mechanism.gradient({"shift": torch.zeros(len(modules), 2, dtype=torch.float64)}, per_example)["shift"]
    mean: dict[str, float] = {}
    std: dict[str, float] = {}
    for module, (shift, spread) in zip(modules, shifts.tolist(), strict=True):
        public = reference[module]
        mean[module] = public.mean + public.std * shift
        std[module] = public.std * math.sqrt(max(1.0 + spread - shift * shift, _NARROWEST**2))
    settings = plan.settings
    return NormStatistics(mean, std, settings.epsilon if mechanism.event() else None, settings.delta)


def _in_deviations(norms: Float64[Tensor, "rows 2"], public: Reference) -> Float64[Tensor, "rows 2"]:
    """Shift of the mean, and of the mean squared deviation from the public mean: 0, 0 for a row like public text."""
    mean, square = norms.unbind(1)
    around = square - 2.0 * public.mean * mean + public.mean**2
    return torch.stack([(mean - public.mean) / public.std, around / public.std**2 - 1.0], dim=1)
