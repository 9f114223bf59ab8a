"""Probe texts, linear models whose scores have closed forms, and a proof that a model was left alone."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PretrainedConfig, PreTrainedModel

from treadle.ranks.inputs import ProbeInputs


@pytest.fixture
def inputs() -> ProbeInputs:
    """Three texts of six tokens and two of nine."""
    generator = torch.Generator().manual_seed(5)
    batches = tuple(torch.randint(4, 128, shape, generator=generator) for shape in ((3, 6), (2, 9)))
    return ProbeInputs(batches, "0" * 64)


@pytest.fixture
def tiny_mamba() -> MambaForCausalLM:
    """Two layers, each of which reads its dt_proj's weight and never calls dt_proj."""
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(15)
    return MambaForCausalLM(config).eval().requires_grad_(False)


def _everything(model: nn.Module) -> dict[str, tuple[Tensor, int, bool]]:
    """A copy of every tensor, where it lies, and whether it asks for a gradient."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {
        name: (tensor.detach().clone(), tensor.data_ptr(), tensor.requires_grad) for name, tensor in tensors.items()
    }


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    before = _everything(model)
    yield
    after = _everything(model)
    assert after.keys() == before.keys()
    for name, (tensor, *facts) in before.items():
        assert list(after[name][1:]) == facts, name
        assert torch.equal(after[name][0].view(torch.uint8), tensor.view(torch.uint8)), name
        assert model.get_parameter(name).grad is None if name in dict(model.named_parameters()) else True
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert torch.is_grad_enabled()


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """A block after which the model's tensors are the same to the bit, at their places, and no hook is left."""
    return _untouched


class _Linear(PreTrainedModel):
    """logits = W₂·W₁·embedding(token), or W₁ alone: disagreement has a closed form."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(PretrainedConfig())
        self.embedding = nn.Embedding(128, widths[0])
        pairs = itertools.pairwise(widths)
        self.layers = nn.Sequential(*(nn.Linear(width, height, bias=False) for width, height in pairs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers(self.embedding(input_ids)))


@pytest.fixture
def linear_model() -> Callable[..., PreTrainedModel]:
    """Makes a linear model of these widths, modules layers.0, layers.1, …"""
    return lambda *widths: _Linear(widths).eval().requires_grad_(False)
