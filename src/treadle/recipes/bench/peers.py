"""What routing one linear layer costs others: PEFT's own layers, and the article's formulas as they are written.

Each peer maps x, (tokens, in), to the layer's output with an adapter chosen and added, base product included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

Peer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fleet:
    """Adapters of one layer that share A.

    Attributes:
        base: the frozen layer.
        A: (rank, in).
        Bs: (out, rank) each.
        mean: (adapters,) of ‖B A x‖.
        std: (adapters,) of ‖B A x‖.
    """

    base: nn.Linear
    A: Tensor
    Bs: Sequence[Tensor]
    mean: Tensor
    std: Tensor


def single_lora(fleet: Fleet) -> Peer:
    """PEFT's linear layer with one adapter, not merged."""
    rank = fleet.A.shape[0]
    layer = nn.Linear(fleet.base.in_features, fleet.base.out_features, bias=False)
    layer.weight = fleet.base.weight
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    adapted = inject_adapter_in_model(config, nn.Sequential(layer)).eval()
    weights = {"0.lora_A.default.weight": fleet.A, "0.lora_B.default.weight": fleet.Bs[0]}
    adapted.load_state_dict(weights, strict=False)
    return adapted


def single_lora_model(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The model with one adapter of PEFT's on every linear layer, not merged; the model is changed."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    inject_adapter_in_model(config, model)  # in place
    return model.eval()


def peft_arrow(fleet: Fleet) -> Peer:
    """PEFT's ARROW layer, its prototypes made beforehand."""
    names = [f"task_{place}" for place in range(len(fleet.Bs))]
    lora_A = nn.ModuleDict({name: _weight(fleet.A) for name in names})
    lora_B = nn.ModuleDict({name: _weight(B) for name, B in zip(names, fleet.Bs, strict=True)})
    config = ArrowConfig(top_k=min(3, len(names)))
    config.task_adapter_names, config.gks_adapter_names = names, []
    router = ArrowLoraLinearLayer(fleet.base.in_features, config)
    router.build_prototypes(lora_A, lora_B)
    scaling, dropout = dict.fromkeys(names, 1.0), nn.Identity()

    def routed(x: Tensor) -> Tensor:
        return fleet.base(x) + router(x[None], lora_A, lora_B, dropout, scaling)[0]

    return routed


def _weight(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)  # shared, not copied
    return layer


def article_loop(fleet: Fleet) -> Peer:
    """SEQR as its article writes it, one adapter after another: h_i = R_i z, z-score, argmax, Q_i h_i."""
    factors = [torch.linalg.qr(B) for B in fleet.Bs]

    def routed(x: Tensor) -> Tensor:
        z = linear(x, fleet.A)
        scores = [
            (torch.linalg.vector_norm(z @ R.T, dim=1) - mean) / std
            for (_, R), mean, std in zip(factors, fleet.mean, fleet.std, strict=True)
        ]
        winners = torch.stack(scores, 1).argmax(1)
        added = torch.stack([factors[i].Q @ (factors[i].R @ z[t]) for t, i in enumerate(winners.tolist())])
        return fleet.base(x) + added

    return routed


def batched_qr(fleet: Fleet) -> Peer:
    """SEQR with all R stacked once: one product (tokens, adapters, rank), then the winners' Q gathered."""
    factors = [torch.linalg.qr(B) for B in fleet.Bs]
    Q, R = (torch.stack([factor[side] for factor in factors]) for side in (0, 1))
    rows = R.flatten(0, 1)

    def routed(x: Tensor) -> Tensor:
        h = linear(linear(x, fleet.A), rows).unflatten(1, R.shape[:2])
        winners = ((torch.linalg.vector_norm(h, dim=2) - fleet.mean) / fleet.std).argmax(1)
        chosen = h[torch.arange(x.shape[0]), winners]
        return fleet.base(x) + torch.bmm(Q[winners], chosen[:, :, None]).squeeze(2)

    return routed
