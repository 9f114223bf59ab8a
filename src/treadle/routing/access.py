"""Who may use which adapter: names in, one mask a row out, and every mistake an error rather than a guess."""

import re
from collections.abc import Collection, Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from treadle.errors import AccessError, InputError

Labels = frozenset[str]
"""KEY=VALUE each: what an adapter is cleared for, or what the data of a request are."""

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}=[A-Za-z0-9_.:/-]{1,64}")


def checked_labels(labels: Iterable[str], *, where: object = None) -> Labels:
    """The labels, if each is of the form KEY=VALUE.

    Raises:
        InputError: one is not.
    """
    found = frozenset(labels)
    for label in sorted(found):
        if not _LABEL.fullmatch(label):
            raise InputError(f"label {label!r} is not KEY=VALUE", where=where, remedy="write dept=oncology")
    return found


Permitted = Sequence[Collection[str] | None]
"""One set of adapter names a row; None permits all, an empty set leaves the base model."""


def permitted_mask(
    names: Sequence[str], permitted: Permitted | None, *, rows: int, required: bool
) -> Bool[Tensor, "rows adapters"] | None:
    """Which adapters each row may use; None where every row may use all.

    Args:
        names: the bank's adapters, in order.
        permitted: the callers' sets, one a row, or None for all.
        rows: of the batch.
        required: whether the bank insists on a set for every row.

    Raises:
        AccessError: a set is missing where one is required, the rows do not match, or a name is unknown.
    """
    if permitted is None or any(allowed is None for allowed in permitted):
        if required:
            raise AccessError(
                "this bank requires a set of permitted adapters", remedy="pass permitted=[{…}], one set a row"
            )
        if permitted is None:
            return None
    if isinstance(permitted, str) or any(isinstance(allowed, str) for allowed in permitted):
        raise AccessError("a string is not a set of names", remedy="pass permitted=[{'name', …}], one set a row")
    if len(permitted) != rows:
        raise AccessError(f"{len(permitted)} permitted sets for {rows} rows", remedy="pass one set a row")
    sets = [None if allowed is None else frozenset(allowed) for allowed in permitted]  # an iterator is read once
    for allowed in sets:
        unknown = sorted(repr(name) for name in allowed or () if name not in names)
        if unknown:
            raise AccessError(f"unknown adapter {unknown[0]}", remedy="use names of `treadle bank list`")
    return torch.tensor([[allowed is None or name in allowed for name in names] for allowed in sets]).reshape(
        rows, len(names)
    )
