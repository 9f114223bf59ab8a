"""Entries are written and read back exactly; what is no entry is refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import FormatError, InputError
from treadle.privacy.accounting import MechanismEvent
from treadle.privacy.entries import (
    Allowed,
    Budget,
    Created,
    Debited,
    Edited,
    Entry,
    Registered,
    ReleaseKey,
    decoded,
    encoded,
    shown,
)
from treadle.privacy.sources import Source

TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
EPSILONS = st.floats(1e-6, 1e6) | st.just(math.inf)
DELTAS = st.floats(1e-12, 1, exclude_max=True)
EVENTS = st.tuples(st.floats(1e-3, 1e6), st.floats(0, 1, exclude_min=True), st.integers(1, 10**9))


@given(TEXT, TEXT, st.integers(0, 10**9), EPSILONS, DELTAS, EVENTS)
def test_an_entry_is_read_back_to_the_last_bit(
    one: str, two: str, number: int, epsilon: float, delta: float, event: tuple[float, float, int]
) -> None:
    budget, source, key = Budget(epsilon, delta), Source(two, one), ReleaseKey(two, number, one)
    entries: list[Entry] = [
        Created(one),
        Registered(one, budget, source),
        Edited(one, source),
        Allowed(one, budget, two),
        Debited(one, key, MechanismEvent(*event)),
        Debited(one, key, None),
    ]
    for entry in entries:
        assert decoded(encoded(entry, time=one), where="x") == (one, entry)


DEBIT = {
    "time": "t",
    "kind": "debited",
    "data": "ward",
    "run": "r",
    "server_round": 3,
    "request": "q",
    "event": {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 2},
}


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"[]",
        json.dumps(DEBIT | {"kind": "credited"}).encode(),
        json.dumps(DEBIT | {"server_round": "3"}).encode(),
        json.dumps(DEBIT | {"server_round": True}).encode(),
        json.dumps(DEBIT | {"event": 7}).encode(),
        json.dumps(DEBIT | {"event": {"noise_multiplier": -1.0, "sample_rate": 0.1, "steps": 2}}).encode(),
        json.dumps({key: value for key, value in DEBIT.items() if key != "event"}).encode(),
        json.dumps(DEBIT | {"data": None}).encode(),
        json.dumps({"time": "t", "kind": "allowed", "data": "w", "epsilon": -1, "delta": 0.1, "reason": "r"}).encode(),
    ],
)
def test_what_is_no_entry_is_refused(body: bytes) -> None:
    assert decoded(json.dumps(DEBIT).encode(), where="row 3")[0] == "t"
    with pytest.raises(FormatError, match="row 3: is no row of a ledger"):
        decoded(body, where="row 3")


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)]
)
def test_a_budget_out_of_range_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InputError):
        Budget(epsilon, delta)


def test_no_bound_is_called_none() -> None:
    assert (shown(math.inf), shown(2.34567)) == ("none", "2.346")
