"""The approximate search scores exactly what it finds, and states a recall that it really has."""

import sys

import pytest
import torch
from torch import Tensor

from treadle.algebra import packed_gram
from treadle.errors import UnavailableError
from treadle.routing.approximate import approximate_search, build_approximate_index
from treadle.routing.search import ScoreIndex, build_index, search


def exact_index(count: int) -> tuple[ScoreIndex, Tensor]:
    """Adapters with one strong direction each, and z's that have a mean."""
    g = torch.Generator().manual_seed(0)
    Bs = torch.randn(count, 5, 4, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.5, 0.2]).double()
    Bs = Bs @ torch.linalg.qr(torch.randn(count, 4, 4, generator=g, dtype=torch.float64)).Q
    norms = torch.linalg.matrix_norm(Bs)
    z = torch.randn(600, 4, generator=g, dtype=torch.float64) + torch.tensor([1.0, 0.0, 0.0, 0.0])
    lengths = torch.linalg.vector_norm(torch.einsum("nor,tr->tno", Bs, z[:200]), dim=2)
    grams = torch.stack([packed_gram(B) for B in Bs / norms[:, None, None]]).float()
    return build_index(grams, norms / lengths.std(0), lengths.mean(0) / lengths.std(0), z[:200]), z[200:]


def test_the_recall_is_the_one_that_is_measured_anew() -> None:
    exact, z = exact_index(4000)
    index = build_approximate_index(exact, z[:200], probes=3, candidates=8)
    pairs = [(search(exact, row), approximate_search(index, row)) for row in z[200:]]
    for best, found in pairs:
        assert found.score <= best.score + 1e-9  # both are scores of the same stored Grams
    again = sum(found.winner == best.winner for best, found in pairs) / len(pairs)
    assert 0.3 < index.recall < 1.0  # three lists of ten are not all
    assert again == pytest.approx(index.recall, abs=0.2)  # 4 standard errors of shares of 100 and 200 at one half


def test_all_lists_and_many_candidates_find_the_best() -> None:
    exact, z = exact_index(500)
    index = build_approximate_index(exact, z[:50], probes=10, candidates=400)
    assert index.recall == 1.0
    assert all(search(exact, row).winner == approximate_search(index, row).winner for row in z[50:80])


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    exact, z = exact_index(20)
    with pytest.raises(UnavailableError, match=r"FAISS is not installed; pip install 'treadle\[large\]'"):
        build_approximate_index(exact, z[:10])
