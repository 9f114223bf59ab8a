"""Pace and limits on a clock of our own."""

import pytest

from treadle.errors import UnavailableError
from treadle.evaluation.voters.gate import Gate, Limits
from treadle.evaluation.voters.voter import Cost

NOTHING = Cost()


class Clock:
    """A clock that moves only when somebody waits."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds


def gate(clock: Clock, limits: Limits, spent: Cost = NOTHING) -> Gate:
    return Gate(limits, lambda: spent, now=clock.now, wait=clock.wait)


def test_requests_begin_at_even_distances() -> None:
    clock = Clock()
    made, begun = gate(clock, Limits(requests_per_minute=30.0)), list[float]()
    for _ in range(4):
        made.enter()
        begun.append(clock.time)
        made.leave(lambda: None)
    assert begun == [100.0, 102.0, 104.0, 106.0]
    clock.time = 200.0  # time that passed unused is no credit
    made.enter()
    made.enter()
    assert clock.time == 202.0


def test_a_pause_holds_for_everybody() -> None:
    clock = Clock()
    made = gate(clock, Limits())
    made.pause(30.0)
    assert clock.time == 130.0
    clock.time = 110.0  # as another thread sees it
    made.enter()
    assert clock.time == 130.0


def test_a_pause_holds_for_those_who_wait_for_their_turn_already() -> None:
    clock, begun = Clock(), list[float]()
    made = gate(clock, Limits(requests_per_minute=60.0))
    made.enter()
    real = clock.wait

    def interrupted(seconds: float) -> None:
        clock.wait = real  # type: ignore[method-assign]
        made._wait = real
        made._next, made._paused = max(made._next, clock.time + 10.0), clock.time + 10.0  # another thread's pause
        real(seconds)

    made._wait = interrupted
    for _ in range(2):
        made.enter()
        begun.append(clock.time)
    assert begun == [110.0, 111.0]  # after the pause, and at their distance still


def test_requests_under_way_count_towards_the_limit() -> None:
    made = gate(Clock(), Limits(requests=5), Cost(requests=3))
    made.enter()
    made.enter()
    with pytest.raises(UnavailableError, match=r"request_limit = 5 is reached; raise it"):
        made.enter()
    made.leave(lambda: None)
    made.enter()


def test_tokens_stop_at_their_limit() -> None:
    gate(Clock(), Limits(tokens=100), Cost(prompt_tokens=60, completion_tokens=39)).enter()
    with pytest.raises(UnavailableError, match=r"token_limit = 100 is reached, 100 are spent"):
        gate(Clock(), Limits(tokens=100), Cost(prompt_tokens=60, completion_tokens=40)).enter()


def test_a_closed_gate_lets_nobody_through_and_wakes_who_waits() -> None:
    made = Gate(Limits(), Cost)
    made.close()
    for action in (made.enter, lambda: made.sleep(3600.0), lambda: made.pause(3600.0)):
        with pytest.raises(UnavailableError, match="stopped"):
            action()
