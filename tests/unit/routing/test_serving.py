"""A bank that changes while it serves: every answer is that of one version, whole."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import FormatError, InputError
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.bank_versions import bank_digest, versions
from treadle.routing.routed import RoutedModel
from treadle.routing.serving import LiveBank

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])


@pytest.fixture
def folder(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    save_bank(make.bank(tiny_llama, tiny_tokenizer, foreign=False), tmp_path / "bank")
    return tmp_path / "bank"


def routed(model: LlamaForCausalLM, bank: AdapterBank) -> RoutedModel:
    return RoutedModel(model, bank, scorer="norm", granularity="token")


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def answer(model: RoutedModel) -> torch.Tensor:
    """Six tokens more, and the logits of the prompt: many passes, time enough for a swap."""
    with torch.inference_mode():
        ids = model.generate(IDS, max_new_tokens=6, do_sample=False)
        logits = model(IDS).logits
    return torch.cat([ids.double().flatten(), logits.double().flatten()])


def test_answers_are_those_of_one_version_while_the_bank_changes(
    folder: Path, make: SimpleNamespace, tiny_llama: LlamaForCausalLM
) -> None:
    live = LiveBank(folder, lambda bank: routed(tiny_llama, bank))
    answers: list[tuple[str, torch.Tensor]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def serve() -> None:
        try:
            while not done.is_set():
                with live.request() as served:
                    answers.append((served.digest, answer(served.model)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    family = load_bank(folder).family
    changes = [
        lambda bank: bank.add(make.adapter(family, "late", scale=1.0)),
        lambda bank: bank.update(make.adapter(family, "beta", scale=2.0)),
        lambda bank: bank.update(make.adapter(family, "gamma", scale=4.0)),
        lambda bank: bank.update(make.adapter(family, "late", scale=8.0)),
        lambda bank: bank.remove("late"),
    ]
    for change in changes:
        save_bank(change(load_bank(folder)), folder)
        seen = len(answers)
        while len(answers) < seen + 4 and not errors:  # let everybody answer from the new version
            done.wait(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    live.close()
    assert hooks(tiny_llama) == 0  # every version is gone, whoever was in the midst of it when it was replaced
    expected: dict[str, torch.Tensor] = {}
    for version in versions(folder):
        model = routed(tiny_llama, load_bank(folder, version=version.number))
        expected[version.digest] = answer(model)
        model.unwrap()
    # Raw norms: each of the first changes brings an adapter that wins by its scale, and so shows in the answers.
    assert len({tuple(value.tolist()) for value in expected.values()}) >= 5
    assert {digest for digest, _ in answers} == expected.keys()
    for digest, found in answers:
        assert torch.equal(found, expected[digest])


def test_a_request_ends_on_the_version_that_it_began_with(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    live = LiveBank(folder, lambda bank: routed(tiny_llama, bank))
    with live.request() as first:
        before = answer(first.model)
        save_bank(load_bank(folder).remove("beta"), folder)
        with live.request() as second:
            assert second.digest == bank_digest(folder) != first.digest
            assert "beta" not in second.model.bank.names
        assert torch.equal(answer(first.model), before)
        both = hooks(tiny_llama)
    assert hooks(tiny_llama) == both // 2
    live.close()
    assert hooks(tiny_llama) == 0


def test_nothing_is_opened_where_nothing_has_changed(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    opened: list[AdapterBank] = []

    def wrap(bank: AdapterBank) -> RoutedModel:
        opened.append(bank)
        return routed(tiny_llama, bank)

    live = LiveBank(folder, wrap)
    for _ in range(3):
        with live.request():
            pass
    (folder / "bank.json").touch()  # looked at again, found the same
    with live.request():
        pass
    assert len(opened) == 1
    live.close()


def test_a_version_that_cannot_be_opened_is_left_aside(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    live = LiveBank(folder, lambda bank: routed(tiny_llama, bank))
    good = (folder / "bank.json").read_bytes()
    (folder / "bank.json").write_text("{}")
    with live.request() as served:
        assert "beta" in served.model.bank.names
    assert isinstance(live.failure, FormatError)
    content = json.loads(good)
    content["adapters"] = [None]  # what no reader of it foresees
    (folder / "bank.json").write_text(json.dumps(content))
    for _ in range(2):
        with live.request() as served:
            assert "beta" in served.model.bank.names
    assert isinstance(live.failure, FormatError)
    (folder / "bank.json").unlink()
    with live.request():
        pass
    assert isinstance(live.failure, InputError)
    (folder / "bank.json").write_bytes(good)
    save_bank(load_bank(folder).remove("beta"), folder)
    with live.request() as served:
        assert "beta" not in served.model.bank.names
    assert live.failure is None
    live.close()


def test_a_version_that_was_repaired_is_found_though_its_description_is_the_same(
    folder: Path, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveBank(folder, lambda bank: routed(tiny_llama, bank))
    save_bank(load_bank(folder).remove("beta"), folder)
    factors = folder / json.loads((folder / "bank.json").read_text())["factors"]
    factors.rename(folder / "aside")
    with live.request() as served:
        assert "beta" in served.model.bank.names
    assert live.failure is not None
    (folder / "aside").rename(factors)
    with live.request() as served:
        assert "beta" in served.model.bank.names  # not at every request: it may be damaged for long
    monkeypatch.setattr("treadle.routing.serving._PAUSE", 0.0)
    with live.request() as served:
        assert "beta" not in served.model.bank.names
        assert served.digest == bank_digest(folder)
    assert live.failure is None
    live.close()
    assert hooks(tiny_llama) == 0


def test_a_version_that_fails_after_it_was_wrapped_leaves_no_hooks(
    folder: Path, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    live = LiveBank(folder, lambda bank: routed(tiny_llama, bank))
    before = hooks(tiny_llama)
    save_bank(load_bank(folder).remove("beta"), folder)
    with monkeypatch.context() as patch:
        patch.setattr(RoutedModel, "prefetch", fail)
        with live.request() as served:
            assert "beta" in served.model.bank.names
            answer(served.model)
    assert "the disk is gone" in str(live.failure)
    assert hooks(tiny_llama) == before
    live.close()
    assert hooks(tiny_llama) == 0


def test_a_new_version_has_at_hand_what_acted_most(
    folder: Path, make: SimpleNamespace, tiny_llama: LlamaForCausalLM
) -> None:
    one = 4 * sum(factors.rank * factors.shape.out_features for factors in load_bank(folder).layers.values())
    live = LiveBank(folder, lambda bank: RoutedModel(tiny_llama, bank, scorer="norm", memory=2 * one))
    with live.request() as served, torch.inference_mode():
        names, model = served.model.bank.names, served.model
        for name, times in ((names[2], 3), (names[3], 2), (names[1], 1)):
            for _ in range(times):
                model(IDS[:1], chosen=model.chosen([name]))
        wins = model.wins()
    assert sorted(wins, key=lambda name: -wins[name]) == [names[2], names[3], names[1]]
    save_bank(load_bank(folder).remove(names[0]), folder)
    with live.request() as served:
        places = [served.model.bank.names.index(name) for name in (names[2], names[3])]
        for layer in served.model.layers.values():
            assert sorted(layer.pool._holders) == sorted(places)
    live.close()
