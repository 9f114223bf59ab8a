"""Statistics of activation norms: what a "large" norm is for each adapter at each layer.

A calibration is an explicit step over named text. `PublicCalibration` reads one text that has nothing to do with any
adapter's task, so the bank spends no privacy; `OwnCalibration` reads each adapter's own training text, as the
article does, and marks the bank accordingly.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError
from treadle.family.injection import Attachment, adapted_layers
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.routing.factors import LayerFactors, squared_norms


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of many values a column; two of them merge exactly.

    Reference: Chan, Golub, LeVeque 1983, the pairwise update.
    """

    count: int
    mean: Float[Tensor, " columns"]
    deviations: Float[Tensor, " columns"]

    @staticmethod
    def of(values: Float[Tensor, "rows columns"]) -> "Moments":
        """The moments of the rows, in float64."""
        exact = values.double()
        mean = exact.mean(0)
        return Moments(values.shape[0], mean, (exact - mean).square().sum(0))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both samples together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        deviations = self.deviations + other.deviations + shift.square() * (self.count * other.count / count)
        return Moments(count, mean, deviations)

    @property
    def std(self) -> Float[Tensor, " columns"]:
        """The population standard deviation."""
        return (self.deviations / self.count).sqrt()


@dataclass(frozen=True)
class PublicCalibration:
    """One public text for all adapters; costs no privacy.

    Attributes:
        texts: passages that none of the adapters' tasks were made from.
        name: what the report calls them.
    """

    texts: Sequence[str]
    name: str = "public"

    @property
    def spends_privacy(self) -> bool:
        """False: nothing here is a function of an adapter's training data but its B."""
        return False

    def texts_of(self, adapter: str) -> Sequence[str]:
        """The same texts, whoever asks."""
        return self.texts


@dataclass(frozen=True)
class OwnCalibration:
    """Each adapter's own training text, as in arXiv 2509.18093; its statistics are a release that no ε accounts for.

    Attributes:
        texts: adapter name → its passages.
        name: what the report calls them.
    """

    texts: Mapping[str, Sequence[str]]
    name: str = "own"

    @property
    def spends_privacy(self) -> bool:
        """True: the statistics are a function of the adapters' own data."""
        return True

    def texts_of(self, adapter: str) -> Sequence[str]:
        """The adapter's own texts.

        Raises:
            InputError: there are none.
        """
        if not self.texts.get(adapter):
            raise InputError("no calibration text for this adapter", where=adapter, remedy="give its training text")
        return self.texts[adapter]


Calibration = PublicCalibration | OwnCalibration


@dataclass(frozen=True)
class Statistics:
    """A finished calibration: module → (adapters,) mean and std of ‖B A x‖ over the tokens that count.

    Attributes:
        mean: float64, NaN where an adapter lacks the module.
        std: float64, NaN where an adapter lacks the module.
        source: the calibration's name.
        digest: SHA-256 of the texts if they are public, "" otherwise.
        tokens: how many tokens were counted, an adapter.
        spends_privacy: whether the adapters' own data went in.
        ignored_tokens: token ids left out here, and therefore when prompts are scored.
    """

    mean: Mapping[str, Tensor]
    std: Mapping[str, Tensor]
    source: str
    digest: str
    tokens: int
    spends_privacy: bool
    ignored_tokens: tuple[int, ...]

    def select(self, places: Sequence[int], modules: Iterable[str]) -> "Statistics":
        """The statistics of the adapters at these places, for these modules."""
        keep = torch.tensor(places, dtype=torch.long)
        return replace(
            self,
            mean={module: self.mean[module][keep] for module in modules},
            std={module: self.std[module][keep] for module in modules},
        )

    def extended(self, modules: Iterable[str]) -> "Statistics":
        """The statistics with one more adapter, of which nothing is known yet."""
        width = len(next(iter(self.mean.values()))) + 1
        unknown = torch.full((width,), torch.nan, dtype=torch.float64)

        def longer(values: Mapping[str, Tensor], module: str) -> Tensor:
            return torch.cat([values[module], unknown[:1]]) if module in values else unknown

        names = list(modules)
        return replace(
            self,
            mean={name: longer(self.mean, name) for name in names},
            std={name: longer(self.std, name) for name in names},
        )


def ignored_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the special tokens (beginning, separators, padding), whose outlier norms would drown the text's."""
    return tuple(sorted(tokenizer.all_special_ids))


def counted(input_ids: Tensor, attention_mask: Tensor | None, ignored: Sequence[int]) -> Bool[Tensor, "rows tokens"]:
    """Which tokens count in statistics and prompt scores: neither padding nor special.

    A row that consists of special tokens alone counts with all its unpadded tokens, so that it still has a score.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    plain = real & ~torch.isin(input_ids, torch.tensor(list(ignored), device=input_ids.device))
    return torch.where(plain.any(1, keepdim=True), plain, real)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, LayerFactors],
    names: Sequence[str],
    calibration: Calibration,
    progress: Progress = silent,
) -> Statistics:
    """Run the base model over the calibration's texts and return the statistics of every adapter at every layer.

    The base acts alone, so an adapter's statistics do not depend on its neighbours.

    Args:
        model: the base model, in eval mode.
        tokenizer: the base's.
        layers: the factors, by module.
        names: the adapters, in the bank's order.
        calibration: which texts.
        progress: told of every batch.

    Raises:
        InputError: there is no text, or it has no token that counts.
    """
    columns: dict[tuple[str, ...], list[int]] = {}
    for place, name in enumerate(names):
        columns.setdefault(tuple(calibration.texts_of(name)), []).append(place)
    ignored = ignored_tokens(tokenizer)
    mean = {module: torch.full((len(names),), torch.nan, dtype=torch.float64) for module in layers}
    std = {module: torch.full((len(names),), torch.nan, dtype=torch.float64) for module in layers}
    tokens = 0
    for texts, places in columns.items():
        moments = _moments(model, tokenizer, layers, texts, ignored, progress)
        for module, found in moments.items():
            keep = torch.tensor([i for i in places if bool(layers[module].present[i])], dtype=torch.long)
            mean[module][keep], std[module][keep] = found.mean.cpu()[keep], found.std.cpu()[keep]
            tokens = max(tokens, found.count)
    digest = "" if calibration.spends_privacy else _digest(calibration.texts_of(names[0]))
    return Statistics(mean, std, calibration.name, digest, tokens, calibration.spends_privacy, ignored)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()


def _moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, LayerFactors],
    texts: Sequence[str],
    ignored: Sequence[int],
    progress: Progress,
) -> dict[str, Moments]:
    """The moments of every adapter's norm at every layer over one list of texts."""
    found: dict[str, Moments] = {}
    mask = torch.zeros(0, dtype=torch.bool)

    def observer(factors: LayerFactors):
        def observe(x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            rows = rows[mask.flatten()] if rows.shape[0] == mask.numel() else rows
            new = Moments.of(squared_norms(factors, rows)[0].sqrt())
            found[factors.module] = found[factors.module].merge(new) if factors.module in found else new

        return observe

    modules = adapted_layers(model, {name: layer_shape(factors) for name, factors in layers.items()})
    batches = text_batches(tokenizer, texts)
    with torch.inference_mode(), Attachment(modules, {name: observer(f) for name, f in layers.items()}):
        for done, batch in enumerate(batches):
            progress("calibrating", done, len(batches))
            ids, attention = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            mask = counted(ids, attention, ignored)
            read_prompt(model, ids, attention)
    if not found:
        raise InputError("the calibration text has no token that counts", remedy="give longer text")
    silent_layers = [name for name in layers if name not in found]
    if silent_layers and not model.config.is_encoder_decoder:
        raise InputError(
            "this layer never ran while reading text", where=silent_layers[0], remedy="leave it out of the plan"
        )
    return found


def text_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int = 2048
) -> list[dict[str, Tensor]]:
    """The texts as padded batches of about `tokens` tokens, shortest first, each text cut at 512 tokens.

    Raises:
        InputError: there is no text.
    """
    lengths = sorted(
        (len(tokenizer(text, truncation=True, max_length=512)["input_ids"]), text) for text in texts if text
    )
    if not lengths:
        raise InputError("there is no calibration text", remedy="give at least one passage")
    groups: list[list[str]] = [[]]
    for length, text in lengths:
        if groups[-1] and (len(groups[-1]) + 1) * length > tokens:
            groups.append([])
        groups[-1].append(text)
    return [
        dict(tokenizer(group, return_tensors="pt", padding=True, truncation=True, max_length=512)) for group in groups
    ]


def layer_shape(factors: LayerFactors) -> LayerShape:
    """The shape of the layer that the factors belong to."""
    group = factors.groups[0]
    return LayerShape(group.A.shape[1], factors.folded_B(int(group.columns[0])).shape[0])


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that ignore left padding, 0 on the padding itself."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def read_prompt(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run what reads a prompt: the trunk of a decoder or encoder, the encoder of an encoder–decoder; no head."""
    if model.config.is_encoder_decoder:
        model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        return
    trunk = model.base_model
    if takes(trunk, "position_ids") and model.config.model_type not in _OWN_POSITIONS:
        trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask))
    else:
        trunk(input_ids=input_ids, attention_mask=attention_mask)


# RoBERTa's kin count positions from the padding id on, by themselves.
_OWN_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm"})


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return argument in signature(model.forward).parameters
