"""A model whose adapters are chosen by what they do to the activations."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from treadle.errors import InputError, UnsupportedError
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.routing.access import Permitted, permitted_mask
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import counted, positions, read_prompt, wants_positions
from treadle.routing.decision import BASE, Decision, contenders, decide, ranked
from treadle.routing.factors import LayerFactors, with_prototypes
from treadle.routing.mixture import Mixture, act, mixture
from treadle.routing.prompt import PromptTotals
from treadle.routing.rows import alike, check_rows, left_padded, prompt_modules, real_tokens, spread
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
            with torch.inference_mode(False):  # what is kept must also serve a later call that needs gradients
                self._matrices[adapter] = self.factors.folded_B(adapter).to(self.factors.present.device)
        return self._matrices[adapter]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutedLayer":
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
        real: (rows, tokens) of the prompt, False on padding.
        uniform: whether all rows are treated alike.
    """

    permitted: Tensor | None
    chosen: Tensor | None
    real: Tensor
    uniform: bool


Note = Callable[[RoutedLayer, Tensor], None]
"""Takes a layer and its input."""


@dataclass(frozen=True)
class _Reading:
    """What a forward pass tells the hooks: nobody acts, `note` is told what every layer sees."""

    note: Note


@dataclass
class _Current:
    """The pass that this thread (or task) is in: whose it is, what the hooks shall do, and what the base was given.

    Attributes:
        owner: the model that began it; another model's hooks on the same base stay silent.
        task: acting or reading.
        batch: (rows, tokens) of the base's latest input, beams included.
    """

    owner: "RoutedModel"
    task: _Acting | _Reading
    batch: tuple[int, int]


# Of a thread or task, not of a model: a caller's rights must never reach another caller's pass.
_CURRENT: ContextVar[_Current | None] = ContextVar("treadle_pass", default=None)
_TRACES: ContextVar[Mapping[int, Trace]] = ContextVar("treadle_traces", default=MappingProxyType({}))


class RoutedModel(nn.Module):
    """A transformers model, wrapped so that adapters of a bank act on it by routing alone.

    The base's modules, weights and state dict stay as they are; `unwrap` gives it back. Calls through the base itself
    are not routed. Threads may share a routed model: each call sees its own permitted sets, choices and trace.

    Args:
        model: the base that the bank was built for: causal LM, encoder, or encoder–decoder; put into eval mode.
        bank: the adapters.
        scorer: "zscore" (SEQR's), "norm" (its raw objective), or the baselines "arrow" and "mean".
        granularity: "token", the article's choice a token and layer; or "sequence": the base reads the prompt once,
            the mean score over its tokens and all layers chooses one adapter, which then acts everywhere. The
            scorer "mean" chooses nothing, so it is always "token".

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
        targets = adapted_layers(model, {module: layer.shape for module, layer in factors.items()})
        layers = [RoutedLayer(layer.to(_device(targets[module]))) for module, layer in factors.items()]
        self._children = nn.ModuleList(layers)  # as children, they follow the model to another device
        self.layers: Mapping[str, RoutedLayer] = MappingProxyType({layer.factors.module: layer for layer in layers})
        self._of_prompt = prompt_modules(model, targets)
        self._attachment = Attachment(targets, {layer.factors.module: self._delta(layer) for layer in layers})
        self._watch = model.register_forward_pre_hook(self._watched, with_kwargs=True)

    def unwrap(self) -> PreTrainedModel:
        """The base model, without a trace of the bank; this object is of no use afterwards."""
        self._attachment.remove()
        self._watch.remove()
        return self.model

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refused: a copy's hooks would still be this object's, and the copy would silently be the base alone."""
        raise UnsupportedError("a routed model cannot be copied or pickled", remedy="wrap a copy of the base again")

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record who acts where until the block ends, in this thread; recording changes no output."""
        trace = Trace(self.bank.names, self._of_prompt)
        token = _TRACES.set(MappingProxyType({**_TRACES.get(), id(self): trace}))
        try:
            yield trace
        finally:
            _TRACES.reset(token)

    @property
    def _trace(self) -> Trace | None:
        return _TRACES.get().get(id(self))

    def choose(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, permitted: Permitted | None = None
    ) -> Decision:
        """One adapter a row, from the mean score over the prompt's tokens and all layers as the base reads it.

        Padding does not count, nor do the special tokens that the bank's calibration left out; an adapter's mean is
        over the layers where it is eligible. Of an encoder–decoder, the encoder reads the prompt.

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
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ignored = self.bank.statistics.ignored_tokens if self.bank.statistics else ()
        mask = counted(input_ids, attention, ignored)

        def totals(settle: Tensor | None) -> PromptTotals:
            found = PromptTotals.empty(mask, len(self.bank.names))
            self.read(input_ids, attention, lambda layer, x: found.add(self.scorer, layer.factors, x, settle))
            return found

        first = totals(None)
        scores = first.means(permitted)
        rivals = contenders(scores)
        disputed = (rivals.sum(1) > 1) & (self.scorer.mixed is None)
        value = scores.value
        if bool(disputed.any()):
            rivals &= disputed[:, None]
            value = torch.where(rivals, totals(rivals).means(permitted).value, value)
        decision = ranked(value, disputed)
        if self._trace is not None:
            self._trace.choose(decision)
        return decision

    def read(self, input_ids: Tensor, attention_mask: Tensor, note: Note) -> None:
        """Let the base alone read prompts, and tell `note` every layer's input, (…, inner), in this thread only.

        Args:
            input_ids: (rows, tokens).
            attention_mask: 1 on tokens, 0 on padding.
            note: (layer, its input) → nothing.
        """
        with torch.no_grad(), self._during(_Reading(note), input_ids):
            read_prompt(self.model, input_ids, attention_mask)

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
            InputError: `sequence` is asked to continue from a cache without `chosen`, or `chosen` is of another batch.
            UnsupportedError: a layer's inputs cannot be told apart by row, and the rows are not treated alike.
        """
        mask = self._mask(permitted, input_ids.shape[0])
        cached = _cached_length(inputs.get("past_key_values"))
        if cached > 0 and chosen is None and self.granularity == "sequence":
            raise InputError(
                "a cache holds no choice of adapter", remedy="pass chosen=model.choose(prompt), or use generate"
            )
        if attention_mask is not None and inputs.get("position_ids") is None and wants_positions(self.model):
            # A mask of the new tokens alone says nothing of what the cache holds.
            whole = attention_mask.shape[1] == cached + input_ids.shape[1]
            inputs["position_ids"] = positions(attention_mask)[:, cached:] if whole else None
        with self._during(self._prepared(input_ids, attention_mask, mask, chosen), input_ids):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **inputs)

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
            InputError: the options ask for more than token ids, or `chosen` is of another batch.
            UnsupportedError: a layer's inputs cannot be told apart by row, and the rows are not treated alike.
        """
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.model.config.is_encoder_decoder:
            input_ids, attention = left_padded(input_ids, attention)
        mask = self._mask(permitted, input_ids.shape[0])
        trace = self._trace
        before = {} if trace is None else trace.lengths()
        with self._during(self._prepared(input_ids, attention, mask, chosen), input_ids):
            result = self.model.generate(input_ids=input_ids, attention_mask=attention, **options)  # type: ignore[arg-type]
        if not isinstance(result, Tensor):
            raise InputError("generate returned more than token ids", remedy="leave return_dict_in_generate out")
        if trace is not None and result.shape[0] == input_ids.shape[0]:
            start = 1 if self.model.config.is_encoder_decoder else input_ids.shape[1]
            trace.end_rows(before, self._ended(result[:, start:], options.get("eos_token_id")))
        return result

    def _ended(self, new: Tensor, asked: object) -> Tensor:
        """After which generated tokens a row is at its end, (rows, new tokens)."""
        ends = asked if asked is not None else self.model.generation_config.eos_token_id
        ids = torch.tensor([] if ends is None else ends, dtype=new.dtype, device=new.device)
        return torch.isin(new, ids).cumsum(1) > 0

    def _prepared(
        self, ids: Tensor, attention: Tensor | None, permitted: Tensor | None, chosen: Decision | None
    ) -> _Acting:
        real = torch.ones_like(ids) if attention is None else attention[:, -ids.shape[1] :]
        if self.granularity == "sequence" and chosen is None:
            chosen = self._choose(ids, attention, permitted)
        if chosen is None:
            return _Acting(permitted, None, real.bool(), permitted is None or alike(permitted))
        winner = chosen.winner.to(ids.device)
        if winner.shape != ids.shape[:1] or bool((winner >= len(self.bank.names)).any()):
            raise InputError("`chosen` is of another batch or bank", remedy="pass choose() of these rows")
        if permitted is not None:  # a choice made under other rights does not outlive them
            kept = permitted.gather(1, winner.clamp_min(0)[:, None]).squeeze(1)
            winner = torch.where(kept, winner, BASE)
        return _Acting(permitted, winner, real.bool(), alike(winner))

    @contextlib.contextmanager
    def _during(self, task: _Acting | _Reading, ids: Tensor) -> Iterator[None]:
        token = _CURRENT.set(_Current(self, task, (ids.shape[0], ids.shape[1])))
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def _watched(self, _: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, object]) -> None:
        """Note the shape of what the base is about to read: `generate` multiplies rows and shortens steps."""
        current = _CURRENT.get()
        given = [*inputs, named.get("input_ids"), named.get("inputs_embeds")]
        ids = next((value for value in given if isinstance(value, Tensor)), None)
        if current is not None and current.owner is self and ids is not None:
            current.batch = (ids.shape[0], ids.shape[1])

    def _delta(self, layer: RoutedLayer) -> Delta:
        def delta(x: Tensor) -> Tensor | None:
            current = _CURRENT.get()
            if current is None or current.owner is not self:
                return None
            flat = x.reshape(-1, x.shape[-1])
            with torch.autocast(x.device.type, enabled=False):
                if isinstance(current.task, _Reading):
                    current.task.note(layer, x)
                    return None
                with torch.no_grad():
                    mixed = self._mixture(layer, x, current.task, current.batch)
                added = act(layer.factors, layer.matrix, flat, mixed)
                return None if added is None else added.reshape(*x.shape[:-1], added.shape[1])

        return delta

    def _mixture(self, layer: RoutedLayer, x: Tensor, task: _Acting, batch: tuple[int, int]) -> Mixture:
        """Who acts on each token of this layer, and how much."""
        module, flat = layer.factors.module, x.reshape(-1, x.shape[-1])
        if not task.uniform:
            check_rows(x, task.real.shape[0], batch, module)
        if task.chosen is not None:
            return Mixture.of(spread(task.chosen.to(x.device), flat.shape[0]))
        permitted = None if task.permitted is None else spread(task.permitted.to(x.device), flat.shape[0])
        scores = self.scorer.scores(layer.factors, flat, permitted)
        if self.scorer.mixed is not None:
            return mixture(scores.value, self.scorer.mixed)
        decision = decide(layer.factors, flat, scores, calibrated=self.scorer.calibrated)
        trace = self._trace
        if trace is not None:
            trace.record(module, decision, real_tokens(x, task.real if module in self._of_prompt else None, batch))
        return Mixture.of(decision.winner)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _cached_length(cache: object) -> int:
    """How many tokens a transformers cache holds."""
    return cache.get_seq_length() if isinstance(cache, Cache) else 0
