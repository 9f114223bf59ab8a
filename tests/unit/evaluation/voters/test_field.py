"""Labels that the rows already have."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from treadle.data.voting import System
from treadle.errors import ConfigError, InputError
from treadle.evaluation.voters import Poll, prepared
from treadle.evaluation.voters.field import FieldVoter
from treadle.progress import silent


def labelled(poll: Poll, values: list[object]) -> Poll:
    return replace(poll, rows=[{**row, "kind": value} for row, value in zip(poll.rows, values, strict=True)])


def test_values_are_names_or_are_said_to_mean_one(poll: Callable[[int], Poll]) -> None:
    found = prepared(FieldVoter("field", "gold", "kind"), labelled(poll(3), ["system2", "", "system1"]))(silent)
    assert [vote.system for vote in found.votes] == ["system2", None, "system1"]
    assert found.votes[1].reason == "no kind"
    settings = FieldVoter("field", "gold", "kind", {"0": "system1", "1": "system2", "2": "system2"})
    mapped = prepared(settings, labelled(poll(4), [0, 2, "1", None]))(silent)
    assert [vote.system for vote in mapped.votes] == ["system1", "system2", "system2", None]


def test_what_is_no_label_is_said(poll: Callable[[int], Poll]) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl, row 2: kind is 'slow', which is none of system1, system2; mend"):
        prepared(FieldVoter("field", "gold", "kind"), labelled(poll(2), ["system1", "slow"]))
    with pytest.raises(InputError, match=r"row 1 for voter 'gold': no field 'kind'; the fields are: question, steps"):
        prepared(FieldVoter("field", "gold", "kind"), poll(2))
    with pytest.raises(ConfigError, match="voter 'gold': its labels name 'fast', which is no system"):
        prepared(FieldVoter("field", "gold", "kind", {"0": "fast"}), labelled(poll(1), ["0"]))


def test_there_may_be_three_systems(poll: Callable[[int], Poll]) -> None:
    systems = tuple(System(name, "") for name in ("look", "think", "ask"))
    three = replace(labelled(poll(3), ["ask", "look", "think"]), systems=systems)
    found = prepared(FieldVoter("field", "gold", "kind"), three)(silent)
    assert [vote.system for vote in found.votes] == ["ask", "look", "think"]
