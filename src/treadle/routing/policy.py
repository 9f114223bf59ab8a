"""Who may use which adapter for which data: a policy joins callers, data labels and adapters' clearances.

A pure function of its arguments. What no rule allows is denied, a denial beats every permission, and a label that the
policy does not declare permits nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from treadle.errors import AccessError, InputError
from treadle.routing.access import Labels, checked_labels

Effect = Literal["allow", "deny"]


@dataclass(frozen=True)
class Rule:
    """One sentence of a policy: it speaks of an adapter, for a request, where all its conditions hold.

    Attributes:
        name: what explanations call it.
        effect: "allow" or "deny".
        roles: the caller has one of them; () for whoever has any role.
        adapter: labels that the adapter carries, all of them.
        request: labels that the request's data carry, all of them.
        cleared: keys; under each the data carry a label, and the adapter carries every one of those.
        uncleared: keys; under one of them the data carry a label that the adapter lacks.
    """

    name: str
    effect: Effect
    roles: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    request: tuple[str, ...] = ()
    cleared: tuple[str, ...] = ()
    uncleared: tuple[str, ...] = ()

    def speaks_of(self, labels: Labels, asked: "Request", roles: Labels) -> bool:
        """Whether all conditions hold for an adapter with these labels and a caller with these roles."""
        return (
            (not self.roles or not roles.isdisjoint(self.roles))
            and labels.issuperset(self.adapter)
            and asked.labels.issuperset(self.request)
            and all(_under(asked.labels, key) and _under(asked.labels, key) <= labels for key in self.cleared)
            and (not self.uncleared or any(_under(asked.labels, key) - labels for key in self.uncleared))
        )


@dataclass(frozen=True)
class Policy:
    """Rules, and the words that they may use.

    Attributes:
        labels: key → the values that it may have; every label of a rule, an adapter or a request is among them.
        roles: role → its callers.
        rules: in any order.
        required: keys under which the data of every request carry a label, so that none is forgotten.
        unknown_caller: what a caller without a role gets: "base", the base model alone, or an "error".

    Raises:
        InputError: a rule uses a label, key or role that is not declared, or two rules have one name.
    """

    labels: Mapping[str, tuple[str, ...]]
    roles: Mapping[str, tuple[str, ...]]
    rules: tuple[Rule, ...]
    required: tuple[str, ...] = ()
    unknown_caller: Literal["base", "error"] = "base"

    def __post_init__(self) -> None:
        checked_labels((f"{key}={value}" for key, values in self.labels.items() for value in values), where="labels")
        _declared_keys(self.required, self.labels, where="required")
        seen: set[str] = set()
        for rule in self.rules:
            where = f"rule {rule.name!r}"
            if rule.name in seen:
                raise InputError("two rules have this name", where=where, remedy="give each a name of its own")
            seen.add(rule.name)
            strangers = sorted(set(rule.roles) - self.roles.keys())
            if strangers:
                raise InputError(f"no role {strangers[0]!r}", where=where, remedy="add it under [roles]")
            undeclared = self.undeclared(checked_labels((*rule.adapter, *rule.request), where=where))
            if undeclared:
                raise InputError(
                    f"label {undeclared[0]!r} is not declared", where=where, remedy="add it under [labels]"
                )
            _declared_keys((*rule.cleared, *rule.uncleared), self.labels, where=where)

    def undeclared(self, labels: Labels) -> list[str]:
        """Those of the labels that the policy does not know, sorted."""
        known = {f"{key}={value}" for key, values in self.labels.items() for value in values}
        return sorted(labels - known)


@dataclass(frozen=True)
class Request:
    """Who asks, about data of which kind.

    Attributes:
        caller: as the service has authenticated it.
        labels: of the data.
    """

    caller: str
    labels: Labels = field(default_factory=frozenset[str])


@dataclass(frozen=True)
class Verdict:
    """One adapter, for one request.

    Attributes:
        adapter: its name.
        permitted: whether it may act.
        reason: the rules that say so, for operators; callers never see it.
    """

    adapter: str
    permitted: bool
    reason: str


@dataclass(frozen=True)
class Permission:
    """What a policy says to one request.

    Attributes:
        roles: of the caller, sorted; none for an unknown one.
        verdicts: one an adapter, in the bank's order.
    """

    roles: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def permitted(self) -> frozenset[str]:
        """The adapters that may act: what `RoutedModel` takes as a row's permitted set."""
        return frozenset(verdict.adapter for verdict in self.verdicts if verdict.permitted)


def permission(policy: Policy, adapters: Sequence[str], labels: Mapping[str, Labels], asked: Request) -> Permission:
    """What the policy lets this request use.

    Args:
        policy: the rules.
        adapters: the bank's, in order.
        labels: adapter → its labels, those without any left out.
        asked: caller and data.

    Raises:
        AccessError: the request carries a label that is not declared or lacks one that is required, or its caller is
            unknown and the policy makes that an error.
    """
    undeclared = policy.undeclared(asked.labels)
    if undeclared:
        raise AccessError(
            f"the policy declares no label {undeclared[0]!r}", where="the request", remedy="use labels of its [labels]"
        )
    missing = [key for key in policy.required if not _under(asked.labels, key)]
    if missing:
        raise AccessError(
            f"it carries no label {missing[0]}=…, which the policy requires", where="the request", remedy="label it"
        )
    roles = frozenset(role for role, callers in policy.roles.items() if asked.caller in callers)
    if not roles and policy.unknown_caller == "error":
        raise AccessError(f"no role has the caller {asked.caller!r}", remedy="add it to a role of the policy")
    verdicts = tuple(_verdict(policy, name, labels.get(name, frozenset()), asked, roles) for name in adapters)
    return Permission(tuple(sorted(roles)), verdicts)


def _verdict(policy: Policy, name: str, labels: Labels, asked: Request, roles: Labels) -> Verdict:
    if not roles:
        return Verdict(name, False, "the caller has no role")
    undeclared = policy.undeclared(labels)
    if undeclared:  # a denial may have meant this adapter by the name that its label should have had
        return Verdict(name, False, f"its label {undeclared[0]!r} is not declared")
    speaking = [rule for rule in policy.rules if rule.speaks_of(labels, asked, roles)]
    denying = [repr(rule.name) for rule in speaking if rule.effect == "deny"]
    if denying:
        return Verdict(name, False, f"denied by {', '.join(denying)}")
    allowing = [repr(rule.name) for rule in speaking if rule.effect == "allow"]
    if allowing:
        return Verdict(name, True, f"allowed by {', '.join(allowing)}")
    return Verdict(name, False, "no rule allows it")


def _under(labels: Labels, key: str) -> Labels:
    """The labels of this key."""
    return frozenset(label for label in labels if label.partition("=")[0] == key)


def _declared_keys(keys: Iterable[str], declared: Mapping[str, object], *, where: str) -> None:
    for key in keys:
        if key not in declared:
            raise InputError(f"key {key!r} is not declared", where=where, remedy="add it under [labels]")
