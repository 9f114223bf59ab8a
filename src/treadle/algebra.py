"""Tensor algebra of low-rank updates; knows nothing of models, adapters or files.

Notation: z is (tokens, rank), B is (out, rank), G = BᵀB is (rank, rank), and the packed form of G has
rank·(rank+1)/2 numbers: the upper triangle row by row, off-diagonals doubled.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

FP32_UNIT = 2.0**-24
"""The unit roundoff of float32: half the gap between 1 and the next number."""

FP64_UNIT = 2.0**-53
"""The unit roundoff of float64."""


def packed_gram(B: Float[Tensor, "outer rank"]) -> Float[Tensor, " pairs"]:
    """BᵀB, packed, in float64: ‖B z‖² is the inner product of this with `pair_products(z)`."""
    B64 = B.double()
    gram = B64.T @ B64
    rows, columns = torch.triu_indices(gram.shape[0], gram.shape[0], device=gram.device)
    packed = gram[rows, columns]
    return torch.where(rows == columns, packed, 2.0 * packed)


def pair_products(z: Float[Tensor, "tokens rank"]) -> Float[Tensor, "tokens pairs"]:
    """The products z_i·z_j for i ≤ j, in the order of `packed_gram`."""
    rows, columns = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
    return z[:, rows] * z[:, columns]


def trusted_product(left: Float[Tensor, "*batch rows inner"], right: Float[Tensor, "*batch inner columns"]) -> Tensor:
    """left · right in float32 to float32's precision, which every bound here counts on.

    By way of float64 where the user has let torch use less (TF32, bfloat16: `torch.set_float32_matmul_precision`).
    """
    return left @ right if full_precision() else (left.double() @ right.double()).float()


def full_precision() -> bool:
    """Whether torch multiplies float32 matrices as float32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's way of saying that its newer settings, one a backend, have been used
        return False


def squared_norm_error(rank: int) -> float:
    """How far a float32 ⟨`pair_products(z)`, packed Gram⟩ can be from ‖B z‖², at most, as a share of ‖z‖²·‖B‖_F².

    Each of the p = r(r+1)/2 terms carries at most p + 7 roundings (two of z, one of the product, two of a scale that
    may be multiplied in, one of the stored Gram, the summation in any order), and Σ abs(z_i z_j G_ij) ≤ ‖z‖²·tr G
    since abs(G_ij) ≤ √(G_ii G_jj).
    It holds where nothing underflows: for z and B scaled to unit norm, whatever they were before.
    """
    pairs = rank * (rank + 1) // 2
    # 1.01 covers the second-order terms of the summation bound, and what float64 rounds on the way.
    return 1.01 * (pairs + 7) * FP32_UNIT


def top_right_singular_vector(
    A: Float[Tensor, "rank inner"], B: Float[Tensor, "outer rank"]
) -> Float[Tensor, " inner"]:
    """The unit vector v that maximises ‖B A v‖, float64; zeros where B·A is zero.

    B = QR gives B·A = Q·(R·A), so the wide product is never formed.
    """
    triangle = torch.linalg.qr(B.double(), mode="r").R
    small = triangle @ A.double()
    if not small.any():
        return torch.zeros(A.shape[1], dtype=torch.float64, device=A.device)
    return torch.linalg.svd(small, full_matrices=False).Vh[0]


def update_norms(A: Float[Tensor, "rank inner"], B: Float[Tensor, "outer rank"]) -> tuple[float, float]:
    """The Frobenius and the spectral norm of B·A, by a QR of each factor."""
    left = torch.linalg.qr(B.double(), mode="r").R
    right = torch.linalg.qr(A.double().T, mode="r").R
    values = torch.linalg.svdvals(left @ right.T)
    return float(values.square().sum().sqrt()), float(values[0])


def orthonormal_factors(
    A: Float[Tensor, "width inner"], B: Float[Tensor, "outer width"], *, rank: int
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "outer rank"]]:
    """A' with orthonormal rows and B', float64, whose product is the best one of this rank to B·A; exact at `width`.

    B·A = U·S·Vᵀ gives A' = Vᵀ and B' = U·S, cut to the largest `rank` values, from a QR of each factor: the wide
    product is never formed. The rows of A' lie in the span of A's rows, where S is zero too. The largest entry of
    every row of A' is positive, so that signs do not hang on the library.

    Args:
        A: right factor.
        B: left factor.
        rank: at most width, inner and outer.
    """
    left, left_triangle = torch.linalg.qr(B.double())
    right, right_triangle = torch.linalg.qr(A.double().T)
    U, values, Vh = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    rows = Vh[:rank] @ right.T
    signs = largest_signs(rows)
    return signs[:, None] * rows, (left @ U[:, :rank]) * (signs * values[:rank])


def largest_signs(rows: Float[Tensor, "rows inner"]) -> Float[Tensor, " rows"]:
    """+1 or −1 a row: the sign of the entry of largest magnitude, the first of equals; +1 for a row of zeros."""
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def squared_norm_moments(
    B: Float[Tensor, "outer rank"], mean: Float[Tensor, " rank"], covariance: Float[Tensor, "rank rank"]
) -> tuple[float, float]:
    """Mean and variance of ‖B z‖² for a Gaussian z; exact.

    With G = BᵀB, m the mean and C the covariance: tr(GC) + mᵀGm, and 2·tr((GC)²) + 4·mᵀGCGm.

    Reference: the cumulants of a quadratic form in normal variables (Mathai and Provost 1992, theorem 3.2b.2).
    """
    wide = B.double()
    gram = wide.T @ wide
    spread, pull = gram @ covariance, gram @ mean
    expected = spread.trace() + mean @ pull
    variance = 2.0 * (spread * spread.T).sum() + 4.0 * pull @ covariance @ pull
    return float(expected), float(variance)


def root_moments(mean: float, variance: float) -> tuple[float, float]:
    """Mean and standard deviation of √q, for q ≥ 0 of this mean and variance that is taken for Gamma distributed.

    √q is then Nakagami distributed: with k = mean²/variance, E√q = √mean · Γ(k+½)/(Γ(k)·√k), and E q = mean gives
    the deviation. Exact for q = ‖B z‖² where B·z is centred and as wide in one direction as in the next.

    Reference: Nakagami 1960, equation 17; for large k, where the gamma functions cancel, its series in 1/k.
    """
    if mean <= 0.0:
        return 0.0, 0.0
    share = variance / mean**2
    if share < 1.0 / 300.0:  # the next term of the series is below 1e-9 of the sum
        missing = share / 4.0 - share**2 / 32.0 - share**3 / 128.0
        return math.sqrt(mean * (1.0 - missing)), math.sqrt(mean * missing)
    k = 1.0 / share
    ratio = math.exp(math.lgamma(k + 0.5) - math.lgamma(k)) / math.sqrt(k)
    return math.sqrt(mean) * ratio, math.sqrt(mean * (1.0 - ratio**2))
