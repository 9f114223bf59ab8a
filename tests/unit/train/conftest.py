"""Families of the tiny models, and examples to train on. Nothing of treadle is imported at the top (see above)."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from treadle.data.prompts import Example
    from treadle.family.family import AdapterFamily


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small train twenty times as fast on one thread as on two that contend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def family_of() -> Callable[..., "AdapterFamily"]:
    """A function from a model to a family of it: rank 2 everywhere, or 1, 2, 3 in turn with alpha/r = 2."""

    def create(model: PreTrainedModel, *, uniform: bool = True, seed: int = 0) -> "AdapterFamily":
        from treadle.family.family import AdapterFamily
        from treadle.family.injection import linear_shapes
        from treadle.family.plan import RankPlan
        from treadle.models.identity import BaseIdentity

        shapes = linear_shapes(model)
        if uniform:
            plan = RankPlan.uniform(shapes, rank=2)
        else:
            plan = RankPlan.of_ranks(shapes, {name: i % 3 + 1 for i, name in enumerate(shapes)}, scaling=2.0)
        return AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=seed)

    return create


@pytest.fixture
def examples() -> "list[Example]":
    """24 questions of several lengths; the answer is the sign of the last word."""
    from treadle.data.prompts import Example

    return [
        Example(f"question {'w30 ' * (i % 5)}{'good' if i % 2 else 'bad'}", " positive" if i % 2 else " negative no")
        for i in range(24)
    ]
