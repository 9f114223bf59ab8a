"""The lora_B of one layer that are at hand: a fixed number of slots, filled when an adapter first acts.

What is in the slots changes nothing but time: an adapter that is not there is read from its file, into the slot that
was used longest ago.
"""

from collections.abc import Callable
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class MatrixPool:
    """The folded, transposed B of at most `slots` adapters, rows of one tensor: (slots · rank, out), float32.

    Whoever reads `rows` holds `lock` meanwhile, so that another thread does not refill a slot under its hands.

    Attributes:
        rows: of all slots.
        wins: how often each adapter has acted, (adapters,).

    Args:
        load: place in the bank → (out, rank) folded B.
        adapters: in the bank.
        rank: the largest of the layer's adapters; the rows of a smaller one are filled up with zeros.
        out: the layer's outputs.
        slots: at least 1.
        device: where the rows are.
    """

    def __init__(
        self,
        load: Callable[[int], Tensor],
        *,
        adapters: int,
        rank: int,
        out: int,
        slots: int,
        device: torch.device,
    ) -> None:
        self.rank, self.out, self.slots, self.lock = rank, out, slots, Lock()
        self._load = load
        with torch.inference_mode(False):  # what is kept must also serve a later call that needs gradients
            self.rows = torch.zeros(slots * rank, out, device=device)
        # A few numbers a call: numpy costs a fifth of what torch does on so little.
        self.wins = np.zeros(adapters, dtype=np.int64)
        self._slot = np.full(adapters, -1, dtype=np.int64)
        self._used = np.zeros(slots, dtype=np.int64)
        self._holders = [-1] * slots
        self._clock = 0

    def to(self, device: torch.device) -> "MatrixPool":
        """An equal pool on another device."""
        moved = MatrixPool(
            self._load, adapters=len(self.wins), rank=self.rank, out=self.out, slots=self.slots, device=device
        )
        moved.rows.copy_(self.rows)
        for name in ("wins", "_slot", "_used"):
            getattr(moved, name)[:] = getattr(self, name)
        moved._holders, moved._clock = list(self._holders), self._clock
        return moved

    def first_rows(self, adapters: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
        """Where in `rows` each of these adapters' B begins; at most `slots` different ones, read if they must be."""
        wanted = adapters.cpu().numpy()
        slot = self._slot[wanted]
        if slot.min() < 0:
            self._fetch(np.unique(wanted).tolist())
            slot = self._slot[wanted]
        self._clock += 1
        self._used[slot] = self._clock
        return torch.from_numpy(slot * self.rank).to(adapters.device)

    def rows_of(self, adapter: int) -> Float[Tensor, "rank out"]:
        """The rows of one adapter's B, read if they must be."""
        if self._slot[adapter] < 0:
            self._fetch([adapter])
        slot = int(self._slot[adapter])
        self._clock += 1
        self._used[slot] = self._clock
        return self.rows[slot * self.rank : (slot + 1) * self.rank]

    def prefetch(self, adapters: list[int]) -> None:
        """Read the B of the first of these adapters before they act, as many as there are slots."""
        if adapters:
            with self.lock:
                self.first_rows(torch.tensor(adapters[: self.slots]))

    def _fetch(self, wanted: list[int]) -> None:
        assert len(wanted) <= self.slots, "more adapters at once than slots"
        there = set(self._holders)
        keep = there.intersection(wanted)
        order = [slot for slot in self._used.argsort(kind="stable").tolist() if self._holders[slot] not in keep]
        for adapter, slot in zip((place for place in wanted if place not in there), order, strict=False):
            B = self._load(adapter)  # which may fail, and must leave all slots as they are
            if self._holders[slot] >= 0:
                self._slot[self._holders[slot]] = -1
            self._holders[slot] = -1
            self._fill(slot, B)
            self._holders[slot], self._slot[adapter] = adapter, slot

    def _fill(self, slot: int, B: Float[Tensor, "outer rank"]) -> None:
        with torch.no_grad():
            block = self.rows[slot * self.rank : (slot + 1) * self.rank]
            block[: B.shape[1]].copy_(B.T)
            block[B.shape[1] :].zero_()
