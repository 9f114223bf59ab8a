from hypothesis import given
from hypothesis import strategies as st

from treadle.family.plan import LayerShape
from treadle.ranks.controls import controls, reversed_scores, shuffled_scores, uniform_scores
from treadle.ranks.scores import ModuleScore, ProbeScores

rows = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.tuples(st.floats(0, 9), st.sampled_from([2, 4])), min_size=1
)


def made(modules: dict[str, tuple[float, int]]) -> ProbeScores:
    values = {name: ModuleScore(LayerShape(width, 3), ((value,),)) for name, (value, width) in modules.items()}
    return ProbeScores(values, "x", {}, 0, None)


@given(rows, st.integers(0, 99))
def test_shuffling_and_reversing_permute(modules: dict[str, tuple[float, int]], seed: int) -> None:
    scores = made(modules)
    means = scores.means()
    for name, control in controls(scores, seed=seed).items():
        assert list(control) == list(means)
        if name != "uniform":
            assert sorted(control.values()) == sorted(means.values())
    assert set(uniform_scores(scores).values()) == {1.0}
    within = shuffled_scores(scores, seed=seed, among="shape")
    for width in (2, 4):
        same = [name for name, shape in scores.shapes().items() if shape.in_features == width]
        assert sorted(within[name] for name in same) == sorted(means[name] for name in same)


@given(rows)
def test_reversing_turns_the_order_round(modules: dict[str, tuple[float, int]]) -> None:
    scores = made(modules)
    means, turned = scores.means(), reversed_scores(scores)
    for a in means:
        for b in means:
            assert means[a] >= means[b] or turned[a] >= turned[b]


def scored(*names: str) -> ProbeScores:
    values = {name: ModuleScore(LayerShape(2, 2), ((float(ord(name)),),)) for name in names}
    return ProbeScores(values, "x", {}, 0, None)


def test_a_shuffle_is_a_function_of_seed_and_names() -> None:
    letters = "abcdefghijkl"
    first = shuffled_scores(scored(*letters), seed=1)
    assert shuffled_scores(scored(*reversed(letters)), seed=1) == first
    others = [shuffled_scores(scored(*letters), seed=seed) for seed in range(2, 40)]
    assert all(other != first for other in others)
    # Every module can get every score: 12 modules, 39 shuffles, so a score is missed by one module with (11/12)^39 = 3%
    assert len({row["a"] for row in [first, *others]}) > 8
