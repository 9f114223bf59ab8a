"""A bank as a folder: `bank.json` names every other file by its digest and is replaced last, in one rename.

    bank.json                       what is in the bank
    family/                         the family's folder
    adapters/NAME-DIGEST.safetensors    lora_B of a member; lora_A and lora_B of a foreign adapter
    factors-DIGEST.safetensors      Gram factors of all layers
    calibration-DIGEST.safetensors  mean and std of all layers; the moments of z, if it is analytic
    public-text-DIGEST.json         the passages that a public calibration read, for adapters to come
    versions/                       earlier `bank.json`s, whose files are kept too (see `bank_versions`)

Opening reads the factors and the statistics; a lora_B is read from its memory-mapped file when it first acts.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
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
from treadle.routing.access import Labels, checked_labels
from treadle.routing.bank import Access, AdapterBank
from treadle.routing.bank_versions import METADATA, archive, bank_digest, metadata_of, number_of, sweep, tensor_files
from treadle.routing.calibration import LatentMoments, Method, PromptStatistics, Statistics
from treadle.routing.factors import Group, LayerFactors, assemble, grouped

FORMAT = "treadle.bank/2"


_FLOATS = ("F64", "F32", "F16", "BF16")


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file under `prefix`, each read from the file when it is asked for.

    The file is mapped for that moment only: pages of a mapping that stays would count as memory of this process, and a
    thousand adapters that have each acted once would fill it.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self._prefix = prefix
        self._guarded = False
        with self._opened() as file:
            self._names = [key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118

    def _opened(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except FileNotFoundError as error:
            raise FormatError(
                "a file of the bank is missing", where=self.path, remedy="restore or rebuild the bank"
            ) from error
        except SafetensorError as error:
            raise FormatError(
                f"damaged safetensors file ({error})", where=self.path, remedy="restore or rebuild the bank"
            ) from error

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Return if the tensors are of these shapes and of floating point, as the file's header says.

        Raises:
            FormatError: one is not: it would be stretched to fit where it acts.
        """
        with self._opened() as file:
            for name, shape in shapes.items():
                found = file.get_slice(self._prefix + name)
                if tuple(found.get_shape()) != shape or found.get_dtype() not in _FLOATS:
                    raise FormatError(
                        f"{name!r} is {found.get_dtype()} of {tuple(found.get_shape())}, not floats of {shape}",
                        where=self.path,
                        remedy="restore or rebuild the bank",
                    )

    def guard(self) -> None:
        """Have the file's digest checked when a tensor is next read: opening a bank must not read every adapter."""
        self._guarded = True

    def __getitem__(self, name: str) -> Tensor:
        if self._guarded:
            _check_digest(self.path)
            self._guarded = False
        with self._opened() as file:
            try:
                return file.get_tensor(self._prefix + name)
            except SafetensorError as error:
                raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_bank(bank: AdapterBank, folder: Path, *, passages: Sequence[str] = ()) -> None:
    """Write the bank into `folder`, as the next version of one that stands there; it stays if anything fails.

    Args:
        bank: to write.
        folder: a new one, or one that holds a bank of this family.
        passages: the public text that it was calibrated with, if that is to be kept for adapters to come.

    Raises:
        InputError: the folder holds a bank of another family, or something else than a bank.
        FormatError: its `adapters` is a link out of it.
        UnavailableError: the disk refuses.
    """
    if not folder.exists() or not any(folder.iterdir()):
        with files.new_folder(folder, overwrite=True) as temporary:
            bank.family.save(temporary / "family")
            _write(bank, temporary, passages, version=1)
        return
    if not (folder / METADATA).exists():
        raise InputError("the folder is not empty and holds no bank", where=folder, remedy="choose another folder")
    if AdapterFamily.load(folder / "family").fingerprint != bank.family.fingerprint:
        raise InputError("the folder holds a bank of another family", where=folder, remedy="choose another folder")
    present = number_of(files.read_json(folder / METADATA), where=folder / METADATA)
    files.contained(folder, "adapters")  # a link would have them written, and swept, elsewhere
    _write(bank, folder, passages, version=present + 1)
    sweep(folder)


def _write(bank: AdapterBank, folder: Path, passages: Sequence[str], *, version: int) -> None:
    """Write what `bank.json` will name, keep the present `bank.json`, then replace it."""
    content: dict[str, object] = {
        "format": FORMAT,
        "version": version,
        "family": bank.family.fingerprint,
        "access": bank.access,
        "adapters": [_write_adapter(folder, adapter, bank) for adapter in bank.adapters],
        "modules": list(bank.layers),
        "factors": _write_tensors(folder, "factors", _factor_tensors(bank)),
        "calibration": None if bank.statistics is None else _write_statistics(folder, bank.statistics),
    }
    if passages and bank.statistics is not None and bank.statistics.digest:
        text = {"source": bank.statistics.source, "passages": list(passages)}
        files.write_json(_text_file(folder, bank.statistics.digest), text)
    if version > 1:
        archive(folder)
    files.write_json(folder / METADATA, content)


def _text_file(folder: Path, digest: str) -> Path:
    return folder / f"public-text-{digest[:16]}.json"


def kept_passages(folder: Path, bank: AdapterBank) -> tuple[str, ...]:
    """The public passages that the bank in `folder` was calibrated with; none if it was not, or they are lost."""
    if bank.statistics is None or not bank.statistics.digest:
        return ()
    path = _text_file(folder, bank.statistics.digest)
    passages = files.read_json(path).get("passages") if path.exists() else None
    return tuple(str(passage) for passage in passages) if isinstance(passages, list) else ()


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors under a name that holds their digest; return the name, relative to `folder`."""
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{stem}-{digest[:16]}.safetensors"
    if not (folder / name).exists() or files.sha256_of(folder / name) != digest:
        files.write_bytes(folder / name, content)
    return name


def _write_adapter(folder: Path, adapter: Adapter, bank: AdapterBank) -> dict[str, object]:
    return {
        "name": adapter.name,
        "file": _adapter_file(folder, adapter),
        "family": adapter.family,
        "base": None if adapter.base is None else asdict(adapter.base),
        "plan": None if adapter.family is not None else adapter.plan.to_json(),
        "task_type": adapter.task_type,
        "transposed": adapter.transposed,
        "folded_B_sha256": adapter.digest,
        "provenance": asdict(adapter.provenance),
        "labels": sorted(bank.labels.get(adapter.name, ())),
    }


def _adapter_file(folder: Path, adapter: Adapter) -> str:
    """The file with the adapter's tensors, relative to `folder`; written unless it was opened from there."""
    mapped = adapter.lora_B
    if isinstance(mapped, MappedTensors) and mapped.path.is_relative_to(folder.resolve()) and mapped.path.exists():
        return mapped.path.relative_to(folder.resolve()).as_posix()
    tensors = {f"lora_B/{module}": B for module, B in adapter.lora_B.items()}
    if adapter.family is None:
        tensors |= {f"lora_A/{module}": A for module, A in adapter.lora_A.items()}
    return _write_tensors(folder, f"adapters/{adapter.name}", tensors)


def _factor_tensors(bank: AdapterBank) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, factors in bank.layers.items():
        for place, group in enumerate(factors.groups):
            tensors |= {f"{module}/{place}/grams": group.grams, f"{module}/{place}/norms": group.norms}
    return tensors


def _write_statistics(folder: Path, statistics: Statistics) -> dict[str, object]:
    tensors = {f"mean/{module}": v for module, v in statistics.mean.items()}
    tensors |= {f"std/{module}": v for module, v in statistics.std.items()}
    if statistics.prompts is not None:
        tensors |= {f"prompts/{name}": values for name, values in statistics.prompts.tensors().items()}
    for module, moments in statistics.moments.items():
        tensors |= {f"moments/{module}/mean": moments.mean, f"moments/{module}/scatter": moments.scatter}
        tensors[f"moments/{module}/count"] = torch.tensor(moments.count)
    return {
        "file": _write_tensors(folder, "calibration", tensors),
        "method": statistics.method,
        "source": statistics.source,
        "digest": statistics.digest,
        "date": statistics.date,
        "tokens": statistics.tokens,
        "ignored_tokens": list(statistics.ignored_tokens),
        "folded_B_sha256": list(statistics.B_digests),
        "epsilon": statistics.epsilon,
        "delta": statistics.delta,
    }


def load_bank(folder: Path, *, version: int | None = None) -> AdapterBank:
    """The bank in `folder`, without reading the adapters' lora_B.

    Args:
        folder: that `save_bank` wrote.
        version: an earlier one of `bank_versions.versions`; None for the present one.

    Raises:
        InputError: no such folder, no bank in it, or no such version.
        FormatError: a file is damaged, missing, or leads out of the folder.
    """
    path = folder / METADATA if version is None else metadata_of(folder, version)
    content = files.read_json(path)
    if content.get("format") != FORMAT:
        raise FormatError(
            f"key 'format' is not {FORMAT!r}", where=path, remedy="rebuild the bank with `treadle bank build`"
        )
    number_of(content, where=path)
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
        labels = _open_labels(cast("list[dict[str, object]]", content["adapters"]), path)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"key {error} is missing or of a wrong type", where=path, remedy="restore the file"
        ) from error
    if access not in get_args(Access):
        raise FormatError(f"key 'access' is {access!r}", where=path, remedy="use 'open' or 'required'")
    if len({adapter.name for adapter in adapters}) != len(adapters):
        raise FormatError("two adapters have one name", where=path, remedy="restore the file")
    bank = AdapterBank(family, adapters, MappingProxyType(layers), None, cast("Access", access), labels)
    if calibration is None:
        return bank
    return bank.with_statistics(_open_statistics(folder, cast("dict[str, object]", calibration), bank))


def load_present(folder: Path) -> tuple[AdapterBank, str]:
    """The bank in `folder` and the digest of the very version that was read, whoever changes it meanwhile.

    Raises:
        InputError: no such folder, or no bank in it.
        FormatError: a file is damaged, missing, or leads out of the folder.
    """
    while True:
        digest = bank_digest(folder)
        bank = load_bank(folder)
        if bank_digest(folder) == digest:
            return bank, digest


def _open_labels(rows: Sequence[Mapping[str, object]], path: Path) -> Mapping[str, Labels]:
    """Adapter → its labels; adapters without any are left out."""
    found = {str(row["name"]): row["labels"] for row in rows}
    for name, labels in found.items():
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise FormatError(f"the labels of {name!r} are no list of texts", where=path, remedy="restore the file")
    checked = {name: checked_labels(cast("list[str]", labels), where=path) for name, labels in found.items()}
    return MappingProxyType({name: labels for name, labels in checked.items() if labels})


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
    if row["family"] not in (None, family.fingerprint):
        raise FormatError(f"{name!r} is of another family", where=folder / METADATA, remedy="rebuild the bank")
    lora_B.check({module: (layer.out_features, layer.rank) for module, layer in plan.modules.items()})
    adapter = Adapter(
        name,
        plan,
        lora_A,
        lora_B,
        None if row["family"] is None else str(row["family"]),
        None if base is None else BaseIdentity(base["name"], base["sha256"]),
        provenance_of(row["provenance"], where=folder / METADATA),
        None if row["task_type"] is None else str(row["task_type"]),
        bool(row["transposed"]),
        known_digest=str(row["folded_B_sha256"]),
    )
    lora_B.guard()
    return adapter


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
        if any(tensor.shape[-1:] != (len(bank.adapters),) for key, tensor in tensors.items() if key[:7] != "moments"):
            raise FormatError("calibrated for other adapters", where=folder / METADATA, remedy="calibrate again")
        if row["method"] not in get_args(Method):
            raise FormatError(f"no such method {row['method']!r}", where=folder / METADATA, remedy="calibrate again")
        return Statistics(
            {module: tensors[f"mean/{module}"] for module in bank.layers},
            {module: tensors[f"std/{module}"] for module in bank.layers},
            cast("Method", row["method"]),
            str(row["source"]),
            str(row["digest"]),
            int(cast("int", row["tokens"])),
            tuple(cast("list[int]", row["ignored_tokens"])),
            tuple(cast("list[str]", row["folded_B_sha256"])),
            _open_moments(tensors),
            _open_prompts(tensors),
            str(row["date"]),
            None if row.get("epsilon") is None else float(cast("float", row["epsilon"])),
            float(cast("float", row.get("delta", 0.0))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"calibration lacks {error}", where=folder / METADATA, remedy="calibrate again") from error


def _open_prompts(tensors: Mapping[str, Tensor]) -> PromptStatistics | None:
    found = {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith("prompts/")}
    return PromptStatistics.of_tensors(found) if found else None


def _open_moments(tensors: Mapping[str, Tensor]) -> dict[str, LatentMoments]:
    """Module → the stored moments of the family's latents."""
    modules = [key.split("/")[1] for key in tensors if key.startswith("moments/") and key.endswith("/count")]
    return {
        module: LatentMoments(
            int(tensors[f"moments/{module}/count"]),
            tensors[f"moments/{module}/mean"],
            tensors[f"moments/{module}/scatter"],
        )
        for module in modules
    }


def verify_bank(folder: Path) -> None:
    """Return if every file of the bank has the digest in its name.

    Raises:
        FormatError: a file was changed, or an adapter's digest is not that of its lora_B.
    """
    for file in tensor_files(folder):
        _check_digest(file)
    for adapter in load_bank(folder).adapters:
        if replace(adapter).digest != adapter.digest:
            raise FormatError(
                f"the digest of {adapter.name!r} is not that of its lora_B",
                where=folder / METADATA,
                remedy="restore or rebuild the bank",
            )
