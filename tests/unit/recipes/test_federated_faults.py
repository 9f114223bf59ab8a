"""Every fault of the benchmark, each in a folder of its own; the benchmark counts what these tests hold."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from treadle.recipes.bench.federated_faults import CASES, Case, unbroken


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    """The final B of the run in which nothing goes wrong."""
    return unbroken(tmp_path_factory.mktemp("unbroken") / "world")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_federation_survives(case: Case, tmp_path: Path, expected: Mapping[str, Tensor]) -> None:
    assert case(tmp_path / "world", expected)


def test_b_moved_in_the_unbroken_run(expected: Mapping[str, Tensor]) -> None:
    assert all(bool(B.any()) for B in expected.values())
