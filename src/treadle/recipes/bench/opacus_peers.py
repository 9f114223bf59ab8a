"""What a private step of B alone costs others: Opacus on PEFT's layers, by per-example gradients and by ghost clipping.

Their noise comes from torch's own generator, in float32 and once: less work than ours, and not for release.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

Optimizer = TypeVar("Optimizer", bound=DPOptimizer)
Losses = Callable[[nn.Module], Tensor]
"""Maps a model to the losses of a batch, (examples,)."""


@dataclass(frozen=True)
class Step:
    """What every peer's step is told.

    Attributes:
        losses: of the batch that it trains on.
        examples: of the batch.
        learning_rate: of SGD.
        max_grad_norm: to which an example's gradient is clipped.
        noise_multiplier: of the noise.
    """

    losses: Losses
    examples: int
    learning_rate: float
    max_grad_norm: float
    noise_multiplier: float


def opacus_hooks(model: PreTrainedModel, modules: Sequence[str], rank: int, step: Step) -> Callable[[], None]:
    """A step by Opacus' hooks, which keep every example's gradient; the model is changed."""
    wrapped = GradSampleModule(_adapted(model, modules, rank), loss_reduction="sum", strict=False)
    optimizer = _optimizer(DPOptimizer, model, step)

    def run() -> None:
        optimizer.zero_grad()
        step.losses(wrapped).sum().backward()
        optimizer.step()

    return run


def opacus_ghost(model: PreTrainedModel, modules: Sequence[str], rank: int, step: Step) -> Callable[[], None]:
    """A step by Opacus' ghost clipping: norms in a first backward pass, the clipped sum in a second."""
    wrapped = GradSampleModuleFastGradientClipping(
        _adapted(model, modules, rank),
        loss_reduction="sum",
        strict=False,
        max_grad_norm=step.max_grad_norm,  # pyright: ignore[reportArgumentType]  it takes its default, 1, for its type
    )
    optimizer = _optimizer(DPOptimizerFastGradientClipping, model, step)

    def run() -> None:
        optimizer.zero_grad()
        DPTensorFastGradientClipping(wrapped, optimizer, step.losses(wrapped), "sum").backward()
        optimizer.step()

    return run


def _adapted(model: PreTrainedModel, modules: Sequence[str], rank: int) -> PreTrainedModel:
    """The model with PEFT's layers at the modules, of which B alone is trained."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules))
    inject_adapter_in_model(config, model)  # in place
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model  # in eval mode but for PEFT's own layers, where Opacus looks


def _optimizer(kind: type[Optimizer], model: PreTrainedModel, step: Step) -> Optimizer:
    """One of Opacus' optimisers around SGD on what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(
        torch.optim.SGD(trained, lr=step.learning_rate),
        noise_multiplier=step.noise_multiplier,
        max_grad_norm=step.max_grad_norm,
        expected_batch_size=step.examples,
        loss_reduction="sum",
    )
