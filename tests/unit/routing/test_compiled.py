"""A routed layer under `torch.compile`: no graph break, the same numbers.

In a process of its own: the checks of shapes that tests switch on are nothing that a compiler could trace.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.routing.bank import AdapterBank
from treadle.routing.routed import RoutedModel

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
plan = RankPlan.uniform(linear_shapes(model), rank=4)
family = AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=0)
adapters = [
    Adapter(name, plan, family.lora_A, {m: torch.randn(row.out_features, 4) for m, row in plan.modules.items()},
            family.fingerprint, family.base, Provenance("test"))
    for name in ("one", "two", "three")
]
routed = RoutedModel(model, AdapterBank.build(family, adapters), scorer="norm", granularity="token")
ids, graphs = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]]), []
layer = model.model.layers[0].self_attn.q_proj

def counting(graph, inputs):
    graphs.append(sum("treadle" in str(node.target) for node in graph.graph.nodes))
    return graph.forward

with torch.inference_mode():
    expected = routed(ids).logits
    x = torch.randn(1, 3, 32)
    alone = torch.nn.functional.linear(x, layer.weight)
    model.model.layers[0].self_attn.q_proj = torch.compile(layer, fullgraph=True, backend=counting)
    found = routed(ids).logits
    assert torch.equal(model.model.layers[0].self_attn.q_proj(x), alone), "outside of a routed call it is the base"
assert not torch.allclose(found, model(ids).logits)
assert torch.equal(found, expected)
assert graphs and all(number == 1 for number in graphs), graphs
print("compiled", len(graphs))
"""


def test_a_compiled_layer_has_one_graph_and_the_eager_output() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("compiled")
