"""ε of composed Gaussian steps: closed forms, monotonicity, and a calibration that keeps its promise."""

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, FormatError, UnavailableError
from treadle.privacy import accounting
from treadle.privacy.accounting import Accountant, MechanismEvent, calibrated_noise_multiplier, epsilon_of

DELTA = 1e-5


def gaussian_delta(epsilon: float, noise: float) -> float:
    """The δ of the Gaussian mechanism at ε, exactly: Balle and Wang, arXiv 1805.06530, theorem 8."""

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * cdf(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 1), (0.3, 1), (5.0, 30), (40.0, 1000)])
def test_plain_gaussians_cost_what_the_closed_form_says(noise: float, steps: int) -> None:
    epsilon = epsilon_of([MechanismEvent(noise, 1.0, steps)], delta=DELTA)
    # ε is an upper bound: δ there is at most DELTA, and one thousandth less ε would not do.
    assert gaussian_delta(epsilon, noise / math.sqrt(steps)) <= DELTA * (1 + 1e-6)
    assert gaussian_delta(0.999 * epsilon, noise / math.sqrt(steps)) > DELTA


def test_sampling_amplifies_and_nothing_costs_nothing() -> None:
    whole = epsilon_of([MechanismEvent(1.0, 1.0, 10)], delta=DELTA)
    sampled = epsilon_of([MechanismEvent(1.0, 0.1, 10)], delta=DELTA)
    assert 0 < sampled < 0.4 * whole
    assert epsilon_of([], delta=DELTA) == 0.0


def test_rdp_agrees_from_above() -> None:
    events = [MechanismEvent(1.1, 0.02, 300)]
    tight, loose = epsilon_of(events, delta=DELTA), epsilon_of(events, delta=DELTA, accountant="rdp")
    assert tight < loose < 1.4 * tight


def test_events_compose_in_any_order_and_division() -> None:
    first, second = MechanismEvent(2.0, 0.1, 30), MechanismEvent(4.0, 0.2, 10)
    whole = epsilon_of([first, second], delta=DELTA)
    parts = [second, *(MechanismEvent(2.0, 0.1, 10) for _ in range(3))]
    assert epsilon_of(parts, delta=DELTA) == whole
    alone = [epsilon_of([event], delta=DELTA) for event in (first, second)]
    assert max(alone) < whole < sum(alone)


def test_one_round_more_is_composed_of_the_step_that_is_known() -> None:
    accounting._gaussian.cache_clear()
    spent = [epsilon_of([MechanismEvent(3.0, 0.05, 10 * rounds)], delta=DELTA) for rounds in range(1, 6)]
    assert spent == sorted(set(spent))
    assert accounting._gaussian.cache_info().misses == 1


@pytest.mark.parametrize("events", [[(1.2, 0.01, 51)], [(16.0, 1.0, 30), (12.0, 0.05, 4)]])
def test_it_is_what_the_accountant_of_the_library_says(events: list[tuple[float, float, int]]) -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, pld

    ours = [MechanismEvent(*event) for event in events]
    interval = accounting._interval(ours)
    account = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    for event in ours:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        sampled = gaussian if event.sample_rate == 1 else PoissonSampledDpEvent(event.sample_rate, gaussian)
        account.compose(sampled, event.steps)
    # It begins with a distribution of no loss, whose composition cuts another tail off: 1e-11 of ε.
    assert epsilon_of(ours, delta=DELTA) == pytest.approx(account.get_epsilon(DELTA), rel=1e-9)


@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(0.05, 20),
    sample_rate=st.floats(0.001, 1.0),
    steps=st.integers(1, 2000),
    delta=st.sampled_from([1e-4, 1e-6, 1e-9]),
)
def test_calibrated_noise_spends_all_and_no_more(epsilon: float, sample_rate: float, steps: int, delta: float) -> None:
    noise = calibrated_noise_multiplier(
        epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps, accountant="rdp"
    )
    spent = epsilon_of([MechanismEvent(noise, sample_rate, steps)], delta=delta, accountant="rdp")
    assert 0.9998 * epsilon <= spent <= epsilon


def test_calibration_by_pld_spends_all_and_no_more() -> None:
    noise = calibrated_noise_multiplier(epsilon=1.0, delta=DELTA, sample_rate=0.05, steps=200)
    spent = epsilon_of([MechanismEvent(noise, 0.05, 200)], delta=DELTA)
    assert 0.9998 <= spent <= 1.0
    assert noise < calibrated_noise_multiplier(epsilon=1.0, delta=DELTA, sample_rate=0.05, steps=200, accountant="rdp")


def test_more_epsilon_than_anybody_needs_still_has_noise() -> None:
    noise = calibrated_noise_multiplier(epsilon=1e6, delta=DELTA, sample_rate=1.0, steps=1, accountant="rdp")
    assert 0 < noise < 0.05
    assert epsilon_of([MechanismEvent(noise, 1.0, 1)], delta=DELTA, accountant="rdp") <= 1e6


def test_an_epsilon_that_no_noise_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise gives epsilon = 1e-09"):
        calibrated_noise_multiplier(epsilon=1e-9, delta=1e-12, sample_rate=1.0, steps=1000, accountant="rdp")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ((0.0, 0.1, 1), "noise_multiplier is 0.0"),
        ((math.inf, 0.1, 1), "noise_multiplier is inf"),
        ((math.nan, 0.1, 1), "noise_multiplier is nan"),
        ((1.0, 0.0, 1), "sample_rate is 0.0"),
        ((1.0, 1.1, 1), "sample_rate is 1.1"),
        ((1.0, 0.1, 0), "steps is 0"),
    ],
)
def test_impossible_events_are_refused(event: tuple[float, float, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MechanismEvent(*event)


@pytest.mark.parametrize("delta", [0.0, 1e-13, 1.0, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta is"):
        epsilon_of([MechanismEvent(1.0, 0.1, 1)], delta=delta)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_impossible_targets_are_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="epsilon is"):
        calibrated_noise_multiplier(epsilon=epsilon, delta=DELTA, sample_rate=0.1, steps=1)


def test_an_event_survives_json() -> None:
    event = MechanismEvent(0.1 + 0.2, 200 / 22449, 10)
    assert MechanismEvent.of_json(event.to_json()) == event


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"noise_multiplier": 1.0, "sample_rate": 0.1},
        {"noise_multiplier": "1", "sample_rate": 0.1, "steps": 1},
        {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1.0},
        {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, "more": 1},
    ],
)
def test_other_json_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="no mechanism event"):
        MechanismEvent.of_json(content)


def test_without_dp_accounting_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    accounting._composed.cache_clear()
    with pytest.raises(UnavailableError, match=r"pip install 'treadle\[privacy\]'"):
        epsilon_of([MechanismEvent(1.0, 0.5, 3)], delta=DELTA)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_accounting_keeps_quiet(accountant: Accountant, capfd: pytest.CaptureFixture[str]) -> None:
    epsilon_of([MechanismEvent(0.97, 0.5, 100)], delta=2e-5, accountant=accountant)  # absl would warn of seven orders
    assert capfd.readouterr().err == ""
