"""The adapter that a federation made, with what every client spent on it."""

from treadle.family.adapter import Adapter, Provenance, package_versions, within
from treadle.privacy.joint import SILOS, Cost, facts_of_silos, largest
from treadle.train.federated.federation import Federation, Progressed

COVERS = (
    "one row of one silo: rows of a person in several silos compose, and neither the choice of settings "
    "nor what silos publish otherwise is covered"
)
"""What the stated ε is about."""
RELEASES = "a silo to its server: name, kind of model, its tensors after the steps of every round, ε and δ spent"
"""All that a client says beside what is wrong."""


def federated_adapter(federation: Federation, progressed: Progressed, name: str, *, data: str) -> Adapter:
    """The adapter as it stands, standard PEFT; outside of its family where a variant has moved an A.

    Its ε is the largest of the clients', whose rows are disjoint; None as soon as one of them is unaccounted. The
    provenance names each client's own ε and δ, which is all that it says about clients; under client-level privacy only
    how many there might have been.

    Args:
        federation: what was run.
        progressed: how far.
        name: the adapter's.
        data: what its training data are called.
    """
    state, family = progressed.state, federation.family
    lora_B = {module: B / family.scaling(module) for module, B in state.lora_B.items()}
    provenance = _provenance(federation, progressed, data)
    if not state.moved:
        return Adapter.of_family(
            family,
            name,
            lora_B,
            provenance=provenance,
            task_type=progressed.task_type,
            transposed=progressed.transposed,
        )
    return Adapter(
        name,
        family.plan,
        state.lora_A,
        lora_B,
        None,
        family.base,
        within(family.plan, provenance),
        progressed.task_type,
        progressed.transposed,
    )


def _provenance(federation: Federation, progressed: Progressed, data: str) -> Provenance:
    members = {name: row for name, row in progressed.members.items() if row.rounds > 0 or row.epsilon is not None}
    costs = {name: Cost(row.epsilon, row.delta or 0.0) for name, row in members.items()}
    spent = largest(costs.values())
    variant, rounds = federation.variant, range(1, progressed.server_round + 1)
    settings: dict[str, str | int | float | bool | None] = {
        **federation.work.facts(),
        "variant": variant.name,
        "aggregation": "exact" if all(map(variant.is_exact, rounds)) else "inexact",
        "weighting": federation.rules.weighting,
        "server_rounds": progressed.server_round,
        "covers": COVERS if spent.epsilon is not None else "none",
        "releases": RELEASES + (", its number of records" if federation.rules.weighting == "records" else ""),
    }
    if progressed.state.moved:
        own = progressed.state.left_family(federation.family, variant=variant.name)
        settings["family_of_its_A"] = own.fingerprint
    if federation.client_privacy is not None:
        settings |= federation.client_privacy.facts(progressed.server_round)
    if federation.client_privacy is None:
        settings |= {f"rounds of {client}": row.rounds for client, row in members.items()}
        settings |= facts_of_silos(costs)
    else:  # which client took part is what it promises not to tell
        settings[SILOS] = len(federation.rules.clients)
    return Provenance(
        method=federation.variant.name,
        data=data,
        epsilon=spent.epsilon,
        delta=None if spent.epsilon is None else spent.delta,
        seeds={"family": federation.family.seed, "clients": federation.rules.seed},
        settings=settings,
        versions=package_versions(),
    )
