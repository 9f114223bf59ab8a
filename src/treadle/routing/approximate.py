"""An approximate search among very many adapters by FAISS, which says how often it is right.

The z-score is no inner product, but its tangent at a usual winning score is one (see `treadle.routing.search`):

    a·√q − c ≤ ⟨φ(z), a²g/(2h)⟩ + (h/2 − c),   q = ⟨φ(z), g⟩.

So an adapter is the vector (a²g/(2h), h/2 − c), a token the vector (φ(z), 1), both in the coordinates in which a
sample of tokens has no preferred direction; the best of the nearest lists by inner product are scored exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from treadle.algebra import pair_products
from treadle.errors import UnavailableError
from treadle.routing.decision import TIE
from treadle.routing.search import Found, ScoreIndex, search, stored_scores

_ADAPTERS_A_LIST = 400
_RIDGE = 1e-6

Nearest = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ApproximateIndex:
    """Lists of adapters that FAISS searches in part, and how well that goes.

    Attributes:
        exact: whose adapters these are.
        nearest: a token in FAISS's coordinates → columns of `exact`, -1 where too few were found.
        tokens: turns (φ(z), 1) into FAISS's coordinates.
        recall: share of the sample's tokens for which the best adapter was found, a tie with it counting.
    """

    exact: ScoreIndex
    nearest: Nearest
    tokens: Float64[np.ndarray, "features features"]
    recall: float


def build_approximate_index(
    exact: ScoreIndex, sample: Float[Tensor, "samples rank"], *, probes: int = 16, candidates: int = 32
) -> ApproximateIndex:
    """An approximate index of the same adapters; its recall is measured on the second half of the sample.

    Which lists there are depends on every adapter of the index. Nothing about it is exact, law 4 included: build one
    for each set of adapters that a caller may use.

    Args:
        exact: the exact index.
        sample: z's as they are to come; the first half shapes the coordinates, the second measures the recall.
        probes: how many lists are read a token, of one for every 400 adapters.
        candidates: how many adapters are scored exactly a token.

    Raises:
        UnavailableError: FAISS is not installed.

    Reference: FAISS, arXiv 2401.08281, IndexIVFFlat with inner products.
    """
    known, unknown = sample[: sample.shape[0] // 2], sample[sample.shape[0] // 2 :]
    features = _features(known)
    second = features.T @ features / len(features)
    root = np.linalg.cholesky(second + _RIDGE * np.diag(np.diag(second)))
    held = np.flatnonzero((exact.places >= 0) & np.isfinite(exact.lines[:, 1].ravel()))
    vectors = np.ascontiguousarray(_vectors(exact, held) @ root, dtype=np.float32)
    nearest = _lists(vectors, held, probes, candidates)
    built = ApproximateIndex(exact, nearest, np.linalg.inv(root), float("nan"))
    hits = [_same(search(exact, z), approximate_search(built, z)) for z in unknown]
    return replace(built, recall=sum(hits) / len(hits))


def _lists(vectors: Float32[np.ndarray, "held features"], held: np.ndarray, probes: int, candidates: int) -> Nearest:
    try:
        import faiss
    except ImportError as error:
        raise UnavailableError("FAISS is not installed", remedy="pip install 'treadle[large]'") from error
    width, count = vectors.shape[1], max(1, len(held) // _ADAPTERS_A_LIST)
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, count, faiss.METRIC_INNER_PRODUCT)
    lists.cp.min_points_per_centroid = 1  # it would print a warning for small banks
    lists.train(vectors)
    lists.add_with_ids(vectors, held)
    lists.nprobe = probes
    return lambda query: lists.search(query[None], candidates)[1][0]


def approximate_search(index: ApproximateIndex, z: Float[Tensor, " rank"]) -> Found:
    """Probably the best adapter for this token, and its score; `index.recall` says how probably."""
    features = _features(z[None])[0]
    query = (index.tokens @ features).astype(np.float32)
    columns = index.nearest(query)
    columns = columns[columns >= 0]
    value = stored_scores(index.exact, features[:-1], columns)
    best = int(value.argmax())
    return Found(int(index.exact.places[columns[best]]), float(value[best]), len(columns))


def _same(exact: Found, approximate: Found) -> bool:
    return approximate.score >= exact.score - TIE * max(1.0, abs(exact.score))


def _features(z: Float[Tensor, "tokens rank"]) -> Float64[np.ndarray, "tokens features"]:
    return torch.nn.functional.pad(pair_products(z.double()), (0, 1), value=1.0).numpy()


def _vectors(exact: ScoreIndex, columns: np.ndarray) -> Float64[np.ndarray, "held features"]:
    scales, centres, roots = exact.scales[columns].T
    weights = np.square(scales) / (2.0 * roots)
    return np.column_stack([exact.grams[columns] * weights[:, None], roots / 2.0 - centres])
