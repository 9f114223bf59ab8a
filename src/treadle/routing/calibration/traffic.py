"""Statistics of what a tenant's callers really ask: aggregates over unlabelled prompts, of which none is kept."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.errors import FormatError, InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.progress import Progress, silent
from treadle.routing.calibration.moments import Moments
from treadle.routing.calibration.norms import read_norms
from treadle.routing.calibration.statistics import Method, Statistics, utc_day
from treadle.routing.calibration.text import (
    Passages,
    check_passages,
    ignored_tokens,
    longest_passage,
    text_batches,
)
from treadle.routing.factors import LayerFactors

FORMAT = "treadle.traffic/1"
MINIMUM_PROMPTS = 64
"""Below it the mean of a prompt-long run of alike tokens is not known to an eighth of a deviation, and an aggregate
says too much about one caller."""
MINIMUM_TOKENS = 1024


@dataclass(frozen=True)
class TrafficCalibration:
    """Every adapter's norms over unlabelled prompts of one tenant's callers; aggregates are kept, prompts are not.

    No adapter's training data is read, so the adapters' ε stands. The statistics are a release about the callers'
    prompts instead, which no ε accounts for: keep a bank calibrated so with the tenant whose prompts it saw.

    Attributes:
        prompts: texts, or token ids as the base's tokenizer makes them.
        tenant: whose callers; letters, digits, `.`, `_`, `-`.
        minimum_prompts: fewer are refused.
        minimum_tokens: fewer are refused.
    """

    prompts: Passages
    tenant: str
    minimum_prompts: int = MINIMUM_PROMPTS
    minimum_tokens: int = MINIMUM_TOKENS

    def __post_init__(self) -> None:
        files.checked_name(self.tenant, where="tenant")
        check_passages(self.prompts, self.tenant)

    @property
    def method(self) -> Method:
        """How the bank's files name it."""
        return "traffic"

    @property
    def source(self) -> str:
        """What is read."""
        return f"traffic:{self.tenant}"


@dataclass(frozen=True)
class TrafficStatistics:
    """Aggregates of one tenant's prompts; those of several servers merge into the aggregates of all.

    Attributes:
        tenant: whose prompts.
        prompts: how many.
        adapters: name → `Adapter.digest`, in the order of the columns.
        moments: module → of ‖B A x‖, one column an adapter, NaN where it lacks the module.
        ignored_tokens: token ids left out.
        date: the UTC day of the last reading.
    """

    tenant: str
    prompts: int
    adapters: Mapping[str, str]
    moments: Mapping[str, Moments]
    ignored_tokens: tuple[int, ...]
    date: str

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return max(moments.count for moments in self.moments.values())

    def merge(self, other: "TrafficStatistics") -> "TrafficStatistics":
        """The aggregates of both.

        Raises:
            MismatchError: of another tenant, of other adapters, or with other tokens left out.
        """
        mine = (self.tenant, dict(self.adapters), self.moments.keys(), self.ignored_tokens)
        if mine != (other.tenant, dict(other.adapters), other.moments.keys(), other.ignored_tokens):
            raise MismatchError(
                "these aggregates are of another tenant or of other adapters",
                where=f"traffic:{other.tenant}",
                remedy="merge those of one tenant, taken with one version of the bank",
            )
        moments = {module: found.merge(other.moments[module]) for module, found in self.moments.items()}
        date = max(self.date, other.date)
        return TrafficStatistics(
            self.tenant, self.prompts + other.prompts, self.adapters, moments, self.ignored_tokens, date
        )

    def check_enough(self, *, prompts: int = MINIMUM_PROMPTS, tokens: int = MINIMUM_TOKENS) -> None:
        """Return if there are at least so many prompts and tokens.

        Raises:
            InputError: there are fewer; it says how many are missing.
        """
        missing = [
            f"{least - have} more {what}"
            for what, have, least in (("prompts", self.prompts, prompts), ("tokens", self.tokens, tokens))
            if have < least
        ]
        if missing:
            raise InputError(
                f"too little traffic: {' and '.join(missing)} needed",
                where=f"traffic:{self.tenant}",
                remedy="collect more prompts",
            )

    def statistics(
        self,
        adapters: Sequence[Adapter],
        *,
        minimum_prompts: int = MINIMUM_PROMPTS,
        minimum_tokens: int = MINIMUM_TOKENS,
    ) -> Statistics:
        """The finished calibration of these adapters; unknown where the traffic was read with another lora_B.

        Raises:
            InputError: too little traffic; it says how many prompts or tokens are missing.
        """
        self.check_enough(prompts=minimum_prompts, tokens=minimum_tokens)
        columns = list(self.adapters)
        known = [columns.index(a.name) if self.adapters.get(a.name) == a.digest else None for a in adapters]

        modules = dict.fromkeys(module for adapter in adapters for module in adapter.plan.modules)

        def row(values: Mapping[str, Tensor], module: str) -> Tensor:
            column = [torch.nan if at is None or module not in values else float(values[module][at]) for at in known]
            return torch.tensor(column, dtype=torch.float64)

        means = {module: found.mean for module, found in self.moments.items()}
        stds = {module: found.std for module, found in self.moments.items()}
        return Statistics(
            {module: row(means, module) for module in modules},
            {module: row(stds, module) for module in modules},
            "traffic",
            f"traffic:{self.tenant}",
            self._digest(),
            self.tokens,
            self.ignored_tokens,
            tuple("" if at is None else a.digest for at, a in zip(known, adapters, strict=True)),
            date=self.date,
        )

    def _digest(self) -> str:
        """What tells two readings apart, though nobody keeps the prompts: SHA-256 of all aggregates."""
        total = hashlib.sha256()
        for module, found in sorted(self.moments.items()):
            total.update(f"{module}\x00{found.count}\x00".encode())
            for values in (found.mean, found.deviations):
                total.update(values.double().contiguous().numpy(force=True).tobytes())
        return total.hexdigest()

    def save(self, path: Path) -> None:
        """Write the aggregates into one safetensors file, for another server to merge.

        Raises:
            UnavailableError: the disk refuses.
        """
        tensors = {f"mean/{module}": found.mean for module, found in self.moments.items()}
        tensors |= {f"deviations/{module}": found.deviations for module, found in self.moments.items()}
        content = {
            "format": FORMAT,
            "tenant": self.tenant,
            "prompts": self.prompts,
            "adapters": dict(self.adapters),
            "counts": {module: found.count for module, found in self.moments.items()},
            "ignored_tokens": list(self.ignored_tokens),
            "date": self.date,
        }
        files.write_bytes(path, save(tensors, {"treadle": json.dumps(content)}))

    @staticmethod
    def load(path: Path) -> "TrafficStatistics":
        """The aggregates in a file of `save`.

        Raises:
            InputError: no such file.
            FormatError: it is damaged, or no file of traffic.
        """
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads((file.metadata() or {})["treadle"])
                if content["format"] != FORMAT:
                    raise FormatError(f"key 'format' is not {FORMAT!r}", where=path, remedy="collect the traffic again")
                counts = cast("dict[str, int]", content["counts"])
                moments = {
                    module: Moments(
                        int(count), file.get_tensor(f"mean/{module}"), file.get_tensor(f"deviations/{module}")
                    )
                    for module, count in counts.items()
                }
        except FileNotFoundError as error:
            raise InputError("no such file", where=path, remedy="check the path") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"no traffic file ({error})", where=path, remedy="collect the traffic again") from error
        adapters = cast("dict[str, str]", content["adapters"])
        if not moments or any(found.mean.shape != (len(adapters),) for found in moments.values()):
            raise FormatError("its columns are not its adapters", where=path, remedy="collect the traffic again")
        ignored = tuple(cast("list[int]", content["ignored_tokens"]))
        tenant = files.checked_name(str(content["tenant"]), where=path)
        return TrafficStatistics(tenant, int(content["prompts"]), adapters, moments, ignored, str(content["date"]))


def read_traffic(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, LayerFactors],
    adapters: Sequence[Adapter],
    prompts: Passages,
    tenant: str,
    progress: Progress = silent,
) -> TrafficStatistics:
    """The aggregates of a tenant's prompts, read by the base alone; prompts of no token do not count.

    Args:
        model: the base model.
        tokenizer: the base's.
        layers: the bank's factors.
        adapters: the bank's, in order.
        prompts: texts or token ids.
        tenant: whose callers.
        progress: told of every batch.

    Raises:
        InputError: no token counts, or a layer never ran.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.
    """
    batches = text_batches(tokenizer, prompts, longest=longest_passage(model))
    ignored = ignored_tokens(tokenizer)
    found = read_norms(model, layers, range(len(adapters)), batches, ignored, progress).moments
    unknown = torch.full((1,), torch.nan, dtype=torch.float64)
    moments: dict[str, Moments] = {}
    for module in layers:
        columns = [found.get((module, place), Moments(0, unknown, unknown)) for place in range(len(adapters))]
        moments[module] = Moments(
            max(column.count for column in columns),
            torch.cat([column.mean for column in columns]),
            torch.cat([column.deviations for column in columns]),
        )
    number = sum(len(batch["input_ids"]) for batch in batches)
    digests = {adapter.name: adapter.digest for adapter in adapters}
    return TrafficStatistics(tenant, number, digests, moments, ignored, utc_day())
