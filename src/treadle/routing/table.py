"""The fast road to the exact argmax: one product for all scores, and a certificate for the winner.

    z   = A x                     float64, of the layer's actual input
    q_i = ⟨φ(z/‖z‖), g_i⟩         float32, one GEMM of width r(r+1)/2, (tokens, adapters), nothing wider
    U_i = √(q_i + e)·‖z‖·a_i − c_i    never below the true score, e the proven error of q
    the largest U wins for certain where its lower bound clears the second largest U, and a tie with it

Where it does not, `decision.decide` settles the token in float64. A table is built once; nothing in it changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from treadle.algebra import FP32_UNIT, full_precision, pair_products, squared_norm_error, trusted_product
from treadle.routing.decision import BASE, TIE, Decision, ranked
from treadle.routing.factors import Group, LayerFactors, exact_norms
from treadle.routing.scores import NormScore

Places = np.ndarray[tuple[int], np.dtype[np.int64]]
Singles = np.ndarray[tuple[int], np.dtype[np.float32]]

ELEMENTS = 2**23
"""Scores held at once; more tokens than fit are scored in turn."""

BEST = 8
"""How many leading adapters of a token are kept: rivals that float64 has to settle are nearly always among them."""

_LENGTHS = (1e-12, 1e12)  # of z, whose squares float32 holds
_RANGE = (1e-25, 1e25)  # of scales and centres whose float32 arithmetic neither under- nor overflows


@dataclass(frozen=True)
class TableGroup:
    """A group of adapters with one A, laid out for the product.

    Attributes:
        columns: their places in the bank; None where they are the whole bank in order.
        A: (rank, inner), float64.
        pairs: (2, pairs), which entries of z each product takes.
        grams: (members, pairs), float32, as in `Group`.
        slack: bound of the error of q.
    """

    columns: Int[Tensor, " members"] | None
    A: Float[Tensor, "rank inner"]
    pairs: Int[Tensor, "2 pairs"]
    grams: Float[Tensor, "members pairs"]
    slack: float


@dataclass(frozen=True)
class LoneTable:
    """What numpy needs of a table for a single token, views of the same numbers.

    Attributes:
        first: (pairs,), which entry of z each product takes first.
        second: likewise.
        scale: (adapters,) float32.
        offset: (adapters,) float32.
    """

    first: Places
    second: Places
    scale: Singles
    offset: Singles


@dataclass(frozen=True)
class ScoreTable:
    """What the scores of a scorer of the norm need at one layer; ineligible adapters have scale 0 and offset -inf.

    Attributes:
        groups: laid out.
        scale: (adapters,), ‖B‖_F / unit, float32.
        offset: (adapters,), minus the centre, float32.
        slack: (adapters,), of each one's group, float64.
        doubtful: (adapters,), whose numbers are beyond what float32 can be trusted with; None where nobody's are.
        widest: the largest abs(centre) of the eligible.
        lone: for single tokens; None off the processor, with more than one A, or where some are doubtful.
    """

    groups: tuple[TableGroup, ...]
    scale: Float[Tensor, " adapters"]
    offset: Float[Tensor, " adapters"]
    slack: Float[Tensor, " adapters"]
    doubtful: Bool[Tensor, " adapters"] | None
    widest: float
    lone: LoneTable | None


@dataclass(frozen=True)
class Leaders:
    """The leading adapters of each token.

    Attributes:
        winner: place in the bank, `BASE` where nobody permitted is eligible.
        upper: the two largest upper bounds, or one where the bank has one adapter.
        place: whose they are.
        length: ‖z‖ of each token under the A of those.
        doubtful: places of the tokens whose winner is not proven: float64 has to settle them.
        rivals: of those, the `BEST` largest upper bounds, and whose they are.
        bar: of those; whoever's upper bound does not reach it can neither win nor tie.
    """

    winner: Int[Tensor, " tokens"]
    upper: Float[Tensor, "tokens best"]
    place: Int[Tensor, "tokens best"]
    length: Float[Tensor, "tokens best"]
    doubtful: Int[Tensor, " few"]
    rivals: tuple[Float[Tensor, "few some"], Int[Tensor, "few some"]]
    bar: Float[Tensor, " few"]


def score_table(factors: LayerFactors, form: NormScore) -> ScoreTable:
    """The table of one layer for the scores of this form."""
    count, device = form.eligible.shape[0], form.eligible.device
    scale = torch.zeros(count, dtype=torch.float64, device=device)
    slack = torch.zeros_like(scale)
    for group in factors.groups:
        scale[group.columns] = group.norms / form.unit[group.columns]
        slack[group.columns] = squared_norm_error(group.A.shape[0])
    scale = torch.where(form.eligible, scale, 0.0)
    centre = torch.where(form.eligible, form.centre, torch.inf)
    low, high = _RANGE
    trusted = ((scale == 0) | ((scale > low) & (scale < high))) & (form.centre.abs() < high)
    doubtful = form.eligible & ~trusted
    known = centre[form.eligible].abs()
    groups = tuple(_laid_out(group, count) for group in factors.groups)
    some, single, offset = bool(doubtful.any()), scale.float(), -centre.float()
    lone = None
    if groups[0].columns is None and not some and device.type == "cpu":
        first, second = groups[0].pairs.numpy()
        lone = LoneTable(first, second, single.numpy(), offset.numpy())
    widest = float(known.max()) if known.numel() > 0 else 0.0
    return ScoreTable(groups, single, offset, slack, doubtful if some else None, widest, lone)


def _laid_out(group: Group, adapters: int) -> TableGroup:
    rank = group.A.shape[0]
    whole = group.columns.shape[0] == adapters
    return TableGroup(
        None if whole else group.columns,
        group.A.double(),
        torch.triu_indices(rank, rank, device=group.A.device),
        group.grams,
        squared_norm_error(rank),
    )


def latents_of(table: ScoreTable, x: Float[Tensor, "tokens inner"]) -> tuple[Float[Tensor, "tokens _"], ...]:
    """A·x of each group, in float64 (see `factors.latent`)."""
    exact = x.double()
    return tuple(exact @ group.A.T for group in table.groups)


def squares(
    group: TableGroup, z: Float[Tensor, "tokens rank"]
) -> tuple[Float[Tensor, "tokens members"], Float[Tensor, "tokens 1"]]:
    """‖B z‖² / (‖B‖_F² ‖z‖²) of every adapter of the group in float32, off by `slack` at most, and ‖z‖ in float64."""
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return trusted_product(_products(group, z, length), group.grams.T), length


def _products(group: TableGroup, z: Tensor, length: Tensor) -> Tensor:
    """φ(z/‖z‖) in float32, as `algebra.pair_products` has it, the pairs looked up once and not at each call."""
    unit = (z / torch.where(length > 0, length, 1.0)).float()
    return unit[:, group.pairs[0]] * unit[:, group.pairs[1]]


def values(table: ScoreTable, x: Float[Tensor, "tokens inner"]) -> Float[Tensor, "tokens adapters"]:
    """Every score in float32, -inf where an adapter is not eligible: for sums of scores, not for an exact argmax."""
    roots = []
    for group, z in zip(table.groups, latents_of(table, x), strict=True):
        square, length = squares(group, z)
        roots.append(square.clamp_min_(0.0).sqrt_().mul_(length.float()))
    return spread_out(table, roots).mul_(table.scale).add_(table.offset)


def spread_out(table: ScoreTable, columns: Sequence[Float[Tensor, "rows _"]]) -> Float[Tensor, "rows adapters"]:
    """The groups' columns side by side in the bank's order, 0 where an adapter lacks the layer."""
    if table.groups[0].columns is None:
        return columns[0]
    result = columns[0].new_zeros(columns[0].shape[0], table.scale.shape[0])
    for group, values_of_group in zip(table.groups, columns, strict=True):
        result[:, group.columns] = values_of_group
    return result


def leaders(
    table: ScoreTable,
    zs: Sequence[Float[Tensor, "tokens _"]],
    permitted: Bool[Tensor, "tokens adapters"] | None,
) -> Leaders:
    """The winner of every token, and for whom it is not proven.

    Args:
        table: of the layer.
        zs: `latents_of` the layer's input.
        permitted: who may act on each token; None for everybody. Whoever may not cannot move anything here.
    """
    tokens, adapters = zs[0].shape[0], table.scale.shape[0]
    step = max(1, ELEMENTS // adapters)
    if tokens <= step:
        return _leaders(table, zs, permitted)
    parts = [
        _leaders(table, [z[at : at + step] for z in zs], None if permitted is None else permitted[at : at + step])
        for at in range(0, tokens, step)
    ]
    return Leaders(
        torch.cat([part.winner for part in parts]),
        torch.cat([part.upper for part in parts]),
        torch.cat([part.place for part in parts]),
        torch.cat([part.length for part in parts]),
        torch.cat([part.doubtful + place * step for place, part in enumerate(parts)]),
        (torch.cat([part.rivals[0] for part in parts]), torch.cat([part.rivals[1] for part in parts])),
        torch.cat([part.bar for part in parts]),
    )


def _leaders(table: ScoreTable, zs: Sequence[Tensor], permitted: Tensor | None) -> Leaders:
    lengths = [torch.linalg.vector_norm(z, dim=1, keepdim=True) for z in zs]
    roots = [_roots(*each) for each in zip(table.groups, zs, lengths, strict=True)]
    bounds = spread_out(table, roots).mul_(table.scale).add_(table.offset)
    if permitted is not None:
        bounds.masked_fill_(~permitted, -torch.inf)
    upper, place = bounds.topk(min(2, bounds.shape[1]), dim=1)
    length = lengths[0].expand_as(place)
    if len(lengths) > 1:
        widths = [len(group.grams) for group in table.groups]
        columns = [one.expand(-1, width) for one, width in zip(lengths, widths, strict=True)]
        length = spread_out(table, columns).gather(1, place)
    bar = _bar(table, upper[:, 0], place[:, 0], length[:, 0], permitted)
    for group, one in zip(table.groups, lengths, strict=True):
        beyond = ~(((one > _LENGTHS[0]) & (one < _LENGTHS[1])) | (one == 0.0)).squeeze(1)
        if permitted is not None and group.columns is not None:
            beyond &= permitted[:, group.columns].any(1)
        bar = bar.masked_fill(beyond, -torch.inf)
    nobody = upper[:, 0] == -torch.inf
    proven = (upper[:, 1] < bar) if upper.shape[1] > 1 else (bar > -torch.inf)
    doubtful = (~(proven | nobody)).nonzero().flatten()
    rivals = bounds[doubtful].topk(min(BEST, bounds.shape[1]), dim=1)
    winner = torch.where(nobody, BASE, place[:, 0])
    return Leaders(winner, upper, place, length, doubtful, (rivals.values, rivals.indices), bar[doubtful])


def _roots(group: TableGroup, z: Tensor, length: Tensor) -> Tensor:
    """√(‖B z‖² + e‖z‖²) / ‖B‖_F of every adapter of the group, in float32: never below ‖B z‖ / ‖B‖_F."""
    square = length.square().float()
    products = _products(group, z, length) * square
    shift = square * (1.001 * group.slack)
    if full_precision():
        total = torch.addmm(shift, products, group.grams.T)
    else:
        total = shift + trusted_product(products, group.grams.T)
    return total.clamp_min_(0.0).sqrt_()


def _bar(table: ScoreTable, first: Tensor, winner: Tensor, length: Tensor, permitted: Tensor | None) -> Tensor:
    """What an upper bound must reach to be a rival of the first: its lower bound, less a tie and float32's rounding."""
    widest: Tensor | float = table.widest
    if permitted is not None:
        widest = torch.where(permitted & table.offset.isfinite(), table.offset.abs(), 0.0).amax(1)
    high, centre = first.double(), -table.offset[winner].double()
    # Seven roundings of float32 at most lie between q and U, on a number no larger than U + widest.
    rounding = 32.0 * FP32_UNIT * (high.abs() + 2.0 * widest)
    error = 2.002 * table.slack[winner] * (table.scale[winner].double() * length).square()
    lower = ((high + centre).square() - error).clamp_min(0.0).sqrt() - centre
    bar = lower - rounding - 3.0 * TIE * lower.abs().clamp_min(1.0)
    bar = torch.where(bar.isnan(), -torch.inf, bar)
    if table.doubtful is None:
        return bar
    allowed = table.doubtful.expand(1, -1) if permitted is None else table.doubtful & permitted
    return bar.masked_fill(allowed.any(1), -torch.inf)


def settled_leaders(
    factors: LayerFactors,
    form: NormScore,
    x: Float[Tensor, "tokens inner"],
    zs: Sequence[Float[Tensor, "tokens _"]],
    found: Leaders,
) -> tuple[Int[Tensor, " told"], Decision, Int[Tensor, " untold"]]:
    """Of the doubtful tokens: those settled in float64 among their rivals, how, and those with more rivals than known.

    First by the stored Grams, whose one rounding leaves hardly a doubt; what is left from the stored matrices.

    Args:
        factors: of the layer.
        form: of the scores.
        x: the layer's input, of all tokens.
        zs: `latents_of` it.
        found: the leaders of all tokens.
    """
    upper, place = found.rivals
    rivals = upper >= found.bar[:, None]
    whole = upper.shape[1] == form.eligible.shape[0]
    closed = (~rivals[:, -1] | (upper[:, -1] == -torch.inf) | whole) & upper[:, 0].isfinite() & found.bar.isfinite()
    told = found.doubtful[closed]
    upper, place, rivals = upper[closed], place[closed], rivals[closed] & (upper[closed] > -torch.inf)
    value = upper.double()
    if len(factors.groups) == 1:
        value, still = _by_grams(factors.groups[0], form, zs[0][told], place, value, rivals)
        rivals = still & (still.sum(1, keepdim=True) > 1)
    for adapter in place[rivals].unique().tolist():
        row, column = (rivals & (place == adapter)).nonzero(as_tuple=True)
        norm = exact_norms(factors, adapter, x[told[row]])
        value[row, column] = norm / form.unit[adapter] - form.centre[adapter]
    order = place.argsort(1)  # ties go to the adapter that stands first in the bank
    decision = ranked(value.gather(1, order), torch.ones_like(told, dtype=torch.bool))
    return told, decision.renamed(place.gather(1, order)), found.doubtful[~closed]


def settled_by_grams(
    factors: LayerFactors, form: NormScore, zs: Sequence[Float[Tensor, "tokens _"]], found: Leaders
) -> Int[Tensor, " few"] | None:
    """The winners of the doubtful tokens where their Grams in float64 leave each a single one; None where not.

    What `settled_leaders` does, without a decision to explain: most calls end here, at a third of its operations.
    """
    upper, place = found.rivals
    rivals = upper >= found.bar[:, None]
    whole = upper.shape[1] == form.eligible.shape[0]
    group, *others = factors.groups
    if others or not bool(found.bar.isfinite().all()) or not (whole or not bool(rivals[:, -1].any())):
        return None
    rivals &= upper > -torch.inf
    _, still = _by_grams(group, form, zs[0][found.doubtful], place, upper.double(), rivals)
    if not bool((still.sum(1) == 1).all()):
        return None
    return (place * still).sum(1)


def _by_grams(
    group: Group, form: NormScore, z: Tensor, place: Tensor, value: Tensor, rivals: Tensor
) -> tuple[Tensor, Tensor]:
    """The rivals' scores in float64 from their Grams, and who may be the best even after the Grams' rounding."""
    mine = place
    if len(group.columns) < form.eligible.shape[0]:
        column = torch.zeros_like(form.eligible, dtype=torch.long)
        column[group.columns] = torch.arange(len(group.columns), device=z.device)
        mine = column[place]
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    products = pair_products(z / torch.where(length > 0, length, 1.0))
    square = torch.bmm(group.grams[mine].double(), products[:, :, None]).squeeze(2)
    scale, centre = length * group.norms[mine] / form.unit[place], form.centre[place]
    # A Gram is rounded once to float32: Σ abs(z_i z_j G_ij) of unit vectors times that; twice, for float64's own.
    error = 2.0 * FP32_UNIT
    high = (square + error).clamp_min(0.0).sqrt() * scale - centre
    low = (square - error).clamp_min(0.0).sqrt() * scale - centre
    value = torch.where(rivals, square.clamp_min(0.0).sqrt() * scale - centre, value)
    best = torch.where(rivals, low, -torch.inf).amax(1, keepdim=True)
    return value, rivals & (high >= best - 2.0 * TIE * best.abs().clamp_min(1.0))


def lone_winner(
    table: ScoreTable, x: Float[Tensor, "1 inner"], permitted: Bool[Tensor, "1 adapters"] | None
) -> int | None:
    """The winner of a single token; None where `leaders` must look closer. The road of decoding on a processor.

    The same bounds as `leaders`, with the least that an operation can cost: the two products are torch's, the rest is
    numpy's on a few numbers. (What is forbidden may lead to None here, never to another winner.)
    """
    lone = table.lone
    if lone is None:
        return None
    group = table.groups[0]
    z = torch.mv(group.A, x[0].detach().double()).numpy()
    length = math.sqrt(float(z @ z))
    if not 0.0 < length < math.inf:
        return None
    unit = (z / length).astype(np.float32)
    upper = torch.mv(group.grams, torch.from_numpy(unit[lone.first] * unit[lone.second])).numpy()
    upper += np.float32(group.slack)
    np.maximum(upper, np.float32(0.0), out=upper)
    np.sqrt(upper, out=upper)
    upper *= lone.scale
    upper *= np.float32(length)
    upper += lone.offset
    if permitted is not None:
        upper[~permitted[0].numpy()] = -np.inf
    winner = int(upper.argmax())
    high = float(upper[winner])
    if not math.isfinite(high):
        return BASE if high == -math.inf else None
    upper[winner] = -np.inf
    second = float(upper.max())
    centre, slack = -float(lone.offset[winner]), 2.0 * group.slack * (float(lone.scale[winner]) * length) ** 2
    lower = math.sqrt(max(0.0, (high + centre) ** 2 - slack)) - centre
    bar = lower - 32.0 * FP32_UNIT * (abs(high) + 2.0 * table.widest) - 3.0 * TIE * max(1.0, abs(lower))
    return winner if second < bar else None


def decision_of(table: ScoreTable, found: Leaders) -> Decision:
    """The leaders as a decision, with margin and runner-up as a trace tells them."""
    upper, place, length = found.upper.double(), found.place, found.length
    scale, centre = table.scale[place].double() * length, -table.offset[place].double()
    norm = ((upper + centre).square() - 1.001 * table.slack[place] * scale.square()).clamp_min(0.0).sqrt()
    value = torch.where(upper > -torch.inf, norm - centre, -torch.inf)
    rescored = torch.zeros_like(found.winner, dtype=torch.bool)
    if value.shape[1] == 1:
        nobody = torch.full_like(found.winner, BASE)
        return Decision(found.winner, nobody, torch.zeros_like(found.length[:, 0]), rescored)
    there = found.upper[:, 1] > -torch.inf
    margin = torch.where(there, value[:, 0] - value[:, 1], 0.0).clamp_min(0.0).float()
    return Decision(found.winner, torch.where(there, found.place[:, 1], BASE), margin, rescored)
