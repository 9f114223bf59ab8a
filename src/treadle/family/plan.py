"""The rank plan: how many ranks, and which scaling, every adapted module gets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from treadle import files
from treadle.errors import FormatError, InputError, MismatchError

FORMAT = "treadle.rank-plan/1"


_EARLIER = "earlier_probe_text"
# What a plan's provenance says of probe texts: key → whose ranks they decided.
_TEXTS = {"probe_text": "the rank plan", _EARLIER: "an earlier rank plan, which shows in A,"}


@dataclass(frozen=True)
class LayerShape:
    """What a linear layer maps: `in_features` to `out_features`."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModulePlan:
    """One adapted module: lora_A is (rank, in_features), lora_B is (out_features, rank)."""

    rank: int
    lora_alpha: float
    in_features: int
    out_features: int

    @property
    def scaling(self) -> float:
        """alpha / r, the factor on B·A."""
        return self.lora_alpha / self.rank

    @property
    def shape(self) -> LayerShape:
        """The layer's own shape."""
        return LayerShape(self.in_features, self.out_features)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a plan: B alone is what B-only training moves, both are what LoRA moves."""

    lora_A: int
    lora_B: int

    @property
    def total(self) -> int:
        """A and B together."""
        return self.lora_A + self.lora_B


@dataclass(frozen=True)
class RankPlan:
    """Module name → rank and lora_alpha, in the model's own order of modules.

    A module that is dropped is absent: a rank of 0 has no alpha/r and is refused.

    Raises:
        InputError: no module, a rank or alpha that is not positive, or a rank above the layer's smaller side.
    """

    modules: Mapping[str, ModulePlan]
    provenance: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if not self.modules:
            raise InputError("a rank plan needs at least one module", remedy="name modules that the model has")
        for name, module in self.modules.items():
            limit = min(module.in_features, module.out_features)
            if not 1 <= module.rank <= limit:
                raise InputError(
                    f"rank {module.rank} is outside 1..{limit}", where=name, remedy="drop the module or change its rank"
                )
            if not 0 < module.lora_alpha < float("inf"):
                raise InputError(f"lora_alpha {module.lora_alpha} is not positive", where=name, remedy="use alpha > 0")
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    @staticmethod
    def uniform(shapes: Mapping[str, LayerShape], *, rank: int, scaling: float = 1.0) -> "RankPlan":
        """The plan that gives every module the same rank, and alpha = scaling · rank."""
        return RankPlan.of_ranks(
            shapes, dict.fromkeys(shapes, rank), scaling=scaling, provenance={"allocator": "uniform"}
        )

    @staticmethod
    def of_ranks(
        shapes: Mapping[str, LayerShape],
        ranks: Mapping[str, int],
        *,
        scaling: float = 1.0,
        provenance: Mapping[str, str] | None = None,
    ) -> "RankPlan":
        """The plan with these ranks; alpha/r is the same everywhere and modules of rank 0 are left out.

        Raises:
            MismatchError: a rank is given for a module that `shapes` lacks.
        """
        unknown = [name for name in ranks if name not in shapes]
        if unknown:
            raise MismatchError(
                f"the model has no module {unknown[0]!r}", remedy="use the names of model.named_modules()"
            )
        modules = {
            name: ModulePlan(ranks[name], scaling * ranks[name], shape.in_features, shape.out_features)
            for name, shape in shapes.items()
            if ranks.get(name, 0) != 0
        }
        return RankPlan(modules, provenance or {})

    @property
    def unaccounted(self) -> str:
        """Why no ε covers the ranks, "" where no text decided them or a public one did.

        Text that nobody has called public counts as private.
        """
        found = self._unaccounted_text
        if found is None:
            return ""
        key, text = found
        where = "private text" if text.startswith("private") else "text that nobody states to be public"
        return f"{_TEXTS[key]} was probed on {where}"

    @property
    def _unaccounted_text(self) -> tuple[str, str] | None:
        """The first text that is not public: its key in the provenance, and what it is."""
        told = ((key, self.provenance.get(key, "public")) for key in _TEXTS)
        return next(((key, text) for key, text in told if not text.startswith("public")), None)

    def showing(self, earlier: "RankPlan") -> "RankPlan":
        """This plan of a family whose A still shows the ranks of `earlier`: if no ε covers those, none covers these."""
        found = earlier._unaccounted_text
        return self if found is None else replace(self, provenance={**self.provenance, _EARLIER: found[1]})

    def count(self) -> ParameterCount:
        """How many parameters A and B have."""
        return ParameterCount(
            lora_A=sum(m.rank * m.in_features for m in self.modules.values()),
            lora_B=sum(m.rank * m.out_features for m in self.modules.values()),
        )

    def check(self, shapes: Mapping[str, LayerShape]) -> None:
        """Return if every planned module is among `shapes` with the planned size.

        Raises:
            MismatchError: a module is missing or of another size.
        """
        for name, module in self.modules.items():
            if name not in shapes:
                raise MismatchError(f"the model has no module {name!r}", remedy="plan again for this model")
            if shapes[name] != module.shape:
                raise MismatchError(
                    f"the model's layer is {shapes[name].in_features}→{shapes[name].out_features}, "
                    f"the plan's {module.in_features}→{module.out_features}",
                    where=name,
                    remedy="plan again for this model",
                )

    def to_json(self) -> dict[str, object]:
        """The plan as plain JSON values, modules in order."""
        return {
            "format": FORMAT,
            "provenance": dict(self.provenance),
            "modules": [
                {
                    "name": name,
                    "rank": m.rank,
                    "lora_alpha": m.lora_alpha,
                    "in_features": m.in_features,
                    "out_features": m.out_features,
                }
                for name, m in self.modules.items()
            ],
        }

    @staticmethod
    def from_json(content: Mapping[str, object], *, where: object = None) -> "RankPlan":
        """The plan that `to_json` wrote.

        Raises:
            FormatError: a key is missing, of a wrong type or range, or a module stands there twice.
        """
        if content.get("format") != FORMAT:
            raise FormatError(
                f"key 'format' is not {FORMAT!r}", where=where, remedy="give a plan.json of `treadle plan`"
            )
        rows, provenance = content.get("modules"), content.get("provenance", {})
        if not isinstance(rows, list) or not isinstance(provenance, dict):
            raise FormatError("key 'modules' must be a list, 'provenance' an object", where=where, remedy="plan again")
        modules = read_modules(rows, _module_of, where=where, remedy="plan again")
        try:
            return RankPlan(modules, {str(key): str(value) for key, value in provenance.items()})
        except InputError as error:
            raise FormatError(str(error), where=where) from error

    def save(self, path: Path) -> None:
        """Write plan.json at `path`, whole or not at all."""
        files.write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> "RankPlan":
        """The plan in the file `path`.

        Raises:
            InputError: no such file, or it is no plan.
        """
        return RankPlan.from_json(files.read_json(path), where=path)


def _module_of(row: Mapping[str, object], shape: LayerShape) -> ModulePlan:
    """The plan of one row of plan.json."""
    rank, alpha = row["rank"], row["lora_alpha"]
    if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(alpha, int | float):
        raise TypeError
    return ModulePlan(rank, float(alpha), shape.in_features, shape.out_features)


Row = TypeVar("Row")


def read_modules(
    rows: list[object], read: Callable[[Mapping[str, object], LayerShape], Row], *, where: object, remedy: str
) -> dict[str, Row]:
    """Module → what `read` makes of its row, for the rows of a file with one row a module, in the file's order.

    Every row has `name`, `in_features` and `out_features`; the rest is `read`'s, which may raise KeyError for what is
    missing and TypeError or ValueError for what is not a value of its kind.

    Raises:
        FormatError: a row lacks a key, a value has the wrong type, or a module stands there twice.
    """
    found: dict[str, Row] = {}
    for row in rows:
        name: object = None
        try:
            if not isinstance(row, dict):
                raise TypeError
            name = row["name"]
            width, height = row["in_features"], row["out_features"]
            if not isinstance(name, str) or any(type(size) is not int for size in (width, height)):  # bool is an int
                raise TypeError
            if min(width, height) < 1:
                raise ValueError
            made = read(row, LayerShape(width, height))
        except KeyError as error:
            raise FormatError(f"module {name!r}: lacks the key {error}", where=where, remedy=remedy) from error
        except (TypeError, ValueError) as error:
            raise FormatError(f"module {name!r}: a value has the wrong type", where=where, remedy=remedy) from error
        if name in found:
            raise FormatError(f"module {name!r} stands there twice", where=where, remedy=remedy)
        found[name] = made
    return found
