"""AdamW on some elements of each parameter: the others stay bit for bit, and have no optimiser state.

Zeroing gradients instead, as the published code does, leaves the moments dense; weight decay and the momentum from
before a change of masks move what should stand still.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim.adamw import adamw

from treadle.errors import InputError, MismatchError, require
from treadle.partition.units import Mask

Masks = Mapping[nn.Parameter, Bool[Tensor, "..."]]
"""Parameter → True where it may move, of its own shape."""

Group = dict[str, object]
"""A group of parameters with settings of their own, as every torch optimiser takes it."""


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW that gathers the active elements, moves them, and puts them back.

    The arithmetic is `torch.optim.adamw.adamw` on the gathered elements, so with full masks the trajectory is that of
    torch's AdamW bit for bit (of `AdamW(foreach=False)`, or of `AdamW(fused=True)` if `fused`). The state of a
    parameter is `step` and, for active elements alone, `exp_avg` and `exp_avg_sq`; beside it stands one byte of mask
    an element. Gradients are as dense as the backward pass leaves them: see `masked_gradients`.

    Masks are the entry "masks" of each group, in the order of its parameters, and so part of `state_dict`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[Group],
        masks: Masks,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = False,
    ) -> None:
        """An optimiser that has not stepped.

        Args:
            params: parameters, or groups of them, as for torch's AdamW.
            masks: parameter → its active elements, for each of them.
            lr: the learning rate, at least 0.
            betas: decay of both moments, in [0, 1).
            eps: added to the denominator.
            weight_decay: decoupled, at least 0.
            fused: whether one kernel does it all.

        Raises:
            ConfigError: a setting is out of its range.
            InputError: a parameter has no mask, or none of another shape or type.
        """
        require("lr", lr, lr >= 0, "at least 0")
        require("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)")
        require("eps", eps, eps >= 0, "at least 0")
        require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__([_with_masks(group, masks) for group in _groups(params)], defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, whose "masks" stand in the order of its parameters.

        Raises:
            InputError: a mask is missing, or of another shape or type.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["masks"] = _checked(group["params"], cast("Sequence[Tensor]", group.get("masks", ())))

    def switch(self, masks: Masks) -> None:
        """Let other elements move. Parameters whose mask changes begin with fresh moments; the others keep theirs.

        Args:
            masks: parameter → its active elements from now on; parameters that are not named keep their mask.

        Raises:
            InputError: a mask is of another shape or type.
        """
        for group in self.param_groups:
            chosen = [masks.get(p, mask) for p, mask in zip(group["params"], group["masks"], strict=True)]
            checked = _checked(group["params"], chosen)
            for parameter, before, after in zip(group["params"], group["masks"], checked, strict=True):
                if not torch.equal(before, after):
                    self.state.pop(parameter, None)
            group["masks"] = checked

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the active elements of every parameter that has a gradient; returns the closure's loss, if there is one.

        Args:
            closure: computes the loss and its gradients anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, mask in zip(group["params"], group["masks"], strict=True):
                if parameter.grad is not None:
                    self._move(group, parameter, mask)
        return loss

    def _move(self, group: Group, parameter: nn.Parameter, mask: Tensor) -> None:
        active = parameter[mask]
        if not active.numel():
            return
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(active), torch.zeros_like(active)
        beta1, beta2 = cast("tuple[float, float]", group["betas"])
        adamw(
            [active],
            [cast("Tensor", parameter.grad)[mask]],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            fused=cast("bool", group["fused"]),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=cast("float", group["lr"]),
            weight_decay=cast("float", group["weight_decay"]),
            eps=cast("float", group["eps"]),
            maximize=False,
        )
        parameter.masked_scatter_(mask, active)

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Stand where the optimiser of `state_dict` stood, its masks included.

        Raises:
            ValueError: its groups are others (torch's own check).
            InputError: its masks do not fit the parameters, or its moments the masks.
        """
        for saved, group in zip(cast("list[Group]", state_dict["param_groups"]), self.param_groups, strict=False):
            _check_state(saved, group["params"], cast("Mapping[int, Mapping[str, Tensor]]", state_dict["state"]))
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["masks"] = _checked(group["params"], group["masks"])


def element_masks(
    mask: Mask, lora_A: Mapping[str, nn.Parameter], lora_B: Mapping[str, nn.Parameter]
) -> dict[nn.Parameter, Bool[Tensor, "..."]]:
    """Parameter → its active elements, as `MaskedAdamW` takes them; a rank is its column of B and its row of A.

    Args:
        mask: of elements or ranks.
        lora_A: module → lora_A where it is trained; empty inside a family.
        lora_B: module → lora_B.

    Raises:
        MismatchError: the mask knows nothing of a factor.
    """
    ranks = mask.ranks
    sides = {
        "lora_A": (lora_A, mask.lora_A or {name: chosen[:, None] for name, chosen in ranks.items()}),
        "lora_B": (lora_B, mask.lora_B or {name: chosen[None] for name, chosen in ranks.items()}),
    }
    found: dict[nn.Parameter, Tensor] = {}
    for side, (factors, chosen) in sides.items():
        for name, factor in factors.items():
            if name not in chosen:
                raise MismatchError(f"the mask has no {side}", where=name, remedy="measure importance on this adapter")
            found[factor] = chosen[name].expand(factor.shape).contiguous().to(factor.device)
    return found


@contextlib.contextmanager
def masked_gradients(masks: Masks) -> Iterator[None]:
    """A block in which backward passes leave 0 in the gradients of what may not move.

    `MaskedAdamW` holds without it. It is for what reads gradients before the optimiser does: clipping by the norm
    would otherwise count elements that do not move.
    """

    def only(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: torch.where(mask, gradient, 0)

    handles = [parameter.register_hook(only(mask)) for parameter, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(params: Iterable[nn.Parameter] | Iterable[Group]) -> list[Group]:
    given = list(params)
    if given and isinstance(given[0], dict):
        return cast("list[Group]", given)
    return [{"params": given}]


def _with_masks(group: Group, masks: Masks) -> Group:
    """The group, whose parameters may come with their names, with its masks."""
    given = cast("Iterable[nn.Parameter | tuple[str, nn.Parameter]]", group["params"])
    listed = list(given)
    parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in listed]
    chosen = [masks[parameter] for parameter in parameters if parameter in masks]
    return {**group, "params": listed, "masks": chosen}


def _checked(parameters: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks of our own, each where its parameter is."""
    if len(parameters) != len(masks):
        raise InputError(
            f"{len(parameters)} parameters have {len(masks)} masks", remedy="give each one, all True where all may move"
        )
    for place, (parameter, mask) in enumerate(zip(parameters, masks, strict=True)):
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise InputError(
                f"the mask is {tuple(mask.shape)} of {mask.dtype}, the parameter {tuple(parameter.shape)}",
                where=f"parameter {place + 1}",
                remedy="give a bool for each of its elements",
            )
    return [mask.to(parameter.device, copy=True) for parameter, mask in zip(parameters, masks, strict=True)]


def _check_state(saved: Group, parameters: Sequence[nn.Parameter], state: Mapping[int, Mapping[str, Tensor]]) -> None:
    masks = _checked(parameters, cast("Sequence[Tensor]", saved.get("masks", ())))
    for number, mask in zip(cast("Sequence[int]", saved["params"]), masks, strict=True):
        if number in state and state[number]["exp_avg"].numel() != int(mask.sum()):
            raise InputError(
                f"{state[number]['exp_avg'].numel()} moments stand beside {int(mask.sum())} active elements",
                where=f"parameter {number + 1}",
                remedy="load the state of the same run",
            )
