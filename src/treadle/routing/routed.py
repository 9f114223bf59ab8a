"""A model whose adapters are chosen by what they do to the activations."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from treadle.errors import InputError
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.routing.access import Permitted, permitted_mask
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import counted, layer_shape, positions, read_prompt, takes
from treadle.routing.decision import BASE, Decision, decide, ranked
from treadle.routing.factors import LayerFactors, with_prototypes
from treadle.routing.mixture import Mixture, act, mixture
from treadle.routing.scorers import SCORERS, Scorer
from treadle.routing.trace import Trace

Granularity = Literal["token", "sequence"]


class RoutedLayer(nn.Module):
    """One layer's factors and the lora_B it has used; moves between devices, never between dtypes."""

    def __init__(self, factors: LayerFactors) -> None:
        super().__init__()
        self.factors = factors
        self._matrices: dict[int, Tensor] = {}

    def matrix(self, adapter: int) -> Tensor:
        """The adapter's folded B on the layer's device, read once."""
        if adapter not in self._matrices:
            self._matrices[adapter] = self.factors.folded_B(adapter).to(self.factors.present.device)
        return self._matrices[adapter]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device; scores stay in float32 when the model turns to bfloat16."""
        device = fn(torch.empty(0, device=self.factors.present.device)).device
        self.factors = self.factors.to(device)
        self._matrices = {adapter: B.to(device) for adapter, B in self._matrices.items()}
        return self


@dataclass(frozen=True)
class _Acting:
    """What a forward pass tells the hooks: adapters act.

    Attributes:
        permitted: (rows, adapters), None for all.
        chosen: (rows,) one adapter a row for all layers; None lets every layer decide.
    """

    permitted: Tensor | None
    chosen: Tensor | None


@dataclass
class _Reading:
    """What a forward pass tells the hooks: nobody acts, scores of the prompt are summed.

    Attributes:
        counted: (rows, tokens) which tokens count.
        sums: running totals of scores, (rows, adapters) in float64.
        counts: how many scores each total has.
    """

    counted: Tensor
    sums: Tensor
    counts: Tensor


class RoutedModel(nn.Module):
    """A transformers model, wrapped so that adapters of a bank act on it by routing alone.

    The base's modules, weights and state dict stay as they are; `unwrap` gives it back. Calls through the base itself
    are not routed.

    Args:
        model: the base that the bank was built for: causal LM, encoder, or encoder–decoder; put into eval mode.
        bank: the adapters.
        scorer: "zscore" (SEQR's), "norm" (its raw objective), or the baselines "arrow" and "mean".
        granularity: "token", the article's choice a token and layer; or "sequence": the base reads the prompt once,
            the mean score over its tokens and all layers chooses one adapter, which then acts everywhere.

    Raises:
        InputError: an unknown setting, or z-scores on a bank without calibration.
        MismatchError: the model lacks a layer of the bank.

    Reference: arXiv 2509.18093. Deviations: `sequence` is ours; decisions are exact (see `routing.decision`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: AdapterBank,
        *,
        scorer: str = "zscore",
        granularity: Granularity = "sequence",
    ) -> None:
        super().__init__()
        if scorer not in SCORERS:
            raise InputError(f"no such scorer {scorer!r}", remedy=f"choose among {', '.join(SCORERS)}")
        if granularity not in ("token", "sequence"):
            raise InputError(f"no such granularity {granularity!r}", remedy="choose token or sequence")
        if SCORERS[scorer].calibrated and bank.statistics is None:
            raise InputError("the bank is not calibrated", remedy="calibrate it, or use scorer 'norm'")
        bank.check_model(model)
        self.model = model.eval()
        self.bank = bank
        self.scorer: Scorer = SCORERS[scorer]
        self.granularity: Granularity = granularity if scorer != "mean" else "token"
        factors = bank.layers if scorer != "arrow" else {m: with_prototypes(f) for m, f in bank.layers.items()}
        layers = [RoutedLayer(layer.to(model.device)) for layer in factors.values()]
        self._children = nn.ModuleList(layers)  # as children, they follow the model to another device
        self.layers: Mapping[str, RoutedLayer] = MappingProxyType({layer.factors.module: layer for layer in layers})
        self._pass: _Acting | _Reading | None = None
        self._trace: Trace | None = None
        targets = adapted_layers(model, {layer.factors.module: layer_shape(layer.factors) for layer in layers})
        self._attachment = Attachment(targets, {layer.factors.module: self._delta(layer) for layer in layers})

    def unwrap(self) -> PreTrainedModel:
        """The base model, without a trace of the bank; this object is of no use afterwards."""
        self._attachment.remove()
        return self.model

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record who acts where until the block ends; recording changes no output."""
        outer, self._trace = self._trace, Trace(self.bank.names)
        try:
            yield self._trace
        finally:
            self._trace = outer

    def choose(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, permitted: Permitted | None = None
    ) -> Decision:
        """One adapter a row, from the mean score over the prompt's tokens and all layers as the base reads it.

        Special tokens and padding do not count; an adapter's mean is over the layers where it is eligible.

        Args:
            input_ids: (rows, tokens), padded on either side.
            attention_mask: 1 on tokens, 0 on padding; None for no padding.
            permitted: one set of adapter names a row.

        Raises:
            AccessError: a set is missing or names an unknown adapter.
        """
        mask = self._mask(permitted, input_ids.shape[0])
        return self._choose(input_ids, attention_mask, mask)

    def _mask(self, permitted: Permitted | None, rows: int) -> Tensor | None:
        mask = permitted_mask(self.bank.names, permitted, rows=rows, required=self.bank.access == "required")
        return None if mask is None else mask.to(self.model.device)

    def _choose(self, input_ids: Tensor, attention_mask: Tensor | None, permitted: Tensor | None) -> Decision:
        ones = torch.ones_like(input_ids)
        attention = ones if attention_mask is None else attention_mask
        ignored = self.bank.statistics.ignored_tokens if self.bank.statistics else ()
        rows, width = input_ids.shape[0], len(self.bank.names)
        sums = torch.zeros(rows, width, dtype=torch.float64, device=input_ids.device)
        reading = _Reading(counted(input_ids, attention, ignored), sums, torch.zeros_like(sums))
        with torch.inference_mode(), self._during(reading):
            read_prompt(self.model, input_ids, attention)
        allowed = reading.counts > 0 if permitted is None else (reading.counts > 0) & permitted
        means = torch.where(allowed, reading.sums / reading.counts.clamp_min(1.0), -torch.inf)
        decision = ranked(means, torch.zeros_like(allowed[:, 0]))
        if self._trace is not None:
            self._trace.choices.append(decision)
        return decision

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        permitted: Permitted | None = None,
        chosen: Decision | None = None,
        **inputs: object,
    ) -> object:
        """What the base model returns, with adapters acting.

        Args:
            input_ids: (rows, tokens), padded on either side.
            attention_mask: 1 on tokens, 0 on padding.
            permitted: one set of adapter names a row; None permits all, an empty set leaves the base.
            chosen: adapters chosen earlier by `choose`; with `sequence`, needed to continue from a cache.
            **inputs: the base model's own arguments.

        Raises:
            AccessError: a permitted set is missing or names an unknown adapter.
            InputError: `sequence` is asked to continue from a cache without `chosen`.
        """
        rows = input_ids.shape[0]
        mask = self._mask(permitted, rows)
        continues = _cached_length(inputs.get("past_key_values")) > 0
        if continues and chosen is None and self.granularity == "sequence":
            raise InputError(
                "a cache holds no choice of adapter", remedy="pass chosen=model.choose(prompt), or use generate"
            )
        if attention_mask is not None and not continues and self._needs_positions(inputs):
            inputs["position_ids"] = positions(attention_mask)
        with self._during(self._prepared(input_ids, attention_mask, mask, chosen)):
            self._record_mask(input_ids, attention_mask)
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def _needs_positions(self, inputs: Mapping[str, object]) -> bool:
        decoder_only = not self.model.config.is_encoder_decoder and self.model.can_generate()
        return decoder_only and inputs.get("position_ids") is None and takes(self.model, "position_ids")

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        permitted: Permitted | None = None,
        chosen: Decision | None = None,
        **options: object,
    ) -> Tensor:
        """What `model.generate` returns, with adapters acting; right-padded prompts are padded on the left first.

        Args:
            input_ids: (rows, tokens), padded on either side.
            attention_mask: 1 on tokens, 0 on padding.
            permitted: one set of adapter names a row.
            chosen: adapters chosen earlier by `choose`.
            **options: of `generate`.

        Raises:
            AccessError: a permitted set is missing or names an unknown adapter.
        """
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.model.config.is_encoder_decoder:
            input_ids, attention = left_padded(input_ids, attention)
        mask = self._mask(permitted, input_ids.shape[0])
        with self._during(self._prepared(input_ids, attention, mask, chosen)):
            self._record_mask(input_ids, attention)
            result = self.model.generate(input_ids=input_ids, attention_mask=attention, **options)  # type: ignore[arg-type]
        assert isinstance(result, Tensor)
        return result

    def _prepared(
        self, ids: Tensor, attention: Tensor | None, permitted: Tensor | None, chosen: Decision | None
    ) -> _Acting:
        if self.granularity == "sequence" and chosen is None:
            chosen = self._choose(ids, attention, permitted)
        if chosen is None:
            return _Acting(permitted, None)
        winner = chosen.winner.to(ids.device)
        if permitted is not None:  # a choice made under other rights does not outlive them
            kept = permitted.gather(1, winner.clamp_min(0)[:, None]).squeeze(1)
            winner = torch.where(kept, winner, BASE)
        return _Acting(permitted, winner)

    def _record_mask(self, ids: Tensor, attention: Tensor | None) -> None:
        if self._trace is not None:
            mask = torch.ones_like(ids) if attention is None else attention[:, -ids.shape[1] :]
            self._trace.masks.append(mask.bool().cpu())

    @contextlib.contextmanager
    def _during(self, current: _Acting | _Reading) -> Iterator[None]:
        outer, self._pass = self._pass, current
        try:
            yield
        finally:
            self._pass = outer

    def _delta(self, layer: RoutedLayer) -> Delta:
        def delta(x: Tensor) -> Tensor | None:
            current = self._pass
            if current is None:
                return None
            flat = x.reshape(-1, x.shape[-1])
            with torch.autocast(x.device.type, enabled=False):
                if isinstance(current, _Reading):
                    self._read(layer, flat, current)
                    return None
                mixed = self._mixture(layer, flat, current, x.shape[0])
                added = act(layer.factors, layer.matrix, flat, mixed)
                return None if added is None else added.reshape(*x.shape[:-1], -1)

        return delta

    def _mixture(self, layer: RoutedLayer, flat: Tensor, current: _Acting, leading: int) -> Mixture:
        """Who acts on each token of this layer, and how much."""
        if current.chosen is not None:
            return Mixture.of(_spread(current.chosen, flat.shape[0]))
        permitted = None if current.permitted is None else _spread(current.permitted, flat.shape[0])
        scores = self.scorer.scores(layer.factors, flat, permitted)
        if self.scorer.mixed is not None:
            return mixture(scores.value, self.scorer.mixed)
        decision = decide(layer.factors, flat, scores, calibrated=self.scorer.calibrated)
        if self._trace is not None:
            self._trace.record(layer.factors.module, decision, leading)
        return Mixture.of(decision.winner)

    def _read(self, layer: RoutedLayer, flat: Tensor, current: _Reading) -> None:
        """Add this layer's scores of the prompt to the running totals."""
        value = self.scorer.scores(layer.factors, flat, None).value.double()
        rows, tokens = current.counted.shape
        value = value.reshape(rows, -1, value.shape[1])
        # A pooler sees one vector a row: there is no padding in it.
        mask = current.counted if value.shape[1] == tokens else torch.ones_like(current.counted[:, :1])
        there = (value > -torch.inf) & mask[:, :, None]
        current.sums += torch.where(there, value, 0.0).sum(1)
        current.counts += there.sum(1)


def _spread(values: Tensor, tokens: int) -> Tensor:
    """One value a row → one a token: rows stay together, and beams of a row follow one another."""
    return values.repeat_interleave(tokens // values.shape[0], dim=0)


def _cached_length(cache: object) -> int:
    """How many tokens a transformers cache holds."""
    return cache.get_seq_length() if isinstance(cache, Cache) else 0


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding moved to the left, as decoders need it to continue."""
    order = attention_mask.bool().int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
