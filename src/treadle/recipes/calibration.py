"""Where a bank's statistics come from: files of public text, of the adapters' own, or of a tenant's traffic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

from treadle import files
from treadle.data.public_text import field_texts, public_texts
from treadle.errors import InputError
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank
from treadle.routing.calibration import (
    AnalyticCalibration,
    Calibration,
    Drift,
    OwnCalibration,
    PrivateCalibration,
    PublicCalibration,
    ReleasedNorms,
    TrafficStatistics,
    drift,
    pooled,
    read_traffic,
)

_AGGREGATES = ".safetensors"


@dataclass(frozen=True)
class PublicSource:
    """One public text for every adapter.

    Attributes:
        text: "pydoc", the language reference that every Python carries; a .txt file; or a source of `read_rows`.
        limit: passages at most.
        words: of a passage, at most.
        seed: of the choice of passages.
        field: that holds the text in a row.
        method: "public" reads every adapter's norms, "analytic" describes adapters by closed forms.
    """

    text: str = "pydoc"
    limit: int = 200
    words: int = 60
    seed: int = 0
    field: str = "text"
    method: Literal["public", "analytic"] = "public"


@dataclass(frozen=True)
class OwnSource:
    """Each adapter's own training text, by adapter name; what it makes is a release that no ε accounts for."""

    texts: Mapping[str, str]
    limit: int = 200
    words: int = 60
    seed: int = 0
    field: str = "text"


@dataclass(frozen=True)
class TrafficSource:
    """Unlabelled prompts of one tenant's callers; what it makes is a release about those callers.

    Attributes:
        sources: of `read_rows`, one prompt a row, or aggregates that `save_traffic` wrote on other servers.
        tenant: whose callers.
        field: that holds the prompt in a row.
    """

    sources: tuple[str, ...]
    tenant: str
    field: str = "text"

    def __post_init__(self) -> None:
        files.checked_name(self.tenant, where="tenant")


@dataclass(frozen=True)
class ReleasedSource:
    """What silos released about their adapters (`treadle bank measure`), by adapter name; costs what it states.

    Of a federated adapter every silo may release its own; they are pooled.
    """

    files: Mapping[str, Sequence[Path]]


Source = PublicSource | OwnSource | ReleasedSource | TrafficSource


def calibration_of(source: PublicSource | OwnSource | ReleasedSource, names: Sequence[str]) -> Calibration:
    """The source's text, read, as a calibration of the adapters of these names.

    Raises:
        InputError: no such file, an adapter without text of its own, or text of an unknown one.
        FormatError: a file is damaged or empty.
    """
    if isinstance(source, PublicSource):
        found = public_texts(source.text, limit=source.limit, words=source.words, seed=source.seed, field=source.field)
        kind = AnalyticCalibration if source.method == "analytic" else PublicCalibration
        return kind(found.passages, name=text_label(source.text))
    if isinstance(source, ReleasedSource):
        _check_names(source.files, names, "nothing released about", "--released")
        return PrivateCalibration(
            {
                name: pooled([ReleasedNorms.load(file) for file in given], where=name)
                for name, given in source.files.items()
            }
        )
    _check_names(source.texts, names, "no text of its own for", "--own")
    # The same reader cuts any text into passages; nothing here becomes public by it.
    return OwnCalibration(
        {
            name: public_texts(
                text, limit=source.limit, words=source.words, seed=source.seed, field=source.field
            ).passages
            for name, text in source.texts.items()
        }
    )


def _check_names(given: Mapping[str, object], names: Sequence[str], lacks: str, option: str) -> None:
    """Return if something is given for every adapter, and for no other.

    Raises:
        InputError: it is not.
    """
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(f"{lacks} adapter {missing[0]!r}", remedy=f"pass {option} {missing[0]}=FILE")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise InputError(f"no adapter {unknown[0]!r} in the bank", remedy=f"choose among {', '.join(names)}")


def text_label(text: str) -> str:
    """What a text is called where it is recorded: a file's own name, never its path."""
    return Path(text).name if Path(text).exists() else text


def calibrated(bank: AdapterBank, calibration: Calibration, base: str | None, progress: Progress) -> AdapterBank:
    """The bank with statistics from this calibration, made by its own base.

    Raises:
        InputError: the calibration has no usable text.
        MismatchError: another base.
    """
    model, tokenizer = loaded_base(bank.family.base, base, progress=progress)
    return bank.calibrate(calibration, model=model, tokenizer=tokenizer, progress=progress)


def collected_traffic(
    bank: AdapterBank, source: TrafficSource, base: str | None, progress: Progress = silent
) -> TrafficStatistics:
    """The aggregates of everything in the source together; the base is loaded only if there are prompts to read.

    Raises:
        InputError: no such file, or no prompt in it.
        FormatError: a file is damaged.
        MismatchError: aggregates of another tenant or other adapters, or another base.
    """
    found = [TrafficStatistics.load(Path(file)) for file in source.sources if Path(file).suffix == _AGGREGATES]
    prompts = [
        text for file in source.sources if Path(file).suffix != _AGGREGATES for text in field_texts(file, source.field)
    ]
    if prompts:
        model, tokenizer = loaded_base(bank.family.base, base, progress=progress)
        found.append(read_traffic(model, tokenizer, bank.layers, bank.adapters, prompts, source.tenant, progress))
    if not found:
        raise InputError("no traffic", where=f"traffic:{source.tenant}", remedy="name at least one file")
    seen = reduce(TrafficStatistics.merge, found)
    if seen.tenant != source.tenant:
        raise InputError(
            f"the aggregates are of tenant {seen.tenant!r}", where=source.tenant, remedy=f"pass --tenant {seen.tenant}"
        )
    return seen


def save_traffic(
    folder: Path, source: TrafficSource, out: Path, *, base: str | None = None, progress: Progress = silent
) -> TrafficStatistics:
    """The aggregates of the source for the bank in `folder`, written to `out`: not a word of any prompt is in there.

    Raises:
        InputError: no bank, no such file, or `out` is no .safetensors file.
        FormatError: a file is damaged.
        MismatchError: aggregates of another tenant or other adapters, or another base.
    """
    if out.suffix != _AGGREGATES:
        raise InputError("not a .safetensors file", where=out, remedy="name one, for example traffic.safetensors")
    seen = collected_traffic(load_bank(folder), source, base, progress)
    seen.save(out)
    return seen


def drift_of_bank(
    folder: Path, source: TrafficSource, *, base: str | None = None, progress: Progress = silent
) -> Drift:
    """How far the source's traffic is from the statistics of the bank in `folder`.

    Raises:
        InputError: no bank, or one without statistics; too little traffic.
        MismatchError: the traffic was read with other adapters.
    """
    bank = load_bank(folder)
    if bank.statistics is None:
        raise InputError("the bank has no statistics", where=folder, remedy="run `treadle bank calibrate`")
    return drift(bank.statistics, collected_traffic(bank, source, base, progress), bank.adapters)
