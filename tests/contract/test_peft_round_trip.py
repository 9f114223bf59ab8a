"""Stock PEFT opens what treadle writes, and treadle what PEFT writes, with the same logits."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.initial import weight_svd
from treadle.family.injection import inject, linear_shapes
from treadle.family.peft_format import read
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.ranks.allocation import AllocationSettings, allocate, mean_rank_budget
from treadle.recipes.public_pca import public_pca

# peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS = ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_t5"]
TASK_TYPES = {"tiny_llama": "CAUSAL_LM", "tiny_gpt2": "CAUSAL_LM", "tiny_bert": None, "tiny_t5": "SEQ_2_SEQ_LM"}
TOKENS = torch.tensor([[1, 5, 9, 33, 7, 2], [1, 8, 4, 30, 31, 32]])


def logits(model: torch.nn.Module, name: str) -> Tensor:
    named = {"decoder_input_ids": TOKENS[:, :4]} if name == "tiny_t5" else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **named).logits


def plan_of(model: PreTrainedModel, ranks: str) -> RankPlan:
    shapes = linear_shapes(model)
    if ranks == "uniform":
        return RankPlan.uniform(shapes, rank=3)
    return RankPlan.of_ranks(shapes, {name: i % 4 for i, name in enumerate(shapes)}, scaling=2.0)


def member(model: PreTrainedModel, plan: RankPlan, task_type: str | None, *, transposed: bool) -> Adapter:
    family = AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=1)
    lora_B = {name: torch.randn(row.out_features, row.rank) for name, row in plan.modules.items()}
    return Adapter.of_family(
        family, "a", lora_B, provenance=Provenance("sft"), task_type=task_type, transposed=transposed
    )


def injected(model: PreTrainedModel, adapter: Adapter, name: str) -> Tensor:
    with inject(model, adapter.lora_A, adapter.folded()):
        return logits(model, name)


@pytest.mark.parametrize("ranks", ["uniform", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_opens_what_we_write(name: str, ranks: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(name)
    adapter = member(model, plan_of(model, ranks), TASK_TYPES[name], transposed=name == "tiny_gpt2")
    ours, bare = injected(model, adapter, name), logits(model, name)
    adapter.save(tmp_path / "a")
    opened = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    torch.testing.assert_close(logits(opened, name), ours, rtol=0, atol=1e-5)
    assert (ours - bare).abs().max() > 1e-2  # else the comparison says nothing
    loaded = Adapter.load(tmp_path / "a")
    assert torch.equal(injected(model, loaded, name), ours)
    trained = [key for key, parameter in opened.named_parameters() if parameter.requires_grad]
    assert trained == []


@pytest.mark.parametrize("init", ["weight-svd", "public-pca"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_peft_opens_adapters_whose_A_comes_from_the_base(
    name: str, init: str, request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, passages = request.getfixturevalue(name), [f"the film is w{i} not good" for i in range(8)]
    plan = plan_of(model, "mixed")
    made = weight_svd(model, plan) if init == "weight-svd" else public_pca(model, tiny_tokenizer, plan, passages)
    family = AdapterFamily.of_tensors(base=BaseIdentity("tiny", "0" * 64), plan=plan, lora_A=made, init=init, seed=0)
    lora_B = {module: torch.randn(row.out_features, row.rank) for module, row in plan.modules.items()}
    transposed = name == "tiny_gpt2"
    adapter = Adapter.of_family(family, "a", lora_B, provenance=Provenance("sft"), transposed=transposed)
    ours, bare = injected(model, adapter, name), logits(model, name)
    adapter.save(tmp_path / "a")
    opened = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    torch.testing.assert_close(logits(opened, name), ours, rtol=0, atol=1e-5)
    assert (ours - bare).abs().max() > 1e-2
    assert Adapter.load(tmp_path / "a", family=family).family == family.fingerprint


ALLOCATIONS = {
    "the paper's": AllocationSettings(rule="floor", scaling=2.0),
    "tied kinds in pairs": AllocationSettings(rule="sqrt", multiple=2, ties="kind"),
    "dropped": AllocationSettings(minimum=0, multiple=2, maximum=8),
}


def allocated(model: PreTrainedModel, settings: AllocationSettings) -> RankPlan:
    """A plan whose scores rise steeply from layer to layer, so that it drops the first modules where it may."""
    shapes = linear_shapes(model)
    scores = {name: float(place**3) for place, name in enumerate(shapes)}
    return allocate(scores, shapes, budget=mean_rank_budget(shapes, 3), settings=settings)


@pytest.mark.parametrize("ranks", ["mixed", *ALLOCATIONS])
@pytest.mark.parametrize("name", MODELS)
def test_peft_builds_the_planned_ranks_and_scalings(
    name: str, ranks: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    plan = plan_of(model, ranks) if ranks == "mixed" else allocated(model, ALLOCATIONS[ranks])
    assert len({row.scaling for row in plan.modules.values()}) == 1
    assert len({row.rank for row in plan.modules.values()}) > 1
    assert (len(plan.modules) < len(linear_shapes(model))) == (ranks != "tied kinds in pairs")
    member(model, plan, TASK_TYPES[name], transposed=name == "tiny_gpt2").save(tmp_path / "a")
    opened = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    built = {
        key.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for key, module in opened.named_modules()
        if hasattr(module, "lora_A")
    }
    assert built == {key: (row.rank, row.scaling) for key, row in plan.modules.items()}
    # The same file of settings builds a fresh adapter of these ranks, for whoever trains it with PEFT alone.
    config = LoraConfig.from_pretrained(tmp_path / "a")
    config.base_model_name_or_path = None  # a model made for a test has no name
    fresh = get_peft_model(copy.deepcopy(model), config)
    sizes = {
        key.removeprefix("base_model.model."): module.lora_A["default"].weight.shape[0]
        for key, module in fresh.named_modules()
        if hasattr(module, "lora_A")
    }
    assert sizes == {key: row.rank for key, row in plan.modules.items()}
    assert sum(p.numel() for key, p in fresh.named_parameters() if "lora_" in key) == plan.count().total


FOREIGN = {
    "plain": LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"),
    "rslora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 6, r"^model\.layers\.1.*up_proj": 1},
        alpha_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 5},
    ),
    "patterns with rslora": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 7},
        alpha_pattern={"v_proj": 3},
        use_rslora=True,
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_we_open_what_peft_writes(kind: str, tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    foreign = get_peft_model(copy.deepcopy(tiny_llama), FOREIGN[kind])
    torch.manual_seed(3)
    for key, parameter in foreign.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_()
    foreign.eval().save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert (adapter.family, adapter.base, adapter.provenance.method) == (None, None, "foreign")
    expected = logits(foreign, "tiny_llama")
    torch.testing.assert_close(injected(tiny_llama, adapter, "tiny_llama"), expected, rtol=0, atol=1e-5)
    assert (expected - logits(tiny_llama, "tiny_llama")).abs().max() > 1e-2


def test_a_name_that_is_anothers_suffix_keeps_its_own_rank(tmp_path: Path) -> None:
    """PEFT matches by suffix and takes the first hit of a pattern: full, anchored names keep modules apart."""

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.x_proj = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.inner = torch.nn.Linear(6, 6), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.proj(self.inner.x_proj(self.proj(x)))

    model, x = Outer(), torch.randn(3, 6)
    ranks = {"proj": 1, "inner.proj": 2, "inner.x_proj": 3}
    plan = RankPlan.of_ranks(linear_shapes(model), ranks, scaling=3.0)
    family = AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=1)
    lora_B = {key: torch.randn(6, rank) for key, rank in ranks.items()}
    adapter = Adapter.of_family(family, "a", lora_B, provenance=Provenance("sft"))
    adapter.save(tmp_path / "a")
    with torch.no_grad(), inject(model, adapter.lora_A, adapter.folded()):
        ours = model(x)
    opened = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    torch.testing.assert_close(opened(x), ours, rtol=0, atol=1e-5)
    assert {key: row.rank for key, row in read(tmp_path / "a").plan.modules.items()} == ranks
