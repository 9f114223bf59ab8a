"""What a federated run is, how far it has come, and what it asks of a client next."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.train.federated.client_privacy import ClientPrivacyPlan
from treadle.train.federated.factors import GlobalState, key_of_A
from treadle.train.federated.messages import Order
from treadle.train.federated.settings import LocalWork, RoundRules
from treadle.train.federated.standing import Member
from treadle.train.federated.variants import Variant


@dataclass(frozen=True)
class Federation:
    """What a run is, apart from how far it has come.

    Attributes:
        family: in which it trains.
        variant: what clients train and how it is joined.
        work: of a client in a round.
        rules: of the rounds.
        client_privacy: clips and noises what clients say together; None for privacy of rows alone.
    """

    family: AdapterFamily
    variant: Variant
    work: LocalWork
    rules: RoundRules
    client_privacy: ClientPrivacyPlan | None = None


@dataclass(frozen=True)
class Progressed:
    """How far a run has come: all that its next round depends on.

    Attributes:
        run: name of the run, drawn once; part of the key of every cached reply.
        server_round: the last round that is done; 0 before the first.
        state: the variant's.
        members: clients that have taken part, by name.
        task_type: PEFT's name of the kind of model, as clients say; None before the first reply, or for a head.
        transposed: whether the adapted layers are Conv1D, likewise.
    """

    run: str
    server_round: int
    state: GlobalState
    members: Mapping[str, Member] = field(default_factory=dict[str, Member])
    task_type: str | None = None
    transposed: bool = False

    def member(self, client: str) -> Member:
        """What is known of the client."""
        return self.members.get(client, Member())

    def asking_everybody(self) -> "Progressed":
        """The same, once nobody's budget counts as spent: silos may have allowed more, and asking costs nothing."""
        return replace(self, members={name: replace(row, exhausted=False) for name, row in self.members.items()})

    def with_member(self, client: str, member: Member) -> "Progressed":
        """The same, once this is known of the client."""
        return replace(self, members={**self.members, client: member})


def order_for(federation: Federation, progressed: Progressed, server_round: int, client: str) -> Order:
    """What the client is asked in this round.

    Beside what the state sends, an A that is to move in this round goes along, though it is still the family's.
    """
    work, state = federation.variant.work(server_round), progressed.state
    tensors = state.message(client, rank_share=federation.rules.rank_share.get(client, 1.0))
    for name in work.lora_A:
        rank = tensors[name].shape[1]
        tensors.setdefault(key_of_A(name), state.lora_A[name][:rank].contiguous())
    trained = work.reply(Factors(state.lora_A, state.lora_B))
    return Order(
        progressed.run, server_round, federation.family.fingerprint, federation.work, tuple(sorted(trained)), tensors
    )
