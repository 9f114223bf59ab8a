"""What sampled Gaussian steps cost: ε at a δ, when one row is added or removed.

Privacy loss distributions (PLD) compose numerically and tightly; Rényi divergences (RDP) are looser and check them.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from typing import Literal, Protocol, cast, runtime_checkable

from treadle.errors import ConfigError, FormatError, UnavailableError, require

Accountant = Literal["pld", "rdp"]

LEAST_DELTA = 1e-12
"""Privacy loss distributions drop tails of about 1e-15, so a δ must be well above that."""

_CLOSE = 1e-4  # of the target ε may stay unspent for want of a closer noise multiplier
_MOST_NOISE = 2.0**24  # beyond it nothing is learnt; an ε that asks for more cannot be met
_LEAST_NOISE = 2.0**-6


@dataclass(frozen=True)
class MechanismEvent:
    """`steps` releases, each a Gaussian on the sum of a Poisson sample's clipped rows.

    Attributes:
        noise_multiplier: standard deviation of the noise over the norm that a row is clipped to; above 0.
        sample_rate: the probability with which each row is in a sample, in (0, 1]; 1 is the plain Gaussian.
        steps: how many, at least 1.

    Raises:
        ConfigError: a value is out of its range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        noise = self.noise_multiplier
        require("noise_multiplier", noise, 0 < noise < math.inf, "a positive number")
        require("sample_rate", self.sample_rate, 0 < self.sample_rate <= 1, "in (0, 1]")
        whole = type(self.steps) is int  # JSON may say 1.0 or true, which no ledger can read again
        require("steps", self.steps, whole and self.steps >= 1, "a whole number of at least 1")

    def to_json(self) -> dict[str, float | int]:
        """Its three numbers by name."""
        return asdict(self)

    @staticmethod
    def of_json(content: Mapping[str, object]) -> "MechanismEvent":
        """The event that `to_json` wrote.

        Raises:
            FormatError: it is none.
        """
        noise, rate, steps = (content.get(name) for name in ("noise_multiplier", "sample_rate", "steps"))
        if len(content) != 3 or not isinstance(noise, float | int) or not isinstance(rate, float | int):
            raise FormatError(f"no mechanism event: {content}", remedy="restore the file")
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise FormatError(f"no mechanism event: {content}", remedy="restore the file")
        return MechanismEvent(float(noise), float(rate), steps)


def epsilon_of(events: Sequence[MechanismEvent], *, delta: float, accountant: Accountant = "pld") -> float:
    """The ε at `delta` of all events together, whatever their order; 0.0 for none.

    An upper bound: PLD errs on the safe side by less than 1e-4 of ε for up to 10,000 steps, RDP by several percent.

    Args:
        events: that concern the same rows. What is released at each may depend on the outcomes of the earlier ones;
            for noise and rates that are themselves chosen after them, see "What it does not promise" in docs/ledger.md.
        delta: in [1e-12, 1).
        accountant: "pld", or "rdp" as a cross-check.

    Raises:
        ConfigError: delta is out of its range.
        UnavailableError: dp-accounting is not installed.

    Reference: Doroshenko et al., arXiv 2207.04380 (PLD, "connect the dots"); Mironov et al., arXiv 1908.10530 (RDP of
    the sampled Gaussian). Both by Google's dp-accounting.

    Deviations: the interval on which losses are discretised grows from dp-accounting's 1e-4 as noise falls below 3:
    the losses are larger there, and 1e-4 would take half a minute where ε is beyond 10.
    """
    require("delta", delta, LEAST_DELTA <= delta < 1, f"at least {LEAST_DELTA:g} and below 1")
    steps = Counter[tuple[float, float]]()
    for event in events:
        steps[event.noise_multiplier, event.sample_rate] += event.steps
    merged = tuple(MechanismEvent(*mechanism, count) for mechanism, count in sorted(steps.items()))
    return _composed(merged, delta, accountant) if merged else 0.0


@lru_cache(maxsize=1024)
def _composed(events: tuple[MechanismEvent, ...], delta: float, accountant: Accountant) -> float:
    with _installed(), _hushed("absl"):
        # absl would report every Rényi order for which a series does not converge; they are left out
        found = _renyi(events, delta) if accountant == "rdp" else _distribution(events).get_epsilon_for_delta(delta)
    return max(0.0, float(found))


def _renyi(events: Sequence[MechanismEvent], delta: float) -> float:
    import dp_accounting as dp
    from dp_accounting import rdp

    account = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        gaussian = dp.GaussianDpEvent(event.noise_multiplier)
        sampled = gaussian if event.sample_rate == 1 else dp.PoissonSampledDpEvent(event.sample_rate, gaussian)
        account.compose(sampled, event.steps)
    return account.get_epsilon(delta)


@runtime_checkable
class _Distribution(Protocol):
    """What is used of dp-accounting's privacy loss distribution."""

    def compose(self, other: "_Distribution") -> "_Distribution": ...
    def self_compose(self, num_times: int) -> "_Distribution": ...
    def get_epsilon_for_delta(self, delta: float) -> float: ...


def _distribution(events: Sequence[MechanismEvent]) -> _Distribution:
    """Of all events together."""
    interval = _interval(events)
    parts = [
        _gaussian(event.noise_multiplier / math.sqrt(event.steps), 1.0, interval)
        if event.sample_rate == 1
        else _gaussian(event.noise_multiplier, event.sample_rate, interval).self_compose(event.steps)
        for event in events
    ]
    return reduce(lambda one, other: one.compose(other), parts)


@lru_cache(maxsize=16)
def _gaussian(noise: float, rate: float, interval: float) -> _Distribution:
    """Of one step. A ledger asks after every round for one round more: most of the work is here, and done once."""
    import dp_accounting as dp
    from dp_accounting import pld

    made = pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    return cast("_Distribution", made)


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """A block that needs dp-accounting.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UnavailableError("dp-accounting is not installed", remedy="pip install 'treadle[privacy]'") from error


def _interval(events: Sequence[MechanismEvent]) -> float:
    """On which losses are discretised: finely where they are small, so that there are never very many points."""
    least = min(e.noise_multiplier / (math.sqrt(e.steps) if e.sample_rate == 1 else 1.0) for e in events)
    return 1e-4 * max(1.0, 3.0 / least, 1.0 / least**2)


@contextlib.contextmanager
def _hushed(name: str) -> Iterator[None]:
    """A block in which the logger of this name says nothing less than an error."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@lru_cache(maxsize=256)
def calibrated_noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """The noise multiplier at which these steps cost at most `epsilon`, and at least 0.9999 of it.

    Args:
        epsilon: above 0 and finite.
        delta: in [1e-12, 1).
        sample_rate: of Poisson sampling, in (0, 1].
        steps: in all, at least 1.
        accountant: see `epsilon_of`.

    Raises:
        ConfigError: a value is out of its range, or no reasonable noise gives this ε.
        UnavailableError: dp-accounting is not installed.
    """
    require("epsilon", epsilon, 0 < epsilon < math.inf, "a positive number")

    def excess(noise: float) -> float:
        """The logarithm of ε over its target; nearly a straight line over the logarithm of the noise."""
        spent = epsilon_of([MechanismEvent(noise, sample_rate, steps)], delta=delta, accountant=accountant)
        return math.log(max(spent, 1e-300) / epsilon)

    noise = max(_LEAST_NOISE, sample_rate * math.sqrt(steps * 2.0 * math.log(1.25 / delta)) / epsilon)
    above = excess(noise)
    while above > 0:  # noise is cheap to account for where it is large, so the bracket comes down on its root
        if noise > _MOST_NOISE:
            raise ConfigError(
                f"no noise gives epsilon = {epsilon:g}", remedy="raise epsilon, or take another accountant"
            )
        noise *= 2.0
        above = excess(noise)
    enough, low = (noise, above), (noise, above)
    while low[1] <= 0:
        if low[0] < _LEAST_NOISE:
            return low[0]  # so much ε that hardly any noise is asked for
        enough, low = low, (low[0] / 1.5, excess(low[0] / 1.5))
    return _root(excess, low, enough)


Point = tuple[float, float]
"""A noise multiplier, and how far ε is above its target there (a logarithm)."""


def _root(excess: Callable[[float], float], below: Point, above: Point) -> float:
    """The noise between the points at which ε is its target, or less by `_CLOSE` at most: secants on logarithms."""
    last, newest = below, above
    while not -_CLOSE <= above[1] <= 0 and above[0] / below[0] > 1 + 1e-6:
        rise = newest[1] - last[1]
        power = (-_CLOSE / 2 - newest[1]) / rise if rise else 0.0  # aims at the middle of what is close enough
        noise = newest[0] * math.exp(min(50.0, power * math.log(newest[0] / last[0])))
        if not below[0] < noise < above[0]:
            noise = math.sqrt(below[0] * above[0])
        last, newest = newest, (noise, excess(noise))
        below, above = (newest, above) if newest[1] > 0 else (below, newest)
    return above[0]
