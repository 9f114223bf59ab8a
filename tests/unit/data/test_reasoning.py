"""Generated questions: fixed by seed, and no two seeds share a draw, which the library itself does not promise."""

import sys

import pytest
import reasoning_gym

from treadle.data.reasoning import STRIDE, draw_questions, generators
from treadle.errors import ConfigError, InputError, UnavailableError


def texts(rows: list[dict[str, object]]) -> list[object]:
    return [row["question"] for row in rows]


def test_the_trap_is_real_neighbouring_seeds_of_the_library_overlap() -> None:
    one = [item["question"] for item in reasoning_gym.create_dataset("word_sequence_reversal", size=10, seed=1)]
    two = [item["question"] for item in reasoning_gym.create_dataset("word_sequence_reversal", size=10, seed=2)]
    assert one[1:] == two[:-1]


def test_neighbouring_seeds_of_ours_do_not() -> None:
    one, two = (draw_questions("word_sequence_reversal", size=100, seed=seed) for seed in (1, 2))
    assert set(texts(one)).isdisjoint(texts(two))


def test_a_stream_is_fixed_and_can_be_entered_anywhere() -> None:
    whole = draw_questions("chain_sum", size=10, seed=3, parameters={"max_digits": 1})
    assert whole[4:] == draw_questions("chain_sum", size=6, seed=3, parameters={"max_digits": 1}, start=4)
    assert set(whole[0]) == {"question", "answer"}


def test_golden_questions_of_this_release() -> None:
    # reasoning-gym 0.1.25: draw_questions("chain_sum", size=2, seed=1, parameters={"max_digits": 1})
    assert draw_questions("chain_sum", size=2, seed=1, parameters={"max_digits": 1}) == [
        {"question": "State the final answer to the following arithmetic problem: 0 - 2 =", "answer": "-2"},
        {"question": "State the final answer to the following arithmetic problem: 9 - 0 + 4 =", "answer": "13"},
    ]


@pytest.mark.parametrize(("size", "seed", "start"), [(0, 0, 0), (1, -1, 0), (1, 0, -1), (2, 0, STRIDE - 1)])
def test_what_is_out_of_range_is_refused(size: int, seed: int, start: int) -> None:
    with pytest.raises(InputError, match="out of range"):
        draw_questions("chain_sum", size=size, seed=seed, start=start)


@pytest.mark.parametrize("parameters", [{"max_digts": 1}, {"max_digits": 0}, {"max_digits": "one"}])
def test_wrong_parameters_are_one_line(parameters: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="reasoning-gym:chain_sum: the generator refuses its parameters") as caught:
        draw_questions("chain_sum", size=1, seed=0, parameters=parameters)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_remedy_is_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "syllogism" in generators()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UnavailableError, match=r"pip install 'treadle\[demo\]'"):
        draw_questions("chain_sum", size=1, seed=0)
