"""The model as a stage sees it: the ranks that the stage trains are a PEFT adapter, the others only act.

The trained ranks of a module are a smaller LoRA of their own, so gradients and moments exist for them alone and no
mask is needed; modules without a trained rank are not wrapped at all. Everything else that acts (ranks trained by
other stages, the subtracted start) is frozen. In a wrapped module it rides in the product of the trained ranks, so that
a step multiplies no more than one that trains all; in the others, and wherever PEFT's adapter is not the one that acts,
hooks on the layers add it. PEFT's adapter is called "default", as TRL expects: the reference policy that TRL then
copies is the policy with which the stage began.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from treadle.errors import InputError
from treadle.family.injection import Attachment, adapted_layers, inject, low_rank_delta
from treadle.family.peft_format import lora_config
from treadle.family.plan import ModulePlan, RankPlan
from treadle.train.stages.factors import Factors

ADAPTER = "default"


@dataclass(frozen=True)
class Acting:
    """A base model with the factors in it.

    Attributes:
        model: PEFT's; its trainable parameters are those of the stage.
        lora_A: PEFT's parameter of the trained ranks, (trained ranks, in_features) a module that has some.
        lora_B: likewise, (out_features, trained ranks).
        factors: from which it was made.
        trained: (rank,) a module, which ranks are in the parameters.
    """

    model: PeftModel
    lora_A: Mapping[str, nn.Parameter]
    lora_B: Mapping[str, nn.Parameter]
    factors: Factors
    trained: Mapping[str, Bool[Tensor, " rank"]]

    def now(self) -> Factors:
        """The factors as they are by now."""
        lora_A: dict[str, Tensor] = {}
        lora_B: dict[str, Tensor] = {}
        for name, B in self.lora_B.items():
            kept = self.trained[name]
            lora_B[name] = self.factors.lora_B[name].clone()
            lora_B[name][:, kept] = B.detach().to(lora_B[name])
            if self.factors.moves_A:
                lora_A[name] = self.factors.lora_A[name].clone()
                lora_A[name][kept] = self.lora_A[name].detach().to(lora_A[name])
        return self.factors.moved(lora_A, lora_B)


def all_ranks(factors: Factors) -> dict[str, Bool[Tensor, " rank"]]:
    """Every rank of every module, as what a stage trains."""
    return {name: torch.ones(row.rank, dtype=torch.bool) for name, row in factors.plan.modules.items()}


@contextlib.contextmanager
def acting(model: PreTrainedModel, factors: Factors, trained: Mapping[str, Bool[Tensor, " rank"]]) -> Iterator[Acting]:
    """A block in which the model acts with the factors, and `trained` of their ranks can be trained.

    After the block the model is what it was: its modules, its forward, its parameters' wish for gradients, its
    configuration's tokens (TRL writes into all of these).

    Args:
        model: the base.
        factors: what acts.
        trained: (rank,) a module; a module that is left out trains none.

    Raises:
        InputError: no rank is to be trained.
        MismatchError: the model lacks a module.
    """
    chosen = {name: row for name, row in trained.items() if bool(row.any())}
    if not chosen:
        raise InputError("no rank is left to train", where="region", remedy="raise theta or share")
    layers = adapted_layers(model, {name: row.shape for name, row in factors.plan.modules.items()})
    plan = RankPlan({name: _smaller(factors.plan.modules[name], int(row.sum())) for name, row in chosen.items()})
    transposed = isinstance(next(iter(layers.values())), Conv1D)
    config = lora_config(plan, base_name=model.name_or_path or "", task_type="CAUSAL_LM", transposed=transposed)
    config.inference_mode = False
    others = _others(factors, chosen)
    alone = {name: sides for name, sides in others.items() if name not in chosen}
    with _as_before(model), _injected(model, factors, alone), contextlib.ExitStack() as hooks:
        wrapped = cast("PeftModel", get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False))
        try:
            parts = {name: _parts(wrapped, name) for name in chosen}
            for name, (A, B) in parts.items():
                _fill(A, factors.lora_A[name][chosen[name]])
                _fill(B, factors.lora_B[name][:, chosen[name]])
                if not factors.moves_A:
                    A.requires_grad_(False)
                    _keep_frozen(wrapped, name)
                if name in others:
                    hooks.enter_context(_riding(wrapped, name, others[name]))
            sides = [{name: part[side] for name, part in parts.items()} for side in (0, 1)]
            yield Acting(wrapped, sides[0], sides[1], factors, chosen)
        finally:
            wrapped.unload()


def _smaller(row: ModulePlan, rank: int) -> ModulePlan:
    return ModulePlan(rank, row.scaling * rank, row.in_features, row.out_features)


def _parts(model: PeftModel, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    layer = model.get_submodule(f"base_model.model.{name}")
    return layer.get_parameter(f"lora_A.{ADAPTER}.weight"), layer.get_parameter(f"lora_B.{ADAPTER}.weight")


def _keep_frozen(model: PeftModel, name: str) -> None:
    """Let A stay frozen when PEFT switches adapters, as TRL makes it do for the reference of a KL term."""
    layer = cast("LoraLayer", model.get_submodule(f"base_model.model.{name}"))
    layer.frozen_peft_weight_names = {ADAPTER: ("lora_A",)}


def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Give the parameter the value, in float32 whatever the model's dtype."""
    parameter.data = value.detach().to(parameter.device, torch.float32, copy=True).contiguous()


def others_acting(model: PreTrainedModel, factors: Factors, trained: Mapping[str, Bool[Tensor, " rank"]]) -> Attachment:
    """Hooks by which all acts that is not trained: other ranks, and the start with its sign turned.

    Args:
        model: the base.
        factors: what acts.
        trained: (rank,) a module, the ranks that are left to the caller.
    """
    return _injected(model, factors, _others(factors, trained))


def _others(factors: Factors, trained: Mapping[str, Bool[Tensor, " rank"]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (others, in_features) and B (out_features, others) of what acts untrained, in the modules that have some."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, A in factors.lora_A.items():
        others = ~trained.get(name, torch.zeros(len(A), dtype=torch.bool))
        sides = [(A[others], factors.lora_B[name][:, others])]
        if name in factors.start_B:
            sides.append((factors.start_A[name], -factors.start_B[name]))
        sides = [(a, b) for a, b in sides if bool(b.any())]
        if sides:
            found[name] = (torch.cat([a for a, _ in sides]), torch.cat([b for _, b in sides], dim=1))
    return found


def _injected(model: PreTrainedModel, factors: Factors, others: Mapping[str, tuple[Tensor, Tensor]]) -> Attachment:
    """Hooks that add the others' products."""
    lora_A = {name: A for name, (A, _) in others.items()}
    return inject(model, lora_A, {name: factors.scaling(name) * B for name, (_, B) in others.items()})


class _Joined(nn.Module):
    """A factor whose trained ranks are its parameter, as PEFT's own layer has it, and whose others are frozen."""

    others: Tensor

    def __init__(self, weight: nn.Parameter, others: Tensor, dim: int) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("others", others.detach().to(weight), persistent=False)
        self._dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.cat([self.weight, self.others], self._dim))


def _riding(model: PeftModel, name: str, others: tuple[Tensor, Tensor]) -> Attachment:
    """Let the others act in the product of the module's trained ranks, and by a hook where those ranks do not act.

    TRL's reference policy is another adapter on the same layer, of the trained ranks alone.
    """
    layer = cast("LoraLayer", model.get_submodule(f"base_model.model.{name}"))
    A, B = (
        _Joined(part, other, dim) for dim, (part, other) in enumerate(zip(_parts(model, name), others, strict=True))
    )
    layer.lora_A[ADAPTER], layer.lora_B[ADAPTER] = A, B
    product = low_rank_delta(A.others, layer.scaling[ADAPTER] * B.others)

    def beside(x: Tensor) -> Tensor | None:
        return None if ADAPTER in layer.active_adapters and not layer.disable_adapters else product(x)

    return Attachment({name: layer.get_base_layer()}, {name: beside})


@contextlib.contextmanager
def _as_before(model: PreTrainedModel) -> Iterator[None]:
    """A block after which the model is as it was, whatever a trainer has written into it."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    own_forward = model.__dict__.get("forward")
    configs = (model.config.get_text_config(), model.generation_config)
    before = [dict(config.__dict__) for config in configs]
    tags = getattr(model, "model_tags", None)
    try:
        yield
    finally:
        for parameter, requires_grad in asked.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for module, training in modes.items():
            module.training = training
        if own_forward is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = own_forward
        for config, values in zip(configs, before, strict=True):
            config.__dict__.clear()
            config.__dict__.update(values)
        model.model_tags = tags
