"""Where a module stands in its model: which layer, which kind."""

import re
from collections.abc import Sequence

_PLACE = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)\.(?P<kind>.+)")


def placed(modules: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Module → (row, column) of a map of layers × kinds, rows and columns in the order of first appearance.

    >>> placed(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
    {'model.layers.0.self_attn.q_proj': ('0', 'q_proj'), 'model.layers.1.mlp.up_proj': ('1', 'up_proj')}
    """
    parts = {module: _parts(module) for module in modules}
    stacks = {stack for stack, layer, _ in parts.values() if layer}
    kinds = {kind for _, _, kind in parts.values()}
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    unique = len(set(short.values())) == len(kinds)
    return {
        module: (
            f"{stack.rsplit('.', 2)[0]} {layer}".strip() if len(stacks) > 1 else layer or "–",
            short[kind] if unique else kind,
        )
        for module, (stack, layer, kind) in parts.items()
    }


def _parts(module: str) -> tuple[str, str, str]:
    match = _PLACE.fullmatch(module)
    return (match["stack"], match["layer"], match["kind"]) if match else ("", "", module)
