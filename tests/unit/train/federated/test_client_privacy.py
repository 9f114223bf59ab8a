"""Privacy of whole clients: noise of the right scale on a clipped mean, and a plain word where it drowns everything."""

import math
import statistics

import pytest
import torch

from treadle.errors import ConfigError, FormatError
from treadle.family.family import AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.noise import SeededRandomness, SystemRandomness
from treadle.train.federated.aggregation import Update
from treadle.train.federated.client_privacy import ClientPrivacyPlan, ClientPrivacySettings
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants import VariantSettings

PLAN = RankPlan.uniform({"a.q": LayerShape(30, 40), "b.k": LayerShape(30, 60)}, rank=10)
FAMILY = AdapterFamily.create(base=BaseIdentity("tiny", "a" * 64), plan=PLAN, seed=5)
STATE = GlobalState.start(FAMILY).with_factors(
    lora_B={name: torch.full((row.out_features, row.rank), 0.25) for name, row in PLAN.modules.items()}
)
PARAMETERS = 1000
SETTINGS = ClientPrivacySettings(epsilon=2.0, delta=1e-3, clients=100, cohort=50, rounds=4, max_update_norm=0.5)


@pytest.fixture(scope="module")
def plan() -> ClientPrivacyPlan:
    return seeded(0)


def seeded(seed: int) -> ClientPrivacyPlan:
    return SETTINGS.plan(SeededRandomness(seed))


def ffa(name: str = "ffa"):
    return VariantSettings(name).variant(list(PLAN.modules), rounds=4)


def update(client: str, change: float, *, weight: float = 1.0) -> Update:
    """One that moves every entry of B alike, by a change of this norm."""
    step = change / math.sqrt(PARAMETERS)
    return Update(client, {name: B + step for name, B in STATE.lora_B.items()}, weight)


def moved(updates: list[Update], seed: int = 0) -> torch.Tensor:
    """How far the mean B has gone."""
    joined = seeded(seed).joined(ffa(), STATE, updates, server_round=1)
    return torch.cat([(joined.state.lora_B[n].double() - B.double()).flatten() for n, B in STATE.lora_B.items()])


def gaussian_delta(noise: float, epsilon: float) -> float:
    """δ of one Gaussian release with this noise multiplier: Balle and Wang, arXiv 1805.06530, theorem 8."""
    normal = statistics.NormalDist()
    above = normal.cdf(0.5 / noise - epsilon * noise)
    return above - math.exp(epsilon) * normal.cdf(-0.5 / noise - epsilon * noise)


def test_the_noise_costs_what_was_promised(plan: ClientPrivacyPlan) -> None:
    """T Gaussian releases are one of a √T-th of the noise, whose δ has a closed form."""
    secret = SETTINGS.plan(SystemRandomness())
    spent = epsilon_of([event_of(secret, SETTINGS.rounds)], delta=SETTINGS.delta)
    assert spent <= SETTINGS.epsilon
    exact = plan.noise_multiplier / math.sqrt(SETTINGS.rounds)
    assert gaussian_delta(exact, SETTINGS.epsilon) <= SETTINGS.delta * (1 + 1e-3)  # what an accountant may round
    assert gaussian_delta(0.95 * exact, SETTINGS.epsilon) > SETTINGS.delta
    assert epsilon_of([event_of(secret, 1)], delta=SETTINGS.delta) < spent
    assert plan.event(1) is None  # a seed can be known


def event_of(plan: ClientPrivacyPlan, rounds: int) -> MechanismEvent:
    event = plan.event(rounds)
    assert event is not None
    return event


def test_the_scale_of_the_noise_is_right_and_no_other(plan: ClientPrivacyPlan) -> None:
    """χ² of 20,000 draws: its relative deviation is 1%, so the right scale passes and 0.9× and 1.1× fail by far."""
    expected = plan.noise_multiplier * SETTINGS.max_update_norm / SETTINGS.cohort
    draws = torch.cat([moved([update("a", 0.0)], seed) for seed in range(20)])
    found = float(draws.square().mean().sqrt())
    assert abs(found / expected - 1) < 0.025  # five standard errors of a scale
    for wrong in (0.9, 1.1):
        assert abs(found / (wrong * expected) - 1) > 0.05
    assert abs(float(draws.mean())) < 5 * expected / math.sqrt(len(draws))


def test_a_client_moves_the_mean_by_its_clipped_share_at_most() -> None:
    others = [update(name, 0.3) for name in ("b", "c")]
    without = moved(others)
    for change in (0.1, 0.5, 7.0, 1e4):
        difference = float((moved([*others, update("a", change)]) - without).norm()) * SETTINGS.cohort
        allowed = min(change, SETTINGS.max_update_norm)
        # B is stored in float32 around 0.25: 1.5e-8 an entry, times √1000 and the cohort.
        assert difference == pytest.approx(allowed, abs=5e-5)


def test_absent_clients_count_as_unmoved() -> None:
    """The denominator is declared, so it tells nothing about who came."""
    one, two = moved([update("a", 0.4)]), moved([update("a", 0.4), update("b", 0.4)])
    assert float((two - one).norm()) * SETTINGS.cohort == pytest.approx(0.4, abs=5e-5)


def test_the_order_of_arrival_changes_nothing() -> None:
    updates = [update(name, change) for name, change in (("c", 0.3), ("a", 9.0), ("b", 0.01))]
    assert torch.equal(moved(updates), moved(updates[::-1]))


def test_fedsvd_is_post_processing() -> None:
    updates = [update("a", 0.4)]
    plain = seeded(1).joined(ffa(), STATE, updates, server_round=1).state
    turned = seeded(1).joined(ffa("fedsvd"), STATE, updates, server_round=1).state
    for name in PLAN.modules:
        ours, theirs = (state.lora_B[name].double() @ state.lora_A[name].double() for state in (turned, plain))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_few_clients_get_a_plain_word(plan: ClientPrivacyPlan) -> None:
    assert plan.noise_to_signal(PARAMETERS) == pytest.approx(plan.noise_multiplier * math.sqrt(1000) / 50)
    assert plan.noise_to_signal(PARAMETERS) > 1
    needed = math.ceil(plan.noise_multiplier * math.sqrt(PARAMETERS))
    said = plan.warning(PARAMETERS)
    assert said is not None
    assert "client-level privacy is meaningless here: with 50 clients a round" in said
    assert f"{needed:,} clients a round" in said
    assert "\n" not in said
    assert plan.warning(4) is None


@pytest.mark.parametrize("name", ["fedit", "flora", "local", "central"])
def test_variants_that_need_more_than_the_mean_are_refused(plan: ClientPrivacyPlan, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} needs more of the updates than their mean; take ffa"):
        plan.joined(ffa(name), STATE, [update("a", 0.1)], server_round=1)


def test_rounds_weights_and_cohorts_that_break_the_promise_are_refused(plan: ClientPrivacyPlan) -> None:
    def joined(updates: list[Update], server_round: int = 1) -> None:
        plan.joined(ffa(), STATE, updates, server_round=server_round)

    with pytest.raises(ConfigError, match="round 5, 4 are paid for"):
        joined([update("a", 0.1)], 5)
    with pytest.raises(ConfigError, match="weights differ"):
        joined([update("a", 0.1), update("b", 0.1, weight=2.0)])
    with pytest.raises(ConfigError, match="51 updates, cohort is 50"):
        joined([update(f"c{i}", 0.1) for i in range(51)])
    with pytest.raises(FormatError, match="a: .* holds NaN"):
        joined([Update("a", {name: torch.full_like(B, torch.nan) for name, B in STATE.lora_B.items()})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be a positive number"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"delta": 0.01}, "delta is 0.01; it must be above 0 and below 1/clients = 0.01"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"cohort": 101}, "cohort is 101; it must be from 1 to clients = 100"),
        ({"cohort": 0}, "cohort is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"max_update_norm": 0.0}, "max_update_norm is 0.0"),
        ({"max_update_norm": math.nan}, "max_update_norm is nan"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict, message: str) -> None:
    stated = {"epsilon": 2.0, "delta": 1e-3, "clients": 100, "cohort": 50, "rounds": 4}
    with pytest.raises(ConfigError, match=message):
        ClientPrivacySettings(**(stated | changes))
