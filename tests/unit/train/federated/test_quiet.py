"""Nothing calls home: what Flower reads before it reports anything is set before Flower can be loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, sys
import treadle.train.federated
assert not any(name.split(".")[0] == "flwr" for name in sys.modules)
import treadle.train.federated.grid
from flwr.supercore import telemetry
names = ["FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "RAY_USAGE_STATS_ENABLED"]
print(telemetry.FLWR_TELEMETRY_ENABLED, *[os.environ[name] for name in names], os.environ["FLWR_HOME"])
"""


@pytest.mark.parametrize("chosen", [None, "/somewhere/else"])
def test_telemetry_is_off_and_the_home_private(tmp_path: Path, chosen: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))}
    environment["TREADLE_CACHE"] = str(tmp_path)
    if chosen is not None:
        environment["FLWR_HOME"] = chosen
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "1", "0", chosen or str(tmp_path / "flower")]
