"""The adapter family: a base model, a rank plan, and one frozen lora_A a module, under one fingerprint."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from treadle import files, randomness
from treadle.errors import FormatError, InputError, MismatchError
from treadle.family.peft_format import read_tensors
from treadle.family.plan import ModulePlan, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.models.loading import identity_of

FORMAT = "treadle.family/1"
METADATA, WEIGHTS = "family.json", "lora_A.safetensors"


@dataclass(frozen=True)
class AdapterFamily:
    """Everything that the adapters of a family share; an adapter adds only its lora_B.

    The fingerprint is the SHA-256 of the bytes of `family.json`, which holds the base's identity, the plan with its
    scalings, how A was made, and the SHA-256 of `lora_A.safetensors`: one changed byte in either file is another
    family or an error. `origin` says what A was made from where `init` and `seed` do not: the name and the SHA-256 of a
    public text, or the family that training left.
    """

    base: BaseIdentity
    plan: RankPlan
    lora_A: Mapping[str, Tensor]
    init: str
    seed: int
    weights: bytes
    metadata: bytes
    origin: Mapping[str, str] = field(default_factory=dict[str, str])

    @staticmethod
    def create(*, base: BaseIdentity | str, plan: RankPlan, seed: int, init: str = "kaiming") -> "AdapterFamily":
        """The family whose A of module m is drawn by a generator of its own for (seed, m).

        Args:
            base: identity of the frozen base model, or its name: a catalogued model, a local folder, a hub id. The
                family records it by the label of `identity_of`, never by a path.
            plan: ranks and scalings.
            seed: any integer.
            init: "kaiming", uniform on ±1/√in_features (PEFT's default for A), the same on every machine; or
                "orthonormal", orthonormal rows, the same only where log, cos and QR agree. What needs the model,
                "weight-svd" and "public-pca", comes to `of_tensors` as tensors (`family.initial`).

        Raises:
            InputError: an `init` that is unknown or needs the model.

        Reference: arXiv 2403.12313 §3 (A random, shared, frozen).
        """
        if init not in INITS:
            raise InputError(f"no such init {init!r}", remedy=f"choose among {', '.join(INITS)}")
        identity = identity_of(base) if isinstance(base, str) else base
        lora_A = {name: torch.from_numpy(INITS[init](seed, name, module)) for name, module in plan.modules.items()}
        return AdapterFamily.of_tensors(base=identity, plan=plan, lora_A=lora_A, init=init, seed=seed)

    @staticmethod
    def of_tensors(
        *,
        base: BaseIdentity,
        plan: RankPlan,
        lora_A: Mapping[str, Tensor],
        init: str,
        seed: int,
        origin: Mapping[str, str] | None = None,
    ) -> "AdapterFamily":
        """The family with these A, float32 (rank, in_features) a module.

        Args:
            base: identity of the frozen base model.
            plan: ranks and scalings.
            lora_A: as they shall be frozen.
            init: how they were made, by name.
            seed: what fixed that.
            origin: what they were made from; never anything private, for it is stored and passed on.

        Raises:
            MismatchError: an A is missing or not of the plan's shape.
        """
        for name, module in plan.modules.items():
            expected = (module.rank, module.in_features)
            if name not in lora_A or tuple(lora_A[name].shape) != expected:
                raise MismatchError(f"lora_A must have shape {expected}", where=name, remedy="draw A for this plan")
        ordered = {name: lora_A[name].detach().cpu().float().contiguous() for name in plan.modules}
        weights = save(ordered, {"format": "pt"})
        metadata = files.canonical_json(
            {
                "format": FORMAT,
                "base": {"name": base.name, "sha256": base.sha256},
                "init": init,
                "seed": seed,
                "lora_A_sha256": hashlib.sha256(weights).hexdigest(),
                "plan": plan.to_json(),
                **({"origin": dict(origin)} if origin else {}),
            }
        )
        return AdapterFamily(base, plan, MappingProxyType(ordered), init, seed, weights, metadata, dict(origin or {}))

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that name this family."""
        return hashlib.sha256(self.metadata).hexdigest()

    def scaling(self, module: str) -> float:
        """alpha / r of the module."""
        return self.plan.modules[module].scaling

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the family's folder, whole or not at all.

        Raises:
            InputError: the folder exists and `overwrite` is false.
        """
        with files.new_folder(folder, overwrite=overwrite) as temporary:
            (temporary / WEIGHTS).write_bytes(self.weights)
            (temporary / METADATA).write_bytes(self.metadata)

    @staticmethod
    def load(folder: Path) -> "AdapterFamily":
        """The family stored in `folder`.

        Raises:
            InputError: no such folder or file.
            FormatError: a file is damaged or was changed.
        """
        content = files.read_json(folder / METADATA)
        metadata = (folder / METADATA).read_bytes()
        if content.get("format") != FORMAT:
            raise FormatError(f"key 'format' is not {FORMAT!r}", where=folder / METADATA, remedy="give a family folder")
        try:
            base, plan = content["base"], content["plan"]
            identity = BaseIdentity(base["name"], base["sha256"])  # type: ignore[index]
            init, seed, digest = str(content["init"]), content["seed"], content["lora_A_sha256"]
        except (KeyError, TypeError) as error:
            raise FormatError(f"key {error} is missing", where=folder / METADATA, remedy="restore the file") from error
        origin = content.get("origin", {})
        if not isinstance(plan, dict) or not isinstance(origin, dict) or not isinstance(seed, int):
            raise FormatError(
                "'plan' and 'origin' must be objects and 'seed' an integer",
                where=folder / METADATA,
                remedy="restore the file",
            )
        path = folder / WEIGHTS
        lora_A = read_tensors(path)
        if files.sha256_of(path) != digest:
            raise FormatError("the frozen A were changed: SHA-256 differs", where=path, remedy="restore the file")
        ranks = RankPlan.from_json(plan, where=folder / METADATA)
        if lora_A.keys() != ranks.modules.keys():
            raise FormatError("its modules are not those of the plan", where=path, remedy="restore the file")
        for name, row in ranks.modules.items():
            A = lora_A[name]
            if (A.dtype, tuple(A.shape)) != (torch.float32, (row.rank, row.in_features)) or not A.isfinite().all():
                raise FormatError(f"{name!r} is not what the plan says", where=path, remedy="restore the file")
        ordered = {name: lora_A[name] for name in ranks.modules}
        made_from = {str(key): str(value) for key, value in origin.items()}
        return AdapterFamily(
            identity, ranks, MappingProxyType(ordered), init, seed, path.read_bytes(), metadata, made_from
        )


def _kaiming(seed: int, name: str, module: ModulePlan) -> np.ndarray:
    bound = 1.0 / math.sqrt(module.in_features)
    draws = randomness.uniform(seed, name, (module.rank, module.in_features))
    return ((2.0 * draws - 1.0) * bound).astype(np.float32)


def _orthonormal(seed: int, name: str, module: ModulePlan) -> np.ndarray:
    columns, triangle = np.linalg.qr(randomness.normal(seed, name, (module.in_features, module.rank)))
    return np.ascontiguousarray((columns * np.sign(np.diag(triangle))).T.astype(np.float32))


INITS: Mapping[str, Callable[[int, str, ModulePlan], np.ndarray]] = {"kaiming": _kaiming, "orthonormal": _orthonormal}
