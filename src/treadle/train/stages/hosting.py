"""What both kinds of stage ask of the trainers that host them: arguments, records, checkpoints.

TRL's trainers are transformers' Trainer. They run as they are: nothing of them is patched or subclassed, and where a
stage trains every rank their trajectory is TRL's own, number by number.

Checkpoints within a stage are the Trainer's own and live in the run's folder until the stage is over. Their generator
states and moments are torch files, which the Trainer opens as weights only.
"""

import contextlib
import json
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from treadle.errors import InputError, TreadleError, UnavailableError
from treadle.progress import Progress, silent
from treadle.train.stages.acting import Acting
from treadle.train.stages.settings import Stage

_SUMMARY = "train_runtime"  # only the last record of a run has it, which speaks of seconds


@dataclass(frozen=True)
class Record:
    """What a trainer tells after a step: the step, counted from 1, and TRL's metrics by their own names."""

    step: int
    values: Mapping[str, float]


Look = Callable[[int], Mapping[str, float]]
"""Told the step, counted from 1; measures the model and returns metrics by name."""


@dataclass(frozen=True)
class Hosting:
    """How a stage is run, none of which changes what it makes.

    Attributes:
        folder: where its checkpoints are, and whence it continues.
        save_steps: steps between checkpoints; 0 keeps none.
        look: called every `look_steps` steps, and after the last.
        look_steps: 0 never calls it.
        progress: called after every step.
    """

    folder: Path
    save_steps: int = 0
    look: Look | None = None
    look_steps: int = 0
    progress: Progress = silent


@dataclass(frozen=True)
class Told:
    """What a stage has told so far, in order; a continued one begins where it had stopped."""

    records: list[Record] = field(default_factory=list[Record])


class _Following(TrainerCallback):
    """Writes the records down, and shows progress."""

    def __init__(self, hosting: Hosting, told: Told) -> None:
        self._hosting, self._told = hosting, told
        self._found: Mapping[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: Any,  # noqa: ANN401  # what the trainer passes to every callback
    ) -> None:
        """Keep what is a number."""
        if logs is None or _SUMMARY in logs:
            return
        values = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        self._told.records.append(Record(state.global_step, values))
        self._hosting.progress(_line(values, self._found), state.global_step, state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,  # noqa: ANN401  # as above
    ) -> None:
        """Let whoever looks look."""
        look, every = self._hosting.look, self._hosting.look_steps
        if look is None or every == 0:
            return
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._found = dict(look(state.global_step))  # shown from now on, since lines are fewer than steps
            record = Record(state.global_step, self._found)
            self._told.records.append(record)
            state.log_history.append({"step": record.step, **record.values})  # kept with the next checkpoint


def _line(values: Mapping[str, float], found: Mapping[str, float]) -> str:
    told = {name: values[name] for name in ("loss", "reward", "frac_reward_zero_std") if name in values}
    return ", ".join(f"{name} {value:.3f}" for name, value in {**told, **found}.items()) or "training"


def common_arguments(acting: Acting, stage: Stage, hosting: Hosting) -> dict[str, Any]:
    """The arguments that SFTConfig and GRPOConfig share."""
    device = next(acting.model.parameters()).device
    return {
        "output_dir": str(hosting.folder),
        "max_steps": stage.steps,
        "learning_rate": stage.learning_rate,
        # transformers' "constant" knows no rise, and would leave warmup out without a word.
        "lr_scheduler_type": "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        "warmup_steps": round(stage.warmup * stage.steps),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "seed": stage.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show the mean of the steps before in the place of NaN
        "save_strategy": "steps" if hosting.save_steps else "no",
        "save_steps": hosting.save_steps or 1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda" and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": False,
        "dataloader_pin_memory": device.type == "cuda",
    }


def adamw(acting: Acting, stage: Stage) -> torch.optim.Optimizer:
    """The optimiser that the Trainer would make of the stage's parameters.

    It is made here, because the Trainer makes its own after it has read a checkpoint, and reading one lets TRL's
    reference adapter ask for gradients: the moments would then fit no parameters.
    """
    parameters = [parameter for parameter in acting.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay, fused=True)


def following(hosting: Hosting, told: Told) -> Sequence[TrainerCallback]:
    """The callbacks of a stage."""
    return [_Following(hosting, told)]


def run_to_the_end(trainer: Trainer, hosting: Hosting, told: Told) -> None:
    """Train, from the last whole checkpoint before the last step in the folder if there is one.

    Raises:
        TreadleError: a loss or a factor is not finite, or the trainer stopped before the last step.
        UnavailableError: a checkpoint cannot be written; the one before it stands.
    """
    trainer.remove_callback(PrinterCallback)
    # The Trainer keeps one of the last step as well, and would make another step from it.
    found = last_checkpoint(hosting.folder, below=trainer.args.max_steps)
    if found is not None:
        state = TrainerState.load_from_json(str(found / "trainer_state.json"))
        told.records[:] = [
            Record(int(entry["step"]), {name: float(value) for name, value in entry.items() if name != "step"})
            for entry in state.log_history
        ]
    try:
        with _writing(trainer, hosting.folder):
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    except RuntimeError:  # what torch says of sampling from NaN
        _refuse_divergence(trainer)
        raise
    for record in told.records:
        loss = record.values.get("loss", 0.0)
        if not -float("inf") < loss < float("inf"):
            raise TreadleError(f"the loss is {loss} at step {record.step}", remedy="lower learning_rate")
    _refuse_divergence(trainer)
    if trainer.state.global_step < trainer.state.max_steps:
        raise TreadleError(
            f"the trainer stopped after {trainer.state.global_step} of {trainer.state.max_steps} steps",
            remedy="give it more examples, or fewer prompts a step",
        )


def _refuse_divergence(trainer: Trainer) -> None:
    model = cast("torch.nn.Module", trainer.model)
    if not all(bool(part.isfinite().all()) for part in model.parameters() if part.requires_grad):
        raise TreadleError("a factor became NaN or infinite", remedy="lower learning_rate")


@contextlib.contextmanager
def _writing(trainer: Trainer, folder: Path) -> Iterator[None]:
    """A block in which the Trainer's failure to write a checkpoint is one line, whichever library wrote."""
    try:
        yield
    except Exception as error:  # open, torch, safetensors and tokenizers have each their own
        if not any(frame.f_code.co_name == "_save_checkpoint" for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise UnavailableError(
            f"cannot write the checkpoint ({error.strerror if isinstance(error, OSError) else error})",
            where=folder / f"checkpoint-{trainer.state.global_step}",
            remedy="free space and run it again: it goes on from the checkpoint before",
        ) from error


def last_checkpoint(folder: Path, *, below: int | None = None) -> Path | None:
    """The newest checkpoint that was written to its end, the Trainer's state being its last file; None without one.

    Args:
        folder: of the checkpoints.
        below: only steps before this one count; None takes all.
    """
    found = {int(path.parent.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*/trainer_state.json")}
    whole = [step for step, path in found.items() if (below is None or step < below) and _is_json(path)]
    return found[max(whole)].parent if whole else None


def _is_json(path: Path) -> bool:
    """Whether the file was written to its end."""
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def discard(folder: Path) -> None:
    """Remove a stage's checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def with_padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """A block in which the tokenizer pads, with its end of sequence if it has no token for it; then it is as before.

    Raises:
        InputError: it has neither.
    """
    before = tokenizer.pad_token
    if before is None and tokenizer.eos_token is None:
        raise InputError(
            "the tokenizer has neither a token for padding nor one for the end", remedy="give it an eos_token"
        )
    try:
        if before is None:
            tokenizer.pad_token = tokenizer.eos_token
        yield tokenizer
    finally:
        tokenizer.pad_token = before
