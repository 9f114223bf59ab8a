"""What a ledger's entries add up to: a data set's spending over every run, and whether one more release fits."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import overload

from treadle.errors import BudgetError, FormatError, MismatchError
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.entries import Allowed, Budget, Created, Debited, Edited, Entry, Registered, ReleaseKey, shown
from treadle.privacy.sources import Source

MechanismKind = tuple[float, float]
"""(noise multiplier, sample rate): steps of one kind add up, so thousands of rounds are one event to compose."""

_LOOK_AHEAD_BITS = (1, 3, 6)


@dataclass
class Account:
    """One data set's account, as its entries have made it so far.

    Attributes:
        data: the name.
        budget: the present one.
        source: the data as last seen.
        contents: keyed digests of every content that the name has ever stood for.
        steps: of each mechanism, over all runs.
        unaccounted: releases that no ε accounts for.
        debits: how often each request was paid for; more than once after a crash.
        began: run → the mechanism of its first release, None if no ε accounts for it.
        steps_of_run: run → the steps that it was debited.
        since: when it was registered (UTC, ISO 8601).
        last: when its last entry was written.
    """

    data: str
    budget: Budget
    source: Source
    contents: set[str]
    since: str
    last: str
    steps: Counter[MechanismKind] = field(default_factory=Counter[MechanismKind])
    unaccounted: int = 0
    debits: Counter[ReleaseKey] = field(default_factory=Counter[ReleaseKey])
    began: dict[str, MechanismKind | None] = field(default_factory=dict[str, MechanismKind | None])
    steps_of_run: Counter[str] = field(default_factory=Counter[str])

    def spent(self) -> float:
        """ε of everything ever released, at the budget's δ; inf once anything was released without noise."""
        return math.inf if self.unaccounted else _epsilon(self.steps, self.budget.delta)

    def refuse_other_noise(self, run: str, event: MechanismEvent | None) -> None:
        """Return if the release has the noise and the rate that the run began with, or is its first.

        Noise that is chosen after releases were seen is not known to compose (docs/ledger.md).

        Raises:
            MismatchError: it has others.
        """
        asked = _kind(event)
        if self.began.get(run, asked) != asked:
            raise MismatchError(
                f"began with {_told(self.began[run])}; this release would have {_told(asked)}",
                where=f"run {run!r} on data set {self.data!r}",
                remedy="nothing was released; train with other numbers, rows or terms in a run of its own",
            )

    def refuse_more_steps(self, run: str, event: MechanismEvent | None, at_most: int) -> None:
        """Return if the run stays within the steps that its noise is for.

        Raises:
            BudgetError: it does not.
        """
        taken = self.steps_of_run[run]
        if event is not None and taken + event.steps > at_most:
            raise BudgetError(
                f"{taken} of the {at_most} steps that its noise is for are paid, and it asks for {event.steps} more",
                where=f"run {run!r} on data set {self.data!r}",
                remedy="nothing was released; announce all rounds, and a reserve, when a run begins",
            )

    def refuse_if_over(self, event: MechanismEvent | None) -> None:
        """Return if the release fits into what the silo allows.

        Raises:
            BudgetError: it does not.
        """
        if math.isinf(self.budget.epsilon):
            return
        if event is None:
            raise self._over("a release that no ε accounts for", math.inf)
        if self.unaccounted:
            raise self._over("a release after one that no ε accounts for", math.inf)
        mechanism = _kind(event)
        after = self.steps + Counter({mechanism: event.steps})
        if not _fits(after, mechanism, self.budget):
            raise self._over(f"{event.steps} steps with {_told(mechanism)}", _epsilon(after, self.budget.delta))

    def _over(self, asked: str, after: float) -> BudgetError:
        return BudgetError(
            f"{asked} would make it ε = {shown(after)}; spent ε = {shown(self.spent())}, budget {self.budget}",
            where=f"data set {self.data!r}",
            remedy="nothing was released; only the silo can allow more (`treadle ledger allow`)",
        )


@overload
def _kind(event: MechanismEvent) -> MechanismKind: ...


@overload
def _kind(event: MechanismEvent | None) -> MechanismKind | None: ...


def _kind(event: MechanismEvent | None) -> MechanismKind | None:
    return None if event is None else (event.noise_multiplier, event.sample_rate)


def _told(kind: MechanismKind | None) -> str:
    return "no noise" if kind is None else f"noise {kind[0]:.4g} at rate {kind[1]:.4g}"


def _fits(steps: Counter[MechanismKind], mechanism: MechanismKind, budget: Budget) -> bool:
    """Whether these steps cost at most the budget's ε.

    More steps never cost less, so if the number of steps of this mechanism, rounded up, is affordable, then so is
    the number itself.
    The rounded number is the same round after round, and `epsilon_of` remembers it; close to the budget the rounding
    gets finer.
    """
    exact = steps[mechanism]
    for bits in _LOOK_AHEAD_BITS:
        unit = 1 << max(0, (exact - 1).bit_length() - bits)
        ahead = Counter(steps)
        ahead[mechanism] = -(-exact // unit) * unit
        if _epsilon(ahead, budget.delta) <= budget.epsilon:
            return True
    return _epsilon(steps, budget.delta) <= budget.epsilon


def _epsilon(steps: Mapping[MechanismKind, int], delta: float) -> float:
    events = [MechanismEvent(noise, rate, count) for (noise, rate), count in steps.items()]
    return epsilon_of(events, delta=delta)


@dataclass
class Accounts:
    """All accounts of a ledger.

    Attributes:
        secret_sha256: of the ledger's secret; "" before the first entry.
        by_data: name → account, in the order of registration.
    """

    secret_sha256: str = ""
    by_data: dict[str, Account] = field(default_factory=dict[str, Account])

    def add(self, entry: Entry, *, time: str, where: object) -> None:
        """Enter what one row says.

        Raises:
            FormatError: it does not follow from the rows before it.
        """
        match entry:
            case Created(secret):
                self.secret_sha256 = secret
            case Registered(data, budget, source):
                self.by_data[data] = Account(data, budget, source, {source.content}, since=time, last=time)
            case Edited() | Allowed() | Debited():
                account = self.by_data.get(entry.data)
                if account is None:
                    raise FormatError(f"{entry.data!r} was never registered", where=where, remedy="restore the ledger")
                account.last = time
                _enter(account, entry)

    def refuse_twin(self, data: str, source: Source) -> None:
        """Return if no other name stands for these data.

        Raises:
            MismatchError: another name does.
        """
        for other in self._others(data):
            if source.content in other.contents or (source.place and source.place == other.source.place):
                raise MismatchError(
                    f"these are the data of {other.data!r}, whose spending would be forgotten under another name",
                    where=f"data set {data!r}",
                    remedy=f"call them {other.data!r} in the silo's configuration",
                )

    def _others(self, data: str) -> Iterable[Account]:
        return (account for name, account in self.by_data.items() if name != data)


def _enter(account: Account, entry: Edited | Allowed | Debited) -> None:
    match entry:
        case Edited(_, source):
            account.source = source
            account.contents.add(source.content)
        case Allowed(_, budget, _):
            account.budget = budget
        case Debited(_, key, event):
            account.debits[key] += 1
            account.began.setdefault(key.run, _kind(event))
            if event is None:
                account.unaccounted += 1
            else:
                account.steps[_kind(event)] += event.steps
                account.steps_of_run[key.run] += event.steps
