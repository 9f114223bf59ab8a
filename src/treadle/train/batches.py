"""Which examples are trained on in which step: a function of lengths, settings and seed."""

from collections.abc import Sequence

from treadle.train.rows import shuffled
from treadle.train.settings import SftSettings

Step = tuple[tuple[int, ...], ...]
"""The batches of one step of the optimiser, each a tuple of indices."""


def steps_of(lengths: Sequence[int], settings: SftSettings) -> list[Step]:
    """Every step of the run, in order; each epoch holds each index once.

    The order is shuffled anew in every epoch. Within windows of `settings.window` steps, examples are sorted by length
    before they are cut into steps, so that little is padded; then the epoch's steps are shuffled again.
    """
    steps: list[Step] = []
    for epoch in range(settings.epochs):
        steps.extend(_epoch(lengths, settings, epoch))
    return steps


def _epoch(lengths: Sequence[int], settings: SftSettings, epoch: int) -> list[Step]:
    size = settings.batch_size * settings.gradient_accumulation_steps
    order = shuffled(len(lengths), settings.seed, f"order/{epoch}")
    window = size * settings.window if settings.window > 1 else len(order)
    steps: list[Step] = []
    for begin in range(0, len(order), window):
        near = order[begin : begin + window]
        if settings.window > 1:
            near.sort(key=lambda index: lengths[index])
        steps += [_batches(near[i : i + size], settings.batch_size) for i in range(0, len(near), size)]
    if settings.window == 1:
        return steps
    return [steps[i] for i in shuffled(len(steps), settings.seed, f"steps/{epoch}")]


def _batches(step: list[int], batch_size: int) -> Step:
    return tuple(tuple(step[i : i + batch_size]) for i in range(0, len(step), batch_size))
