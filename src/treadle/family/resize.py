"""Other ranks for a family and its adapters: growing is exact, shrinking says what it loses.

A family grows by rows: A' begins with A, so an adapter's B with columns of zeros is the same update. It shrinks to its
first rows, A[:r'], which cost no privacy but suit no adapter: each gets the B' that comes closest. An adapter that
shrinks alone gets an A of its own, from the best truncation there is, and leaves the family.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from treadle import randomness
from treadle.algebra import orthonormal_factors, update_norms
from treadle.errors import MismatchError
from treadle.family.adapter import Adapter, within
from treadle.family.family import INITS, AdapterFamily
from treadle.family.plan import ModulePlan, RankPlan


@dataclass(frozen=True)
class ModuleChange:
    """What became of one module's update ΔW = s·B·A.

    Attributes:
        module: its name.
        before: rank; 0 where the adapter had no such module.
        after: rank; 0 where it is dropped.
        norm: ‖ΔW‖_F before.
        lost: ‖ΔW' − ΔW‖_F.
        least: the smallest loss that this many ranks allow, whatever A is.
    """

    module: str
    before: int
    after: int
    norm: float
    lost: float
    least: float

    @property
    def error(self) -> float:
        """`lost` as a share of `norm`, 0 where there was nothing to lose."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Resized:
    """An adapter of other ranks, and what became of each of its modules."""

    adapter: Adapter
    changes: tuple[ModuleChange, ...]

    @property
    def error(self) -> float:
        """‖ΔW' − ΔW‖_F / ‖ΔW‖_F over all modules; 0 means the same update to the bit, or none at all."""
        return self._share([change.lost for change in self.changes])

    @property
    def least_error(self) -> float:
        """The smallest such error that these ranks allow, whatever A is."""
        return self._share([change.least for change in self.changes])

    def _share(self, losses: list[float]) -> float:
        norm = math.hypot(*(change.norm for change in self.changes))
        return math.hypot(*losses) / norm if norm else 0.0


def resized_family(family: AdapterFamily, plan: RankPlan) -> AdapterFamily:
    """The family of this plan whose A begin with the rows of `family`'s, or are its first rows.

    Of a "kaiming" family it is the very one that `create` makes of the plan with its seed. Of others, new rows are
    drawn orthonormal to those that are there, and `origin` names the family. There the old ranks can be told from A, so
    that a family whose plan no ε covers makes one that none covers, whatever text the new plan was probed on.

    Raises:
        MismatchError: the plan is of another base, or has a module in another shape.
    """
    if plan.provenance.get("base_sha256", family.base.sha256) != family.base.sha256:
        raise MismatchError(
            f"the plan was made for {plan.provenance.get('base')!r}, not for {family.base.name!r}",
            remedy="plan again for the family's base",
        )
    known = {**plan.modules, **family.plan.modules}
    plan.check({name: row.shape for name, row in known.items()})
    lora_A = {
        name: _rows(family, name, row, family.lora_A.get(name, torch.zeros(0, row.in_features)))
        for name, row in plan.modules.items()
    }
    drawn = family.init == "kaiming" and not family.origin
    origin = {} if drawn else {**family.origin, "resized_from": family.fingerprint}
    if origin:
        plan = plan.showing(family.plan)
    return AdapterFamily.of_tensors(
        base=family.base, plan=plan, lora_A=lora_A, init=family.init, seed=family.seed, origin=origin
    )


def _rows(family: AdapterFamily, name: str, row: ModulePlan, there: Float[Tensor, "rows inner"]) -> Tensor:
    """`row.rank` rows that begin with those that are there."""
    if row.rank <= len(there):
        return there[: row.rank]
    if family.init == "kaiming":
        drawn = torch.from_numpy(INITS["kaiming"](family.seed, name, row))
    else:
        drawn = torch.from_numpy(_orthonormal_rows(there.double().numpy(), family.seed, name, row.rank))
    return torch.cat([there, drawn[len(there) :]])


def _orthonormal_rows(there: np.ndarray, seed: int, name: str, rank: int) -> np.ndarray:
    """`rank` rows: those that are there, then orthonormal ones at right angles to them."""
    draws = randomness.normal(seed, f"{name} grown from {len(there)}", (rank - len(there), there.shape[1]))
    columns, triangle = np.linalg.qr(np.concatenate([there, draws]).T)
    grown = (columns * np.sign(np.diag(triangle))).T
    return np.concatenate([there, grown[len(there) :]]).astype(np.float32)


def resized(adapter: Adapter, family: AdapterFamily) -> Resized:
    """The adapter as a member of `family`, with the B that comes closest to its update, and how close that is.

    Exact to the bit where the family's A begins with the adapter's and the scaling is the same: B gets columns of
    zeros. Elsewhere B' is the least-squares solution for the family's A.

    Args:
        adapter: of any ranks, on the same base.
        family: where it goes.

    Raises:
        MismatchError: another base, or a module of another shape.
    """
    if adapter.base is not None and adapter.base != family.base:
        raise MismatchError(
            f"trained on base {adapter.base.name!r}, the family's is {family.base.name!r}",
            where=adapter.name,
            remedy="use adapters of one base",
        )
    lora_B: dict[str, Tensor] = {}
    changes: list[ModuleChange] = []
    for name, row in family.plan.modules.items():
        if name not in adapter.plan.modules:
            lora_B[name] = torch.zeros(row.out_features, row.rank)
            changes.append(ModuleChange(name, 0, row.rank, 0.0, 0.0, 0.0))
            continue
        before = adapter.plan.modules[name]
        if before.shape != row.shape:
            raise MismatchError(
                f"{name!r} has another shape in the family", where=adapter.name, remedy="check the base"
            )
        lora_B[name], lost = _closest(adapter, name, family.lora_A[name], row)
        changes.append(_change(adapter, name, row.rank, lost))
    changes += [_change(adapter, name, 0, None) for name in adapter.plan.modules if name not in family.plan.modules]
    made = Resized(
        Adapter.of_family(
            family,
            adapter.name,
            lora_B,
            provenance=adapter.provenance,
            task_type=adapter.task_type,
            transposed=adapter.transposed,
        ),
        tuple(changes),
    )
    return _noted(made, adapter)


def _closest(adapter: Adapter, name: str, A: Float[Tensor, "rank inner"], row: ModulePlan) -> tuple[Tensor, float]:
    """The B of `A` that comes closest to the adapter's update of this module, and ‖ΔW' − ΔW‖_F."""
    own, before = adapter.lora_A[name].float(), adapter.plan.modules[name]
    width = min(len(own), len(A))
    alike = math.isclose(row.scaling, before.scaling, rel_tol=1e-12)  # s·r/r is not always s
    if alike and torch.equal(own[:width], A[:width]) and len(A) >= len(own):
        stored = adapter.lora_B[name].float()
        return torch.nn.functional.pad(stored, (0, len(A) - len(own))), 0.0
    folded = adapter.folded_B(name).double()
    fitted = folded @ (own.double() @ torch.linalg.pinv(A.double()))
    B = (fitted / row.scaling).float()
    left = torch.cat([folded, -row.scaling * B.double()], dim=1)
    return B, update_norms(torch.cat([own, A]), left)[0]


def _change(adapter: Adapter, name: str, rank: int, lost: float | None) -> ModuleChange:
    """What became of a module that has `rank` ranks now; `lost` is None where all is lost, or as little as can be."""
    A, B = adapter.lora_A[name], adapter.folded_B(name)
    before = adapter.plan.modules[name].rank
    norm = update_norms(A, B)[0]
    least = 0.0
    if rank < before:
        left = torch.linalg.qr(B.double(), mode="r").R
        right = torch.linalg.qr(A.double().T, mode="r").R
        least = float(torch.linalg.svdvals(left @ right.T)[rank:].square().sum().sqrt())
    return ModuleChange(name, before, rank, norm, least if lost is None else lost, least)


def truncated(adapter: Adapter, plan: RankPlan) -> Resized:
    """The adapter alone, cut to at most the plan's ranks by the best truncation of each update.

    Modules that have no more ranks than planned stay bit for bit; where one is cut, the adapter has an A of its own
    and belongs to no family.

    Raises:
        MismatchError: the plan keeps none of the adapter's modules.

    Reference: Eckart and Young 1936: the leading singular values and vectors lose least.
    """
    kept = [name for name in adapter.plan.modules if name in plan.modules]
    if not kept:
        raise MismatchError("the plan keeps none of its modules", where=adapter.name, remedy="plan for its base")
    modules: dict[str, ModulePlan] = {}
    A, B = dict[str, Tensor](), dict[str, Tensor]()
    for name in kept:
        before = adapter.plan.modules[name]
        rank = min(before.rank, plan.modules[name].rank)
        modules[name] = replace(before, rank=rank, lora_alpha=before.scaling * rank)
        A[name], B[name] = adapter.lora_A[name], adapter.lora_B[name]
        if rank < before.rank:
            right, left = orthonormal_factors(A[name], adapter.folded_B(name), rank=rank)
            A[name], B[name] = right.float().contiguous(), (left / before.scaling).float().contiguous()
    changes = [
        _change(adapter, name, modules[name].rank if name in modules else 0, None) for name in adapter.plan.modules
    ]
    ranks = RankPlan(modules, plan.provenance)
    told = within(ranks, adapter.provenance)  # the plan's text decided these ranks too
    made = replace(adapter, plan=ranks, lora_A=A, lora_B=B, provenance=told, family=None, known_digest=None)
    return _noted(Resized(made, tuple(changes)), adapter)


def _noted(made: Resized, before: Adapter) -> Resized:
    """The same, its provenance telling of the change; what was spent on training stays spent, and no more is."""
    settings = {
        **made.adapter.provenance.settings,
        "resized_from": before.family or "foreign",
        "resize_error": made.error,
    }
    provenance = replace(made.adapter.provenance, settings=settings)
    return replace(made, adapter=replace(made.adapter, provenance=provenance, known_digest=None))
