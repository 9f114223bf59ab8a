"""EVA as a peer of the probes: the ranks that PEFT gives by the variance that a layer's inputs explain."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.errors import InputError
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.outputs import check_called, memory_for, token_tensors, trunk_runner
from treadle.ranks.partial import PartialProbe
from treadle.ranks.probing import Probing, Recipe
from treadle.ranks.scores import ProbeScores

NAME = "eva"
_PASSES = 50  # over all batches; PEFT itself would go on for ever


@dataclass(frozen=True)
class EvaSettings:
    """What PEFT's EVA is asked for.

    Attributes:
        rank: mean rank to be shared out.
        rho: a layer gets at most rho·rank, as in `EvaConfig`.
        tau: cosine at which a direction counts as settled, as in `EvaConfig`.

    Raises:
        InputError: a rank below 1, a rho below 1, or a tau outside 0..1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rank: int = 8
    rho: float = 2.0
    tau: float = 0.99

    def __post_init__(self) -> None:
        if self.rank < 1 or not 1 <= self.rho < float("inf") or not 0 <= self.tau <= 1:
            raise InputError(
                f"EVA cannot share out rank {self.rank} with rho {self.rho} and tau {self.tau}",
                remedy="use rank ≥ 1, rho ≥ 1 and 0 ≤ tau ≤ 1",
            )


def eva(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: EvaSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """A score a module: the rank that PEFT's EVA gives it out of rank·modules, a single value for all texts.

    No weight and no output is looked at, only the layers' inputs; layers that read the same input share what it
    explains. The model is left alone.

    Args:
        model: in eval mode.
        inputs: the probe texts.
        shapes: the modules to probe.
        settings: by default rank 8, and PEFT's own rho and tau.
        seed: recorded; PEFT draws by a seed of its own.
        progress: told of every pass over the batches.
        partial: takes up the result of a probe that had ended.

    Raises:
        InputError: too few tokens in every batch, an input that is not finite, directions that do not settle, or as
            for `jacobian`.
        UnsupportedError: a weight is quantised or shared, or a module is never called.

    Reference: arXiv 2410.07170, through `peft.get_eva_state_dict`.
    """
    chosen = settings or EvaSettings()
    recipe = Recipe(NAME, asdict(chosen), 1, seed)
    probing = Probing.begin(recipe, model, inputs, shapes, progress=progress, partial=partial)
    if probing.partial.missing(0, 1, list(shapes)):
        with memory_for(max(inputs.batches, key=Tensor.numel)):
            ranks = _ranks(probing, chosen)
        probing.partial.add(0, 0, {name: torch.tensor([float(ranks[name])]) for name in shapes})
    return probing.scores(batches=1)


def _ranks(probing: Probing, chosen: EvaSettings) -> dict[str, int]:
    """Module → the rank that EVA gives it."""
    batches = _large_enough(probing, round(chosen.rank * chosen.rho))
    calls = 0

    def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls > _PASSES * len(batches):
            raise InputError(f"EVA has not settled after {_PASSES} passes", remedy="lower tau or the rank")
        probing.model.base_model(**batch)
        if calls % len(batches) == 0:
            probing.progress("probing all modules", calls // len(batches), 0)

    config = LoraConfig(
        r=chosen.rank,
        target_modules="|".join(map(re.escape, probing.shapes)),  # a text is an expression that names match in full
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=chosen.rho, tau=chosen.tau),
    )
    layers = probing.layers.values()
    with _without_new_hooks(layers), _contiguous_inputs(layers):
        found = get_eva_state_dict(
            probing.model,
            batches,
            config,
            forward_fn=forward,
            prepare_model_inputs_fn=None,  # texts of a batch have one length, so that every token counts
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return {name: len(found[name]) for name in probing.shapes}


@contextlib.contextmanager
def _without_new_hooks(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A block after which the layers have the forward hooks that they had: PEFT leaves its own when interrupted."""
    hooks = [layer._forward_hooks for layer in layers]  # pyright: ignore[reportPrivateUsage]
    earlier = [set(own) for own in hooks]
    try:
        yield
    finally:
        for own, kept in zip(hooks, earlier, strict=True):
            for key in set(own) - kept:
                del own[key]


@contextlib.contextmanager
def _contiguous_inputs(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A block in which layers read contiguous inputs: PEFT takes a view of each, and BERT's pooler reads a slice."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


def _large_enough(probing: Probing, components: int) -> list[dict[str, Tensor]]:
    """The batches in which every layer has rows for so many directions; PEFT would wait for ever for such a batch.

    Raises:
        InputError: there is none; names the layer that lacks them.
        UnsupportedError: a layer is never called.
    """
    check_called(probing.layers, probing.inputs.batches, trunk_runner(probing.model))
    narrow = next((name for name, shape in probing.shapes.items() if shape.in_features < components), None)
    if narrow is not None:
        raise InputError(f"its input has no {components} directions", where=narrow, remedy="lower the rank or rho")
    tensors = [token_tensors(probing.model, ids) for ids in probing.inputs.batches]
    rows = [_rows(probing, batch) for batch in tensors]
    for name in probing.layers:
        most = max(found[name] for found in rows)
        if most < components:
            raise InputError(
                f"EVA needs {components} rows of its input in a batch, there are {most}",
                where=name,
                remedy="use larger batches (text.batch) or a lower rank, or leave this module out",
            )
    large = [batch for batch, found in zip(tensors, rows, strict=True) if min(found.values()) >= components]
    if not large:
        raise InputError(
            f"no batch has the {components} rows that EVA needs at every module",
            remedy="use larger batches (text.batch)",
        )
    return large


def _rows(probing: Probing, batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Module → how many rows its input has in this batch.

    Raises:
        InputError: one is not finite; PEFT's decomposition would fail on it.
    """
    rows = dict.fromkeys(probing.layers, 0)

    def counting(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not torch.isfinite(inputs[0]).all():
                raise InputError("its input holds NaN or Inf", where=name, remedy="use float32")
            rows[name] = inputs[0].numel() // inputs[0].shape[-1]

        return hook

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, layer in probing.layers.items():
            stack.callback(layer.register_forward_pre_hook(counting(name)).remove)
        probing.model.base_model(**batch)
    return rows
