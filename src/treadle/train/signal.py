"""What rows' gradients have in common where training begins, and so what private steps can find before their noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable
from treadle.privacy.gradients import clipped_sum, row_norms
from treadle.train.attention import quick_attention
from treadle.train.private import RowGradients
from treadle.train.rows import Row
from treadle.train.settings import PrivateSettings
from treadle.train.unchanged import eval_mode, unchanged


@dataclass(frozen=True)
class ClippedSignal:
    """Rows' gradients under one clip.

    Attributes:
        clip: the norm to which each is clipped.
        cut: share of rows whose norm is above it.
        mean: norm of the expected clipped gradient, sampling noise taken out; 0 where nothing can be told from it.
        coherence: κ, `mean` over the root mean square of a row's clipped norm: 1 where all rows pull alike, 0 where
            they have nothing in common. n rows tell it from 0 where it is above about 1/√n.
    """

    clip: float
    cut: float
    mean: float
    coherence: float


@dataclass(frozen=True)
class GradientSignal:
    """Rows' gradients of B at B = 0.

    Attributes:
        rows: how many were looked at.
        size: numbers in B.
        norms: the 10th, 50th and 90th percentile of rows' norms.
        clipped: them under each clip.
    """

    rows: int
    size: int
    norms: tuple[float, float, float]
    clipped: tuple[ClippedSignal, ...]

    def to_noise(self, clip: float, noise_multiplier: float, *, batch: int, steps: int, clients: int) -> float:
        """How far all steps move B along the first gradient, over the noise that they add: m·b·√(T·K) / (σ·C·√d).

        m is the mean clipped gradient's norm, C the clip, b the rows of a client's step, T its steps, K the clients,
        d the numbers in B. Far below 1 there is nothing to be learnt; near 1 is no promise, since the first gradient
        may say no more than how frequent each answer is (docs/federated.md has figures). Infinite without noise.

        Args:
            clip: one of those that were looked at.
            noise_multiplier: σ, at least 0.
            batch: expected rows of a step.
            steps: of one client, in all rounds together.
            clients: whose results are averaged.
        """
        mean = next(row.mean for row in self.clipped if row.clip == clip)
        noise = noise_multiplier * clip * math.sqrt(self.size)
        return math.inf if noise == 0 else mean * batch * math.sqrt(steps * clients) / noise


def gradient_signal(
    model: PreTrainedModel,
    family: AdapterFamily,
    rows: Sequence[Row],
    clips: Sequence[float],
    *,
    micro_batch: int = 8,
) -> GradientSignal:
    """One pass over public rows: B = 0, nothing moves. On private rows every number of it would be a release.

    The squared norm of an expected gradient is estimated by the mean of g_i·g_j over i ≠ j, which is unbiased.

    Args:
        model: the family's base; on return it is as it was.
        family: gives A, ranks and modules.
        rows: at least 2, public.
        clips: above 0.
        micro_batch: rows in one forward pass.

    Raises:
        MismatchError: the model lacks the family's modules.
        UnsupportedError: a module's gradients cannot be told apart by row.
    """
    shapes = {name: module.shape for name, module in family.plan.modules.items()}
    settings = PrivateSettings(learning_rate=1.0, micro_batch=micro_batch)
    totals = [dict[str, Tensor]() for _ in clips]
    found = list[Tensor]()
    with (
        unchanged(model, family.lora_A),
        trainable(model, family.lora_A, shapes) as lora_B,
        eval_mode(model),
        quick_attention(model, max(row.tokens for row in rows)),
    ):
        size = sum(B.numel() for B in lora_B.values())
        for batch in RowGradients(model, lora_B, rows, settings).per_example(range(len(rows))):
            found.append(row_norms(batch))
            for total, clip in zip(totals, clips, strict=True):
                for name, value in clipped_sum(batch, clip).items():
                    total[name] = total[name] + value if name in total else value
    norms = torch.cat(found)
    norms = torch.where(norms.isfinite(), norms, 0.0)
    low, middle, high = norms.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=norms.dtype)).tolist()
    clipped = tuple(_clipped(total, norms, clip) for total, clip in zip(totals, clips, strict=True))
    return GradientSignal(len(rows), size, (low, middle, high), clipped)


def _clipped(total: dict[str, Tensor], norms: Tensor, clip: float) -> ClippedSignal:
    """What rows of these norms have in common whose clipped gradients sum to `total`."""
    count, squares = len(norms), float(norms.clamp(max=clip).square().sum())
    products = sum(float(value.square().sum()) for value in total.values()) - squares
    mean = math.sqrt(max(0.0, products) / (count * (count - 1)))
    coherence = mean / math.sqrt(squares / count) if squares else 0.0
    return ClippedSignal(clip, float((norms > clip).double().mean()), mean, coherence)
