"""Evidence: the same sums from which `sequence` chooses, and nothing of forbidden adapters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.errors import AccessError, InputError
from treadle.models.loading import load_model
from treadle.routing.bank_files import load_bank
from treadle.routing.evidence import Evidence, prompt_evidence
from treadle.routing.routed import RoutedModel

IDS = torch.tensor([[1, 50, 51, 60, 9, 55, 70]])


@pytest.fixture
def routed(small_fleet: Path, built_bank: Path) -> RoutedModel:
    return RoutedModel(load_model(str(small_fleet / "base")), load_bank(built_bank))


def ordered(evidence: Evidence, values: Tensor) -> list[str]:
    return [evidence.names[place] for place in values.argsort(descending=True).tolist()]


def test_the_last_running_means_are_what_decides(routed: RoutedModel) -> None:
    evidence, decision = prompt_evidence(routed, IDS), routed.choose(IDS)
    last = evidence.running[-1]
    names = ordered(evidence, last)
    assert names[:2] == [routed.bank.names[int(decision.winner)], routed.bank.names[int(decision.runner_up)]]
    top = last.sort(descending=True).values
    # Scores in float32 twice, summed in another order, times weights of a few tens.
    assert float(top[0] - top[1]) == pytest.approx(float(decision.margin), abs=1e-4)


def test_tokens_and_layers_add_up_to_the_same(routed: RoutedModel) -> None:
    evidence, prompts = prompt_evidence(routed, IDS), routed.prompts
    assert prompts is not None
    assert evidence.counted.tolist() == [False] + [True] * 6  # <bos> does not count
    over_tokens = evidence.tokens[evidence.counted].mean(0)
    over_layers = sum(prompts.weight[module] * scores for module, scores in evidence.layers.items()) - prompts.centre
    assert torch.allclose(over_tokens, evidence.running[-1])
    assert torch.allclose(over_layers, evidence.running[-1])


def test_without_public_prompts_layers_average(routed: RoutedModel) -> None:
    base, bank = routed.unwrap(), routed.bank
    assert bank.statistics is not None
    plain = RoutedModel(base, replace(bank, statistics=replace(bank.statistics, prompts=None)))
    evidence = prompt_evidence(plain, IDS)
    over_layers = torch.stack(list(evidence.layers.values())).mean(0)
    assert torch.allclose(over_layers, evidence.running[-1])
    assert torch.allclose(evidence.tokens[evidence.counted].mean(0), evidence.running[-1])


def test_the_score_of_a_token_is_the_z_score_by_definition(routed: RoutedModel) -> None:
    evidence, module = prompt_evidence(routed, IDS), "model.layers.0.self_attn.q_proj"
    seen: list[Tensor] = []
    layer = routed.model.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        routed.model(IDS)
    handle.remove()
    factors = routed.bank.layers[module]
    for place, adapter in enumerate(routed.bank.adapters):
        norm = (seen[0][0].double() @ adapter.lora_A[module].double().T @ adapter.folded_B(module).double().T).norm(
            dim=1
        )
        z = (norm - factors.mean[place].double()) / factors.std[place].double()
        assert float(z[1:].mean()) == pytest.approx(float(evidence.layers[module][place]), abs=1e-4)


def test_the_forbidden_do_not_appear(routed: RoutedModel) -> None:
    whole, part = prompt_evidence(routed, IDS), prompt_evidence(routed, IDS, permitted={"films", "foreign"})
    assert part.names == ("films", "foreign")
    columns = [whole.names.index(name) for name in part.names]
    assert torch.allclose(part.running[1:], whole.running[1:, columns])


def test_refusals(routed: RoutedModel) -> None:
    with pytest.raises(InputError, match="no adapter is permitted"):
        prompt_evidence(routed, IDS, permitted=set())
    with pytest.raises(AccessError, match="unknown adapter"):
        prompt_evidence(routed, IDS, permitted={"nosuch"})
