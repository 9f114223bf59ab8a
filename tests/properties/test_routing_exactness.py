"""The decided winner is float64's, for random families of every size, scale and condition."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.family.adapter import Adapter, Provenance
from treadle.family.plan import LayerShape, RankPlan
from treadle.routing.decision import BASE, TIE, decide
from treadle.routing.factors import LayerFactors, build_factors, calibrated
from treadle.routing.layer import Composition, RoutedLayer
from treadle.routing.scorers import SCORERS, norm, seqr

MODULE, INNER, OUTER = "layer", 40, 36
ARGMAX = Composition(1, 1.0)
FORMS = {"norm": norm.form, "seqr": seqr.form}


@dataclass(frozen=True)
class Case:
    """A layer's adapters, its calibration and one batch of inputs."""

    adapters: list[Adapter]
    factors: LayerFactors
    x: torch.Tensor


def member(name: str, A: torch.Tensor, B: torch.Tensor, *, family: str | None) -> Adapter:
    plan = RankPlan.uniform({MODULE: LayerShape(INNER, OUTER)}, rank=A.shape[0], scaling=1.0)
    return Adapter(name, plan, {MODULE: A}, {MODULE: B}, family, None, Provenance("test"))


def matrix(rank: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    B = torch.randn(OUTER, rank, generator=generator)
    if kind == "zero":
        return torch.zeros_like(B)
    if kind == "ill":
        left, _, right = torch.linalg.svd(B.double(), full_matrices=False)
        return ((left * torch.logspace(0, -6, rank)) @ right).float()
    return B * {"plain": 1.0, "tiny": 1e-20, "huge": 1e15}[kind]


KINDS = ["plain", "plain", "ill", "zero", "tiny", "huge", "twin"]

RECIPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rank": st.integers(1, 32),
        "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=64),
        "foreign_rank": st.one_of(st.none(), st.integers(1, 32)),
        "tokens": st.integers(0, 12),
        "scale_A": st.sampled_from([1e-3, 1.0]),
        "scale_x": st.sampled_from([1e-4, 1.0, 1e3]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "zero_token": st.booleans(),
    }
)


def case_of(recipe: Mapping[str, Any]) -> Case:
    generator = torch.Generator().manual_seed(recipe["seed"])
    rank = recipe["rank"]
    A = torch.randn(rank, INNER, generator=generator) * recipe["scale_A"]
    adapters: list[Adapter] = []
    for place, kind in enumerate(recipe["kinds"]):
        if kind == "twin" and adapters:
            B = adapters[-1].lora_B[MODULE]
        else:
            B = matrix(rank, "plain" if kind == "twin" else kind, generator)
        adapters.append(member(f"a{place}", A, B, family="0"))
    other = recipe["foreign_rank"]
    if other is not None:
        A2 = torch.randn(other, INNER, generator=generator)
        adapters.append(member("foreign", A2, matrix(other, "plain", generator), family=None))
    x = (torch.randn(recipe["tokens"], INNER, generator=generator) * recipe["scale_x"]).to(recipe["dtype"])
    if recipe["zero_token"] and x.shape[0]:
        x[0] = 0.0
    norms = reference(adapters, torch.randn(50, INNER, generator=generator))
    factors = calibrated(build_factors(MODULE, adapters), {"mean": norms.mean(0), "std": norms.std(0)})
    return Case(adapters, factors, x)


def reference(adapters: list[Adapter], x: torch.Tensor) -> torch.Tensor:
    """‖B_i A_i x‖ by its definition, (tokens, adapters) in float64."""
    columns = [
        torch.linalg.vector_norm((x.double() @ a.lora_A[MODULE].double().T) @ a.folded_B(MODULE).double().T, dim=1)
        for a in adapters
    ]
    return torch.stack(columns, 1)


def scored(case: Case, scorer: str, permitted: torch.Tensor | None) -> torch.Tensor:
    """The float64 scores, -inf where forbidden or ineligible."""
    score = reference(case.adapters, case.x)
    if scorer == "seqr":
        score = (score - case.factors.mean) / case.factors.std
        score = score.masked_fill(~case.factors.eligible, -torch.inf)
    return score if permitted is None else score.masked_fill(~permitted, -torch.inf)


def wrong(score: torch.Tensor, winner: torch.Tensor) -> torch.Tensor:
    """Which winners are beaten by more than a tie."""
    best = score.max(1).values
    got = torch.where(winner == BASE, -torch.inf, score.gather(1, winner.clamp_min(0)[:, None]).squeeze(1))
    nobody = best == -torch.inf
    return torch.where(nobody, winner != BASE, got < best - TIE * best.abs().clamp_min(1.0))


@settings(max_examples=120, deadline=None)
@given(recipe=RECIPES, scorer=st.sampled_from(["norm", "seqr"]), mask=st.one_of(st.none(), st.integers(0, 2**31)))
def test_the_winner_is_that_of_a_float64_brute_force(recipe: Mapping[str, Any], scorer: str, mask: int | None) -> None:
    case = case_of(recipe)
    shape = (case.x.shape[0], len(case.adapters))
    permitted = None if mask is None else torch.rand(shape, generator=torch.Generator().manual_seed(mask)) < 0.5
    scores = SCORERS[scorer].scores(case.factors, case.x, permitted)
    decision = decide(case.factors, case.x, scores, FORMS[scorer](case.factors))
    score = scored(case, scorer, permitted)
    assert not wrong(score, decision.winner).any()
    # the runner-up is permitted, another, and no better than a tie
    there = decision.runner_up != BASE
    assert not (there & (decision.runner_up == decision.winner)).any()
    if permitted is not None and there.any():
        assert permitted[there].gather(1, decision.runner_up[there, None]).all()
    assert (decision.margin >= 0).all()
    fast = RoutedLayer(case.factors, SCORERS[scorer], slots=1).choose(case.x, permitted, ARGMAX, explained=True)
    assert fast.decision is not None
    assert torch.equal(fast.decision.winner, decision.winner)
    assert torch.equal(fast.mixture.adapter[:, 0], decision.winner)
    assert (fast.decision.margin >= 0).all()
    layer = RoutedLayer(case.factors, SCORERS[scorer], slots=1)
    for row in range(case.x.shape[0]):  # token by token, as in decoding
        mine = None if permitted is None else permitted[row : row + 1]
        one = layer.choose(case.x[row : row + 1], mine, ARGMAX, explained=False)
        assert one.mixture.adapter.item() == decision.winner[row]
    finite = score > -torch.inf
    assert (scores.lower <= score + 1e-12 * score.abs())[finite].all()
    assert (scores.upper >= score - 1e-12 * score.abs())[finite].all()


@settings(max_examples=30, deadline=None)
@given(recipe=RECIPES)
def test_twins_go_to_the_one_that_stands_first(recipe: Mapping[str, Any]) -> None:
    case = case_of(recipe)
    scores = SCORERS["norm"].scores(case.factors, case.x, None)
    decision = decide(case.factors, case.x, scores, norm.form(case.factors))
    for place, adapter in enumerate(case.adapters[1:], 1):
        if adapter.family and torch.equal(adapter.lora_B[MODULE], case.adapters[place - 1].lora_B[MODULE]):
            assert not (decision.winner == place).any()


def adversarial() -> tuple[Case, torch.Tensor]:
    """Two adapters that differ by one part in 20,000 in a direction that float32 Grams can hardly see."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(8, INNER, generator=generator)
    left, _, right = torch.linalg.svd(torch.randn(OUTER, 8, generator=generator).double(), full_matrices=False)
    spectrum = torch.logspace(0, -4, 8).double()
    first = (left * spectrum) @ right
    grown = spectrum.clone()
    grown[-1] *= 1.05
    second = (left * grown) @ right
    # inputs whose z lies along the weakest direction, where the two differ by 5%
    x = torch.linalg.lstsq(A.double(), right[-1:].T * torch.linspace(1, 2, 200).double()).solution.T.float()
    adapters = [member("first", A, first.float(), family="0"), member("second", A, second.float(), family="0")]
    case = Case(adapters, build_factors(MODULE, adapters), x * 1e4)
    return case, scored(case, "norm", None)


def test_without_rescoring_the_property_would_fail() -> None:
    case, score = adversarial()
    scores = SCORERS["norm"].scores(case.factors, case.x, None)
    assert wrong(score, scores.value.argmax(1)).any()
    decision = decide(case.factors, case.x, scores, norm.form(case.factors))
    assert not wrong(score, decision.winner).any()
    assert decision.rescored.all()
