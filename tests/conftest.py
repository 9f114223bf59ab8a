"""Small random models, a small tokenizer, the real models where they have been fetched, one fixed seed.

Nothing of treadle is imported at the top: the jaxtyping hook must be in place before the first import.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub, whatever the shell says
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

if TYPE_CHECKING:
    from treadle.family.adapter import Adapter
    from treadle.family.family import AdapterFamily
    from treadle.family.plan import LayerShape
    from treadle.routing.bank import AdapterBank

VOCABULARY = 128

torch.set_num_threads(1)  # models this small run faster on one thread than on two that wait for each other


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same torch generator."""
    torch.manual_seed(0)


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode, without gradients, as treadle loads its bases."""
    return model.eval().requires_grad_(False)


def llama_of(*, width: int = 32, layers: int = 2, seed: int = 11) -> LlamaForCausalLM:
    """Decoder layers with grouped-query attention and a tied head: Linear modules of four different shapes."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return frozen(LlamaForCausalLM(config))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Two decoder layers, 32 wide."""
    return llama_of()


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    """Two layers of Conv1D modules, whose weights are (in, out)."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(12)
    return frozen(GPT2LMHeadModel(config))


@pytest.fixture
def tiny_bert() -> BertForSequenceClassification:
    """A two-layer encoder with a head of three classes."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(13)
    return frozen(BertForSequenceClassification(config))


@pytest.fixture
def tiny_t5() -> T5ForConditionalGeneration:
    """A two-layer encoder and a two-layer decoder."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    torch.manual_seed(14)
    return frozen(T5ForConditionalGeneration(config))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3, then punctuation, digits, letters and words.

    Puts `<bos>` first, pads on the left.
    """
    words = "the a of is not good bad film question answer yes no why who where when positive negative colour number"
    entries = ["<pad>", "<bos>", "<eos>", "<unk>", *".,:;?!'\"()-+=*/", *"0123456789", *"abcdefghijklmnopqrstuvwxyz"]
    entries += [word for word in words.split() if word not in entries]
    entries += [f"w{index}" for index in range(VOCABULARY - len(entries))]
    core = Tokenizer(models.WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def fetched(name: str) -> Path:
    """The folder of a catalogue model; skips the test where nobody has fetched it yet."""
    from treadle.models.catalogue import entry
    from treadle.models.fetch import fetched_folder, is_whole

    folder = fetched_folder(name)
    if not is_whole(entry(name), folder):
        pytest.skip(f"{name} is not in the cache: run make models")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return fetched("smollm2-135m")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return fetched("minilm-l6")


def family_of(model: PreTrainedModel, *, rank: int = 4, kinds: Sequence[str] | None = None) -> "AdapterFamily":
    """A family over a tiny model, scaling 2."""
    from treadle.family.family import AdapterFamily
    from treadle.family.injection import linear_shapes
    from treadle.family.plan import RankPlan
    from treadle.models.identity import BaseIdentity

    plan = RankPlan.uniform(linear_shapes(model, kinds), rank=rank, scaling=2.0)
    return AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=3)


def adapter_of(family: "AdapterFamily", name: str, *, scale: float = 0.3) -> "Adapter":
    """A member whose B is drawn from its name; strong enough to change what a tiny model says."""
    from treadle.family.adapter import Adapter, Provenance

    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-4:], "big"))
    lora_B = {
        module: scale * torch.randn(row.out_features, row.rank, generator=generator)
        for module, row in family.plan.modules.items()
    }
    return Adapter.of_family(family, name, lora_B, provenance=Provenance("test"))


def foreign_of(family: "AdapterFamily", name: str, *, rank: int = 3, every: int = 2) -> "Adapter":
    """An adapter with an A of its own, another rank, and only every second module of the family."""
    from treadle.family.adapter import Adapter, Provenance
    from treadle.family.plan import RankPlan

    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-4:], "big"))
    shapes = dict(list(family_shapes(family).items())[::every])
    plan = RankPlan.uniform(shapes, rank=rank, scaling=1.5)
    lora_A = {m: 0.2 * torch.randn(rank, s.in_features, generator=generator) for m, s in shapes.items()}
    lora_B = {m: 0.3 * torch.randn(s.out_features, rank, generator=generator) for m, s in shapes.items()}
    return Adapter(name, plan, lora_A, lora_B, None, None, Provenance("foreign"))


def family_shapes(family: "AdapterFamily") -> "dict[str, LayerShape]":
    return {module: row.shape for module, row in family.plan.modules.items()}


PASSAGES = (
    "the film is good : a question of colour",
    "w10 w11 w12 w13 w14 w15",
    "why is the answer not positive ?",
    "a b c d e f g h",
    "who where when number 1 2 3",
    "yes no bad w20 w21 ( w22 )",
)


def bank_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, foreign: bool = True, access: str = "open"
) -> "AdapterBank":
    """Four members and a foreign adapter, calibrated on `PASSAGES`."""
    from treadle.routing.bank import AdapterBank
    from treadle.routing.calibration import PublicCalibration

    family = family_of(model)
    adapters = [adapter_of(family, name, scale=scale) for name, scale in MEMBERS.items()]
    adapters += [foreign_of(family, "stranger")] if foreign else []
    return AdapterBank.build(
        family, adapters, calibration=PublicCalibration(PASSAGES), model=model, tokenizer=tokenizer, access=access
    )


MEMBERS = {"alpha": 0.3, "beta": 0.5, "gamma": 0.3, "delta": 0.2}


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions above, since test modules cannot import this file."""
    return SimpleNamespace(
        llama=llama_of,
        family=family_of,
        adapter=adapter_of,
        foreign=foreign_of,
        bank=bank_of,
        passages=PASSAGES,
        members=tuple(MEMBERS),
    )
