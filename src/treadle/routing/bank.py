"""The adapter bank: a library of adapters with what routing needs of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import adapted_layers
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.routing.access import Labels
from treadle.routing.calibration import Calibration, Statistics, calibrate, completed
from treadle.routing.factors import LayerFactors, build_factors, calibrated
from treadle.routing.joining import Pick, joined_factors, joined_statistics

Access = Literal["open", "required"]


@dataclass(frozen=True)
class AdapterBank:
    """Adapters over one base, with factors and statistics by layer; immutable, every change is a new bank.

    Attributes:
        family: what its members share.
        adapters: in their fixed order, which settles ties.
        layers: module → factors, in the family's order of modules, foreign ones behind.
        statistics: the calibration, None before it.
        access: "required" insists on a permitted set for every row.
        labels: adapter → its clearances, which a policy joins with a caller and the data of a request; an adapter
            without any is left out.
    """

    family: AdapterFamily
    adapters: tuple[Adapter, ...]
    layers: Mapping[str, LayerFactors]
    statistics: Statistics | None
    access: Access
    labels: Mapping[str, Labels] = field(default_factory=dict[str, Labels])

    def __post_init__(self) -> None:
        if self.access not in get_args(Access):  # a misspelt "required" must not open the bank
            raise InputError(f"no such access {self.access!r}", remedy=f"choose among {', '.join(get_args(Access))}")
        names = set(self.names)
        if len(names) != len(self.adapters) or not self.labels.keys() <= names:
            raise InputError("two adapters have one name, or labels no adapter", remedy="give each a name of its own")

    @staticmethod
    def build(
        family: AdapterFamily,
        adapters: Sequence[Adapter],
        *,
        calibration: Calibration | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        access: Access = "open",
        progress: Progress = silent,
    ) -> "AdapterBank":
        """The bank of these adapters; with a calibration, ready for z-scores.

        Args:
            family: every adapter that belongs to a family must belong to this one; foreign ones are kept on the
                exact, slower path.
            adapters: at least one, names unique.
            calibration: where the statistics come from; None leaves them for `calibrate`.
            model: the base to calibrate with, loaded by the family's base name if None.
            tokenizer: the base's, likewise.
            access: "required" makes a permitted set obligatory.
            progress: told of the calibration.

        Raises:
            InputError: no adapter, two of one name, or an unknown `access`.
            MismatchError: an adapter of another family or base.
        """
        if not adapters:
            raise InputError("a bank needs at least one adapter", remedy="add one")
        seen: set[str] = set()
        members: list[Adapter] = []
        for adapter in adapters:
            if adapter.name in seen:
                raise InputError("this adapter name is taken", where=adapter.name, remedy="give it another name")
            seen.add(adapter.name)
            members.append(_admitted(adapter, family))
        layers = {module: build_factors(module, members) for module in _modules(family, members)}
        bank = AdapterBank(family, tuple(members), MappingProxyType(layers), None, access)
        if calibration is None:
            return bank
        return bank.calibrate(calibration, model=model, tokenizer=tokenizer, progress=progress)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def ignored_tokens(self) -> tuple[int, ...]:
        """The token ids that the calibration left out, and that no prompt is scored by."""
        return () if self.statistics is None else self.statistics.ignored_tokens

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name.

        Raises:
            InputError: there is none.
        """
        for adapter in self.adapters:
            if adapter.name == name:
                return adapter
        raise InputError(f"no adapter {name!r} in the bank", remedy=f"choose among {', '.join(self.names)}")

    def calibrate(
        self,
        calibration: Calibration,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Progress = silent,
    ) -> "AdapterBank":
        """A bank with statistics from this calibration; this one stays as it is.

        Args:
            calibration: where the statistics come from.
            model: the base, loaded by the family's base name if None.
            tokenizer: the base's, likewise.
            progress: told of every batch.

        Raises:
            InputError: the calibration has no usable text.
            MismatchError: the model lacks a layer that an adapter changes, or its name leads to another one.
        """
        if model is None:
            base = self.family.base
            if identity_of(base.name) != base:
                raise MismatchError(
                    "the model of this name has other weights than the bank's base",
                    where=base.name,
                    remedy="pass the model and its tokenizer",
                )
            model = load_model(base.name)
        tokenizer = tokenizer or load_tokenizer(self.family.base.name)
        return self.with_statistics(
            calibrate(model, tokenizer, self.layers, self.adapters, calibration, progress=progress)
        )

    def with_statistics(self, statistics: Statistics) -> "AdapterBank":
        """A bank with these statistics.

        Raises:
            MismatchError: they were made for another lora_B, or other adapters.
        """
        statistics.check(self.adapters)
        layers = {
            module: calibrated(factors, {"mean": statistics.mean[module], "std": statistics.std[module]})
            for module, factors in self.layers.items()
        }
        return replace(self, layers=MappingProxyType(layers), statistics=statistics)

    def labelled(self, name: str, labels: Labels) -> "AdapterBank":
        """A bank in which this adapter has these labels and no others.

        Raises:
            InputError: there is no such adapter.
        """
        self.adapter(name)
        others = {other: kept for other, kept in self.labels.items() if other != name}
        return replace(self, labels=MappingProxyType(others | ({name: labels} if labels else {})))

    def add(self, adapter: Adapter) -> "AdapterBank":
        """A bank with one more adapter at the end, which has no statistics yet: see `merge`.

        Raises:
            InputError: its name is taken.
            MismatchError: it belongs to another family or base.
        """
        return self.merge(AdapterBank.build(self.family, [adapter]))

    def update(self, adapter: Adapter) -> "AdapterBank":
        """A bank with this adapter in the place of the one of its name, whose labels it keeps; without statistics yet.

        Raises:
            InputError: there is no adapter of this name.
            MismatchError: it belongs to another family or base.
        """
        self.adapter(adapter.name)
        return self.merge(AdapterBank.build(self.family, [adapter]), replacing=True)

    def remove(self, name: str) -> "AdapterBank":
        """A bank without the adapter of this name; the others keep their order and statistics.

        Raises:
            InputError: there is no such adapter, or it is the last.
        """
        self.adapter(name)
        if len(self.adapters) == 1:
            raise InputError("a bank needs at least one adapter", where=name, remedy="add another one first")
        return self._joined([self], [Pick(0, place) for place, other in enumerate(self.names) if other != name])

    def merge(self, other: "AdapterBank", *, replacing: bool = False) -> "AdapterBank":
        """A bank of both; factors and statistics are copied, not a bit of any is computed anew.

        This bank's adapters keep their order, the other's follow. Statistics of the other bank that were taken in
        another way than this one's are left out, so that `calibrate` those first where that matters. The bank
        insists on permitted sets if one of the two does.

        Args:
            other: of the same family.
            replacing: let an adapter of the other bank take the place of one of its name, instead of refusing.

        Raises:
            InputError: both have an adapter of one name.
            MismatchError: the other bank is of another family.
        """
        if other.family.fingerprint != self.family.fingerprint:
            raise MismatchError(
                f"its family is {other.family.fingerprint[:12]}, this bank's {self.family.fingerprint[:12]}",
                where="the other bank",
                remedy="merge banks of one family, or add its adapters as foreign ones",
            )
        theirs = {name: Pick(1, place) for place, name in enumerate(other.names)}
        mine = {name: Pick(0, place) for place, name in enumerate(self.names)}
        taken = [name for name in theirs if name in mine]
        if taken and not replacing:
            raise InputError(
                "this adapter name is taken", where=taken[0], remedy="give it another name, update it, or remove one"
            )
        return self._joined([self, other], list((mine | theirs).values()))

    def _joined(self, sources: Sequence["AdapterBank"], picks: Sequence[Pick]) -> "AdapterBank":
        """The bank of the picked adapters; an adapter that replaces another keeps its labels if it has none."""
        members = tuple(sources[pick.source].adapters[pick.place] for pick in picks)
        modules = _modules(self.family, members)
        tables = [source.layers for source in sources]
        layers = {module: joined_factors(module, members, tables, picks) for module in modules}
        labels: dict[str, Labels] = {}
        for source in sources:
            labels |= source.labels
        bank = AdapterBank(
            self.family,
            members,
            MappingProxyType(layers),
            None,
            "required" if any(source.access == "required" for source in sources) else "open",
            MappingProxyType({member.name: labels[member.name] for member in members if member.name in labels}),
        )
        sizes = [len(source.adapters) for source in sources]
        found = joined_statistics([source.statistics for source in sources], sizes, picks, modules)
        return bank if found is None else bank.with_statistics(completed(found, bank.layers, members))

    def check_model(self, model: PreTrainedModel) -> None:
        """Return if the model has every layer that the bank's adapters change.

        Raises:
            MismatchError: a layer is missing or of another shape.
        """
        for adapter in self.adapters:
            try:
                adapted_layers(model, adapter.shapes())
            except MismatchError as error:
                raise MismatchError(error.what, where=adapter.name, remedy=error.remedy) from error


def _modules(family: AdapterFamily, members: Sequence[Adapter]) -> list[str]:
    """The modules that the members change: the family's in its order, foreign ones behind."""
    modules = dict.fromkeys(family.plan.modules)
    modules |= dict.fromkeys(module for adapter in members for module in adapter.plan.modules)
    used = {module for adapter in members for module in adapter.plan.modules}
    return [module for module in modules if module in used]


def _admitted(adapter: Adapter, family: AdapterFamily) -> Adapter:
    """The adapter as the bank keeps it."""
    if adapter.family is not None:
        return adapter.member_of(family)
    if adapter.base is not None and adapter.base.sha256 != family.base.sha256:
        raise MismatchError(
            f"trained on base {adapter.base.name!r}, the bank's is {family.base.name!r}",
            where=adapter.name,
            remedy="use adapters of one base",
        )
    for module, row in adapter.plan.modules.items():
        planned = family.plan.modules.get(module)
        if planned is not None and planned.shape != row.shape:
            raise MismatchError(
                f"{module!r} maps {row.in_features}→{row.out_features}, "
                f"the family's base {planned.in_features}→{planned.out_features}",
                where=adapter.name,
                remedy="use adapters of one base",
            )
    return adapter
