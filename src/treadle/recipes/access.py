"""Which adapters of a bank a policy file permits to a request."""

from dataclasses import dataclass
from pathlib import Path

from treadle.configs.policy import load_policy
from treadle.routing.access import checked_labels
from treadle.routing.bank import AdapterBank
from treadle.routing.policy import Permission, Request, permission


@dataclass(frozen=True)
class AccessQuestion:
    """A request, and the policy that decides about it.

    Attributes:
        policy: the file.
        caller: who asks.
        labels: of the data, KEY=VALUE each.
    """

    policy: Path
    caller: str
    labels: tuple[str, ...] = ()

    @property
    def request(self) -> Request:
        """What the policy is asked.

        Raises:
            InputError: a label is not KEY=VALUE.
        """
        return Request(self.caller, checked_labels(self.labels, where="--label"))


def permitted_of(bank: AdapterBank, question: AccessQuestion) -> Permission:
    """What the policy says to this request of each of the bank's adapters.

    Raises:
        ConfigError: the policy file is missing or wrong.
        AccessError: the policy refuses the request as a whole.
    """
    return permission(load_policy(question.policy), bank.names, bank.labels, question.request)
