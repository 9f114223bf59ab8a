"""Running sums of scores over tokens and layers: what `evidence` chooses by, and how they travel with a KV cache.

    E(t, m) = mean over tokens s ≤ t and layers m' ≤ m of score(s, m')      the argmax of E acts at (t, m)

One causal pass. What a sequence must carry from token to token is one row of sums a layer: layers × adapters numbers,
for prefill runs layer by layer, and layer m may know of earlier tokens only what layers up to m saw. They are kept as
one more layer of the transformers cache, which beam search reorders and callers copy together with keys and values.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from treadle.errors import UnsupportedError


class RunningSums(CacheLayerMixin):
    """The sums of every layer over the tokens of a cache, in float64; a layer of that cache which holds no keys.

    Attributes:
        sums: module → (rows, adapters).
        tokens: (rows,) counted tokens so far.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self.tokens = torch.zeros(rows, dtype=torch.float64, device=device)

    def _rearranged(self, order: Tensor) -> None:
        self.sums = {module: part[order.to(part.device)] for module, part in self.sums.items()}
        self.tokens = self.tokens[order.to(self.tokens.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._rearranged(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._rearranged(torch.arange(self.tokens.shape[0])[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._rearranged(torch.arange(self.tokens.shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.sums = {}
        self.tokens = torch.zeros_like(self.tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a sum cannot forget its last terms.

        Raises:
            UnsupportedError: always, but for nothing to remove.
        """
        if tokens_to_remove != 0:
            raise UnsupportedError(
                "`evidence` cannot take tokens back", remedy="route by `sequence` with a draft model"
            )

    def get_seq_length(self) -> int:
        """0: it holds no keys."""
        return 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of an empty layer."""
        return query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """Refused: it takes no keys."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> NoReturn:
        """Refused: it takes no keys."""
        raise NotImplementedError


def sums_of(cache: Cache) -> RunningSums | None:
    """The sums that travel with this cache, None if there are none yet."""
    return next((layer for layer in cache.layers if isinstance(layer, RunningSums)), None)


class EvidencePass:
    """One forward pass of the base: adds its tokens' scores layer by layer, and says who leads where.

    Args:
        before: the sums of the tokens in the cache.
        counted: (rows, tokens) of this pass, False on padding and special tokens: they add nothing.
    """

    def __init__(self, before: RunningSums, counted: Bool[Tensor, "rows tokens"]) -> None:
        self._before = before
        self._counted = counted
        self._number = before.tokens[:, None] + counted.double().cumsum(1)
        self._evidence: Tensor | None = None
        self._terms: Tensor | None = None
        self._fresh: dict[str, Tensor] = {}

    def add(
        self, module: str, scores: Float[Tensor, "tokens adapters"], eligible: Bool[Tensor, " adapters"]
    ) -> Float[Tensor, "tokens adapters"]:
        """E at this layer for every token of the pass, in float64, -inf where an adapter was eligible nowhere yet.

        Args:
            module: the layer.
            scores: of every adapter, rows after rows.
            eligible: at this layer.

        Raises:
            UnsupportedError: the layer has run in this pass already.
        """
        if module in self._fresh:
            raise UnsupportedError("it runs twice in one pass", where=module, remedy="use granularity 'sequence'")
        rows, tokens = self._counted.shape
        kept = self._counted.reshape(-1, 1) & eligible
        cube = torch.where(kept, scores, 0.0).double().reshape(rows, tokens, -1).cumsum(1)
        past = self._before.sums.get(module)
        if past is not None:
            cube += past[:, None]
        self._fresh[module] = cube[:, -1].clone()  # the cube itself goes on to hold the sums over layers
        if self._evidence is None or self._terms is None:
            self._evidence, self._terms = cube, eligible.double()
        else:
            self._evidence, self._terms = cube.add_(self._evidence), self._terms + eligible
        number = self._number[:, :, None] * self._terms
        return (self._evidence / number).masked_fill_(number == 0, -torch.inf).flatten(0, 1)

    def end(self) -> RunningSums:
        """The sums with this pass's tokens, so that the next pass continues from here."""
        self._before.sums = self._fresh
        self._before.tokens = self._number[:, -1]
        return self._before


def counted_tokens(
    ids: Tensor | None, attention: Tensor | None, shape: tuple[int, int], ignored: Sequence[int], device: torch.device
) -> Bool[Tensor, "rows tokens"]:
    """Which tokens of a pass count: neither padding nor special; the mask may cover what is in the cache too."""
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if attention is not None and attention.dim() == 2:
        real = attention[:, -shape[1] :].bool().to(device)
    if ids is None or not ignored:
        return real
    return real & ~torch.isin(ids.to(device), torch.tensor(list(ignored), device=device))
