"""The principal directions of what layers see of a public text.

layers in groups, as many as memory allows:
    the base reads the text; of a layer's inputs nothing is kept but count, mean and scatter
    A = the eigenvectors of the covariance with the largest eigenvalues
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError
from treadle.family.initial import principal_directions
from treadle.family.plan import RankPlan
from treadle.progress import Progress, silent
from treadle.routing.calibration.moments import LatentMoments
from treadle.routing.calibration.text import Observer, ignored_tokens, longest_passage, read_text, text_batches

GROUP_BYTES = 1 << 29
"""What the covariances of the layers that one pass over the text serves may take."""


def public_pca(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: RankPlan,
    passages: Sequence[str],
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """(rank, in_features) a module, orthonormal rows: the directions in which its inputs vary most, largest first.

    Special tokens do not count, nor does the first position of a passage: what decoders park there says nothing about
    the text, and is half of all variance in front of some layers (docs/variants.md has figures).

    Raises:
        InputError: the text has too few tokens for the ranks, or a layer never ran.
        MismatchError: the model lacks a planned module, or it has another shape.
        UnsupportedError: a layer's inputs cannot be told apart by token.

    Reference: arXiv 2410.07170 (EVA): the singular vectors of layers' inputs as A.

    Deviations: EVA reads the task's own data, which would be a release; the text here is public. EVA gives ranks to
    modules by the variance that they explain, where our plan has given them already. Inputs are centred.
    """
    batches, ignored = text_batches(tokenizer, passages, longest=longest_passage(model)), ignored_tokens(tokenizer)
    found: dict[str, Tensor] = {}
    for group in _groups(plan):
        progress("reading public text", len(found), len(plan.modules))
        moments: dict[str, LatentMoments] = {}
        observers = {name: (plan.modules[name].shape, _adding(moments, name)) for name in group}
        read_text(model, batches, ignored, observers)
        for name in group:
            found[name] = _directions(name, moments.pop(name, None), plan.modules[name].rank)
            progress("principal directions", len(found), len(plan.modules))
    return found


def _groups(plan: RankPlan) -> Iterator[list[str]]:
    """The modules in order, cut where their covariances would take more than `GROUP_BYTES`."""
    group, taken = list[str](), 0
    for name, row in plan.modules.items():
        size = 8 * row.in_features**2
        if group and taken + size > GROUP_BYTES:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    yield group


def _adding(moments: dict[str, LatentMoments], name: str) -> Observer:
    def observe(x: Float[Tensor, "tokens inner"], rows: Int[Tensor, " tokens"]) -> None:
        kept = _behind_the_first(x, rows)
        if len(kept):
            added = LatentMoments.of(kept.cpu())
            moments[name] = moments[name].merge(added) if name in moments else added

    return observe


def _behind_the_first(x: Float[Tensor, "tokens inner"], rows: Int[Tensor, " tokens"]) -> Float[Tensor, "kept inner"]:
    """The inputs without the first of every row; all of them where a layer sees one vector a row (a pooler)."""
    if len(rows) == len(torch.unique(rows)):
        return x
    return x[1:][rows[1:] == rows[:-1]]


def _directions(name: str, moments: LatentMoments | None, rank: int) -> Float[Tensor, "{rank} inner"]:
    count = moments.count if moments else 0
    if moments is None or count <= rank:
        raise InputError(
            f"the public text has {count} tokens for it, too few for rank {rank}", where=name, remedy="give more text"
        )
    return principal_directions(moments.covariance, rank)
