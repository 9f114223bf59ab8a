"""What an adapter, a family or a bank is: where it changes the model, what it came from, what it has spent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from treadle.algebra import pair_products, update_norms
from treadle.errors import InputError, MismatchError, TreadleError
from treadle.family import adapter as adapter_files
from treadle.family import family as family_files
from treadle.family import peft_format
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.plan import RankPlan
from treadle.files import sha256_of
from treadle.models.identity import BaseIdentity, StoredTensor, identify_folder, stored_tensors
from treadle.models.loading import model_folder
from treadle.progress import Progress, silent
from treadle.recipes.bases import local_base
from treadle.recipes.fleet_privacy import FleetPrivacy, fleet_privacy
from treadle.routing import bank_files
from treadle.routing.bank import AdapterBank
from treadle.routing.factors import LayerFactors

Kind = Literal["adapter", "family", "bank"]
UNVERIFIED = "unverified base"


@dataclass(frozen=True)
class ModuleRow:
    """One adapted layer.

    Attributes:
        module: its full name.
        rank: of the update.
        scaling: alpha / r.
        parameters: of lora_B.
        frobenius: ‖ΔW‖_F, scaling included; None for a family, which has no update yet.
        spectral: the largest singular value of ΔW; None where it was not computed.
        base_frobenius: ‖W‖_F of the base's layer; None where the base is not at hand.
    """

    module: str
    rank: int
    scaling: float
    parameters: int
    frobenius: float | None = None
    spectral: float | None = None
    base_frobenius: float | None = None

    @property
    def share(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F."""
        if self.frobenius is None or not self.base_frobenius:
            return None
        return self.frobenius / self.base_frobenius


@dataclass(frozen=True)
class Member:
    """One adapter of a bank.

    Attributes:
        name: in the bank.
        path: "shared A" for a member of the family, "exact, own A" for a foreign one, which costs its own product.
        method: how it was trained, by its own account.
        data: the name of its training data.
        epsilon: its own statement; None is "none".
        delta: that belongs to epsilon.
        base: its base's name, or "unverified base".
        calibrated: whether statistics describe it.
        modules: where it changes the model.
    """

    name: str
    path: Literal["shared A", "exact, own A"]
    method: str
    data: str
    epsilon: float | None
    delta: float | None
    base: str
    calibrated: bool
    modules: tuple[ModuleRow, ...]

    @property
    def frobenius(self) -> float:
        """‖ΔW‖_F over all layers."""
        return math.sqrt(sum((row.frobenius or 0.0) ** 2 for row in self.modules))


@dataclass(frozen=True)
class Inspection:
    """What stands in a folder.

    Attributes:
        kind: adapter, family or bank.
        name: the adapter's own, or the folder's.
        base: the base's name, followed by "(unverified base)" where no digest backs it.
        facts: everything else that is stated once: digests, seeds, versions, calibration, access.
        modules: of an adapter or a family.
        members: of a bank.
        privacy: of a bank.
        notes: what could not be looked at, and why.
    """

    kind: Kind
    name: str
    base: str
    facts: Mapping[str, str]
    modules: tuple[ModuleRow, ...] = ()
    members: tuple[Member, ...] = ()
    privacy: FleetPrivacy | None = None
    notes: tuple[str, ...] = field(default=())


def inspect(path: Path, *, base: str | None = None, progress: Progress = silent) -> Inspection:
    """What the folder `path` holds: an adapter (ours or foreign), a family or a bank.

    The base model is read for ‖W‖_F only if it is on this machine already; nothing is downloaded, no model is loaded.

    Args:
        path: the folder.
        base: where the base model is, if its name does not say.
        progress: told of every layer.

    Raises:
        InputError: no such folder, or none of the three.
        FormatError: a file is damaged; of a bank, every byte is checked.
        MismatchError: `base` is not the base that the folder names.
    """
    if (path / bank_files.METADATA).is_file():
        progress("checking every file of the bank", 0, 0)
        bank_files.verify_bank(path)
        bank = bank_files.load_bank(path)
        plans = {name: row for adapter in bank.adapters for name, row in adapter.plan.modules.items()}
        norms, notes = _base_norms(bank.family.base.name, bank.family.base, base, RankPlan(plans), progress)
        return inspect_bank(bank, path.resolve().name, norms, notes)
    if (path / family_files.METADATA).is_file():
        return _inspect_family(path, base, progress)
    if (path / peft_format.CONFIG).is_file():
        return _inspect_adapter(path, base, progress)
    missing = "no such folder" if not path.is_dir() else "neither an adapter, a family nor a bank"
    raise InputError(missing, where=path, remedy="name a folder with adapter_config.json, family.json or bank.json")


def _inspect_adapter(path: Path, named: str | None, progress: Progress) -> Inspection:
    adapter = Adapter.load(path)
    label = adapter.base.name if adapter.base else peft_format.read(path).base_name
    norms, notes = _base_norms(label, adapter.base, named, adapter.plan, progress)
    rows: list[ModuleRow] = []
    for done, module in enumerate(sorted(adapter.plan.modules, key=_numbered)):  # a folder keeps no order of its own
        progress("measuring updates", done, len(adapter.plan.modules))
        planned = adapter.plan.modules[module]
        frobenius, spectral = update_norms(adapter.lora_A[module], adapter.folded_B(module))
        size = planned.rank * planned.out_features
        rows.append(ModuleRow(module, planned.rank, planned.scaling, size, frobenius, spectral, norms.get(module)))
    facts = {
        "family": adapter.family or "none: foreign, with an A of its own",
        "base sha256": adapter.base.sha256 if adapter.base else UNVERIFIED,
        "weights sha256": sha256_of(path / peft_format.WEIGHTS),
        "task type": adapter.task_type or "none",
        **_size_facts(adapter.plan),
        **_provenance_facts(adapter.provenance),
    }
    if (path / adapter_files.METADATA).is_file():
        facts["treadle.json sha256"] = sha256_of(path / adapter_files.METADATA)
    return Inspection("adapter", adapter.name, _base_label(label, adapter.base), facts, tuple(rows), notes=notes)


def _inspect_family(path: Path, named: str | None, progress: Progress) -> Inspection:
    family = AdapterFamily.load(path)
    norms, notes = _base_norms(family.base.name, family.base, named, family.plan, progress)
    rows = tuple(
        ModuleRow(name, row.rank, row.scaling, row.rank * row.out_features, base_frobenius=norms.get(name))
        for name, row in family.plan.modules.items()
    )
    facts = {
        "fingerprint": family.fingerprint,
        "base sha256": family.base.sha256,
        "A drawn by": f"{family.init}, seed {family.seed}",
        **{f"A made from: {key}": value for key, value in family.origin.items()},
        "lora_A sha256": sha256_of(path / family_files.WEIGHTS),
        **_size_facts(family.plan),
        **({"ε of whatever is trained in it": f"none ({family.plan.unaccounted})"} if family.plan.unaccounted else {}),
        **{f"plan: {key}": value for key, value in family.plan.provenance.items()},
    }
    return Inspection("family", path.resolve().name, family.base.name, facts, rows, notes=notes)


def inspect_bank(
    bank: AdapterBank, name: str, norms: Mapping[str, float] | None = None, notes: tuple[str, ...] = ()
) -> Inspection:
    """What an open bank holds.

    Args:
        bank: the bank.
        name: what to call it.
        norms: module → ‖W‖_F of the base, where it is known.
        notes: what could not be looked at.
    """
    updates = {module: _update_norms(factors) for module, factors in bank.layers.items()}
    members = tuple(_member(bank, place, updates, norms or {}) for place in range(len(bank.adapters)))
    statistics = bank.statistics
    facts = {
        "family": bank.family.fingerprint,
        "base sha256": bank.family.base.sha256,
        "access": "required: every row names its permitted adapters" if bank.access == "required" else "open",
        "calibration": "none" if statistics is None else statistics.source,
    }
    if statistics is not None:
        facts["calibration tokens"] = str(statistics.tokens)
        facts["calibration method"] = f"{statistics.method}, {statistics.date}"
        facts["calibration text"] = statistics.text_read
        if statistics.epsilon is not None:
            facts["calibration ε"] = f"{statistics.epsilon:g} at δ = {statistics.delta:g}, beside an adapter's training"
        of_text = "" if statistics.method == "traffic" else statistics.digest
        facts["calibration sha256"] = of_text or f"not kept: {statistics.text_read}"
        if statistics.method == "traffic":
            facts["beyond the adapters' ε"] = "the statistics are a release about the callers whose prompts they saw"
    return Inspection(
        "bank",
        name,
        bank.family.base.name,
        facts,
        members=members,
        privacy=fleet_privacy(bank),
        notes=notes,
    )


def _member(
    bank: AdapterBank, place: int, updates: Mapping[str, Sequence[float]], norms: Mapping[str, float]
) -> Member:
    adapter = bank.adapters[place]
    rows = tuple(
        ModuleRow(
            name,
            row.rank,
            row.scaling,
            row.rank * row.out_features,
            updates[name][place],
            base_frobenius=norms.get(name),
        )
        for name, row in adapter.plan.modules.items()
    )
    means = [] if bank.statistics is None else [mean[place] for mean in bank.statistics.mean.values()]
    return Member(
        name=adapter.name,
        path="shared A" if adapter.family is not None else "exact, own A",
        method=adapter.provenance.method,
        data=adapter.provenance.data,
        epsilon=adapter.provenance.epsilon,
        delta=adapter.provenance.delta,
        base=adapter.base.name if adapter.base else UNVERIFIED,
        calibrated=any(not bool(mean.isnan()) for mean in means),
        modules=rows,
    )


def _update_norms(factors: LayerFactors) -> list[float]:
    """‖ΔW‖_F of every adapter at one layer: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, from Gram factors stored for B of norm 1."""
    found = [0.0] * len(factors.present)
    for group in factors.groups:
        A = group.A.double()
        # pair_products of the rows of Aᵀ, summed, are the packed products of A·Aᵀ.
        squares = group.norms.square() * (group.grams.double() @ pair_products(A.T).sum(0))
        for place, square in zip(group.columns.tolist(), squares.tolist(), strict=True):
            found[place] = math.sqrt(max(square, 0.0))
    return found


def _size_facts(plan: RankPlan) -> dict[str, str]:
    ranks = sorted({row.rank for row in plan.modules.values()})
    count = plan.count()
    return {
        "modules": str(len(plan.modules)),
        "ranks": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "parameters": f"{count.lora_B:,} in B, {count.lora_A:,} in A",
    }


def _numbered(module: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


def _provenance_facts(provenance: Provenance) -> dict[str, str]:
    epsilon = "none" if provenance.epsilon is None else f"{provenance.epsilon:g} at δ = {provenance.delta:g}"
    if "no_epsilon_because" in provenance.settings:
        epsilon = f"none ({provenance.settings['no_epsilon_because']})"
    facts = {"method": provenance.method, "data": provenance.data or "not stated", "ε": epsilon}
    if provenance.data_sha256:
        facts["data sha256"] = provenance.data_sha256
    facts |= {f"seed: {key}": str(value) for key, value in provenance.seeds.items()}
    facts |= {f"setting: {key}": str(value) for key, value in provenance.settings.items()}
    return facts | {f"version: {key}": value for key, value in provenance.versions.items()}


def _base_label(name: str, verified: BaseIdentity | None) -> str:
    if verified is not None:
        return name
    return f"{name} ({UNVERIFIED})" if name else UNVERIFIED


def _base_norms(
    label: str, identity: BaseIdentity | None, named: str | None, plan: RankPlan, progress: Progress
) -> tuple[dict[str, float], tuple[str, ...]]:
    """‖W‖_F of every planned module, and what to say where there is none.

    Raises:
        MismatchError: `named` has other weights than `identity`.
    """
    folder = model_folder(named) if named is not None else local_base(label)
    if folder is None:
        return {}, (f"‖W‖_F is left out: the base {label or '(unnamed)'} is not on this machine; pass --base FOLDER",)
    try:
        found = identify_folder(folder, label)
        if identity is not None and found != identity:
            raise MismatchError(
                f"its weights are {found.sha256[:12]}, the folder names {identity.sha256[:12]}",
                where=named or label,
                remedy="name the right base",
            )
        tensors = stored_tensors(folder)
    except TreadleError as error:
        if named is not None:
            raise
        return {}, (f"‖W‖_F is left out: {error}",)
    norms: dict[str, float] = {}
    for done, module in enumerate(plan.modules):
        progress("measuring the base", done, len(plan.modules))
        stored = _weight_name(module, tensors)
        if stored is not None:
            norms[module] = _frobenius(tensors[stored], stored)
    notes = () if len(norms) == len(plan.modules) else ("‖W‖_F is left out for layers that the base's files lack",)
    return norms, notes


def _weight_name(module: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The stored weight of a module: by its name, or without the prefix that a head's class puts before its trunk."""
    exact = f"{module}.weight"
    if exact in tensors:
        return exact
    trunk = exact.partition(".")[2]
    if trunk in tensors:
        return trunk
    return next((name for name in tensors if name.partition(".")[2] == exact), None)


def _frobenius(stored: StoredTensor, name: str) -> float:
    with safe_open(stored.file, framework="pt") as opened:
        return float(torch.linalg.vector_norm(opened.get_tensor(name).double()))
