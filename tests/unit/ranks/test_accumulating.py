from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from treadle.errors import MismatchError
from treadle.family.injection import linear_shapes
from treadle.ranks.accumulating import AccumulatingSettings, perturbation_accumulating
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import drawn
from treadle.ranks.partial import PartialProbe
from treadle.ranks.scores import ProbeScores


def test_noise_piles_up_over_trials_and_modules(tiny_llama: LlamaForCausalLM, inputs: ProbeInputs) -> None:
    shapes = linear_shapes(tiny_llama, ["q_proj", "up_proj"])
    found = perturbation_accumulating(tiny_llama, inputs, shapes, settings=AccumulatingSettings(trials=2))
    with torch.no_grad():
        clean = [tiny_llama(input_ids=ids).logits[:, -1] for ids in inputs.batches]
        for name in shapes:
            weight = tiny_llama.get_submodule(name).weight
            size = float(weight.std(correction=0))
            for trial in range(2):
                weight.add_(size * torch.randn(weight.shape, generator=drawn(0, "piling up", name, trial)))
                moved = [tiny_llama(input_ids=ids).logits[:, -1] for ids in inputs.batches]
                wanted = torch.cat([(a - b).abs().mean(dim=1) for a, b in zip(moved, clean, strict=True)])
                torch.testing.assert_close(torch.tensor(found.modules[name].values[trial]), wanted, rtol=0, atol=1e-6)


def test_another_number_of_trials_is_another_probe(
    tiny_llama: LlamaForCausalLM, inputs: ProbeInputs, tmp_path: Path
) -> None:
    shapes, path = linear_shapes(tiny_llama, ["q_proj"]), tmp_path / "probe.jsonl"

    def probe(trials: int) -> ProbeScores:
        settings = AccumulatingSettings(trials=trials)
        return perturbation_accumulating(tiny_llama, inputs, shapes, settings=settings, partial=PartialProbe(path))

    few = probe(2)
    with pytest.raises(MismatchError, match=r"probe\.jsonl: the probe begun there had settings"):
        probe(3)
    assert probe(2) == few
