"""Running a model again without what cannot have changed: blocks that had finished before a layer was first called.

A clean run records the output of every block (the children of the model's outermost ModuleLists) and the order in
which things happened. When layer m alone is changed, a block that finished before m was first called gives the same
output again, so its `forward` is replaced by one that returns a copy of the recorded output. Where blocks are not
found, or run more than once, nothing is skipped; nor where a block also acts by other ways than its output, such as a
dictionary of keys and values that later blocks read: runs that skip as many blocks as each layer may must say what the
clean one did. What a block keeps on the model from one run to the next is not seen.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

from torch import Tensor, nn

from treadle.ranks.outputs import is_out_of_memory

_SAME = 1e-3  # relative; kernels of accelerators may sum in another order, and half precision rounds


@dataclass(frozen=True)
class Recording:
    """What a clean run did.

    Attributes:
        output: what it returned.
        finished: the blocks with their outputs, as they finished.
        skippable: how many of them each layer may skip.
        rows: the sizes of the first axis of each layer's inputs, one a call.
    """

    output: Tensor
    finished: tuple[tuple[nn.Module, object], ...]
    skippable: Mapping[str, int]
    rows: Mapping[str, tuple[int, ...]]


def record(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> Recording:
    """What `run`, which runs the model once, does and in which order."""
    finished: list[tuple[nn.Module, object]] = []
    skippable: dict[str, int] = {}
    rows: dict[str, tuple[int, ...]] = dict.fromkeys(layers, ())

    def note_call(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            skippable.setdefault(name, len(finished))
            rows[name] += (len(inputs[0]),) if inputs else (0,)  # named inputs come by no position

        return hook

    def note_output(module: nn.Module, _inputs: object, output: object) -> None:
        finished.append((module, _copied(output)))

    with contextlib.ExitStack() as stack:
        for block in _blocks(model):
            stack.callback(block.register_forward_hook(note_output).remove)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(note_call(name)).remove)
        output = run()
    for name in layers:
        skippable.setdefault(name, 0)  # never called, but its weight may be read in any block
    recording = Recording(output, tuple(finished), skippable, rows)
    return recording if _replays(recording, run) else replace(recording, skippable=dict.fromkeys(layers, 0))


def _replays(recording: Recording, run: Callable[[], Tensor]) -> bool:
    """Whether the model says the same with as many blocks skipped as each layer may skip."""
    by_count = {count: name for name, count in recording.skippable.items() if count > 0}
    for name in by_count.values():
        try:
            with skipping(recording, name):
                again = run()
        except Exception as error:  # it lacks what a skipped block would have left for it
            if is_out_of_memory(error):
                raise
            return False
        if not (again - recording.output).norm() <= _SAME * recording.output.norm():
            return False
    return True


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The children of every ModuleList that lies in no other."""
    blocks: list[nn.Module] = []
    below: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in below:
            below.update(module.modules())
            blocks.extend(module.children())
    return blocks


@contextlib.contextmanager
def skipping(recording: Recording, layer: str) -> Iterator[None]:
    """Until the block ends, the model's blocks that cannot feel a change of `layer` return what they did before."""
    calls: dict[nn.Module, int] = {}
    for block, _ in recording.finished:
        calls[block] = calls.get(block, 0) + 1
    with contextlib.ExitStack() as stack:
        for block, output in recording.finished[: recording.skippable[layer]]:
            if calls[block] == 1:
                stack.enter_context(replaced(block, _returning(output)))
        yield


def _returning(output: object) -> Callable[..., object]:
    """A `forward` that does nothing but return a copy of `output`."""

    def forward(*_: object, **__: object) -> object:
        return _copied(output)

    return forward


@contextlib.contextmanager
def replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Until the block ends, the module runs this in place of its own `forward`."""
    own = module.__dict__.get("forward")  # there if somebody else has wrapped this instance
    try:
        module.forward = forward
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own


def _copied(output: object) -> object:
    """The same structure with its tensors copied: what runs next may write into them."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple) and hasattr(output, "_make"):
        return cast("type[NamedTuple]", type(output))._make(map(_copied, output))
    if isinstance(output, tuple | list):
        return type(output)(_copied(part) for part in output)
    if isinstance(output, dict):
        again = copy.copy(cast("dict[object, object]", output))
        for key, part in again.items():
            again[key] = _copied(part)
        return again
    return output
