"""Where a run begins: A and B of every module, by name.

zero       A as the family has it, B = 0
gaussian   A drawn anew (standard deviation 1/rank, as PEFT draws it), B = 0
pissa      B·A is the base weight's principal part
olora      B and A are the first columns of Q and the first rows of R, with Q·R the base weight

At B = 0 every importance is exactly 0, so the first two need a warm-up before regions can be told apart.

Reference: arXiv 2404.02948 (PiSSA), arXiv 2406.01775 (OLoRA).

Deviations: both replace the base's weights by what is left of them; here the base stays and the start is subtracted
from the update (`Factors`). In a family A is given: pissa then starts B at W·A⁺, the part of W that the family's A
can express, which is PiSSA's own start where the family was made with `weight-svd`.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from treadle import randomness
from treadle.errors import UnsupportedError
from treadle.family.family import AdapterFamily
from treadle.family.injection import adapted_layers
from treadle.family.plan import ModulePlan
from treadle.train.stages.factors import Factors

Start = Literal["zero", "gaussian", "pissa", "olora"]
WITHOUT_IMPORTANCE: tuple[Start, ...] = ("zero", "gaussian")
"""Starts at which B = 0."""


def started(model: PreTrainedModel, family: AdapterFamily, start: Start, *, moves_A: bool, seed: int = 0) -> Factors:
    """The factors with which a run begins.

    Args:
        model: the family's base.
        family: gives the plan and, unless A moves, A.
        start: by name.
        moves_A: whether A will be trained, so that the result leaves the family.
        seed: of the Gaussian start.

    Raises:
        UnsupportedError: the start needs an A of its own, and the family's is frozen.
        MismatchError: the model lacks a module of the plan.
    """
    if not moves_A and start in ("gaussian", "olora"):
        raise UnsupportedError(
            f"start = {start!r} makes an A of its own, and the family's A is frozen",
            remedy="choose start = 'zero' or 'pissa', or set moves_A = true, with which the adapter leaves the family",
        )
    plan = family.plan
    A = {name: family.lora_A[name].float() for name in plan.modules}
    zeros = {name: torch.zeros(row.out_features, row.rank) for name, row in plan.modules.items()}
    if start == "zero":
        return Factors(plan, A, zeros, {}, {}, moves_A)
    if start == "gaussian":
        return Factors(plan, _drawn(plan.modules, seed), zeros, {}, {}, moves_A)
    layers = adapted_layers(model, {name: row.shape for name, row in plan.modules.items()})
    weights = {name: _weight_of(layer) for name, layer in layers.items()}
    parts = {
        name: _OWN[start](weights[name], row) if moves_A else _projected(weights[name] / row.scaling, A[name])
        for name, row in plan.modules.items()
    }
    lora_B = {name: part[0].float().contiguous() for name, part in parts.items()}
    lora_A = A if not moves_A else {name: part[1].float().contiguous() for name, part in parts.items()}
    return Factors(plan, lora_A, lora_B, lora_A, lora_B, moves_A)


def _drawn(modules: Mapping[str, ModulePlan], seed: int) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(randomness.normal(seed, f"start/{name}", (row.rank, row.in_features))).float() / row.rank
        for name, row in modules.items()
    }


def _weight_of(layer: torch.nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach().cpu().double()
    return weight.T if isinstance(layer, Conv1D) else weight


def _projected(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """W·A⁺ and A: their product is W on the rows of A and 0 across them."""
    return weight @ torch.linalg.pinv(A.double()), A


def _principal(weight: Tensor, row: ModulePlan) -> tuple[Tensor, Tensor]:
    """U·√(S/s) and √(S/s)·Vᵀ of the largest singular values: s·B·A is then the principal part."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = (S[: row.rank] / row.scaling).sqrt()
    return U[:, : row.rank] * root, root[:, None] * V[: row.rank]


def _orthonormal(weight: Tensor, row: ModulePlan) -> tuple[Tensor, Tensor]:
    """The first columns of Q and the first rows of R."""
    Q, R = torch.linalg.qr(weight)
    return Q[:, : row.rank], R[: row.rank]


_OWN: Mapping[str, Callable[[Tensor, ModulePlan], tuple[Tensor, Tensor]]] = {
    "pissa": _principal,
    "olora": _orthonormal,
}
