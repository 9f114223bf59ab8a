import json
from fractions import Fraction
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from treadle.errors import InputError, MismatchError
from treadle.family.plan import LayerShape
from treadle.models.identity import BaseIdentity
from treadle.ranks.allocation import AllocationSettings, Budget, allocate, mean_rank_budget, plan_of_scores
from treadle.ranks.rules import RULES, RuleName, rule_of
from treadle.ranks.scores import ModuleScore, ProbeScores
from treadle.ranks.ties import Ties

SQUARE = LayerShape(64, 64)

sides = st.integers(1, 40)
layers = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.floats(0, 100, allow_subnormal=False), st.builds(LayerShape, sides, sides)),
    min_size=1,
    max_size=12,
)
units = st.sampled_from(["total", "trainable", "ranks"])
rules = st.sampled_from(sorted(RULES))
multiples = st.sampled_from([1, 2, 4, 8])

# Two layers of four kinds, so that every way of tying has something to tie.
KINDS = ("attn.q_proj", "attn.k_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = tuple(f"layers.{layer}.{kind}" for layer in range(2) for kind in KINDS)
TIES: dict[str, tuple[Ties, list[set[str]]]] = {
    "none": ("none", [{name} for name in NAMES]),
    "qk": (
        "qk",
        [
            {f"layers.{layer}.attn.q_proj", f"layers.{layer}.attn.k_proj"}
            if kind == "attn"
            else {f"layers.{layer}.mlp.{kind}"}
            for layer in range(2)
            for kind in ("attn", "up_proj", "down_proj")
        ],
    ),
    "kind": ("kind", [{f"layers.0.{kind}", f"layers.1.{kind}"} for kind in KINDS]),
    "lists": (
        (("attn.k_proj", "mlp.up_proj"),),
        [
            group
            for layer in range(2)
            for group in (
                {f"layers.{layer}.attn.k_proj", f"layers.{layer}.mlp.up_proj"},
                {f"layers.{layer}.attn.q_proj"},
                {f"layers.{layer}.mlp.down_proj"},
            )
        ],
    ),
}
models = st.fixed_dictionaries(
    {name: st.tuples(st.floats(0, 100, allow_subnormal=False), st.builds(LayerShape, sides, sides)) for name in NAMES}
)


def split(modules: dict[str, tuple[float, LayerShape]]) -> tuple[dict[str, float], dict[str, LayerShape]]:
    return {n: score for n, (score, _) in modules.items()}, {n: shape for n, (_, shape) in modules.items()}


def cost(budget: Budget, ranks: dict[str, int], shapes: dict[str, LayerShape]) -> int:
    """Written out here once more, so that a wrong unit in the code is seen."""
    price = {
        "total": lambda s: s.in_features + s.out_features,
        "trainable": lambda s: s.out_features,
        "ranks": lambda s: 1,
    }
    return sum(rank * price[budget.unit](shapes[name]) for name, rank in ranks.items())


def ranks_of(
    scores: dict[str, float], shapes: dict[str, LayerShape], budget: Budget, **options: object
) -> dict[str, int]:
    plan = allocate(scores, shapes, budget=budget, settings=AllocationSettings(**options))  # type: ignore[arg-type]
    return {name: plan.modules[name].rank if name in plan.modules else 0 for name in shapes}


@given(
    models,
    units,
    st.integers(1, 5000),
    rules,
    st.sampled_from(sorted(TIES)),
    multiples,
    st.tuples(st.integers(0, 3), st.integers(3, 50)),
)
def test_never_above_the_budget_and_the_rest_buys_nothing(
    modules: dict[str, tuple[float, LayerShape]],
    unit: str,
    value: int,
    rule: RuleName,
    ties: str,
    multiple: int,
    limits: tuple[int, int],
) -> None:
    scores, shapes = split(modules)
    assume(any(scores.values()))
    budget, (minimum, maximum) = Budget(unit, value), limits  # type: ignore[arg-type]
    assume(multiple * -(-max(minimum, 1) // multiple) <= maximum)
    groups = TIES[ties][1]
    tops = [
        min(maximum, *(min(shapes[n].in_features, shapes[n].out_features) for n in group)) // multiple * multiple
        for group in groups
    ]
    least = [min(-(-minimum // multiple) * multiple, top) for top in tops]
    steps = [cost(budget, dict.fromkeys(group, multiple), shapes) for group in groups]
    below = sum(step * rank // multiple for step, rank in zip(steps, least, strict=True)) > value
    options = {"rule": rule, "minimum": minimum, "maximum": maximum, "multiple": multiple, "ties": TIES[ties][0]}
    refusal = ""
    if minimum > 0 and 0 in tops:
        refusal = "is a rank of this layer"
    elif below:
        refusal = "below the"
    elif minimum == 0 and all(step > value or not top for step, top in zip(steps, tops, strict=True)):
        refusal = "buys not one rank"
    if refusal:
        with pytest.raises(InputError, match=refusal):
            ranks_of(scores, shapes, budget, **options)
        return
    try:
        ranks = ranks_of(scores, shapes, budget, **options)
    except InputError:  # what floor cuts off may be all there is
        assume(rule != "floor")
        raise
    spent = cost(budget, ranks, shapes)
    assert spent <= value
    for group, low, top, step in zip(groups, least, tops, steps, strict=True):
        (rank,) = {ranks[name] for name in group}
        assert low <= rank <= top
        assert rank % multiple == 0
        if rule != "floor" and rank < top:
            assert value - spent < step


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), units, st.integers(8, 40), rules, multiples)
def test_a_higher_score_never_earns_a_lower_rank_among_equal_shapes(
    values: list[float], unit: str, mean: int, rule: RuleName, multiple: int
) -> None:
    scores = {f"m{index}": value for index, value in enumerate(values)}
    shapes = dict.fromkeys(scores, LayerShape(30, 50))
    budget = Budget(unit, mean * cost(Budget(unit, 1), dict.fromkeys(scores, 1), shapes))  # type: ignore[arg-type]
    ranks = ranks_of(scores, shapes, budget=budget, rule=rule, multiple=multiple)
    for a in scores:
        for b in scores:
            assert ranks[a] >= ranks[b] or scores[a] <= scores[b]


@given(
    models, st.randoms(use_true_random=False), st.integers(200, 4000), rules, st.sampled_from(sorted(TIES)), multiples
)
def test_the_order_of_modules_changes_nothing(
    modules: dict[str, tuple[float, LayerShape]], random: Random, value: int, rule: RuleName, ties: str, multiple: int
) -> None:
    scores, shapes = split(modules)
    assume(any(scores.values()))
    names = list(shapes)
    random.shuffle(names)
    options = {
        "budget": Budget("total", value),
        "minimum": 0,
        "rule": rule,
        "ties": TIES[ties][0],
        "multiple": multiple,
    }
    try:
        expected = ranks_of(scores, shapes, **options)
    except InputError:
        assume(False)
    shuffled = ranks_of({n: scores[n] for n in reversed(names)}, {n: shapes[n] for n in names}, **options)
    assert shuffled == expected


@given(layers, st.floats(0.001, 1000), st.integers(500, 4000), rules)
def test_only_the_ratios_of_scores_count(
    modules: dict[str, tuple[float, LayerShape]], factor: float, value: int, rule: RuleName
) -> None:
    scores, shapes = split(modules)
    whole = {name: float(round(score)) for name, score in scores.items()}
    assume(any(whole.values()))
    options = {"budget": Budget("ranks", value), "minimum": 1, "rule": rule}
    power = 2.0 ** round(factor % 9)  # exact in binary, so no rounding stands between the two
    assert ranks_of({n: s * power for n, s in whole.items()}, shapes, **options) == ranks_of(whole, shapes, **options)


def test_whole_shares_are_met_exactly() -> None:
    scores = {"a": 1.0, "b": 2.0, "c": 5.0}
    shapes = dict.fromkeys(scores, SQUARE)
    for rule in ("floor", "largest-remainder"):
        assert ranks_of(scores, shapes, budget=Budget("ranks", 16), rule=rule) == {"a": 2, "b": 4, "c": 10}
        assert ranks_of(scores, shapes, budget=Budget("total", 16 * 128), rule=rule) == {"a": 2, "b": 4, "c": 10}


FLOOR = AllocationSettings(rule="floor")


def test_the_papers_floor_loses_budget_and_says_so() -> None:
    # r̄ = 2, M = 3, Σd = 10: shares of 6 are 0.6, 2.4, 3.0
    scores = {"a": 1.0, "b": 4.0, "c": 5.0}
    plan = allocate(scores, dict.fromkeys(scores, SQUARE), budget=Budget("ranks", 6), settings=FLOOR)
    assert {name: module.rank for name, module in plan.modules.items()} == {"b": 2, "c": 3}
    assert plan.provenance["allocator"] == "floor"
    assert (plan.provenance["spent"], plan.provenance["lost"], plan.provenance["dropped"]) == ("5", "1", "a")


def test_the_largest_remainder_takes_what_floor_loses() -> None:
    scores = {"a": 1.0, "b": 4.0, "c": 5.0}
    shapes = dict.fromkeys(scores, SQUARE)
    assert ranks_of(scores, shapes, budget=Budget("ranks", 6), minimum=0) == {"a": 1, "b": 2, "c": 3}


def test_costs_enter_the_ideal_ranks() -> None:
    # λ(10·1 + 30·1) = 400 gives both 10 ranks, though one costs three times the other
    shapes = {"small": LayerShape(5, 5), "wide": LayerShape(15, 15)}
    assert ranks_of({"small": 1.0, "wide": 1.0}, shapes, budget=Budget("total", 160), minimum=0) == {
        "small": 4,
        "wide": 4,
    }
    assert ranks_of({"small": 1.0, "wide": 1.0}, shapes, budget=Budget("trainable", 80)) == {"small": 4, "wide": 4}


def test_what_a_full_module_cannot_take_goes_to_the_others() -> None:
    shapes = {"tiny": LayerShape(2, 64), "a": SQUARE, "b": SQUARE}
    scores = {"tiny": 100.0, "a": 1.0, "b": 2.0}
    assert ranks_of(scores, shapes, budget=Budget("ranks", 32)) == {"tiny": 2, "a": 10, "b": 20}


def test_a_budget_above_the_models_limits_fills_every_layer() -> None:
    shapes = {"a": LayerShape(3, 9), "b": LayerShape(9, 4)}
    assert ranks_of({"a": 1.0, "b": 0.0}, shapes, budget=Budget("total", 10**6)) == {"a": 3, "b": 4}


def test_the_scaling_is_the_same_whatever_the_rank() -> None:
    settings = AllocationSettings(scaling=2.0)
    plan = allocate({"a": 1.0, "b": 7.0}, {"a": SQUARE, "b": SQUARE}, budget=Budget("ranks", 16), settings=settings)
    assert {module.rank for module in plan.modules.values()} == {2, 14}
    assert {module.scaling for module in plan.modules.values()} == {2.0}


def test_mean_rank_budget_is_what_the_uniform_plan_costs() -> None:
    from treadle.family.plan import RankPlan

    shapes = {"a": LayerShape(10, 30), "b": LayerShape(64, 8)}
    budget = mean_rank_budget(shapes, 4)
    assert budget == Budget("total", RankPlan.uniform(shapes, rank=4).count().total) == Budget("total", 448)
    assert ranks_of({"a": 1.0, "b": 1.0}, shapes, budget=budget) == {"a": 4, "b": 4}


def test_ideal_ranks_are_exact_where_floats_are_not() -> None:
    scores = {f"m{index}": 0.1 for index in range(10)}
    shapes = dict.fromkeys(scores, SQUARE)
    assert Fraction(0.1) * 10 != 1
    assert set(ranks_of(scores, shapes, budget=Budget("ranks", 70), rule="floor").values()) == {7}


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"a": 1.0}, {}, "'b' has a score or a shape, but not both"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {}, "'c' has a score or a shape"),
        ({"a": 1.0, "b": -1.0}, {}, "b: score -1.0"),
        ({"a": 1.0, "b": float("nan")}, {}, "b: score nan"),
        ({"a": float("inf"), "b": 1.0}, {}, "a: score inf"),
        ({"a": 0.0, "b": 0.0}, {}, "every score is 0"),
        ({"a": 1.0, "b": 1.0}, {"minimum": -1}, "no rank is from -1"),
        ({"a": 1.0, "b": 1.0}, {"minimum": 4, "maximum": 3}, "no rank is from 4 to 3"),
        ({"a": 1.0, "b": 1.0}, {"minimum": 0, "maximum": 0}, "no rank is from 0 to 0"),
        ({"a": 1.0, "b": 1.0}, {"multiple": 0}, "no rank is a multiple of 0"),
        ({"a": 1.0, "b": 1.0}, {"multiple": 8, "maximum": 7}, "no multiple of 8 is from 1 to 7"),
        ({"a": 1.0, "b": 1.0}, {"multiple": 4, "minimum": 5, "maximum": 7}, "no multiple of 4 is from 5 to 7"),
        ({"a": 1.0, "b": 1.0}, {"multiple": 65, "budget": Budget("ranks", 999)}, "a: no multiple of 65 is a rank"),
        ({"a": 1.0, "b": 1.0}, {"minimum": 6}, "below the 12 that the minimum rank 6 costs"),
        ({"a": 1.0, "b": 1.0}, {"budget": Budget("total", 127), "minimum": 0}, "buys not one rank"),
    ],
)
def test_wrong_input_is_one_line(scores: dict[str, float], options: dict[str, object], message: str) -> None:
    given_options = {"budget": Budget("ranks", 10), **options}
    with pytest.raises(InputError, match=message) as caught:
        ranks_of(scores, {"a": SQUARE, "b": SQUARE}, **given_options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_unknown_rule_is_named_beside_the_known_ones() -> None:
    with pytest.raises(InputError, match="no such rule 'best'; choose among largest-remainder, floor, ranking"):
        rule_of("best")


def test_scores_of_other_modules_are_a_mismatch() -> None:
    with pytest.raises(MismatchError):
        allocate({"x": 1.0}, {"a": SQUARE}, budget=Budget("ranks", 10))


def test_a_budget_is_positive() -> None:
    with pytest.raises(InputError, match="buys nothing"):
        Budget("total", 0)


def test_tied_modules_earn_together_what_they_earn_apart() -> None:
    # Prices 75, 25 and 50 a rank: 3·75 + 11·25 + 6·50 = 800. Tied, q and k spend the same 500 = 5·(75 + 25).
    shapes = {"l.q_proj": LayerShape(25, 50), "l.k_proj": LayerShape(12, 13), "l.o_proj": LayerShape(25, 25)}
    scores = {"l.q_proj": 3.0, "l.k_proj": 11.0, "l.o_proj": 6.0}
    assert ranks_of(scores, shapes, Budget("total", 800)) == {"l.q_proj": 3, "l.k_proj": 11, "l.o_proj": 6}
    assert ranks_of(scores, shapes, Budget("total", 800), ties="qk") == {"l.q_proj": 5, "l.k_proj": 5, "l.o_proj": 6}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # weights 1 : 4 : 4 : 16 of 100 ranks
        ("largest-remainder", {"a": 4, "b": 16, "c": 16, "d": 64}),
        # places 1, 2½, 2½, 4
        ("ranking", {"a": 10, "b": 25, "c": 25, "d": 40}),
        # roots 1 : 2 : 2 : 4, ideal 11.1, 22.2, 22.2, 44.4: the one rank left goes to the largest remainder
        ("sqrt", {"a": 11, "b": 22, "c": 22, "d": 45}),
    ],
)
def test_rules_by_hand(rule: str, expected: dict[str, int]) -> None:
    scores = {"a": 0.25, "b": 1.0, "c": 1.0, "d": 4.0}
    shapes = dict.fromkeys(scores, LayerShape(100, 100))
    assert ranks_of(scores, shapes, Budget("ranks", 100), rule=rule) == expected


def test_per_parameter_gives_each_score_its_share_of_the_parameters() -> None:
    # 100 and 25 parameters a rank, scores 3 : 1, 4000 parameters: 3000 and 1000 of them
    shapes = {"wide": LayerShape(50, 50), "slim": LayerShape(5, 20)}
    scores = {"wide": 3.0, "slim": 1.0}
    found = ranks_of(scores, {"wide": LayerShape(50, 50), "slim": LayerShape(45, 55)}, Budget("total", 4000))
    assert found == {"wide": 30, "slim": 10}  # of one price a rank, the rules agree
    assert ranks_of(scores, shapes, Budget("total", 400), rule="per-parameter") == {"wide": 3, "slim": 4}
    # roots of 3/100 and 1/25: 0.1732 and 0.2; 400 = λ(17.32 + 5) gives 3.1 and 3.58, the rest of 25 goes to slim
    assert ranks_of(scores, shapes, Budget("total", 400), rule="sqrt-per-parameter") == {"wide": 3, "slim": 4}


def test_a_multiple_rounds_the_minimum_up_and_the_limit_down() -> None:
    shapes = {"small": LayerShape(7, 64), "a": SQUARE, "b": SQUARE}
    scores = {"small": 50.0, "a": 1.0, "b": 9.0}
    assert ranks_of(scores, shapes, Budget("ranks", 27), multiple=4, minimum=2) == {"small": 4, "a": 4, "b": 16}
    assert ranks_of(scores, shapes, Budget("ranks", 27), multiple=8, minimum=0) == {"small": 0, "a": 0, "b": 24}


def test_a_plan_of_scores_says_where_it_comes_from() -> None:
    modules = {name: ModuleScore(SQUARE, ((value,),)) for name, value in (("a", 1.0), ("b", 3.0))}
    scores = ProbeScores(modules, "perturbation", {"trials": 1}, 5, None, BaseIdentity("small", "ab" * 32), "private")
    plan = plan_of_scores(scores, budget=Budget("ranks", 8))
    assert {name: row.rank for name, row in plan.modules.items()} == {"a": 2, "b": 6}
    told = plan.provenance
    assert (told["base"], told["base_sha256"], told["probe"], told["probe_seed"]) == (
        "small",
        "ab" * 32,
        "perturbation",
        "5",
    )
    assert (told["probe_text"], told["probe_text_sha256"]) == ("private", "")
    assert json.loads(told["probe_settings"]) == {"trials": 1}
    bare = allocate(scores.means(), scores.shapes(), budget=Budget("ranks", 8))
    assert bare.provenance["probe_text"] == "not stated"
