"""The benchmark of memory, on a model with two blocks, in a process of its own as in the real thing."""

from pathlib import Path

import pytest

from treadle.configs.bench.routing_cost import RoutingMemoryRun
from treadle.errors import UnavailableError
from treadle.recipes.bench.routing_memory import routing_memory


def test_the_serving_process_says_what_it_held_and_whom_it_asked(small_fleet: Path, tmp_path: Path) -> None:
    config = RoutingMemoryRun(base=str(small_fleet / "base"), rank=2, adapters=3, requests=12, memory=1)
    result = routing_memory(config, work=tmp_path)
    peak = result.metrics["peak_resident"].value
    assert 50e6 < peak < 4e9  # Python and torch alone take more than the lower, a tiny model never the upper
    assert result.metrics["adapters_used"].value == 3
    assert result.metrics["peak_resident"].holds is (peak <= 2e9)
    assert routing_memory(config, work=tmp_path, quick=True).metrics["peak_resident"].holds is None


def test_a_failure_of_the_serving_process_is_told(small_fleet: Path, tmp_path: Path) -> None:
    config = RoutingMemoryRun(base=str(small_fleet / "base"), rank=2, adapters=2, requests=1, memory=1)
    routing_memory(config, work=tmp_path)
    next((tmp_path / "bank-2" / "adapters").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(UnavailableError, match="the serving process failed"):
        routing_memory(config, work=tmp_path)
