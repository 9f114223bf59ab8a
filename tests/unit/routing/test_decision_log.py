"""The decision log: one whole line a request, who acted and how many were kept away, nothing of the prompt."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, UnsupportedError
from treadle.routing.decision_log import DecisionEntry, LogContext, append_decision, logged
from treadle.routing.policy import Request
from treadle.routing.routed import RoutedModel

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])
REQUESTS = [Request("ada", frozenset({"dept=oncology"})), Request("cy")]
ALLOWED = [{"alpha", "beta"}, set()]
ENTRY = DecisionEntry("ada", (), "d" * 64, None, "seqr", "sequence", "alpha", None, 0.5, None, {"alpha": 1.0}, 1, 2, 3)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_line_a_row_says_who_acted_and_how_many_might_not(
    granularity: Any,
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity=granularity, abstain=0.999)
    context = LogContext(tmp_path / "log" / "decisions.jsonl", "b" * 64, "p" * 64)
    with logged(model, context, REQUESTS, ALLOWED) as trace:
        model(IDS, permitted=ALLOWED)
    first, second = lines(context.file)
    assert (first["caller"], first["labels"], second["caller"]) == ("ada", ["dept=oncology"], "cy")
    assert (first["bank"], first["policy"], first["granularity"]) == ("b" * 64, "p" * 64, granularity)
    assert (first["permitted"], first["excluded"]) == (2, 3)
    assert (second["permitted"], second["excluded"]) == (0, 5)
    assert first["shares"] == {name or "base": share for name, share in trace.shares(0).items()}
    assert second["shares"] == {"base": 1.0}
    if granularity == "sequence":
        assert first["choice"] in ALLOWED[0]
        assert first["margin"] == pytest.approx(float(trace.choices[0].margin[0]))
        assert first["chance"] == pytest.approx(float(trace.choices[0].chance[0]))
        assert first["decisions"] == 1
    else:
        assert first["choice"] is first["margin"] is first["chance"] is None
        assert first["decisions"] == 5 * len(model.bank.layers)
    assert "excluded" not in json.dumps(trace.to_json())  # what the caller may see


def test_an_open_bank_excludes_nobody(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer))
    context = LogContext(tmp_path / "decisions.jsonl")
    with logged(model, context, REQUESTS, None):
        model(IDS)
    assert [(line["permitted"], line["excluded"]) for line in lines(context.file)] == [(5, 0)] * 2
    with pytest.raises(InputError, match="1 permitted sets for 2 requests"), logged(model, context, REQUESTS, [set()]):
        pass
    with pytest.raises(ValueError, match="broken"), logged(model, context, REQUESTS, None):
        raise ValueError("broken")
    assert len(lines(context.file)) == 2  # what failed decided nothing


def test_beams_are_logged_with_the_row_that_they_are_of(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity="token")
    context, allowed = LogContext(tmp_path / "decisions.jsonl"), [{"alpha"}, {"beta"}]
    with logged(model, context, REQUESTS, allowed):
        model.generate(IDS, permitted=allowed, num_beams=2, max_new_tokens=3, do_sample=False)
    first, second = lines(context.file)
    assert set(first["shares"]) <= {"alpha", "base"}
    assert set(second["shares"]) <= {"beta", "base"}
    assert first["decisions"] == second["decisions"] > 5 * len(model.bank.layers)


def test_a_choice_that_is_handed_over_is_logged_as_it_acts(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer))
    context, chosen = LogContext(tmp_path / "decisions.jsonl"), model.chosen(["alpha", "alpha"])
    with logged(model, context, REQUESTS, ALLOWED):
        model(IDS, permitted=ALLOWED, chosen=chosen)
    assert [line["choice"] for line in lines(context.file)] == ["alpha", None]  # the second may use none
    assert [line["shares"] for line in lines(context.file)] == [{"alpha": 1.0}, {"base": 1.0}]


def test_where_several_act_at_once_nothing_is_logged_rather_than_something_wrong(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity="token", top_k=2)
    context = LogContext(tmp_path / "decisions.jsonl")
    with pytest.raises(UnsupportedError, match="several adapters act at once"), logged(model, context, REQUESTS, None):
        pass
    assert not context.file.exists()


def test_the_time_is_utc_and_the_file_is_the_operators(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_decision(path, ENTRY, now=datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC))
    assert lines(path)[0]["time"] == "2026-01-02T03:04:05.678+00:00"
    assert path.stat().st_mode & 0o077 == 0


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    def write() -> None:
        for _ in range(50):
            append_decision(path, ENTRY)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path)) == 200
    assert {line["choice"] for line in lines(path)} == {"alpha"}
