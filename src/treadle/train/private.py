"""DP-SGD on the B of one adapter: the steps of a client or of a central run, and the adapter with what it cost."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from treadle.data.prompts import Example
from treadle.errors import TreadleError
from treadle.example_gradients import per_example_gradients
from treadle.family.adapter import Adapter, Provenance, package_versions
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable
from treadle.privacy.gradients import MicroBatch
from treadle.privacy.noise import SystemRandomness
from treadle.privacy.plan import DPPlan, Mechanism
from treadle.progress import Progress, silent
from treadle.train.attention import quick_attention
from treadle.train.objectives import Kind, kind_of, summed_loss, weight
from treadle.train.rows import Row, encoded
from treadle.train.settings import PrivateSettings
from treadle.train.unchanged import eval_mode, unchanged


@dataclass(frozen=True)
class PrivateResult:
    """What a private run made. It keeps no loss, count or length: each would be a release of its own.

    Attributes:
        family: in which it was trained.
        plan: what it promises.
        settings: with which.
        lora_B: (out_features, rank) a module, as PEFT stores it (scaling divided out).
        private: whether the promise holds: not at epsilon = inf.
        kind: of the model.
        transposed: whether the adapted layers are Conv1D.
    """

    family: AdapterFamily
    plan: DPPlan
    settings: PrivateSettings
    lora_B: Mapping[str, Tensor]
    private: bool
    kind: Kind
    transposed: bool

    def adapter(self, name: str, *, data: str, data_sha256: str | None = None) -> Adapter:
        """The adapter; its provenance states ε and δ, and what decided them.

        Args:
            name: the adapter's.
            data: the name of the data, never a path.
            data_sha256: their digest, only for data that are public: a digest of private data tells who is in them.
        """
        promise = self.plan.settings
        decisive = asdict(self.settings) | asdict(promise)
        decisive |= {"epsilon": promise.epsilon if self.private else None, "noise": self.plan.noise_multiplier}
        provenance = Provenance(
            method="dp-sgd",
            data=data,
            epsilon=promise.epsilon if self.private else None,
            delta=promise.delta if self.private else None,
            data_sha256=data_sha256,
            seeds={"family": self.family.seed},
            settings=decisive,
            versions=package_versions(),
        )
        return Adapter.of_family(
            self.family,
            name,
            self.lora_B,
            provenance=provenance,
            task_type=self.kind.value,
            transposed=self.transposed,
        )


def train_private(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: AdapterFamily,
    examples: Sequence[Example],
    plan: DPPlan,
    settings: PrivateSettings,
    *,
    progress: Progress = silent,
) -> PrivateResult:
    """The lora_B that all steps of the plan's rounds make of the examples, under (ε, δ); A and the model stay.

    No two runs are alike: batches and noise come from the operating system. A run that is killed leaves nothing and
    is begun anew; it released nothing either, so only the last one counts. Its reserve rounds stay unspent.

    Args:
        model: the family's base model; on return it is as it was.
        tokenizer: the model's.
        family: gives A, ranks and scalings.
        examples: what to learn; one of them is the unit of privacy.
        plan: what is promised.
        settings: the rest.
        progress: called after every step.

    Raises:
        InputError: the examples cannot be trained on; see `rows.encoded`.
        MismatchError: the model lacks the family's modules.
        UnsupportedError: the model neither generates nor classifies, or a module's gradients cannot be told apart.
        UnavailableError: cryptography is not installed.
        TreadleError: B became NaN, or something frozen moved.

    Reference: arXiv 2403.12313 §3 (A frozen, B private), with one client.
    """
    rows = encoded(model, tokenizer, examples, settings)
    mechanism = plan.mechanism(len(rows), SystemRandomness())
    shapes = {name: module.shape for name, module in family.plan.modules.items()}
    steps = plan.settings.rounds * plan.settings.local_steps
    with unchanged(model, family.lora_A), trainable(model, family.lora_A, shapes) as folded:
        private_steps(model, folded, rows, mechanism, settings, steps=steps, progress=progress)
        lora_B = {name: (B.detach() / family.scaling(name)).cpu() for name, B in folded.items()}
    return PrivateResult(
        family=family,
        plan=plan,
        settings=settings,
        lora_B=lora_B,
        private=mechanism.event() is not None,
        kind=kind_of(model),
        transposed=isinstance(model.get_submodule(next(iter(shapes))), Conv1D),
    )


def private_steps(
    model: PreTrainedModel,
    lora_B: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    mechanism: Mechanism,
    settings: PrivateSettings,
    *,
    steps: int,
    progress: Progress = silent,
) -> None:
    """Move B in place by `steps` private steps; nothing else changes, and the optimiser begins anew.

    An example's loss is the mean cross-entropy of its own targets. The model is in eval mode throughout, so that
    nothing is dropped and no normalisation mixes the examples of a batch. Every step is counted by the mechanism.

    Args:
        model: with B injected, as in `injection.trainable`, and everything else frozen.
        lora_B: by the name of its module; any other weights of linear layers will do.
        rows: as many as the mechanism was made for.
        mechanism: draws, clips, noises and counts.
        settings: the choices that promise nothing.
        steps: at least 1.
        progress: called after every step; told nothing about the data.

    Raises:
        UnsupportedError: a module's gradients cannot be told apart by example.
        TreadleError: B became NaN or infinite, or the plan does not pay for that many steps.
    """
    work = RowGradients(model, lora_B, rows, settings)
    optimizer = _optimizer(lora_B, settings)
    with eval_mode(model), quick_attention(model, settings.max_length):  # not the longest row: rows choose nothing
        for step in range(steps):
            gradients = mechanism.gradient(lora_B, work.per_example)
            for name, B in lora_B.items():
                B.grad = gradients[name]
            optimizer.step()
            optimizer.zero_grad()
            progress("private step", step + 1, steps)
    if not all(math.isfinite(B.detach().abs().max()) for B in lora_B.values()):
        raise TreadleError("lora_B became NaN or infinite", remedy="lower learning_rate")


@dataclass(frozen=True)
class RowGradients:
    """The gradients of rows, one by one.

    Attributes:
        model: with the weights injected, in eval mode.
        lora_B: the weights, by the name of their module.
        rows: all there are.
        settings: gives the micro-batch.
    """

    model: PreTrainedModel
    lora_B: Mapping[str, nn.Parameter]
    rows: Sequence[Row]
    settings: PrivateSettings

    def per_example(self, batch: Sequence[int]) -> Iterator[MicroBatch]:
        """The gradients of the batch, rows of like length together."""
        near = sorted(batch, key=lambda index: self.rows[index].tokens)
        for begin in range(0, len(near), self.settings.micro_batch):
            chosen = [self.rows[i] for i in near[begin : begin + self.settings.micro_batch]]
            yield self._gradients([(row.prompt, row.target) for row in chosen])

    def _gradients(self, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> MicroBatch:
        kind = kind_of(self.model)
        gradients = per_example_gradients(lambda: summed_loss(self.model, pairs), self.lora_B, len(pairs))
        return MicroBatch(gradients, torch.tensor([1.0 / weight(kind, [pair]) for pair in pairs]))


def _optimizer(lora_B: Mapping[str, nn.Parameter], settings: PrivateSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(lora_B.values(), lr=settings.learning_rate)
    return torch.optim.SGD(lora_B.values(), lr=settings.learning_rate, momentum=settings.momentum)
