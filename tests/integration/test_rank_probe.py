"""The probe on SmolLM2: cached equals whole passes, the weights are untouched, and the plan meets its budget."""

from pathlib import Path

import pytest
import torch

from treadle.data.public_text import public_texts
from treadle.family.injection import linear_shapes
from treadle.models.loading import load_model, load_tokenizer
from treadle.ranks.allocation import allocate, mean_rank_budget
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import drawn
from treadle.ranks.perturbation import PerturbationSettings, perturbation

pytestmark = pytest.mark.integration


def test_smollm2_is_probed_exactly_and_left_alone(smollm2: Path) -> None:
    model = load_model(str(smollm2), device="cpu")
    passages = public_texts("pydoc", limit=2, words=32).passages
    inputs = ProbeInputs.of_texts(load_tokenizer(str(smollm2)), passages, tokens=12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = linear_shapes(model)
    assert len(shapes) == 210
    picked = {name: shape for name, shape in shapes.items() if ".layers.0." in name or ".layers.21." in name}
    found = perturbation(model, inputs, picked, settings=PerturbationSettings(trials=1, compare="pristine"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    for name in ("model.layers.0.self_attn.v_proj", "model.layers.21.mlp.down_proj"):
        layer = model.get_submodule(name)
        rows: list[torch.Tensor] = []
        with torch.no_grad():
            for ids in inputs.batches:
                clean = model(input_ids=ids, use_cache=False).logits[:, -1]
                noise = torch.randn(layer.weight.shape, generator=drawn(0, name, 0, 0))
                layer.weight.add_(noise * layer.weight.std(correction=0))
                rows.append((model(input_ids=ids, use_cache=False).logits[:, -1] - clean).abs().mean(dim=1))
                layer.weight.copy_(before[f"{name}.weight"])
        torch.testing.assert_close(torch.tensor(found.modules[name].values[0]), torch.cat(rows), rtol=0, atol=1e-5)

    budget = mean_rank_budget(picked, 8)
    plan = allocate(found.means(), picked, budget=budget)
    cheapest = min(shape.in_features + shape.out_features for shape in picked.values())
    assert budget.value - cheapest < plan.count().total <= budget.value
