"""Where a module stands in its model: which layer, which kind."""

import re
from collections.abc import Collection, Sequence

_PLACE = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)\.(?P<kind>.+)")


def placed(modules: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Module → (row, column) of a map of layers × kinds, rows and columns in the order of first appearance.

    >>> placed(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    {'model.layers.0.self_attn.q_proj': ('0', 'q_proj'), 'model.layers.1.mlp.up_proj': ('1', 'up_proj')}
    """
    parts = {module: _parts(module) for module in modules}
    stacks = {stack for stack, layer, _ in parts.values() if layer}
    names = _told_apart(stacks)
    kinds = {kind for _, _, kind in parts.values()}
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    unique = len(set(short.values())) == len(kinds)
    return {
        module: (
            f"{names[stack]} {layer}" if layer and len(stacks) > 1 else layer or "–",
            short[kind] if unique else kind,
        )
        for module, (stack, layer, kind) in parts.items()
    }


def _told_apart(stacks: Collection[str]) -> dict[str, str]:
    """Stack → what is its own: "model.encoder.layers" and "model.decoder.layers" are "encoder" and "decoder"."""
    split = {stack: stack.split(".") for stack in stacks}
    if len(split) < 2:
        return {stack: stack for stack in stacks}
    begin = _alike(list(split.values()))
    rest = {stack: parts[begin:] for stack, parts in split.items()}
    end = _alike([parts[::-1] for parts in rest.values()])
    return {stack: ".".join(parts[: len(parts) - end]) for stack, parts in rest.items()}


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """How many entries they all begin with."""
    return next(
        (place for place, row in enumerate(zip(*lists, strict=False)) if len(set(row)) > 1), min(map(len, lists))
    )


def _parts(module: str) -> tuple[str, str, str]:
    match = _PLACE.fullmatch(module)
    return (match["stack"], match["layer"], match["kind"]) if match else ("", "", module)
