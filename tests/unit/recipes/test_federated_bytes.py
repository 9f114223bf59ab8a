"""`federated-bytes`: on a tiny base the bytes of both variants stand to one another as their parameters do."""

from pathlib import Path

from transformers import LlamaForCausalLM

from treadle.configs.bench.federated import FederatedBytesRun
from treadle.recipes.bench.federated_bytes import federated_bytes


def test_bytes_follow_the_parameters(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> None:
    config = FederatedBytesRun(base=str(tiny_base), rank=8, clients=2, rounds=3)
    result = federated_bytes(config, work=tmp_path / "work")
    ffa, fedit = result.rows
    widths = [(m.in_features, m.out_features) for m in tiny_llama.model.modules() if hasattr(m, "in_features")]
    B = 8 * sum(outer for _, outer in widths)
    both = B + 8 * sum(inner for inner, _ in widths)
    assert result.settings["expected"] == B / both
    for row, parameters in ((ffa, B), (fedit, both)):
        for way in ("down", "up"):
            sent = int(str(row[way]))
            assert sent >= 2 * 2 * 4 * parameters  # two clients, the two rounds that count, four bytes a number
            assert sent < 2 * 2 * (4 * parameters + 1200 * len(widths))  # heads of arrays and messages
