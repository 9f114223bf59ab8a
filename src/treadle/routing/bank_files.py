"""A bank as a folder: `bank.json` names every other file by its digest and is replaced last, in one rename.

    bank.json                       what is in the bank
    family/                         the family's folder
    adapters/NAME-DIGEST.safetensors    lora_B of a member; lora_A and lora_B of a foreign adapter
    factors-DIGEST.safetensors      Gram factors of all layers
    calibration-DIGEST.safetensors  mean and std of all layers

Opening reads the factors and the statistics; a lora_B is read from its memory-mapped file when it first acts.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from treadle import files
from treadle.errors import FormatError, InputError
from treadle.family.adapter import Adapter, provenance_of
from treadle.family.family import AdapterFamily
from treadle.family.peft_format import read_tensors
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.routing.bank import Access, AdapterBank
from treadle.routing.calibration import Statistics
from treadle.routing.factors import Group, LayerFactors, assemble, grouped

FORMAT = "treadle.bank/1"
METADATA = "bank.json"


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file under `prefix`, each read from the mapped file when it is asked for."""

    def __init__(self, path: Path, prefix: str) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise FormatError(
                "a file of the bank is missing", where=path, remedy="restore or rebuild the bank"
            ) from error
        except SafetensorError as error:
            raise FormatError(
                f"damaged safetensors file ({error})", where=path, remedy="restore or rebuild the bank"
            ) from error
        self._prefix = prefix
        self._names = [key.removeprefix(prefix) for key in self._file.keys() if key.startswith(prefix)]  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(self._prefix + name)
        except SafetensorError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_bank(bank: AdapterBank, folder: Path) -> None:
    """Write the bank into `folder`; a bank that stands there is replaced in one rename, or stays if anything fails.

    Raises:
        InputError: the folder holds a bank of another family, or something else than a bank.
        UnavailableError: the disk refuses.
    """
    if not folder.exists() or not any(folder.iterdir()):
        with files.new_folder(folder, overwrite=True) as temporary:
            bank.family.save(temporary / "family")
            _write(bank, temporary)
        return
    if not (folder / METADATA).exists():
        raise InputError("the folder is not empty and holds no bank", where=folder, remedy="choose another folder")
    if AdapterFamily.load(folder / "family").fingerprint != bank.family.fingerprint:
        raise InputError("the folder holds a bank of another family", where=folder, remedy="choose another folder")
    _sweep(folder, _write(bank, folder))


def _write(bank: AdapterBank, folder: Path) -> dict[str, object]:
    """Write what `bank.json` names, then `bank.json`; return its content."""
    entries = [_write_adapter(folder, adapter) for adapter in bank.adapters]
    content: dict[str, object] = {
        "format": FORMAT,
        "family": bank.family.fingerprint,
        "access": bank.access,
        "adapters": entries,
        "modules": list(bank.layers),
        "factors": _write_tensors(folder, "factors", _factor_tensors(bank)),
        "calibration": None if bank.statistics is None else _write_statistics(folder, bank.statistics),
    }
    files.write_json(folder / METADATA, content)
    return content


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors under a name that holds their digest; return the name, relative to `folder`."""
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{stem}-{digest[:16]}.safetensors"
    if not (folder / name).exists() or files.sha256_of(folder / name) != digest:
        files.write_bytes(folder / name, content)
    return name


def _write_adapter(folder: Path, adapter: Adapter) -> dict[str, object]:
    tensors = {f"lora_B/{module}": B for module, B in adapter.lora_B.items()}
    if adapter.family is None:
        tensors |= {f"lora_A/{module}": A for module, A in adapter.lora_A.items()}
    return {
        "name": adapter.name,
        "file": _write_tensors(folder, f"adapters/{adapter.name}", tensors),
        "family": adapter.family,
        "base": None if adapter.base is None else asdict(adapter.base),
        "plan": None if adapter.family is not None else adapter.plan.to_json(),
        "task_type": adapter.task_type,
        "transposed": adapter.transposed,
        "provenance": asdict(adapter.provenance),
    }


def _factor_tensors(bank: AdapterBank) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, factors in bank.layers.items():
        for place, group in enumerate(factors.groups):
            tensors |= {f"{module}/{place}/grams": group.grams, f"{module}/{place}/norms": group.norms}
    return tensors


def _write_statistics(folder: Path, statistics: Statistics) -> dict[str, object]:
    tensors = {f"mean/{module}": v for module, v in statistics.mean.items()}
    tensors |= {f"std/{module}": v for module, v in statistics.std.items()}
    return {
        "file": _write_tensors(folder, "calibration", tensors),
        "source": statistics.source,
        "digest": statistics.digest,
        "tokens": statistics.tokens,
        "spends_privacy": statistics.spends_privacy,
        "ignored_tokens": list(statistics.ignored_tokens),
    }


def _sweep(folder: Path, content: Mapping[str, object]) -> None:
    """Delete the files that an earlier version of this bank left and this one does not name."""
    calibration = cast("dict[str, object] | None", content["calibration"])
    kept = {
        str(content["factors"]),
        *(str(entry["file"]) for entry in cast("list[dict[str, object]]", content["adapters"])),
    }
    kept |= {str(calibration["file"])} if calibration else set()
    for file in (*folder.glob("*.safetensors"), *(folder / "adapters").glob("*.safetensors")):
        if file.relative_to(folder).as_posix() not in kept:
            with contextlib.suppress(OSError):  # the bank is whole without it; some systems keep open files
                file.unlink()


def load_bank(folder: Path) -> AdapterBank:
    """The bank in `folder`, without reading the adapters' lora_B.

    Raises:
        InputError: no such folder, or no bank in it.
        FormatError: a file is damaged, missing, or leads out of the folder.
    """
    path = folder / METADATA
    content = files.read_json(path)
    if content.get("format") != FORMAT:
        raise FormatError(f"key 'format' is not {FORMAT!r}", where=path, remedy="give a bank folder")
    family = AdapterFamily.load(folder / "family")
    try:
        if content["family"] != family.fingerprint:
            raise FormatError("its family is not the one in family/", where=path, remedy="restore the folder")
        adapters = tuple(
            _open_adapter(folder, family, row) for row in cast("list[dict[str, object]]", content["adapters"])
        )
        modules = cast("list[str]", content["modules"])
        if sorted(modules) != sorted({module for adapter in adapters for module in adapter.plan.modules}):
            raise FormatError("its modules are not those of its adapters", where=path, remedy="restore the file")
        tensors = _read_checked(files.contained(folder, str(content["factors"])))
        layers = {module: _open_layer(module, adapters, tensors, path) for module in modules}
        access, calibration = content["access"], content["calibration"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"key {error} is missing or of a wrong type", where=path, remedy="restore the file"
        ) from error
    if access not in get_args(Access):
        raise FormatError(f"key 'access' is {access!r}", where=path, remedy="use 'open' or 'required'")
    if len({adapter.name for adapter in adapters}) != len(adapters):
        raise FormatError("two adapters have one name", where=path, remedy="restore the file")
    bank = AdapterBank(family, adapters, MappingProxyType(layers), None, cast("Access", access))
    if calibration is None:
        return bank
    return bank.with_statistics(_open_statistics(folder, cast("dict[str, object]", calibration), bank))


def _open_adapter(folder: Path, family: AdapterFamily, row: Mapping[str, object]) -> Adapter:
    path = files.contained(folder, str(row["file"]))
    name = files.checked_name(str(row["name"]), where=folder / METADATA)
    lora_B = MappedTensors(path, "lora_B/")
    base = cast("dict[str, str] | None", row["base"])
    if row["family"] is None:
        plan = RankPlan.from_json(cast("dict[str, object]", row["plan"]), where=folder / METADATA)
        lora_A: Mapping[str, Tensor] = dict(MappedTensors(path, "lora_A/"))
    else:
        plan, lora_A = family.plan, family.lora_A
    if set(lora_B) != set(plan.modules) or set(lora_A) != set(plan.modules):
        raise FormatError("its modules are not those of its plan", where=path, remedy="restore or rebuild the bank")
    return Adapter(
        name,
        plan,
        lora_A,
        lora_B,
        None if row["family"] is None else str(row["family"]),
        None if base is None else BaseIdentity(base["name"], base["sha256"]),
        provenance_of(row["provenance"], where=folder / METADATA),
        None if row["task_type"] is None else str(row["task_type"]),
        bool(row["transposed"]),
    )


def _read_checked(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that is read whole, so that its digest costs little to check."""
    tensors = read_tensors(path)
    _check_digest(path)
    return tensors


def _check_digest(path: Path) -> None:
    if not path.stem.endswith(f"-{files.sha256_of(path)[:16]}"):
        raise FormatError("the file was changed: SHA-256 differs", where=path, remedy="restore or rebuild the bank")


def _open_layer(module: str, adapters: tuple[Adapter, ...], tensors: Mapping[str, Tensor], path: Path) -> LayerFactors:
    """The layer's factors as stored, grouped as `build_factors` groups them."""
    groups: list[Group] = []
    for place, columns in enumerate(grouped(module, adapters)):
        A = adapters[columns[0]].lora_A[module].float()
        grams, norms = tensors[f"{module}/{place}/grams"], tensors[f"{module}/{place}/norms"]
        if grams.shape != (len(columns), A.shape[0] * (A.shape[0] + 1) // 2) or norms.shape != (len(columns),):
            raise FormatError(f"the factors of {module!r} are of other adapters", where=path, remedy="rebuild the bank")
        groups.append(Group(torch.tensor(columns), A, grams, norms))
    return assemble(module, adapters, groups)


def _open_statistics(folder: Path, row: Mapping[str, object], bank: AdapterBank) -> Statistics:
    try:
        tensors = _read_checked(files.contained(folder, str(row["file"])))
        if any(tensor.shape != (len(bank.adapters),) for tensor in tensors.values()):
            raise FormatError("calibrated for other adapters", where=folder / METADATA, remedy="calibrate again")
        return Statistics(
            {module: tensors[f"mean/{module}"] for module in bank.layers},
            {module: tensors[f"std/{module}"] for module in bank.layers},
            str(row["source"]),
            str(row["digest"]),
            int(cast("int", row["tokens"])),
            bool(row["spends_privacy"]),
            tuple(cast("list[int]", row["ignored_tokens"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"calibration lacks {error}", where=folder / METADATA, remedy="calibrate again") from error


def verify_bank(folder: Path) -> None:
    """Return if every file of the bank has the digest in its name.

    Raises:
        FormatError: a file was changed.
    """
    for file in (*folder.glob("*.safetensors"), *(folder / "adapters").glob("*.safetensors")):
        _check_digest(file)
