"""Statistics of activation norms: what a "large" norm is for each adapter at each layer.

A calibration is an explicit step over named text. `PublicCalibration` reads one text that has nothing to do with any
adapter's task, so the bank spends no privacy; `OwnCalibration` reads each adapter's own training text, as the
article does, and marks the bank accordingly.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from threading import get_ident

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError, UnsupportedError
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.progress import Progress, silent
from treadle.routing.factors import LayerFactors, latent, triangles


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

    def __post_init__(self) -> None:
        _check_passages(self.texts, self.name)

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

    def __post_init__(self) -> None:
        for adapter, texts in self.texts.items():
            _check_passages(texts, adapter)

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


def _check_passages(texts: Sequence[str], where: str) -> None:
    if isinstance(texts, str):  # a string is a sequence of strings too, one letter each
        raise InputError("one string is not a list of passages", where=where, remedy="give a list")


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
    """Which tokens count in prompt scores: neither padding nor special.

    A row that consists of special tokens alone counts with all its unpadded tokens, so that it still has a score.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    plain = real & ~_special(input_ids, ignored)
    return torch.where(plain.any(1, keepdim=True), plain, real)


def _special(input_ids: Tensor, ignored: Sequence[int]) -> Bool[Tensor, "rows tokens"]:
    return torch.isin(input_ids, torch.tensor(list(ignored), dtype=torch.long, device=input_ids.device))


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, LayerFactors],
    names: Sequence[str],
    calibration: Calibration,
    progress: Progress = silent,
) -> Statistics:
    """Run the base model over the calibration's texts and return the statistics of every adapter at every layer.

    The base acts alone and every adapter's norms are computed apart, in float64: its statistics are, bit for bit, the
    same whoever else is in the bank. Neither padding nor special tokens count.

    Args:
        model: the base model; its dropout is off while it reads.
        tokenizer: the base's.
        layers: the factors, by module.
        names: the adapters, in the bank's order.
        calibration: which texts.
        progress: told of every batch.

    Raises:
        InputError: there is no text, it has no token that counts, or a layer never ran on it.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.

    Deviations: the decoder of an encoder–decoder reads the same text as its encoder, after the start token.
    """
    columns: dict[tuple[str, ...], list[int]] = {}
    for place, name in enumerate(names):
        columns.setdefault(tuple(calibration.texts_of(name)), []).append(place)
    ignored = ignored_tokens(tokenizer)
    mean = {module: torch.full((len(names),), torch.nan, dtype=torch.float64) for module in layers}
    std = {module: torch.full((len(names),), torch.nan, dtype=torch.float64) for module in layers}
    tokens = 0
    for texts, places in columns.items():
        batches = text_batches(tokenizer, texts, longest=_longest(model))
        for (module, place), found in _moments(model, layers, places, batches, ignored, progress).items():
            mean[module][place], std[module][place] = found.mean.item(), found.std.item()
            tokens = max(tokens, found.count)
    digest = "" if calibration.spends_privacy else _digest(calibration.texts_of(names[0]))
    return Statistics(mean, std, calibration.name, digest, tokens, calibration.spends_privacy, ignored)


def _longest(model: PreTrainedModel) -> int:
    """How many tokens of a passage are read: 512, or as many as the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return min(512, limit) if isinstance(limit, int) and limit > 0 else 512


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()


def _moments(
    model: PreTrainedModel,
    layers: Mapping[str, LayerFactors],
    places: Sequence[int],
    batches: Sequence[Mapping[str, Tensor]],
    ignored: Sequence[int],
    progress: Progress,
) -> dict[tuple[str, int], Moments]:
    """The moments of each of these adapters' norms at every layer that it has, one column each.

    Columns are kept apart since the order in which torch adds up a column may depend on how many there are.
    """
    found: dict[tuple[str, int], Moments] = {}
    masks: list[Tensor] = []
    reader = get_ident()

    def observer(factors: LayerFactors) -> Delta:
        norms = _norms_of(factors, places)

        def observe(x: Tensor) -> None:
            if get_ident() != reader:  # another thread's prompts are not calibration text
                return
            kept = _selected(x, masks, factors.module)
            for place, column in norms(kept).items() if kept.shape[0] > 0 else ():
                new, key = Moments.of(column[:, None]), (factors.module, place)
                found[key] = found[key].merge(new) if key in found else new

        return observe

    mine = {name: factors for name, factors in layers.items() if bool(factors.present[list(places)].any())}
    targets = adapted_layers(model, {name: factors.shape for name, factors in mine.items()})
    with torch.no_grad(), _evaluating(model), Attachment(targets, {name: observer(f) for name, f in mine.items()}):
        for done, batch in enumerate(batches):
            progress("calibrating", done, len(batches))
            ids, attention = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            masks[:] = [attention.bool() & ~_special(ids, ignored)]
            if model.config.is_encoder_decoder:
                masks.append(nn.functional.pad(masks[0], (1, 0)))
            _read_text(model, ids, attention)
    progress("calibrating", len(batches), len(batches))
    if not found:
        raise InputError("the calibration text has no token that counts", remedy="give longer text")
    ran = {module for module, _ in found}
    for name in mine:
        if name not in ran:
            raise InputError("this layer never ran while reading text", where=name, remedy="leave it out of the plan")
    return found


def _norms_of(factors: LayerFactors, places: Sequence[int]) -> Callable[[Tensor], dict[int, Tensor]]:
    """x ↦ place → ‖B_i A_i x‖, (tokens,) in float64, of the adapters at these places that have the layer."""
    small = [(group, triangles(factors, group, places)) for group in factors.groups]

    def norms(x: Tensor) -> dict[int, Tensor]:
        columns: dict[int, Tensor] = {}
        for group, by_place in small:
            z = latent(group, x)
            columns |= {place: torch.linalg.vector_norm(z @ R.T, dim=1) for place, R in by_place.items()}
        return columns

    return norms


def _selected(x: Tensor, masks: Sequence[Tensor], module: str) -> Tensor:
    """The layer's inputs at the tokens that count; a layer that sees one vector a row (a pooler) counts every row."""
    flat = x.reshape(-1, x.shape[-1])
    for mask in masks:
        if flat.shape[0] == mask.numel():
            return flat[mask.flatten()]
    if flat.shape[0] == masks[0].shape[0]:
        return flat[masks[0].any(1)]
    raise UnsupportedError(
        "its inputs cannot be told apart by row and token", where=module, remedy="leave it out of the plan"
    )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout is off until the block ends."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def text_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int = 2048, longest: int = 512
) -> list[dict[str, Tensor]]:
    """The texts as padded batches of about `tokens` tokens, shortest first, each text cut at `longest` tokens.

    Raises:
        InputError: there is no text.
    """
    lengths = sorted(
        (len(tokenizer(text, truncation=True, max_length=longest)["input_ids"]), text) for text in texts if text
    )
    if not lengths:
        raise InputError("there is no calibration text", remedy="give at least one passage")
    groups: list[list[str]] = [[]]
    for length, text in lengths:
        if groups[-1] and (len(groups[-1]) + 1) * length > tokens:
            groups.append([])
        groups[-1].append(text)
    return [
        dict(tokenizer(group, return_tensors="pt", padding=True, truncation=True, max_length=longest))
        for group in groups
    ]


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that ignore left padding, 0 on the padding itself."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def read_prompt(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run what reads a prompt: the trunk of a decoder or encoder, the encoder of an encoder–decoder; no head."""
    if model.config.is_encoder_decoder:
        model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        return
    trunk = model.base_model
    if wants_positions(model, trunk):
        trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask))
    else:
        trunk(input_ids=input_ids, attention_mask=attention_mask)


def _read_text(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run every layer over the text; the decoder of an encoder–decoder reads it too, one place to the right."""
    if not model.config.is_encoder_decoder:
        read_prompt(model, input_ids, attention_mask)
        return
    start = model.config.decoder_start_token_id
    start = model.config.pad_token_id if start is None else start
    model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=nn.functional.pad(input_ids, (1, 0), value=start or 0),
        decoder_attention_mask=nn.functional.pad(attention_mask, (1, 0), value=1),
    )


# RoBERTa's kin count positions from the padding id on, by themselves.
_OWN_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm"})


def wants_positions(model: PreTrainedModel, part: nn.Module | None = None) -> bool:
    """Whether padded rows need `positions` to be read as they would be alone: not where a model counts by itself.

    Args:
        model: the whole model.
        part: what shall be called, if not the whole.
    """
    if model.config.is_encoder_decoder or model.config.model_type in _OWN_POSITIONS:
        return False
    return "position_ids" in signature((part or model).forward).parameters
