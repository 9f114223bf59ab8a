"""What a probe found: one number a module, how sure it is, and everything needed to plan again without probing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from types import MappingProxyType

from scipy.stats import t as student_t

from treadle import files
from treadle.errors import FormatError, InputError
from treadle.family.plan import LayerShape, read_modules
from treadle.models.identity import BaseIdentity

FORMAT = "treadle.probe-scores/1"

Value = str | int | float | bool


@dataclass(frozen=True)
class ModuleScore:
    """The disagreements that one module's perturbations caused: `values[trial][text]`, each ≥ 0, and its shape.

    Raises:
        InputError: no value, rows of different lengths, or a value that is negative or not finite.
    """

    shape: LayerShape
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.values}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError("a score needs the same texts, at least one, in every trial", remedy="probe again")
        if not all(math.isfinite(value) and value >= 0 for row in self.values for value in row):
            raise InputError("a disagreement is negative or not finite", remedy="probe in float32")

    @property
    def mean(self) -> float:
        """The score: the mean over trials and texts."""
        return fmean(fmean(row) for row in self.values)

    @property
    def standard_error(self) -> float:
        """Of the mean, from the spread over trials and, added to it, the spread over texts.

        The two are added as if nothing were shared between them, which errs on the large side; but a single trial or a
        single text tells nothing of its spread and adds 0, so that one trial of noise looks surer than it is.
        """
        return math.sqrt(sum(variance(means) / len(means) for means in self._spreads))

    @property
    def margin(self) -> float:
        """Half the width of the mean's 95% interval by Student's t, with the fewer of trials and texts less one as its
        degrees of freedom; 0 where neither spread is known.
        """
        freedom = min((len(means) for means in self._spreads), default=1) - 1
        return float(student_t.ppf(0.975, freedom)) * self.standard_error if freedom else 0.0

    @property
    def _spreads(self) -> list[list[float]]:
        """The means by trial and by text, where there are several."""
        trials = [fmean(row) for row in self.values]
        texts = [fmean(column) for column in zip(*self.values, strict=True)]
        return [means for means in (trials, texts) if len(means) > 1]


@dataclass(frozen=True)
class ProbeScores:
    """The result of a probe, modules in the model's order.

    Attributes:
        modules: module → score.
        probe: its name.
        settings: its settings.
        seed: of its draws.
        text_sha256: digest of the probe texts, None where they are private: a digest of private text leaks.
        base: the model that was probed; None where nobody has said.
        text: what the texts were: "public: " and a name, "private", or "not stated", which counts as private.

    Raises:
        InputError: no module.
    """

    modules: Mapping[str, ModuleScore]
    probe: str
    settings: Mapping[str, Value]
    seed: int
    text_sha256: str | None
    base: BaseIdentity | None = None
    text: str = "not stated"

    def __post_init__(self) -> None:
        if not self.modules:
            raise InputError("a probe needs at least one module", remedy="name modules that the model has")
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def means(self) -> dict[str, float]:
        """Module → score."""
        return {name: score.mean for name, score in self.modules.items()}

    def shapes(self) -> dict[str, LayerShape]:
        """Module → shape of its layer."""
        return {name: score.shape for name, score in self.modules.items()}

    def to_json(self) -> dict[str, object]:
        """The scores as plain JSON values; means and errors stand there for readers and are not read back."""
        return {
            "format": FORMAT,
            "probe": self.probe,
            "settings": dict(self.settings),
            "seed": self.seed,
            "text_sha256": self.text_sha256,
            "text": self.text,
            "base": None if self.base is None else {"name": self.base.name, "sha256": self.base.sha256},
            "modules": [
                {
                    "name": name,
                    "in_features": score.shape.in_features,
                    "out_features": score.shape.out_features,
                    "mean": score.mean,
                    "standard_error": score.standard_error,
                    "values": [list(row) for row in score.values],
                }
                for name, score in self.modules.items()
            ],
        }

    def save(self, path: Path) -> None:
        """Write scores.json at `path`, whole or not at all."""
        files.write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> "ProbeScores":
        """The scores in the file `path`.

        Raises:
            InputError: no such file.
            FormatError: it holds no scores, or a key is missing or of a wrong type.
        """
        content = files.read_json(path)
        if content.get("format") != FORMAT:
            raise FormatError(f"key 'format' is not {FORMAT!r}", where=path, remedy="give a scores.json")
        probe, settings, seed = content.get("probe"), content.get("settings"), content.get("seed")
        digest, rows = content.get("text_sha256"), content.get("modules")
        text, base = content.get("text", "not stated"), content.get("base")
        if not (
            isinstance(probe, str)
            and isinstance(settings, dict)
            and isinstance(seed, int)
            and isinstance(digest, str | None)
            and isinstance(text, str)
            and isinstance(base, dict | None)
            and isinstance(rows, list)
        ):
            raise FormatError("a key is missing or has the wrong type", where=path, remedy="probe again")
        try:
            modules = read_modules(rows, _score_of, where=path, remedy="probe again")
        except FormatError:
            raise
        except InputError as error:  # of values that are no scores; they do not know the file
            raise FormatError(error.what, where=path, remedy=error.remedy) from error
        if len({(len(score.values), len(score.values[0])) for score in modules.values()}) > 1:
            raise FormatError("modules have different trials or texts", where=path, remedy="probe again")
        return ProbeScores(modules, probe, settings, seed, digest, _base_of(base, path), text)


def _base_of(row: Mapping[str, object] | None, path: Path) -> BaseIdentity | None:
    if row is None:
        return None
    name, sha256 = row.get("name"), row.get("sha256")
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise FormatError("key 'base' lacks 'name' or 'sha256'", where=path, remedy="probe again")
    return BaseIdentity(name, sha256)


def _score_of(row: Mapping[str, object], shape: LayerShape) -> ModuleScore:
    """The score of one row of scores.json."""
    table = row["values"]
    if not isinstance(table, list) or any(type(value) not in (int, float) for line in table for value in line):
        raise TypeError  # bool is an int
    try:
        return ModuleScore(shape, tuple(tuple(map(float, line)) for line in table))
    except OverflowError as error:  # JSON knows integers that no float holds
        raise ValueError from error
