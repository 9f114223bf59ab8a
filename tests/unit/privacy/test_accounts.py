"""Accounts add up every event, and the quick answer to "does it fit?" is the exact one."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import BudgetError, FormatError, MismatchError
from treadle.privacy import accounts
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.accounts import Account, Accounts
from treadle.privacy.entries import Allowed, Budget, Debited, Edited, Registered, ReleaseKey
from treadle.privacy.sources import Source

EVENT = MechanismEvent(16.0, 1.0, 10)


def key(server_round: int, run: str = "run") -> ReleaseKey:
    return ReleaseKey(run, server_round, "0" * 64)


def opened(budget: Budget, *debits: MechanismEvent | None) -> Account:
    made = Accounts()
    made.add(Registered("ward", budget, Source("c", "p")), time="t0", where="row 1")
    for number, event in enumerate(debits):
        made.add(Debited("ward", key(number), event), time=f"t{number + 1}", where="row")
    return made.by_data["ward"]


def additive(events: Sequence[MechanismEvent], *, delta: float) -> float:
    """An accountant whose every step costs 1/noise: any decision can be checked by hand."""
    return sum((event.steps / event.noise_multiplier for event in events), 0.0)


def test_everything_is_composed_whatever_the_order_and_the_run() -> None:
    events = [EVENT, MechanismEvent(12.0, 0.05, 4), EVENT, MechanismEvent(24.0, 1.0, 1)]
    expected = epsilon_of(events, delta=1e-5)
    assert expected > epsilon_of(events[:3], delta=1e-5) > epsilon_of(events[:1], delta=1e-5)
    # The same numbers go through the same arithmetic: not one bit may differ.
    assert opened(Budget(9.0, 1e-5), *events).spent() == expected
    assert opened(Budget(9.0, 1e-5), *events[::-1]).spent() == expected


def test_the_budget_is_exact() -> None:
    three = epsilon_of([MechanismEvent(16.0, 1.0, 30)], delta=1e-5)
    opened(Budget(three, 1e-5), EVENT, EVENT).refuse_if_over(EVENT)
    with pytest.raises(BudgetError) as raised:
        opened(Budget(three, 1e-5), EVENT, EVENT, EVENT).refuse_if_over(MechanismEvent(16.0, 1.0, 1))
    line = str(raised.value)
    assert "data set 'ward': 1 steps with noise 16 at rate 1 would make it" in line
    assert f"spent ε = {three:.4g}, budget ε = {three:.4g} at δ = 1e-05" in line


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 2.0, 8.0]), st.integers(1, 3000)), max_size=6),
    st.tuples(st.sampled_from([1.0, 2.0, 8.0]), st.integers(1, 3000)),
    st.integers(1, 12_000),
)
def test_the_quick_answer_is_the_exact_one(
    spent: list[tuple[float, int]], asked: tuple[float, int], epsilon: int
) -> None:
    events = [MechanismEvent(noise, 0.5, steps) for noise, steps in spent]
    event = MechanismEvent(asked[0], 0.5, asked[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts, "epsilon_of", additive)
        account = opened(Budget(float(epsilon), 1e-5), *events)
        if additive([*events, event], delta=1e-5) <= epsilon:
            account.refuse_if_over(event)
        else:
            with pytest.raises(BudgetError):
                account.refuse_if_over(event)


def test_a_thousand_rounds_ask_the_accountant_a_few_dozen_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[MechanismEvent, ...]] = set()

    def counting(events: Sequence[MechanismEvent], *, delta: float) -> float:
        asked.add(tuple(events))  # the real one remembers what it was asked
        return additive(events, delta=delta)

    monkeypatch.setattr(accounts, "epsilon_of", counting)
    account = opened(Budget(10_000.0 / EVENT.noise_multiplier, 1e-5))
    made = Accounts(by_data={"ward": account})
    for server_round in range(1000):
        account.refuse_if_over(EVENT)
        made.add(Debited("ward", key(server_round), EVENT), time="t", where="row")
    with pytest.raises(BudgetError):
        account.refuse_if_over(EVENT)
    assert len(asked) <= 60  # 14 powers of two, then eighths and sixty-fourths, then the last rounds one by one


def test_without_noise_nothing_is_bounded() -> None:
    open_ended = opened(Budget(float("inf"), 1e-5), EVENT, None)
    assert open_ended.spent() == float("inf")
    open_ended.refuse_if_over(None)
    open_ended.refuse_if_over(EVENT)
    bounded = opened(Budget(3.0, 1e-5))
    with pytest.raises(BudgetError, match="no ε accounts for would make it ε = none; spent ε = 0,"):
        bounded.refuse_if_over(None)
    open_ended.budget = Budget(3.0, 1e-5)
    with pytest.raises(BudgetError, match="spent ε = none, budget ε = 3"):
        open_ended.refuse_if_over(EVENT)


def test_entries_change_what_they_say_and_no_more() -> None:
    made = Accounts()
    made.add(Registered("ward", Budget(1.0, 1e-5), Source("c", "p")), time="t0", where="row 1")
    made.add(Debited("ward", key(1), EVENT), time="t1", where="row 2")
    spent = made.by_data["ward"].spent()
    made.add(Edited("ward", Source("c2", "p2")), time="t2", where="row 3")
    made.add(Allowed("ward", Budget(2.0, 1e-5), "ethics board"), time="t3", where="row 4")
    account = made.by_data["ward"]
    assert (account.spent(), account.budget.epsilon, account.source) == (spent, 2.0, Source("c2", "p2"))
    assert (account.since, account.last) == ("t0", "t3")
    with pytest.raises(FormatError, match="row 5: 'clinic' was never registered"):
        made.add(Debited("clinic", key(1), EVENT), time="t", where="row 5")


@pytest.mark.parametrize(
    "twin", [Source("c2", "elsewhere"), Source("c", "elsewhere"), Source("other", "p2"), Source("c2", "")]
)
def test_data_have_one_name(twin: Source) -> None:
    made = Accounts()
    made.add(Registered("ward", Budget(1.0, 1e-5), Source("c", "p")), time="t0", where="row 1")
    made.add(Edited("ward", Source("c2", "p2")), time="t1", where="row 2")
    made.refuse_twin("ward", twin)
    made.refuse_twin("clinic", Source("other", "p"))  # a place that these data have left may be taken
    made.refuse_twin("clinic", Source("other", ""))
    with pytest.raises(MismatchError, match="data set 'clinic': these are the data of 'ward'"):
        made.refuse_twin("clinic", twin)
