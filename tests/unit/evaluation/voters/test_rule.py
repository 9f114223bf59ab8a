"""The length of the reference reasoning."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.classify import SYSTEMS
from treadle.data.voting import System
from treadle.errors import ConfigError, InputError
from treadle.evaluation.voters import Poll, Question, prepared
from treadle.evaluation.voters.rule import RuleVoter
from treadle.progress import silent


def votes(settings: RuleVoter, poll: Poll) -> list[str | None]:
    return [vote.system for vote in prepared(settings, poll)(silent).votes]


def test_lengths_up_to_the_limit_are_the_first_systems(poll: Callable[[int], Poll]) -> None:
    # row i has i words of steps
    expected = ["system1"] * 3 + ["system2"] * 3
    assert votes(RuleVoter("rule", "length", "steps", thresholds=(2.0,)), poll(6)) == expected
    three = replace(poll(6), systems=tuple(System(name, "") for name in "abc"))
    assert votes(RuleVoter("rule", "length", "steps", thresholds=(0.0, 3.5)), three) == list("abbbcc")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.sampled_from([0.1, 0.25, 0.5, 0.8]))
def test_a_quantile_is_the_least_length_that_its_share_does_not_exceed(lengths: list[int], share: float) -> None:
    rows = [{"steps": " ".join(["w"] * length)} for length in lengths]
    poll = Poll(rows, [Question("q")] * len(rows), SYSTEMS, None, Path("unused"), "rows")
    fast = votes(RuleVoter("rule", "length", "steps", quantiles=(share,)), poll).count("system1")
    limit = min(n for n in lengths if sum(other <= n for other in lengths) >= share * len(lengths) - 1e-9)
    assert fast == sum(length <= limit for length in lengths)
    assert fast >= share * len(lengths) - 1e-9


def test_tokens_are_those_of_the_named_tokenizer(
    poll: Callable[[int], Poll], tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    two = replace(poll(2), rows=[{"steps": "a,b,c"}, {"steps": "abc"}])  # five tokens, one token; a word each
    settings = RuleVoter("rule", "length", "steps", (4.0,), unit="tokens", tokenizer=str(tmp_path / "base"))
    assert votes(settings, two) == ["system2", "system1"]
    assert votes(RuleVoter("rule", "length", "steps", (4.0,)), two) == ["system1", "system1"]


def test_what_the_limits_are_is_said(poll: Callable[[int], Poll]) -> None:
    found = prepared(RuleVoter("rule", "length", "steps", quantiles=(0.5,)), poll(5))(silent)
    assert found.remarks == ("limits in words: 2",)


def test_rules_that_say_nothing_are_refused(poll: Callable[[int], Poll]) -> None:
    for wrong, said in [
        ({}, "either thresholds or quantiles"),
        ({"thresholds": (1.0,), "quantiles": (0.5,)}, "either thresholds or quantiles"),
        ({"thresholds": (3.0, 2.0)}, "numbers that ascend"),
        ({"thresholds": (float("nan"),)}, "numbers that ascend"),
        ({"quantiles": (1.0,)}, "between 0 and 1"),
        ({"thresholds": (1.0,), "unit": "tokens"}, "belong together"),
        ({"thresholds": (1.0,), "tokenizer": "x"}, "belong together"),
    ]:
        with pytest.raises(ValueError, match=said):
            RuleVoter("rule", "length", "steps", **wrong)
    with pytest.raises(ConfigError, match="voter 'length': 2 limits part 3 systems, not 2; give one limit fewer"):
        prepared(RuleVoter("rule", "length", "steps", thresholds=(1.0, 2.0)), poll(2))
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: no field 'reasons'"):
        prepared(RuleVoter("rule", "length", "reasons", thresholds=(1.0,)), poll(2))
