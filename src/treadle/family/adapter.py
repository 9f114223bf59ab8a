"""An adapter: its lora_B (and, if it is foreign, its own lora_A), stored as a folder that stock PEFT opens."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from treadle import files
from treadle.errors import FormatError, MismatchError
from treadle.family import peft_format
from treadle.family.family import AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity

FORMAT = "treadle.adapter/1"
METADATA = "treadle.json"
_RECORDED_PACKAGES = ("treadle", "torch", "transformers", "peft")
_PROVENANCE = {
    "method": str,
    "data": str,
    "epsilon": int | float | None,
    "delta": int | float | None,
    "data_sha256": str | None,
    "seeds": dict,
    "settings": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Provenance:
    """Where an adapter comes from.

    Attributes:
        method: "sft", "dp-sgd", …; "foreign" for an adapter that treadle did not train.
        data: the name of the training data, never a path.
        epsilon: its privacy budget, or None where nothing was accounted (shown as "none").
        delta: the δ that belongs to epsilon.
        data_sha256: digest of the training data; only ever set for data declared public.
        seeds: what fixed the run's random choices.
        settings: the run's other choices, by name.
        versions: of the packages that made it.
    """

    method: str
    data: str = ""
    epsilon: float | None = None
    delta: float | None = None
    data_sha256: str | None = None
    seeds: Mapping[str, int] = field(default_factory=dict[str, int])
    settings: Mapping[str, str | int | float | bool | None] = field(
        default_factory=dict[str, str | int | float | bool | None]
    )
    versions: Mapping[str, str] = field(default_factory=dict[str, str])


def within(plan: RankPlan, provenance: Provenance) -> Provenance:
    """The provenance of an adapter with these ranks: it states no ε where nothing accounts for the plan.

    Whoever sees the adapter sees its ranks. What its training cost stays among its settings, with the reason.
    """
    if not plan.unaccounted or provenance.epsilon is None:
        return provenance
    settings = {
        **provenance.settings,
        "epsilon_of_training_alone": provenance.epsilon,
        "delta_of_training_alone": provenance.delta,
        "no_epsilon_because": plan.unaccounted,
    }
    return replace(provenance, epsilon=None, delta=None, settings=settings)


def package_versions() -> dict[str, str]:
    """The versions of the packages that shape an adapter."""
    return {name: version(name) for name in _RECORDED_PACKAGES}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: letters, digits, `.`, `_`, `-`.
        plan: rank and alpha a module.
        lora_A: (rank, in_features) a module; for a member of a family, the family's own.
        lora_B: (out_features, rank) a module, as PEFT stores it (scaling not folded in).
        family: the family's fingerprint, or None for a foreign adapter.
        base: the base it was trained on; None is "unverified base", as foreign adapters carry no hash.
        task_type: PEFT's task type ("CAUSAL_LM", …) or None.
        transposed: whether its layers are Conv1D.
        known_digest: what `digest` is, where it is written down beside lora_B; None to compute it when asked.
    """

    name: str
    plan: RankPlan
    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
    family: str | None
    base: BaseIdentity | None
    provenance: Provenance
    task_type: str | None = None
    transposed: bool = False
    known_digest: InitVar[str | None] = None

    def __post_init__(self, known_digest: str | None) -> None:
        files.checked_name(self.name)
        object.__setattr__(self, "lora_A", MappingProxyType(self.lora_A))
        if isinstance(self.lora_B, dict):  # a mapping of a file cannot be written to, and a bank knows it again
            object.__setattr__(self, "lora_B", MappingProxyType(self.lora_B))
        if known_digest is not None:
            self.__dict__["digest"] = known_digest  # where `cached_property` keeps it; no `replace` copies it

    @staticmethod
    def of_family(
        family: AdapterFamily,
        name: str,
        lora_B: Mapping[str, Tensor],
        *,
        provenance: Provenance,
        task_type: str | None = None,
        transposed: bool = False,
    ) -> "Adapter":
        """The member of `family` with these lora_B; its provenance is what `within` leaves of the one given.

        Raises:
            MismatchError: a module is missing, unknown or of a wrong shape.
            FormatError: a value is NaN or infinite.
        """
        plan = family.plan
        if lora_B.keys() != plan.modules.keys():
            raise MismatchError("its modules are not the family's", where=name, remedy="train it in this family")
        for module, row in plan.modules.items():
            if tuple(lora_B[module].shape) != (row.out_features, row.rank):
                raise MismatchError(
                    f"{module!r} has lora_B {tuple(lora_B[module].shape)}, the family {(row.out_features, row.rank)}",
                    where=name,
                    remedy="train it in this family",
                )
            if not torch.isfinite(lora_B[module]).all():
                raise FormatError(f"{module!r} holds NaN or Inf", where=name, remedy="train the adapter again")
        ordered = {module: lora_B[module].detach().cpu().float().contiguous() for module in plan.modules}
        stated = within(plan, provenance)
        return Adapter(
            name, plan, family.lora_A, ordered, family.fingerprint, family.base, stated, task_type, transposed
        )

    def folded_B(self, module: str) -> Tensor:
        """scaling · lora_B of the module, (out_features, rank), so that the update is folded_B · A · x."""
        scaling = self.plan.modules[module].scaling
        B = self.lora_B[module].float()
        return B if scaling == 1.0 else B * scaling

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is its own: the sorted modules with dtype, shape and bytes of folded_B, and of lora_A
        too where no family has it.
        """
        total = hashlib.sha256()
        for module in sorted(self.lora_B):
            for factor in (self.folded_B(module), *(() if self.family else (self.lora_A[module].float(),))):
                total.update(f"{module}\x00{factor.dtype}\x00{tuple(factor.shape)}\x00".encode())
                total.update(factor.contiguous().numpy(force=True).tobytes())
        return total.hexdigest()

    def folded(self) -> dict[str, Tensor]:
        """`folded_B` of every module."""
        return {module: self.folded_B(module) for module in self.lora_B}

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write a PEFT folder with `treadle.json` beside it, whole or not at all.

        Raises:
            InputError: the folder exists and `overwrite` is false.
        """
        config = peft_format.lora_config(
            self.plan,
            base_name=self.base.name if self.base else "",
            task_type=self.task_type,
            transposed=self.transposed,
        )
        with files.new_folder(folder, overwrite=overwrite) as temporary:
            peft_format.write(temporary, config, self.lora_A, self.lora_B)
            files.write_json(temporary / METADATA, self._metadata(temporary))

    def _metadata(self, folder: Path) -> dict[str, object]:
        return {
            "format": FORMAT,
            "name": self.name,
            "family": self.family,
            "base": {"name": self.base.name, "sha256": self.base.sha256} if self.base else None,
            "transposed": self.transposed,
            "weights_sha256": files.sha256_of(folder / peft_format.WEIGHTS),
            "provenance": asdict(self.provenance)
            | {"epsilon": "none" if self.provenance.epsilon is None else self.provenance.epsilon},
        }

    @staticmethod
    def load(folder: Path, *, family: AdapterFamily | None = None, name: str | None = None) -> "Adapter":
        """The adapter in a PEFT folder; without `treadle.json` it is foreign and its base unverified.

        Args:
            folder: what PEFT's `save_pretrained` or `Adapter.save` wrote.
            family: if given, a member must belong to it, bit for bit in its lora_A.
            name: another name for it than the stored one, or the folder's.

        Raises:
            InputError: a file is missing.
            FormatError: a file is damaged, or was changed since it was saved.
            UnsupportedError: it is not of the form B·A·x, or a pickle.
            MismatchError: it belongs to another family or base.
        """
        stored = peft_format.read(folder)
        if not (folder / METADATA).exists():
            label = name or files.checked_name(folder.resolve().name, where=folder)
            return Adapter(
                label, stored.plan, stored.lora_A, stored.lora_B, None, None, Provenance("foreign"), stored.task_type
            )
        content = files.read_json(folder / METADATA)
        if content.get("format") != FORMAT:
            raise FormatError(f"key 'format' is not {FORMAT!r}", where=folder / METADATA, remedy="save it again")
        if content.get("weights_sha256") != files.sha256_of(folder / peft_format.WEIGHTS):
            raise FormatError(
                "the weights are not those that treadle.json describes",
                where=folder,
                remedy="restore the folder, or delete treadle.json to load it as foreign",
            )
        adapter = Adapter(
            name or str(content.get("name")),
            _ordered(stored.plan, family),
            stored.lora_A,
            stored.lora_B,
            _optional_text(content.get("family")),
            _base_of(content.get("base"), folder),
            provenance_of(content.get("provenance"), where=folder / METADATA),
            stored.task_type,
            bool(content.get("transposed")),
        )
        return adapter.member_of(family) if family is not None and adapter.family is not None else adapter

    def member_of(self, family: AdapterFamily) -> "Adapter":
        """This adapter with the family's own lora_A, once it is proved to be a member.

        Raises:
            MismatchError: another base, another family, or a lora_A that differs in one bit.
        """
        if self.base is not None and self.base.sha256 != family.base.sha256:
            raise MismatchError(
                f"trained on base {self.base.name!r} ({self.base.sha256[:12]}), "
                f"the family's is {family.base.name!r} ({family.base.sha256[:12]})",
                where=self.name,
                remedy="use adapters of one base",
            )
        if self.family != family.fingerprint:
            raise MismatchError(
                f"belongs to family {(self.family or 'none')[:12]}, not to {family.fingerprint[:12]}",
                where=self.name,
                remedy="train it in this family, or delete its treadle.json to add it as foreign",
            )
        for module, A in family.lora_A.items():
            if module not in self.lora_A or not torch.equal(self.lora_A[module], A):
                raise MismatchError(
                    f"its lora_A of {module!r} is not the family's", where=self.name, remedy="restore it"
                )
        if dict(self.plan.modules) != dict(family.plan.modules):
            raise MismatchError(
                "its adapter_config.json has other modules, ranks or alphas than its family",
                where=self.name,
                remedy="restore the file, or delete treadle.json to add it as foreign",
            )
        lora_B = {module: self.lora_B[module] for module in family.plan.modules}
        digest = self.__dict__.get("digest")
        return replace(
            self, plan=family.plan, lora_A=family.lora_A, lora_B=lora_B, base=family.base, known_digest=digest
        )

    def shapes(self) -> dict[str, LayerShape]:
        """The shape of every adapted layer."""
        return {name: row.shape for name, row in self.plan.modules.items()}


def _ordered(plan: RankPlan, family: AdapterFamily | None) -> RankPlan:
    """The plan in the family's order of modules (a safetensors file keeps none)."""
    if family is None or family.plan.modules.keys() != plan.modules.keys():
        return plan
    return RankPlan({name: plan.modules[name] for name in family.plan.modules}, plan.provenance)


def _optional_text(value: object) -> str | None:
    return None if value is None else str(value)


def _base_of(value: object, folder: Path) -> BaseIdentity | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not {"name", "sha256"} <= value.keys():
        raise FormatError("key 'base' lacks 'name' or 'sha256'", where=folder / METADATA, remedy="save it again")
    return BaseIdentity(str(value["name"]), str(value["sha256"]))


def is_privacy(value: object, *, below: float) -> bool:
    """Whether this can be an ε or a δ: None, or a number from 0 to below `below`."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < below)


def provenance_of(value: object, *, where: object) -> Provenance:
    """The provenance in a JSON object.

    Raises:
        FormatError: it is not the object that `Adapter.save` writes.
    """
    row = dict(value) if isinstance(value, dict) else {}
    if row.get("epsilon") == "none":
        row["epsilon"] = None
    wrong = [key for key in row if key not in _PROVENANCE]
    wrong += [key for key, kind in _PROVENANCE.items() if not isinstance(row.get(key), kind)]
    if wrong:
        raise FormatError(
            f"key 'provenance.{wrong[0]}' is unknown, missing or of a wrong type",
            where=where,
            remedy="save the adapter again",
        )
    for key, most in (("epsilon", math.inf), ("delta", 1.0)):
        if not is_privacy(row.get(key), below=most):
            raise FormatError(
                f"key 'provenance.{key}' is {row[key]}",
                where=where,
                remedy="ask for the adapter again: it says nothing",
            )
    return Provenance(**row)
