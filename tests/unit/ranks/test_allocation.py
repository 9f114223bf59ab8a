from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from treadle.errors import InputError, MismatchError
from treadle.family.plan import LayerShape
from treadle.ranks.allocation import Budget, Rule, allocate, mean_rank_budget

SQUARE = LayerShape(64, 64)

sides = st.integers(1, 40)
layers = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.floats(0, 100, allow_subnormal=False), st.builds(LayerShape, sides, sides)),
    min_size=1,
    max_size=12,
)
units = st.sampled_from(["total", "trainable", "ranks"])
rules = st.sampled_from(["largest-remainder", "floor"])


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


def ranks_of(scores: dict[str, float], shapes: dict[str, LayerShape], **options: object) -> dict[str, int]:
    plan = allocate(scores, shapes, **options)  # type: ignore[arg-type]
    return {name: plan.modules[name].rank if name in plan.modules else 0 for name in shapes}


@given(layers, units, st.integers(1, 5000), rules, st.integers(0, 3), st.integers(3, 50))
def test_never_above_the_budget_and_the_rest_buys_nothing(
    modules: dict[str, tuple[float, LayerShape]], unit: str, value: int, rule: Rule, minimum: int, maximum: int
) -> None:
    scores, shapes = split(modules)
    assume(any(scores.values()))
    budget = Budget(unit, value)  # type: ignore[arg-type]
    top = {name: min(maximum, shape.in_features, shape.out_features) for name, shape in shapes.items()}
    least = {name: min(minimum, top[name]) for name in shapes}
    options = {"budget": budget, "rule": rule, "minimum": minimum, "maximum": maximum}
    if cost(budget, least, shapes) > value:
        with pytest.raises(InputError, match="below the"):
            allocate(scores, shapes, **options)  # type: ignore[arg-type]
        return
    try:
        ranks = ranks_of(scores, shapes, **options)
    except InputError:  # with nothing to spend on one rank there is no plan
        ranks = dict.fromkeys(shapes, 0)
    spent = cost(budget, ranks, shapes)
    assert spent <= value
    assert all(least[name] <= ranks[name] <= top[name] for name in shapes)
    if rule == "largest-remainder":
        steps = [cost(budget, {name: 1}, shapes) for name in shapes if ranks[name] < top[name]]
        assert not steps or value - spent < min(steps)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), units, st.integers(1, 40), rules)
def test_a_higher_score_never_earns_a_lower_rank_among_equal_shapes(
    values: list[float], unit: str, mean: int, rule: Rule
) -> None:
    scores = {f"m{index}": value for index, value in enumerate(values)}
    shapes = dict.fromkeys(scores, LayerShape(30, 50))
    budget = Budget(unit, mean * cost(Budget(unit, 1), dict.fromkeys(scores, 1), shapes))  # type: ignore[arg-type]
    ranks = ranks_of(scores, shapes, budget=budget, rule=rule)
    for a in scores:
        for b in scores:
            assert ranks[a] >= ranks[b] or scores[a] <= scores[b]


@given(layers, st.randoms(use_true_random=False), st.integers(200, 4000))
def test_the_order_of_modules_changes_nothing(
    modules: dict[str, tuple[float, LayerShape]], random: object, value: int
) -> None:
    scores, shapes = split(modules)
    assume(any(scores.values()))
    names = list(shapes)
    random.shuffle(names)  # type: ignore[attr-defined]
    options = {"budget": Budget("total", value), "minimum": 0}
    try:
        expected = ranks_of(scores, shapes, **options)
    except InputError:
        assume(False)
    shuffled = ranks_of({n: scores[n] for n in reversed(names)}, {n: shapes[n] for n in names}, **options)
    assert shuffled == expected


@given(layers, st.floats(0.001, 1000), st.integers(500, 4000))
def test_only_the_ratios_of_scores_count(
    modules: dict[str, tuple[float, LayerShape]], factor: float, value: int
) -> None:
    scores, shapes = split(modules)
    whole = {name: float(round(score)) for name, score in scores.items()}
    assume(any(whole.values()))
    options = {"budget": Budget("ranks", value)}
    power = 2.0 ** round(factor % 9)  # exact in binary, so no rounding stands between the two
    assert ranks_of({n: s * power for n, s in whole.items()}, shapes, **options) == ranks_of(whole, shapes, **options)


def test_whole_shares_are_met_exactly() -> None:
    scores = {"a": 1.0, "b": 2.0, "c": 5.0}
    shapes = dict.fromkeys(scores, SQUARE)
    for rule in ("floor", "largest-remainder"):
        assert ranks_of(scores, shapes, budget=Budget("ranks", 16), rule=rule) == {"a": 2, "b": 4, "c": 10}
        assert ranks_of(scores, shapes, budget=Budget("total", 16 * 128), rule=rule) == {"a": 2, "b": 4, "c": 10}


def test_the_papers_floor_loses_budget_and_says_so() -> None:
    # r̄ = 2, M = 3, Σd = 10: shares of 6 are 0.6, 2.4, 3.0
    scores = {"a": 1.0, "b": 4.0, "c": 5.0}
    plan = allocate(scores, dict.fromkeys(scores, SQUARE), budget=Budget("ranks", 6), rule="floor")
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
    plan = allocate({"a": 1.0, "b": 7.0}, {"a": SQUARE, "b": SQUARE}, budget=Budget("ranks", 16), scaling=2.0)
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
        ({"a": 1.0, "b": 1.0}, {"minimum": 6}, "below the 12 that the minimum rank 6 costs"),
        ({"a": 1.0, "b": 1.0}, {"budget": Budget("total", 127), "minimum": 0}, "buys not one rank"),
    ],
)
def test_wrong_input_is_one_line(scores: dict[str, float], options: dict[str, object], message: str) -> None:
    given_options = {"budget": Budget("ranks", 10), **options}
    with pytest.raises(InputError, match=message) as caught:
        allocate(scores, {"a": SQUARE, "b": SQUARE}, **given_options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_scores_of_other_modules_are_a_mismatch() -> None:
    with pytest.raises(MismatchError):
        allocate({"x": 1.0}, {"a": SQUARE}, budget=Budget("ranks", 10))


def test_a_budget_is_positive() -> None:
    with pytest.raises(InputError, match="buys nothing"):
        Budget("total", 0)
