"""Our ARROW is stock PEFT's: the same adapters, top_k and temperature give the same logits."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import create_arrow_model
from transformers import LlamaForCausalLM

from treadle.family.adapter import Adapter
from treadle.routing.bank import AdapterBank
from treadle.routing.routed import RoutedModel


# peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_arrow_is_pefts(
    temperature: float,
    tiny_llama: LlamaForCausalLM,
    make: SimpleNamespace,
    tmp_path: Path,
) -> None:
    family = make.family(tiny_llama)
    adapters: list[Adapter] = []
    for name in ("alpha", "beta", "gamma", "delta"):
        made: Adapter = make.adapter(family, name)
        for (
            B
        ) in made.lora_B.values():  # a wide gap between singular values: PEFT's power iteration then finds the first
            B *= torch.tensor([1.0, 0.1, 0.1, 0.1])
        made.save(tmp_path / name)
        adapters.append(Adapter.load(tmp_path / name, family=family))
    theirs = create_arrow_model(
        copy.deepcopy(tiny_llama),
        [str(tmp_path / adapter.name) for adapter in adapters],
        ArrowConfig(top_k=3, router_temperature=temperature, rng_seed=0),
    ).eval()
    bank = AdapterBank.build(family, adapters)
    ids = torch.randint(4, 128, (3, 9))
    plain = tiny_llama(input_ids=ids).logits
    for scorer in ("arrow", "arrow-parameters"):  # one A: the same
        ours = RoutedModel(tiny_llama, bank, scorer=scorer, granularity="token", temperature=temperature)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-5)
            assert (ours(ids).logits - plain).abs().max() > 1e-2  # else the comparison says nothing
        ours.unwrap()
