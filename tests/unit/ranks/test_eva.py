from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

from treadle.errors import InputError
from treadle.family.injection import linear_shapes
from treadle.ranks import eva as subject
from treadle.ranks.eva import EvaSettings, eva
from treadle.ranks.inputs import ProbeInputs


@pytest.fixture
def long_inputs() -> ProbeInputs:
    return ProbeInputs((torch.randint(4, 128, (4, 20)), torch.randint(4, 128, (2, 2))), "0" * 64)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers by its old name
def test_scores_are_the_ranks_that_pefts_own_initialisation_gives(
    tiny_llama: LlamaForCausalLM, long_inputs: ProbeInputs
) -> None:
    shapes = linear_shapes(tiny_llama, ["q_proj", "o_proj", "down_proj"])
    found = eva(tiny_llama, long_inputs, shapes, settings=EvaSettings(rank=4)).means()
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    adapted = get_peft_model(tiny_llama, config, low_cpu_mem_usage=True)
    batch = long_inputs.batches[0]  # the other one has fewer tokens than there are directions
    initialize_lora_eva_weights(
        adapted, [{"input_ids": batch, "attention_mask": torch.ones_like(batch)}], show_progress_bar=False
    )
    pattern = adapted.peft_config["default"].rank_pattern
    assert {name: pattern.get(name, 4) for name in shapes} == found
    assert sum(found.values()) == 4 * len(shapes)
    assert len(set(found.values())) > 1


def test_too_few_rows_are_told_where_peft_would_wait_for_ever(
    tiny_llama: LlamaForCausalLM, tiny_bert: BertForSequenceClassification, long_inputs: ProbeInputs
) -> None:
    short = ProbeInputs((torch.randint(4, 128, (2, 3)),), "0" * 64)
    with pytest.raises(InputError, match=r"q_proj: EVA needs 16 rows of its input in a batch, there are 6"):
        eva(tiny_llama, short, linear_shapes(tiny_llama))
    with pytest.raises(InputError, match=r"pooler.dense: EVA needs 8 rows of its input in a batch, there are 4"):
        eva(tiny_bert, long_inputs, linear_shapes(tiny_bert), settings=EvaSettings(rank=4))
    with pytest.raises(InputError, match=r"q_proj: its input has no 60 directions"):
        eva(tiny_llama, long_inputs, linear_shapes(tiny_llama), settings=EvaSettings(rank=30))


def test_directions_that_never_settle_are_told(
    tiny_llama: LlamaForCausalLM, long_inputs: ProbeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "_PASSES", 1)
    with pytest.raises(InputError, match="not settled after 1 passes; lower tau or the rank"):
        eva(tiny_llama, long_inputs, linear_shapes(tiny_llama), settings=EvaSettings(rank=4, tau=1.0))


def test_a_pooler_that_reads_a_slice_has_a_share_too(
    tiny_bert: BertForSequenceClassification, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    shapes = linear_shapes(tiny_bert)
    inputs = ProbeInputs((torch.randint(4, 128, (8, 20)),), "0" * 64)
    with untouched(tiny_bert):
        found = eva(tiny_bert, inputs, shapes, settings=EvaSettings(rank=2)).means()
    assert sum(found.values()) == 2 * len(shapes)
    assert next(ranks for name, ranks in found.items() if name.endswith("pooler.dense")) > 0
