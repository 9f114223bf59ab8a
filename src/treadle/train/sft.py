"""Supervised fine-tuning of the B of one adapter in a family."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from treadle.data.prompts import Example
from treadle.errors import TreadleError
from treadle.family.adapter import Adapter, Provenance, package_versions
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable
from treadle.progress import Progress, silent
from treadle.train.attention import quick_attention
from treadle.train.batches import Step, steps_of
from treadle.train.checkpoint import Facts, Run
from treadle.train.objectives import Kind, kind_of, summed_loss, weight
from treadle.train.rows import Row, digest, encoded, within_budget
from treadle.train.settings import SftSettings
from treadle.train.unchanged import eval_mode, unchanged


@dataclass(frozen=True)
class SftResult:
    """What a run made.

    Attributes:
        family: in which it was trained.
        settings: with which.
        lora_B: (out_features, rank) a module, as PEFT stores it (scaling divided out).
        losses: mean cross-entropy (nats) over the target tokens of each step, before the step.
        examples: how many were trained on in each epoch.
        tokens: how many were trained on, all epochs together, padding not counted.
        truncated: how many of the examples lost the beginning of their prompt.
        resumed_at: the step at which the run continued from a checkpoint; 0 for an unbroken run.
        kind: of the model.
        transposed: whether the adapted layers are Conv1D.
    """

    family: AdapterFamily
    settings: SftSettings
    lora_B: Mapping[str, Tensor]
    losses: tuple[float, ...]
    examples: int
    tokens: int
    truncated: int
    resumed_at: int
    kind: Kind
    transposed: bool

    def adapter(self, name: str, *, data: str, data_sha256: str | None = None) -> Adapter:
        """The adapter, with its provenance; it records neither losses nor counts, which are facts about the data.

        Args:
            name: the adapter's.
            data: the name of the data, never a path.
            data_sha256: their digest, only for data that are public.
        """
        provenance = Provenance(
            method="sft",
            data=data,
            data_sha256=data_sha256,
            seeds={"family": self.family.seed, "train": self.settings.seed},
            settings=self.settings.decisive(),
            versions=package_versions(),
        )
        return Adapter.of_family(
            self.family,
            name,
            self.lora_B,
            provenance=provenance,
            task_type=self.kind.value,
            transposed=self.transposed,
        )


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: AdapterFamily,
    examples: Sequence[Example],
    settings: SftSettings,
    *,
    checkpoint_folder: Path | None = None,
    progress: Progress = silent,
) -> SftResult:
    """The lora_B that `examples` teach, A and the model itself staying as they are.

    The loss is the cross-entropy on completions alone (classes for an encoder with a head); the optimiser is AdamW at
    scaling 1, the rate falling linearly. Equal model, data, family and settings give the same lora_B bit for bit on
    one CPU with one number of threads, also when the run was killed and resumed. The model is in eval mode throughout,
    so dropout is off.

    Args:
        model: the family's base model; on return it is as it was.
        tokenizer: the model's.
        family: gives A, ranks and scalings.
        examples: what to learn, in any order.
        settings: the choices of the run.
        checkpoint_folder: where the run's state is kept, and continued from if it is there.
        progress: called after every step.

    Raises:
        InputError: the examples cannot be trained on; see `rows.encoded`.
        MismatchError: the model lacks the family's modules, or the checkpoint is of another run.
        UnsupportedError: the model neither generates nor classifies.
        TreadleError: the loss became NaN, B did not move, or something frozen did.

    Reference: arXiv 2403.12313 §3 (A frozen, B from 0), without its federation and privacy.
    """
    kind, encodings = kind_of(model), encoded(model, tokenizer, examples, settings)
    rows = [encodings[i] for i in within_budget(encodings, settings)]
    work = _Work(model, rows, steps_of([row.tokens for row in rows], settings), settings)
    facts: Facts = {**settings.decisive(), "data": digest(rows), "family": family.fingerprint, "kind": kind.name}
    shapes = {name: module.shape for name, module in family.plan.modules.items()}
    with (
        eval_mode(model),
        quick_attention(model, max(row.tokens for row in rows)),
        unchanged(model, family.lora_A),
        trainable(model, family.lora_A, shapes) as folded,
    ):
        run = Run(facts, folded, _optimizer(folded, settings))
        losses = run.resume(checkpoint_folder) if checkpoint_folder else []
        resumed_at = len(losses)
        _train(work, run, losses, checkpoint_folder, progress)
        lora_B = {name: (B.detach() / family.scaling(name)).cpu() for name, B in folded.items()}
    return SftResult(
        family=family,
        settings=settings,
        lora_B=lora_B,
        losses=tuple(losses),
        examples=len(rows),
        tokens=sum(row.tokens for row in rows) * settings.epochs,
        truncated=sum(row.truncated for row in rows),
        resumed_at=resumed_at,
        kind=kind,
        transposed=isinstance(model.get_submodule(next(iter(shapes))), Conv1D),
    )


@dataclass(frozen=True)
class _Work:
    """All that a run has to do."""

    model: PreTrainedModel
    rows: Sequence[Row]
    steps: Sequence[Step]
    settings: SftSettings

    def tokens(self, step: Step) -> int:
        return sum(self.rows[index].tokens for batch in step for index in batch)


def _train(work: _Work, run: Run, losses: list[float], folder: Path | None, progress: Progress) -> None:
    """Do the steps that `losses` lacks, appending to it."""
    left = sum(work.tokens(step) for step in work.steps[len(losses) :])
    saved, busy, tokens = time.monotonic(), 0.0, 0
    for index in range(len(losses), len(work.steps)):
        begun = time.monotonic()
        losses.append(_one_step(work, run, index))
        busy += time.monotonic() - begun
        tokens += work.tokens(work.steps[index])
        last = index + 1 == len(work.steps)
        if folder and (last or time.monotonic() - saved >= work.settings.checkpoint_seconds):
            run.save(folder, losses)
            saved = time.monotonic()
        rate = tokens / max(busy, 1e-9)
        progress(_description(losses[-1], rate, (left - tokens) / rate), index + 1, len(work.steps))


def _one_step(work: _Work, run: Run, index: int) -> float:
    """Move B once; returns the loss it had, averaged over the step's targets."""
    step, parameters = work.steps[index], list(run.lora_B.values())
    batches = [[(work.rows[i].prompt, work.rows[i].target) for i in batch] for batch in step]
    count = sum(weight(kind_of(work.model), batch) for batch in batches)
    run.optimizer.zero_grad()
    loss = 0.0
    for batch in batches:
        share = summed_loss(work.model, batch) / count
        share.backward()
        loss += share.item()
    norm = nn.utils.clip_grad_norm_(parameters, work.settings.max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TreadleError(
            f"the loss is {loss:.3g} and its gradient {norm:.3g} at step {index + 1} of {len(work.steps)}",
            remedy="lower learning_rate, or check the base model",
        )
    for group in run.optimizer.param_groups:
        group["lr"] = work.settings.rate(index, len(work.steps))
    run.optimizer.step()
    if index == 0 and not any(bool(B.detach().any()) for B in parameters):
        raise TreadleError(
            "no lora_B moved in the first step", remedy="plan modules whose output reaches the loss, or check the base"
        )
    return loss


def _optimizer(lora_B: Mapping[str, nn.Parameter], settings: SftSettings) -> torch.optim.Optimizer:
    parameters = list(lora_B.values())
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused)


def _description(loss: float, rate: float, seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"loss {loss:.3f}, {rate:.0f} tokens/s, {minutes}:{rest:02d} left"
