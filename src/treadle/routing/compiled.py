"""What a routed layer adds, as one opaque operator: `torch.compile` keeps it whole and breaks no graph around it.

Who acts depends on the values, and lora_B may have to be read, so a compiler could not look inside with profit.
"""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from treadle.family.injection import Delta

_DELTAS: "WeakValueDictionary[int, Callable[[Tensor], Tensor | None]]" = WeakValueDictionary()
_KEYS = count()


@torch.library.custom_op("treadle::delta", mutates_args=())
def _delta(x: Tensor, key: int, out_features: int) -> Tensor:
    added = _DELTAS[key](x)
    return x.new_zeros((*x.shape[:-1], out_features), dtype=torch.float32) if added is None else added


@_delta.register_fake
def _(x: Tensor, key: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32)


def compilable(delta: Delta, out_features: int) -> Delta:
    """The same delta, called through the operator while a graph is being compiled.

    A compiled layer serves inference only: the operator has no gradient.
    """
    key = next(_KEYS)
    _DELTAS[key] = delta

    def either(x: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling():
            return _delta(x, key, out_features)
        return delta(x)

    return either
