"""The article's own function: by hand in float64, and equal to the fast road."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import UnsupportedError
from treadle.routing.layer import Composition, RoutedLayer
from treadle.routing.reference import qr_factors, seqr_routing
from treadle.routing.scorers import SCORERS


def test_it_is_the_article_by_hand() -> None:
    torch.manual_seed(2)
    tokens, inner, outer, rank, count = 40, 10, 12, 3, 6
    x, A, W = torch.randn(tokens, inner).double(), torch.randn(rank, inner).double(), torch.randn(outer, inner).double()
    Bs = torch.randn(count, outer, rank).double()
    norms = torch.linalg.vector_norm(torch.einsum("nor,ri,ti->tno", Bs, A, x), dim=2)
    mus, sigmas = norms.mean(0), 0.5 + torch.rand(count).double()
    Qs, Rs = torch.linalg.qr(Bs)
    found = seqr_routing(x, A, Qs, Rs, mus, sigmas, W)
    chosen = set()
    for token in range(tokens):
        scores = [
            (float(torch.linalg.vector_norm(B @ A @ x[token])) - float(mu)) / float(sigma)
            for B, mu, sigma in zip(Bs, mus, sigmas, strict=True)
        ]
        best = scores.index(max(scores))
        chosen.add(best)
        torch.testing.assert_close(found[token], W @ x[token] + Bs[best] @ A @ x[token])
    assert len(chosen) > 2  # else the argmax has not been tried


def test_the_fast_road_gives_the_same(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = make.bank(tiny_llama, tiny_tokenizer, foreign=False)
    chosen: set[int] = set()
    for module, factors in bank.layers.items():
        linear = tiny_llama.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        x = torch.randn(64, factors.shape.in_features)
        layer = RoutedLayer(factors, SCORERS["seqr"], slots=4)
        choice = layer.choose(x, None, Composition(1, 1.0), explained=False)
        added = layer.added(x, choice)
        assert added is not None
        parts = qr_factors(factors)
        truth = seqr_routing(
            x.double(), parts.A, parts.Qs, parts.Rs, parts.mus, parts.sigmas, linear.weight.detach().double()
        )
        torch.testing.assert_close((linear(x) + added).double(), truth, rtol=1e-5, atol=1e-5)
        chosen |= set(choice.mixture.adapter.flatten().tolist())
    assert len(chosen) == 4


def test_what_the_article_does_not_know_is_refused(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = make.bank(tiny_llama, tiny_tokenizer)
    with pytest.raises(UnsupportedError, match="needs one A"):
        qr_factors(next(iter(bank.layers.values())))
