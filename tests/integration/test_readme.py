"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.integration
@pytest.mark.usefixtures("smollm2")
def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from treadle.family.adapter import Adapter, Provenance
    from treadle.family.family import AdapterFamily

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    code = "\n".join(blocks)
    before, after = code.split("# … train adapters", 1)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(before, "README.md", "exec"), scope)
    family = scope["family"]
    assert isinstance(family, AdapterFamily)
    for number, name in enumerate(["billing", "weather"]):  # stands for the training that the comment speaks of
        generator = torch.Generator().manual_seed(number)
        lora_B = {
            module: torch.randn(row.out_features, row.rank, generator=generator) * 1e-3
            for module, row in family.plan.modules.items()
        }
        Adapter.of_family(family, name, lora_B, provenance=Provenance("sft")).save(tmp_path / "adapters" / name)
    exec(compile(after.split("\n", 1)[1], "README.md", "exec"), scope)
    shares = capsys.readouterr().out
    # The second row permits the first adapter alone; random as it is, the base may be taken for the better one.
    assert shares.rstrip().endswith(("{'billing': 1.0}", "{None: 1.0}"))
