"""Differential privacy of whole clients: clipped updates, and Gaussian noise on their mean, at a trusted server.

It is another promise than that of a silo's rows: what is hidden is what all of a client's updates were, or whether
they were zeros, and from all but the server. Who belongs to the federation is public, and whom a round asks hangs on
nobody. It hides one among many, so among few it hides everything that is learnt too: `warning` says when.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from treadle.errors import ConfigError, require
from treadle.privacy.accounting import Accountant, MechanismEvent, calibrated_noise_multiplier, epsilon_of
from treadle.privacy.noise import PrivateRandomness, grid_width, noised
from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState, key_of_A
from treadle.train.federated.variants.variant import Aggregate, Variant, Work, checked


@dataclass(frozen=True)
class ClientPrivacySettings:
    """What is promised to a client, and the public facts that the promise needs.

    Attributes:
        epsilon: of all rounds together, above 0; for one client's updates, or zeros in their place.
        delta: below 1 / clients.
        clients: how many belong to the federation, a public number.
        cohort: how many a round is declared to join, at most `clients`. The sum of updates is divided by this number,
            whoever comes. A server that chooses among clients gains nothing by it.
        rounds: in which a client may take part.
        max_update_norm: Frobenius norm, over all tensors together, to which a client's change of the state is clipped.
        accountant: "pld", or "rdp" to compare with articles.

    Raises:
        ConfigError: a value is out of its range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epsilon: float
    delta: float
    clients: int
    cohort: int
    rounds: int
    max_update_norm: float = 1.0
    accountant: Accountant = "pld"

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        require("epsilon", self.epsilon, 0 < self.epsilon < math.inf, "a positive number")
        require("clients", self.clients, self.clients >= 1, "at least 1")
        require(
            "delta",
            self.delta,
            0 < self.delta * self.clients < 1,
            f"above 0 and below 1/clients = {1 / self.clients:.3g}",
        )
        require("cohort", self.cohort, 1 <= self.cohort <= self.clients, f"from 1 to clients = {self.clients}")
        require("rounds", self.rounds, self.rounds >= 1, "at least 1")
        require("max_update_norm", self.max_update_norm, 0 < self.max_update_norm < math.inf, "a positive number")

    def plan(self, randomness: PrivateRandomness) -> "ClientPrivacyPlan":
        """The plan with as little noise as the promise permits, drawn from this randomness.

        Raises:
            ConfigError: no noise gives this epsilon.
            UnavailableError: dp-accounting is not installed.
        """
        return ClientPrivacyPlan(self, randomness)


@dataclass(frozen=True)
class ClientPrivacyPlan:
    """Clipping, noise and what they cost, from one set of settings.

    Attributes:
        settings: what is promised.
        randomness: where the noise comes from; unless it is secret, nothing is promised.

    Raises:
        ConfigError: no noise gives this epsilon.
        UnavailableError: dp-accounting is not installed.
    """

    settings: ClientPrivacySettings
    randomness: PrivateRandomness = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        """Calibrate, so that a plan that cannot be kept does not exist."""
        _ = self.noise_multiplier

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise on the sum of updates, over `max_update_norm`."""
        settings = self.settings
        return calibrated_noise_multiplier(
            epsilon=settings.epsilon,
            delta=settings.delta,
            sample_rate=1.0,
            steps=settings.rounds,
            accountant=settings.accountant,
        )

    def event(self, rounds: int) -> MechanismEvent | None:
        """What this many rounds are to an accountant whose unit is one client; None where the noise can be known."""
        return MechanismEvent(self.noise_multiplier, 1.0, rounds) if self.randomness.secret else None

    def facts(self, rounds: int) -> dict[str, str | int | float | bool | None]:
        """What an adapter says of it after this many rounds; its own ε, of rows, stands beside that.

        Raises:
            UnavailableError: dp-accounting is not installed.
        """
        event, settings = self.event(rounds), self.settings
        spent = epsilon_of([event], delta=settings.delta, accountant=settings.accountant) if event else "none"
        return {
            "client_epsilon": spent,
            "client_delta": settings.delta,
            "client_max_update_norm": settings.max_update_norm,
            "client_covers": "what one client's updates were, or zeros in their place, from all but the server; "
            "neither who was asked, nor reports of single clients, nor the largest ε of their rows, which is stated",
        }

    def noise_to_signal(self, parameters: int) -> float:
        """Norm to be expected of the noise in a mean update of this many parameters, over the largest possible."""
        return self.noise_multiplier * math.sqrt(parameters) / self.settings.cohort

    def warning(self, parameters: int) -> str | None:
        """One plain sentence where the noise is larger than all that the clients of a round can say; else None."""
        ratio, cohort = self.noise_to_signal(parameters), self.settings.cohort
        if ratio <= 1.0:
            return None
        return (
            f"client-level privacy is meaningless here: with {cohort} clients a round the noise is {ratio:.3g} times "
            f"as long as the longest possible mean update; it takes {math.ceil(ratio * cohort):,} clients a round, "
            "fewer parameters, or privacy of rows in its place"
        )

    def joined(
        self, variant: Variant, state: GlobalState, updates: Sequence[Update], *, server_round: int
    ) -> Aggregate:
        """What `variant` makes of the noised mean of the clipped updates, every client counting alike.

        Nothing else of a round is covered: norms or cosines of single updates are releases of their own. A round may be
        joined again, with fresh noise, as long as what it made before has gone to nobody.

        Raises:
            ConfigError: the variant does not go by the mean of updates, or joins them inexactly; weights differ; there
                are more updates than the declared cohort; the round is beyond those that are paid for.
            InputError: as `Variant.aggregate`.

        Reference: arXiv 1710.06963, algorithm 1, with a fixed denominator.

        Deviations: no amplification by sampling, since the server chooses the clients; noise as `privacy.noise`.
        """
        work = variant.work(server_round)
        self.check(variant, server_round)
        self._check_updates(updates, server_round)
        before = _sent(state, work)
        flat = _flat(before)
        deviation = self.noise_multiplier * self.settings.max_update_norm
        room = grid_width(deviation) * math.sqrt(len(flat))  # what rounding to the noise's grid may add to a norm
        total = torch.zeros_like(flat)
        for update in checked(state, work, updates):
            change = _flat(_filled(update.tensors, before)) - flat
            norm = float(change.norm())
            total += change * min(1.0, (self.settings.max_update_norm - room) / norm) if norm > 0 else change
        mean = flat + noised(total, deviation, self.randomness) / self.settings.cohort
        return variant.aggregate(state, [Update("mean", _split(mean, before))], server_round=server_round)

    def check(self, variant: Variant, server_round: int) -> None:
        """Return if noise on the mean of the round's updates is noise on all that this variant releases.

        Raises:
            ConfigError: it is not.
        """
        if not variant.averages or not variant.is_exact(server_round):
            raise ConfigError(
                f"{variant.name} needs more of the updates than their mean", remedy="take ffa, rolora or fedsvd"
            )

    def _check_updates(self, updates: Sequence[Update], server_round: int) -> None:
        settings = self.settings
        if len({update.weight for update in updates}) > 1:
            raise ConfigError("weights differ, and clients that are private count alike", remedy="weigh uniformly")
        if len(updates) > settings.cohort:
            raise ConfigError(f"{len(updates)} updates, cohort is {settings.cohort}", remedy="declare a larger cohort")
        if server_round > settings.rounds:
            raise ConfigError(f"round {server_round}, {settings.rounds} are paid for", remedy="plan more rounds")


def _sent(state: GlobalState, work: Work) -> dict[str, Tensor]:
    """The factors that this work moves, as they were before it."""
    lora_B = {name: B for name, B in state.lora_B.items() if name in work.lora_B}
    return lora_B | {key_of_A(name): A for name, A in state.lora_A.items() if name in work.lora_A}


def _filled(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the order of `like`, filled up with zeros to its widths."""
    return {
        name: torch.nn.functional.pad(tensors[name].cpu(), (0, whole.shape[1] - tensors[name].shape[1]))
        for name, whole in like.items()
    }


def _flat(tensors: Mapping[str, Tensor]) -> Float64[Tensor, " parameters"]:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def _split(flat: Float64[Tensor, " parameters"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)}
