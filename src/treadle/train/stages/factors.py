"""The factors of an adapter in training, and the adapter that they make."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.plan import ModulePlan, RankPlan


@dataclass(frozen=True)
class Factors:
    """A and B of every module at one moment of a run: the model's update is s·(B·A − start_B·start_A).

    What a start such as PiSSA takes from the base's weights is subtracted again as `start_A`, `start_B`, so that the
    base itself is never touched and the update is 0 before the first step.

    Attributes:
        plan: rank and scaling s = alpha/r a module.
        lora_A: (rank, in_features) a module.
        lora_B: (out_features, rank) a module, scaling not folded in, as PEFT stores it.
        start_A: as lora_A at the start; empty where the start's update is zero anyway.
        start_B: likewise.
        moves_A: whether A is trained; in a family it is not.
    """

    plan: RankPlan
    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
    start_A: Mapping[str, Tensor]
    start_B: Mapping[str, Tensor]
    moves_A: bool

    def scaling(self, module: str) -> float:
        """alpha/r of the module."""
        return self.plan.modules[module].scaling

    @property
    def trainable(self) -> int:
        """How many parameters may be trained: those of B, and of A where it moves."""
        count = self.plan.count()
        return count.total if self.moves_A else count.lora_B

    def moved(self, lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor]) -> "Factors":
        """The same with other A and B; modules that are not given keep theirs."""
        return replace(self, lora_A={**self.lora_A, **lora_A}, lora_B={**self.lora_B, **lora_B})

    def update(self, module: str) -> Tensor:
        """What is added to the module's weight, (out_features, in_features)."""
        whole = self.lora_B[module] @ self.lora_A[module]
        if module in self.start_B:
            whole = whole - self.start_B[module] @ self.start_A[module]
        return self.scaling(module) * whole

    def learnt(self) -> dict[str, Tensor]:
        """B without its start, (out_features, rank) a module: with the frozen A it is the whole update.

        Only for factors whose A does not move.
        """
        return {name: B - self.start_B[name] if name in self.start_B else B for name, B in self.lora_B.items()}

    def adapter(self, family: AdapterFamily, name: str, *, provenance: Provenance, transposed: bool) -> Adapter:
        """The adapter that stock PEFT opens on the original base: of the family if A is its own, else a foreign one.

        Where A moved and the start was not zero, the update has twice the rank, and is stored so.

        Args:
            family: in which the run began.
            name: the adapter's.
            provenance: what is recorded of its making.
            transposed: whether its layers are Conv1D.
        """
        if not self.moves_A:
            return Adapter.of_family(
                family, name, self.learnt(), provenance=provenance, task_type="CAUSAL_LM", transposed=transposed
            )
        lora_A, lora_B, modules = dict(self.lora_A), dict(self.lora_B), dict(self.plan.modules)
        for module, start_B in self.start_B.items():
            row = modules[module]
            lora_A[module] = torch.cat([lora_A[module], self.start_A[module]])
            lora_B[module] = torch.cat([lora_B[module], -start_B], dim=1)
            modules[module] = ModulePlan(2 * row.rank, 2 * row.lora_alpha, row.in_features, row.out_features)
        plan = RankPlan(modules, self.plan.provenance)
        return Adapter(name, plan, lora_A, lora_B, None, family.base, provenance, "CAUSAL_LM", transposed)
