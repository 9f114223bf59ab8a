"""The lora_B of one layer that are at hand: a fixed number of slots, filled when an adapter first acts.

What is in the slots changes nothing but time: an adapter that is not there is read from its file, into the slot that
was used longest ago.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor


class MatrixPool:
    """The folded, transposed B of at most `slots` adapters, rows of one tensor: (slots · rank, out), float32.

    Args:
        load: place in the bank → (out, rank) folded B.
        rank: the largest of the layer's adapters; the rows of a smaller one are filled up with zeros.
        out: the layer's outputs.
        slots: at least 1.
        device: where the rows are.
    """

    def __init__(self, load: Callable[[int], Tensor], *, rank: int, out: int, slots: int, device: torch.device) -> None:
        self.rank, self.out, self.slots = rank, out, slots
        self.wins: Counter[int] = Counter()
        self._load = load
        with torch.inference_mode(False):  # what is kept must also serve a later call that needs gradients
            self._rows = torch.zeros(slots * rank, out, device=device)
        self._slot: OrderedDict[int, int] = OrderedDict()
        self._lock = Lock()

    @property
    def held(self) -> tuple[int, ...]:
        """The places of the adapters at hand, the one used longest ago first."""
        return tuple(self._slot)

    def to(self, device: torch.device) -> "MatrixPool":
        """An equal pool on another device."""
        moved = MatrixPool(self._load, rank=self.rank, out=self.out, slots=self.slots, device=device)
        moved._rows.copy_(self._rows)
        moved._slot, moved.wins = OrderedDict(self._slot), Counter(self.wins)
        return moved

    @contextmanager
    def rows(self, adapters: Sequence[int]) -> Iterator[tuple[Float[Tensor, "rows out"], dict[int, int]]]:
        """All rows, and the slot of each of these adapters (at most `slots`); nobody else moves them in the block."""
        assert len(adapters) <= self.slots, "more adapters at once than slots"
        with self._lock:
            wanted = set(adapters)
            for adapter in adapters:
                self._ensure(adapter, wanted)
            yield self._rows, self._slot

    def _ensure(self, adapter: int, wanted: set[int]) -> None:
        if adapter in self._slot:
            self._slot.move_to_end(adapter)
            return
        if len(self._slot) < self.slots:
            slot = len(self._slot)
        else:
            oldest = next(place for place in self._slot if place not in wanted)
            slot = self._slot.pop(oldest)
        B = self._load(adapter)
        with torch.no_grad():
            block = self._rows[slot * self.rank : (slot + 1) * self.rank]
            block[: B.shape[1]].copy_(B.T)
            block[B.shape[1] :].zero_()
        self._slot[adapter] = slot

    def prefetch(self) -> None:
        """Fill the slots with the adapters that won most often so far."""
        best = [adapter for adapter, _ in self.wins.most_common(self.slots)]
        with self.rows(best[::-1]):  # the most frequent last: it stays longest
            pass
