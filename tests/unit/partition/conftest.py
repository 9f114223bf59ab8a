"""A small adapted network with losses by sample, whose gradients a loop can find one sample at a time."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Net:
    """Two adapted layers on positions and one on the pooled sample, in float64; "mixed" has no trained A."""

    def __init__(self, samples: int = 6, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.x = normal(samples, 4, 5)
        self.weights = {"first": normal(7, 5), "mixed": normal(7, 7), "pooled": normal(3, 7)}
        ranks = {"first": 2, "mixed": 3, "pooled": 2}
        self.frozen_A = {"mixed": normal(3, 7)}
        self.lora_A = {
            name: nn.Parameter(normal(ranks[name], self.weights[name].shape[1])) for name in ("first", "pooled")
        }
        self.lora_B = {name: nn.Parameter(0.3 * normal(len(W), ranks[name])) for name, W in self.weights.items()}

    def layer(self, name: str, x: Tensor) -> Tensor:
        A = self.lora_A.get(name, self.frozen_A.get(name))
        return linear(x, self.weights[name]) + linear(linear(x, A), self.lora_B[name])

    def loss(self, numbers: Sequence[int]) -> Tensor:
        h = self.layer("first", self.x[list(numbers)]).tanh()
        h = self.layer("mixed", h).sin().mean(1)
        return self.layer("pooled", h).square().sum()

    def gradients(self) -> dict[str, Tensor]:
        """Key → (samples, *factor shape), from a backward pass for each sample alone."""
        factors = {f"{name}/lora_B": B for name, B in self.lora_B.items()}
        factors |= {f"{name}/lora_A": A for name, A in self.lora_A.items()}
        rows = [torch.autograd.grad(self.loss([i]), list(factors.values())) for i in range(len(self.x))]
        return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(factors)}

    def factor(self, key: str) -> nn.Parameter:
        module, _, part = key.rpartition("/")
        return (self.lora_A if part == "lora_A" else self.lora_B)[module]


@pytest.fixture(scope="session")
def net_of() -> Callable[..., Net]:
    """A function from a number of samples and a seed to a network."""
    return Net
