"""The adapter bank: a library of adapters with what routing needs of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import adapted_layers
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.routing.calibration import Calibration, Statistics, calibrate
from treadle.routing.factors import LayerFactors, build_factors, calibrated

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
    """

    family: AdapterFamily
    adapters: tuple[Adapter, ...]
    layers: Mapping[str, LayerFactors]
    statistics: Statistics | None
    access: Access

    def __post_init__(self) -> None:
        if self.access not in get_args(Access):  # a misspelt "required" must not open the bank
            raise InputError(f"no such access {self.access!r}", remedy=f"choose among {', '.join(get_args(Access))}")

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
        modules = dict.fromkeys(module for module in family.plan.modules)
        modules |= dict.fromkeys(module for adapter in members for module in adapter.plan.modules)
        used = [module for module in modules if any(module in adapter.plan.modules for adapter in members)]
        layers = {module: build_factors(module, members) for module in used}
        bank = AdapterBank(family, tuple(members), MappingProxyType(layers), None, access)
        if calibration is None:
            return bank
        return bank.calibrate(calibration, model=model, tokenizer=tokenizer, progress=progress)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return tuple(adapter.name for adapter in self.adapters)

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

        Raises:
            InputError: the calibration has no usable text.
            MismatchError: the model lacks a layer that an adapter changes.
        """
        model = model or load_model(self.family.base.name)
        tokenizer = tokenizer or load_tokenizer(self.family.base.name)
        found = calibrate(model, tokenizer, self.layers, self.names, calibration, progress)
        return self.with_statistics(found)

    def with_statistics(self, statistics: Statistics) -> "AdapterBank":
        """A bank with these statistics."""
        layers = {
            module: calibrated(factors, {"mean": statistics.mean[module], "std": statistics.std[module]})
            for module, factors in self.layers.items()
        }
        return replace(self, layers=MappingProxyType(layers), statistics=statistics)

    def add(self, adapter: Adapter) -> "AdapterBank":
        """A bank with one more adapter at the end; it is ineligible for z-scores until the bank is calibrated again.

        Raises:
            InputError: its name is taken.
            MismatchError: it belongs to another family or base.
        """
        bank = AdapterBank.build(self.family, (*self.adapters, adapter), access=self.access)
        return bank if self.statistics is None else bank.with_statistics(self.statistics.extended(bank.layers))

    def remove(self, name: str) -> "AdapterBank":
        """A bank without the adapter of this name; the others keep their order and statistics.

        Raises:
            InputError: there is no such adapter, or it is the last.
        """
        self.adapter(name)
        kept = [place for place, other in enumerate(self.names) if other != name]
        bank = AdapterBank.build(self.family, [self.adapters[place] for place in kept], access=self.access)
        return bank if self.statistics is None else bank.with_statistics(self.statistics.select(kept, bank.layers))

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
