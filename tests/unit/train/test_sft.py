"""Training moves B as a plain loop would, repeats itself, survives a kill, and touches nothing else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from treadle.data.prompts import Example
from treadle.errors import InputError, MismatchError, TreadleError
from treadle.family.family import AdapterFamily
from treadle.train.batches import steps_of
from treadle.train.checkpoint import FILE
from treadle.train.rows import Row, encoded, within_budget
from treadle.train.settings import SftSettings
from treadle.train.sft import SftResult, train_sft

FamilyOf = Callable[..., AdapterFamily]
SETTINGS = SftSettings(learning_rate=0.02, batch_size=4, epochs=2, seed=5)


def equal(left: SftResult, right: SftResult) -> bool:
    return left.losses == right.losses and all(torch.equal(B, right.lora_B[name]) for name, B in left.lora_B.items())


def reference_loss(model: PreTrainedModel, merged: dict[str, Tensor], row: Row) -> Tensor:
    """Minus the log-probability of the target, one unpadded row through merged weights."""
    tokens = torch.tensor([row.prompt + row.target])
    logits = functional_call(model, merged, (tokens,)).logits[0, len(row.prompt) - 1 : -1]
    return -logits.log_softmax(-1)[range(len(row.target)), list(row.target)].sum()


def reference(
    model: PreTrainedModel, family: AdapterFamily, rows: list[Row], settings: SftSettings
) -> tuple[list[float], dict[str, Tensor]]:
    """The whole run written out: weights W + B·A merged, one row at a time, the plain AdamW."""
    lora_B = {name: nn.Parameter(torch.zeros(m.out_features, m.rank)) for name, m in family.plan.modules.items()}
    optimizer = torch.optim.AdamW(
        lora_B.values(), settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    steps, losses = steps_of([row.tokens for row in rows], settings), []
    for index, step in enumerate(steps):
        chosen = [rows[i] for batch in step for i in batch]
        merged = {
            f"{name}.weight": model.get_submodule(name).weight + B @ family.lora_A[name] for name, B in lora_B.items()
        }
        loss = sum(reference_loss(model, merged, row) for row in chosen) / sum(len(row.target) for row in chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lora_B.values(), settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = settings.rate(index, len(steps))
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: B.detach() / family.scaling(name) for name, B in lora_B.items()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("uniform", [True, False])
def test_it_is_the_plain_loop(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
    accumulation: int,
    uniform: bool,
) -> None:
    family = family_of(tiny_llama, uniform=uniform)
    settings = SftSettings(
        learning_rate=0.01,
        batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        warmup=0.3,
        weight_decay=0.1,
        max_grad_norm=0.05,
        seed=2,
    )
    found = train_sft(tiny_llama, tiny_tokenizer, family, examples[:12], settings)
    rows = encoded(tiny_llama, tiny_tokenizer, examples[:12], settings)
    losses, lora_B = reference(tiny_llama, family, [rows[i] for i in within_budget(rows, settings)], settings)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    for name, B in lora_B.items():
        torch.testing.assert_close(found.lora_B[name], B, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5", "tiny_bert"])
def test_every_kind_of_model_learns(
    name: str,
    request: pytest.FixtureRequest,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    model = request.getfixturevalue(name)
    if name == "tiny_bert":
        examples = [Example(e.prompt, "LABEL_1" if "good" in e.prompt else "LABEL_0") for e in examples]
    settings = SftSettings(learning_rate=0.1, batch_size=8, epochs=4, max_grad_norm=10.0)
    result = train_sft(model, tiny_tokenizer, family_of(model), examples, settings)
    assert sum(result.losses[-3:]) < 0.97 * sum(result.losses[:3])
    assert result.examples == 24
    assert len(result.losses) == 12


def test_one_seed_one_adapter_another_seed_another(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    family = family_of(tiny_llama)
    torch.manual_seed(1)
    first = train_sft(tiny_llama, tiny_tokenizer, family, examples, SETTINGS)
    torch.manual_seed(2)  # nothing depends on torch's generator
    assert equal(first, train_sft(tiny_llama, tiny_tokenizer, family, examples, SETTINGS))
    other = SftSettings(learning_rate=0.02, batch_size=4, epochs=2, seed=6)
    assert not equal(first, train_sft(tiny_llama, tiny_tokenizer, family, examples, other))


def test_the_model_is_left_as_it_was(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    family = family_of(tiny_llama)
    tiny_llama.train()
    tiny_llama.lm_head.requires_grad_(True)
    tiny_llama.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    train_sft(tiny_llama, tiny_tokenizer, family, examples[:4], SETTINGS)
    assert tiny_llama.training
    assert not tiny_llama.model.norm.training
    assert [p.requires_grad for p in tiny_llama.lm_head.parameters()] == [True]
    assert not any(p.requires_grad for p in tiny_llama.model.layers.parameters())
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    after = tiny_llama.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_dropout_is_off_whatever_mode_the_model_is_in(
    tiny_gpt2: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, family_of: FamilyOf, examples: list[Example]
) -> None:
    for module in tiny_gpt2.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    family = family_of(tiny_gpt2)
    still = train_sft(tiny_gpt2, tiny_tokenizer, family, examples[:8], SETTINGS)
    tiny_gpt2.train()
    assert equal(still, train_sft(tiny_gpt2, tiny_tokenizer, family, examples[:8], SETTINGS))


def test_the_result_counts_what_it_did(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = SftSettings(max_tokens=60, max_length=6, batch_size=2, epochs=2)
    result = train_sft(
        tiny_llama,
        tiny_tokenizer,
        family_of(tiny_llama),
        examples,
        settings,
        progress=lambda *call: seen.append(call),
    )
    assert 48 < result.tokens <= 60
    assert 0 < result.truncated <= result.examples
    assert [done for _, done, _ in seen] == list(range(1, len(result.losses) + 1))
    assert {total for _, _, total in seen} == {len(result.losses)}
    assert all(" tokens/s, " in text and text.startswith("loss ") and text.endswith(" left") for text, _, _ in seen)


def test_the_adapter_says_where_it_comes_from_but_nothing_about_private_data(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    family = family_of(tiny_llama, seed=3)
    result = train_sft(tiny_llama, tiny_tokenizer, family, examples[:4], SETTINGS)
    adapter = result.adapter("signs", data="signs-2026")
    assert adapter.family == family.fingerprint
    provenance = adapter.provenance
    assert (provenance.method, provenance.data, provenance.epsilon) == ("sft", "signs-2026", None)
    assert provenance.seeds == {"family": 3, "train": 5}
    assert provenance.settings["learning_rate"] == 0.02
    assert {"treadle", "torch", "transformers", "peft"} == set(provenance.versions)
    adapter.save(tmp_path / "signs")
    stored = json.loads((tmp_path / "signs" / "treadle.json").read_text())["provenance"]
    assert stored["epsilon"] == "none"
    assert stored["data_sha256"] is None
    assert not {"examples", "losses", "tokens", "truncated"} & stored["settings"].keys()
    assert result.adapter("signs", data="signs", data_sha256="0" * 64).provenance.data_sha256 == "0" * 64


def test_a_loss_that_is_no_number_stops_the_run(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, family_of: FamilyOf, examples: list[Example]
) -> None:
    family = family_of(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = float("nan")
    with pytest.raises(TreadleError, match=r"the loss is nan .* at step 1 of 12; lower learning_rate"):
        train_sft(tiny_llama, tiny_tokenizer, family, examples, SETTINGS)
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_a_b_that_cannot_move_stops_the_run(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, family_of: FamilyOf, examples: list[Example]
) -> None:
    with torch.no_grad():
        tiny_llama.model.norm.weight.zero_()
    with pytest.raises(TreadleError, match="no lora_B moved in the first step"):
        train_sft(tiny_llama, tiny_tokenizer, family_of(tiny_llama), examples, SETTINGS)


def test_another_models_family_is_refused(
    tiny_llama: LlamaForCausalLM,
    tiny_gpt2: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
) -> None:
    with pytest.raises(MismatchError, match=r"the model has no module 'transformer\.h\.0"):
        train_sft(tiny_llama, tiny_tokenizer, family_of(tiny_gpt2), examples, SETTINGS)


class StoppedError(Exception):
    """Somebody pressed a key."""


def test_a_stopped_run_continues_and_a_finished_one_returns_at_once(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    family_of: FamilyOf,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    family = family_of(tiny_llama, uniform=False)
    unbroken = train_sft(tiny_llama, tiny_tokenizer, family, examples, SETTINGS)
    often = SftSettings(learning_rate=0.02, batch_size=4, epochs=2, seed=5, checkpoint_seconds=0.0)

    def stop(_: str, done: int, __: int) -> None:
        if done % 5 == 0:
            raise StoppedError

    for _ in range(2):
        with pytest.raises(StoppedError):
            train_sft(tiny_llama, tiny_tokenizer, family, examples, often, checkpoint_folder=tmp_path, progress=stop)
    resumed = train_sft(tiny_llama, tiny_tokenizer, family, examples, often, checkpoint_folder=tmp_path)
    assert resumed.resumed_at == 10
    assert equal(resumed, unbroken)
    finished = train_sft(tiny_llama, tiny_tokenizer, family, examples, often, checkpoint_folder=tmp_path)
    assert finished.resumed_at == 12
    assert equal(finished, unbroken)
    with pytest.raises(MismatchError, match="the checkpoint's data is"):
        train_sft(tiny_llama, tiny_tokenizer, family, examples[1:], often, checkpoint_folder=tmp_path)
    with pytest.raises(InputError, match="the checkpoint's family is"):
        train_sft(
            tiny_llama, tiny_tokenizer, family_of(tiny_llama, seed=1), examples, often, checkpoint_folder=tmp_path
        )


SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from treadle.data.prompts import Example
from treadle.family.family import AdapterFamily
from treadle.train.settings import SftSettings
from treadle.train.sft import train_sft

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
family = AdapterFamily.load(folder / "family")
examples = [Example(f"question w{40 + i % 60} a b", f" w{50 + i % 50}") for i in range(120)]
settings = SftSettings(batch_size=2, seed=1, checkpoint_seconds=0.0)
checkpoints = folder / "checkpoints" if sys.argv[2] == "broken" else None
result = train_sft(model, tokenizer, family, examples, settings, checkpoint_folder=checkpoints,
                   progress=lambda text, done, total: print(done, flush=True))
save_file(dict(result.lora_B), folder / f"{sys.argv[2]}.safetensors")
"""


def killed_at(folder: Path, step: int) -> bool:
    """Train in a process of its own and kill it with SIGKILL once it reports `step`; False if it ended before."""
    command = [sys.executable, "-c", SCRIPT, str(folder), "broken"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if int(line) >= step:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_minus_nine_changes_nothing(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, family_of: FamilyOf, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    family_of(tiny_llama, uniform=False).save(tmp_path / "family")
    assert killed_at(tmp_path, 13)
    assert (tmp_path / "checkpoints" / FILE).exists()
    assert killed_at(tmp_path, 41)
    for mode in ("broken", "unbroken"):
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), mode], check=True, capture_output=True)
    broken, unbroken = (load_file(tmp_path / f"{mode}.safetensors") for mode in ("broken", "unbroken"))
    assert broken.keys() == unbroken.keys()
    assert all(torch.equal(B, unbroken[name]) for name, B in broken.items())
