"""A chain of rows notices whatever is done to it, and names the first row that is wrong."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import FormatError, InputError
from treadle.privacy.chain import START, Head, Row, checked, linked

BODIES = st.lists(st.binary(max_size=20), min_size=1, max_size=8)


def chained(bodies: list[bytes]) -> tuple[list[Row], Head]:
    rows, head = [], START
    for body in bodies:
        rows.append(linked(head, body))
        head = Head(rows[-1].number, rows[-1].hash)
    return rows, head


def first_broken(rows: list[Row], head: Head) -> str:
    with pytest.raises(FormatError) as raised:
        checked(rows, after=START, until=head, where="ledger")
    return raised.value.what


def test_a_row_hashes_the_one_before_and_its_own_body() -> None:
    rows, _ = chained([b"one", b"two"])
    first = hashlib.sha256(bytes(32) + b"one").digest()
    assert [row.hash for row in rows] == [first, hashlib.sha256(first + b"two").digest()]
    assert [row.number for row in rows] == [1, 2]


@given(BODIES, st.data())
def test_an_untouched_chain_leads_to_its_head_from_anywhere(bodies: list[bytes], data: st.DataObject) -> None:
    rows, head = chained(bodies)
    start = data.draw(st.integers(0, len(rows)))
    after = START if start == 0 else Head(rows[start - 1].number, rows[start - 1].hash)
    assert checked(rows[start:], after=after, until=head, where="ledger") == head


@given(BODIES, st.data())
def test_a_changed_row_is_named(bodies: list[bytes], data: st.DataObject) -> None:
    rows, head = chained(bodies)
    place = data.draw(st.integers(0, len(rows) - 1))
    other = data.draw(st.binary(max_size=20).filter(lambda body: body != bodies[place]))
    rows[place] = Row(rows[place].number, other, rows[place].hash)
    assert first_broken(rows, head) == f"row {place + 1} was changed"


@given(BODIES, st.data())
def test_a_changed_row_with_a_hash_to_match_breaks_the_next_or_the_head(
    bodies: list[bytes], data: st.DataObject
) -> None:
    rows, head = chained(bodies)
    place = data.draw(st.integers(0, len(rows) - 1))
    other = data.draw(st.binary(max_size=20).filter(lambda body: body != bodies[place]))
    before = START if place == 0 else Head(rows[place - 1].number, rows[place - 1].hash)
    rows[place] = linked(before, other)
    last = place == len(rows) - 1
    expected = f"row {place + 1} is not the last one that was written" if last else f"row {place + 2} was changed"
    assert first_broken(rows, head) == expected


@given(BODIES, st.data())
def test_a_deleted_row_is_named_the_last_one_too(bodies: list[bytes], data: st.DataObject) -> None:
    rows, head = chained(bodies)
    place = data.draw(st.integers(0, len(rows) - 1))
    del rows[place]
    assert first_broken(rows, head) == f"row {place + 1} is missing"


@given(BODIES.filter(lambda bodies: len(bodies) > 1), st.data())
def test_a_row_put_in_is_noticed(bodies: list[bytes], data: st.DataObject) -> None:
    rows, head = chained(bodies)
    rows.append(linked(head, b"more"))
    assert first_broken(rows, head) == f"row {head.number} is not the last one that was written"


@given(BODIES)
def test_a_head_is_read_back(bodies: list[bytes]) -> None:
    _, head = chained(bodies)
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize("text", ["", "7", "7:", "x:" + "0" * 64, "7:" + "0" * 63, "7:" + "g" * 64, "-1:" + "0" * 64])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no head of a ledger"):
        Head.parse(text)
