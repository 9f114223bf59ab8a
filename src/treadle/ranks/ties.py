"""Groups of modules that share one rank.

none    every module has its own
qk      query and key of the same attention, whose product is all that the model sees of them
kind    one kind in all layers, so that a single `rank_pattern` entry of PEFT says it
lists   of kinds, such as [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]: tied where they stand side by side
"""

from collections.abc import Iterable
from typing import Literal

from treadle.errors import InputError, MismatchError

Ties = Literal["none", "qk", "kind"] | tuple[tuple[str, ...], ...]

QUERY_KEY = (("q_proj", "k_proj"), ("query", "key"), ("query_proj", "key_proj"), ("q_lin", "k_lin"), ("q", "k"))
"""How transformers' models name them: Llama and its kin, BERT, DeBERTa-v2, DistilBERT, T5."""


def groups_of(modules: Iterable[str], ties: Ties) -> list[tuple[str, ...]]:
    """The modules in groups that share a rank, each group in the order given, groups by their first module.

    Raises:
        InputError: a list of fewer than two kinds, or a module in two of them.
        MismatchError: a tied kind matches no module, or is missing where the kind that it is tied with is planned.
    """
    names = list(modules)
    if ties == "none":
        return [(name,) for name in names]
    if ties == "kind":
        return _gathered({name: _kind(name) for name in names})
    if ties != "qk":
        return _tied(names, ties)
    pairs = [pair for pair in QUERY_KEY if any(_stem(name, kind) is not None for name in names for kind in pair)]
    if not pairs:
        raise MismatchError("no module is a query or a key", remedy="set ties = 'none', or list the kinds to tie")
    return _tied(names, pairs)


def _kind(name: str) -> str:
    """The name with every number open: one kind in all layers.

    >>> _kind("model.layers.11.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _stem(name: str, kind: str) -> str | None:
    """What stands before `kind` in the name; None if the module is of another kind."""
    if name == kind:
        return ""
    return name.removesuffix(kind) if name.endswith(f".{kind}") else None


def _tied(names: list[str], ties: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Groups of the modules that differ only in which kind of the same tie they are."""
    keys: dict[str, str] = {}
    for number, kinds in enumerate(ties):
        if len(set(kinds)) < 2:
            raise InputError(f"ties of {list(kinds)} bind nothing", remedy="name two or more kinds in each list")
        found = {(stem, kind): name for name in names for kind in kinds if (stem := _stem(name, kind)) is not None}
        for kind in kinds:
            if not any(kind == other for _, other in found):
                there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
                raise MismatchError(f"no planned module is a {kind!r} to tie", remedy=f"choose among {there}")
        for (stem, kind), name in found.items():
            missing = [other for other in kinds if (stem, other) not in found]
            if missing:
                raise MismatchError(
                    f"{name!r} is tied with {stem + missing[0]!r}, which is not planned",
                    remedy="plan both kinds, or drop the tie",
                )
            if name in keys:
                raise InputError(f"{name!r} is in two ties", remedy=f"name {kind!r} once")
            keys[name] = f"{number} {stem}"
    return _gathered({name: keys.get(name, f"alone {name}") for name in names})


def _gathered(keys: dict[str, str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return [tuple(members) for members in groups.values()]
