"""The exact best of very many adapters for one token, by bounds that are cheaper than the scores.

The flat way computes all N scores by a product of width r(r+1)/2. Here a product of width r bounds them, and few are
computed. Let S·Sᵀ be the covariance of a sample of z's plus a third of their mean's square, so that y = S⁻¹z hardly
prefers a direction; let λ₁ ≥ λ₂ be the largest eigenvalues of SᵀG_iS and v_i the first's eigenvector. Then

    ‖B_i z‖² ≤ (λ₁ − λ₂)·(v_i·y)² + λ₂·‖y‖².

The score a·‖B_i z‖ − c is concave in the square, so the tangent where it has some value T, and its root the value
h_i = T + c_i, is above it: a square and a sum, u_i = (w_i·y)² + b_i·‖y‖² + o_i. It is as sharp away from T as at T:

    a·√q − c ≥ t   ⇔   a²q/(2h) + h/2 − c ≥ t + (h − c − t)²/(2h),   for t + c ≥ 0.

Adapters of similar b and o share a block; the greatest abs(w·y) in it bounds the block, and a block below the best
score found so far is never opened. Adapters that survive are scored in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from treadle.algebra import FP32_UNIT, FP64_UNIT, pair_products
from treadle.errors import InputError
from treadle.routing.decision import BASE, TIE

_BLOCK = 128
_FIRST_BLOCKS = 12
_STRIP = 8 * _BLOCK
_GROWTH = 8
_FIRST_SCORED = 8
_LEVEL_SAMPLES = 64
# One absurd adapter must not make T absurd.
_LEVEL = 1e3
_CHUNK = 16384
_OPENED = -np.inf
_LOWEST = -1e308
# Of a score's root and centre, by the few float64 operations between them.
_ROUNDING = 16.0 * FP64_UNIT
# Share of the sample's mean square: S stays well-conditioned where the sample spans less than the whole space.
_RIDGE = 1e-8
# Of the mean's square in S·Sᵀ: with all of it, bounds let 53 of 20,000 adapters through where it outweighs the
# covariance four times, with 0.3 of it 3, with 0.1 of it 10; where it is small, 0.3 is as good as all.
_MEAN_SHARE = 0.3
# Beyond this a float32 product could overflow; such an adapter has no bound and is always scored.
_LARGEST = 1e15

Grid = Float64[np.ndarray, "blocks 128"]


@dataclass(frozen=True)
class Blocks:
    """What holds for everybody in a block.

    Attributes:
        heights: the greatest b·E‖y‖² + o.
        steepest: the greatest b.
        flattest: the least b.
        sharpness: 1/(2h) at the greatest h; 0 unless every h is T + c.
        least_centre: the least c of all.
    """

    heights: Float64[np.ndarray, " blocks"]
    steepest: Float64[np.ndarray, " blocks"]
    flattest: Float64[np.ndarray, " blocks"]
    sharpness: Float64[np.ndarray, " blocks"]
    least_centre: float


@dataclass(frozen=True)
class ScoreIndex:
    """What `build_index` makes of one layer's N adapters, in the order of its blocks, filled up to whole blocks.

    It holds 6r + 2r² + 48 bytes an adapter: 224 at r=8 (the flat way's factors: 160).

    Attributes:
        whitening: S⁻¹.
        usual: E‖y‖².
        level: T.
        directions: w, one column an adapter, float32.
        lines: b and o of each block's members; o is inf where an adapter has no bound, -inf where a block is filled up.
        blocks: bounds of all these.
        pairs: the order of `treadle.algebra.pair_products`.
        places: of each adapter in the bank, -1 where a block is filled up.
        grams: packed, as `treadle.algebra.packed_gram` gives them for unit-norm B's, float32.
        scales: of each adapter a = ‖B‖_F/σ, c = μ/σ and h.
    """

    whitening: Float64[np.ndarray, "rank rank"]
    usual: float
    level: float
    directions: Float[Tensor, "rank filled"]
    lines: Float64[np.ndarray, "blocks 2 128"]
    blocks: Blocks
    pairs: Int[np.ndarray, "2 pairs"]
    places: Int[np.ndarray, " filled"]
    grams: Float[np.ndarray, "filled pairs"]
    scales: Float64[np.ndarray, "filled 3"]


@dataclass(frozen=True)
class Found:
    """The best adapter for one token.

    Attributes:
        winner: its place in the bank, `BASE` where nobody permitted has a score.
        score: its score, -inf where there is none.
        scored: how many adapters were scored. Forbidden adapters can change this number: it is for the operator.
    """

    winner: int
    score: float
    scored: int


def build_index(
    grams: Float[Tensor, "adapters pairs"],
    scales: Float64[Tensor, " adapters"],
    centres: Float64[Tensor, " adapters"],
    sample: Float[Tensor, "samples rank"],
) -> ScoreIndex:
    """The index of N adapters' scores scale·‖B z‖/‖B‖ − centre; about 30·r³ FLOPs an adapter, once.

    An adapter with a number that is not finite, or too large to bound in float32, is kept without a bound.

    Args:
        grams: packed BᵀB/‖B‖_F² (`treadle.algebra.packed_gram`), float32.
        scales: ‖B‖_F/σ, not negative.
        centres: μ/σ.
        sample: z's as they are to come. They decide how much a search costs, never what it finds.

    Raises:
        InputError: an empty bank or sample, a sample of zeros, or shapes that do not fit.

    Reference: this library's own.
    """
    rank = sample.shape[1]
    if grams.shape[0] == 0 or grams.shape[1] != rank * (rank + 1) // 2 or not bool((sample != 0).any()):
        raise InputError("no adapters, no sample, or ranks that differ", remedy="give both, of one rank")
    z = sample.double()
    centre = z.mean(0)
    shape = (z - centre).T @ (z - centre) / z.shape[0] + _MEAN_SHARE * torch.outer(centre, centre)
    ridge = _RIDGE * z.square().sum(1).mean() * torch.eye(rank, dtype=torch.float64)
    root = torch.linalg.cholesky(shape + ridge)
    usual = float(torch.linalg.solve_triangular(root, z.T, upper=False).square().sum(0).mean())
    level = _level(grams, scales, centres, z[:_LEVEL_SAMPLES])
    parts = [
        _bounded(grams[at : at + _CHUNK], scales[at : at + _CHUNK], centres[at : at + _CHUNK], root=root, level=level)
        for at in range(0, grams.shape[0], _CHUNK)
    ]
    directions, slopes, offsets, roots = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = _ordered(slopes, offsets, usual)
    filler = -len(order) % _BLOCK

    def grid(values: Tensor, fill: float) -> Grid:
        return torch.nn.functional.pad(values[order], (0, filler), value=fill).view(-1, _BLOCK).numpy()

    b, o, h, c = grid(slopes, 0.0), grid(offsets, -torch.inf), grid(roots, 1.0), grid(centres, torch.inf)
    return ScoreIndex(
        whitening=torch.linalg.inv(root).numpy(),
        usual=usual,
        level=level,
        directions=torch.nn.functional.pad(directions[order].T, (0, filler)).contiguous(),
        lines=np.stack([b, o], axis=1),
        blocks=_blocks(b, o, h, c, usual=usual, level=level),
        pairs=torch.triu_indices(rank, rank).numpy(),
        places=torch.nn.functional.pad(order, (0, filler), value=-1).numpy(),
        grams=torch.nn.functional.pad(grams[order].float(), (0, 0, 0, filler)).numpy(),
        scales=np.stack([grid(scales, 0.0), c, h], axis=2).reshape(-1, 3),
    )


def _ordered(slopes: Float64[Tensor, " adapters"], offsets: Float64[Tensor, " adapters"], usual: float) -> Tensor:
    """Strips of similar b·E‖y‖² + o, each in the order of b, so that a block's members are alike at every ‖y‖²."""
    strips = torch.argsort(slopes * usual + offsets, stable=True).split(_STRIP)
    return torch.cat([strip[torch.argsort(slopes[strip], stable=True)] for strip in strips])


def _level(grams: Tensor, scales: Tensor, centres: Tensor, z: Tensor) -> float:
    """T, the best score of a usual token; any number is right, this one makes the tangents touch where winners are."""
    best = torch.full((z.shape[0],), -torch.inf, dtype=torch.float64)
    products = pair_products(z).float()
    for at in range(0, grams.shape[0], _CHUNK):
        part = slice(at, at + _CHUNK)
        squares = (products @ grams[part].float().T).double().clamp_min(0.0)
        scores = squares.sqrt() * scales[part] - centres[part]
        best = torch.maximum(best, scores.nan_to_num(-torch.inf, posinf=-torch.inf).max(1).values)
    level = float(best.median())
    return max(-_LEVEL, min(level, _LEVEL)) if np.isfinite(level) else 0.0


def _bounded(
    grams: Float[Tensor, "adapters pairs"],
    scales: Float64[Tensor, " adapters"],
    centres: Float64[Tensor, " adapters"],
    *,
    root: Float64[Tensor, "rank rank"],
    level: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w (adapters, rank) in float32, and b, o, h: every rounding of theirs, of w·y and of G is inside b and o."""
    rank = root.shape[0]
    sound = grams.isfinite().all(1) & scales.isfinite() & centres.isfinite()
    whole = root.T @ _symmetric(torch.where(sound[:, None], grams.double(), 0.0), rank) @ root
    values, vectors = torch.linalg.eigh(whole)
    second = values[:, -2] if rank > 1 else torch.zeros_like(scales)
    h = (level + centres).clamp_min(max(1e-3 * abs(level), 1e-30))
    curvature = scales.square() / (2.0 * h)
    directions = vectors[:, :, -1] * (curvature * (values[:, -1] - second).clamp_min(0.0)).sqrt()[:, None]
    # w and y are rounded and so is each step of their product: (r + 3) units on w·y, twice that on its square, with
    # room for the eigenvalues. The stored Gram of a unit-norm B is off by one unit of its norm, S stretches that.
    slack = 16.0 * rank * FP32_UNIT * (curvature * values.abs().amax(1))
    stored = 2.0 * FP32_UNIT * curvature * torch.linalg.matrix_norm(root, 2).square()
    b = curvature * second + slack + stored + 1e-30
    o = h / 2.0 - centres + 64.0 * FP64_UNIT * (h + centres.abs())
    bounded = sound & (directions.abs().amax(1) < _LARGEST) & (b.abs() < _LARGEST**2) & (o.abs() < _LARGEST)
    return (
        torch.where(bounded[:, None], directions, 0.0).float(),
        torch.where(bounded, b, 0.0),
        torch.where(bounded, o, torch.inf),
        torch.where(bounded, h, torch.inf),
    )


def _symmetric(packed: Float64[Tensor, "adapters pairs"], rank: int) -> Float64[Tensor, "adapters rank rank"]:
    rows, columns = torch.triu_indices(rank, rank)
    upper = packed.new_zeros(packed.shape[0], rank, rank)
    upper[:, rows, columns] = packed / 2.0
    return upper + upper.mT


def _blocks(b: Grid, o: Grid, h: Grid, c: Grid, *, usual: float, level: float) -> Blocks:
    rounding = 4.0 * FP64_UNIT * (np.abs(h) + np.abs(c))
    with np.errstate(invalid="ignore"):  # inf - inf of adapters without a bound: not regular
        regular = (np.abs(h - c - level) <= rounding) | (o == -np.inf)
    sharpness = np.where(regular.all(1), 1.0 / (2.0 * h.max(1)), 0.0)
    return Blocks((b * usual + o).max(1), b.max(1), b.min(1), sharpness, float(np.where(np.isnan(c), -np.inf, c).min()))


def search(
    index: ScoreIndex,
    z: Float[Tensor, " rank"],
    *,
    permitted: Bool[Tensor, " adapters"] | None = None,
    settle: Callable[[Sequence[int]], Sequence[float]] | None = None,
) -> Found:
    """The best permitted adapter for this token: the one that the flat scores and float64 would choose.

    About 2·N·r FLOPs and 4·N·r bytes read, where the flat product takes N·r(r+1) and 2·N·r(r+1); then 2r² FLOPs for
    each adapter of a few opened blocks, and r(r+1) for each that is scored. Where bounds say nothing, all are scored.

    Args:
        index: of the layer.
        z: A·x, float64.
        permitted: who may be chosen, ineligible adapters left out by the caller; None means everybody. What the
            others' factors hold, NaN included, changes neither `winner` nor `score`.
        settle: scores at these places of the bank, in float64 from the stored B; asked about everybody that rounding
            of the stored Gram leaves in doubt. None takes the stored Gram for the truth.

    Deviations: an adapter whose own score is not finite is never chosen.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # adapters without a bound may hold anything
        walk = _Walk(index, z.double().numpy(), None if permitted is None else permitted.numpy())
        heights = walk.heights()
        size = min(_FIRST_BLOCKS, len(heights))
        near = heights.argpartition(-size)[-size:]
        while near.size:
            walk.open(near)
            heights[near] = _OPENED
            near, size = (~walk.low(heights) & (heights != _OPENED)).nonzero()[0], size * _GROWTH
            if walk.floor == -np.inf and near.size > size:
                near = near[heights[near].argpartition(-size)[-size:]]
        return walk.end(settle)


class _Walk:
    """One search: what has been scored, and the floor below which no score matters any more."""

    def __init__(self, index: ScoreIndex, z: np.ndarray, permitted: np.ndarray | None) -> None:
        self.index, self.permitted = index, permitted
        self.products = z[index.pairs[0]] * z[index.pairs[1]]
        # The Gram of a unit-norm B, rounded to float32, is off by one unit of its norm; twice that leaves room.
        self.slack = 2.0 * FP32_UNIT * float(z @ z)
        y = index.whitening @ z
        self.length = float(y @ y)
        self.sizes = torch.mv(index.directions.T, torch.from_numpy(y.astype(np.float32))).abs_().view(-1, _BLOCK)
        self.floor = -np.inf
        self.columns: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def heights(self) -> Float64[np.ndarray, " blocks"]:
        """Of each block, a number that none of its scores is above."""
        blocks, more = self.index.blocks, self.length - self.index.usual
        height = self.sizes.amax(1).numpy().astype(np.float64)
        height *= height
        height += blocks.heights
        height += more * (blocks.steepest if more > 0 else blocks.flattest)
        return height

    def low(self, heights: Float64[np.ndarray, " blocks"]) -> Bool[np.ndarray, " blocks"]:
        """Which blocks hold no score that reaches the floor."""
        blocks = self.index.blocks
        if self.floor + blocks.least_centre < 0.0:
            return heights < self.floor
        return heights < self.floor + (self.index.level - self.floor) ** 2 * blocks.sharpness

    def reaches(self, blocks: Int[np.ndarray, " some"]) -> Float64[np.ndarray, "some 128"]:
        """u of everybody in these blocks."""
        u = self.sizes.numpy().take(blocks, axis=0).astype(np.float64)
        lines = self.index.lines.take(blocks, axis=0)
        u *= u
        u += lines[:, 0] * self.length
        u += lines[:, 1]
        return u

    def open(self, blocks: Int[np.ndarray, " some"]) -> None:
        """Score everybody in these blocks whose u reaches the floor, the most promising first."""
        u = self.reaches(blocks).ravel()
        if self.permitted is not None:
            places = self.index.places.reshape(-1, _BLOCK)[blocks].ravel()
            u[~self.permitted[places]] = -np.inf
        near = self._near(u)
        if near.size > _FIRST_SCORED:
            best = near[u[near].argpartition(-_FIRST_SCORED)[-_FIRST_SCORED:]]
            self._score(blocks[best // _BLOCK] * _BLOCK + best % _BLOCK)
            u[best] = -np.inf
            near = self._near(u)
        columns = blocks[near // _BLOCK] * _BLOCK + near % _BLOCK
        if self.floor > -np.inf and columns.size:
            _, c, h = self.index.scales.take(columns, axis=0).T
            sharper = np.where(self.floor + c >= 0.0, (h - c - self.floor) ** 2 / (2.0 * h), 0.0)
            columns = columns[~(u[near] < self.floor + sharper)]
        if columns.size:
            self._score(columns)

    def _near(self, u: np.ndarray) -> np.ndarray:
        """Where u reaches the floor, nor is -inf."""
        return (~(u < max(self.floor, _LOWEST))).nonzero()[0]

    def _score(self, columns: np.ndarray) -> None:
        value = stored_scores(self.index, self.products, columns)
        self.columns.append(columns)
        self.values.append(value)
        best = int(value.argmax())
        if not np.isfinite(value[best]):
            best = int(np.where(np.isfinite(value), value, -np.inf).argmax())
        if np.isfinite(value[best]):
            scale, centre, _ = self.index.scales[columns[best]].tolist()
            squared = max((float(value[best]) + centre) ** 2 - self.slack * scale**2, 0.0)
            least = squared**0.5 - centre - _ROUNDING * (squared**0.5 + abs(centre))
            self.floor = max(self.floor, least - 2.0 * TIE * max(1.0, abs(least)))

    def end(self, settle: Callable[[Sequence[int]], Sequence[float]] | None) -> Found:
        """The decision among all who were scored."""
        if self.floor == -np.inf:
            return Found(BASE, -np.inf, sum(map(len, self.columns)))
        columns, value = np.concatenate(self.columns), np.concatenate(self.values)
        scale, centre, _ = self.index.scales.take(columns, axis=0).T
        root = np.sqrt(np.square(value + centre) + self.slack * np.square(scale))
        most = root - centre + _ROUNDING * (root + np.abs(centre))
        rivals = (most >= self.floor).nonzero()[0]
        places, close = self.index.places[columns[rivals]], value[rivals]
        if settle is not None and rivals.size > 1:
            close = np.asarray(settle(places.tolist()), dtype=np.float64)
        close = np.where(np.isfinite(close), close, -np.inf)
        best = float(close.max())
        at = (close >= best - TIE * max(1.0, abs(best))).nonzero()[0]
        winner = at[places[at].argmin()]
        return Found(int(places[winner]), float(close[winner]), len(columns))


def stored_scores(
    index: ScoreIndex, products: Float64[np.ndarray, " pairs"], columns: Int[np.ndarray, " some"]
) -> Float64[np.ndarray, " some"]:
    """The scores of the adapters at these columns of the index, from the stored Grams and the token's pair products.

    Each row is summed on its own, so that no score depends on who else is asked for.
    """
    squares = (index.grams.take(columns, axis=0) * products).sum(1)
    scale, centre, _ = index.scales.take(columns, axis=0).T
    return scale * np.sqrt(np.maximum(squares, 0.0)) - centre
