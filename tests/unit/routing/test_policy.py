"""Policies: default deny, denials win, nothing undeclared permits anything, and every refusal says why."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import AccessError, InputError
from treadle.routing.access import checked_labels
from treadle.routing.policy import Policy, Request, Rule, permission

ADAPTERS = ("tumours", "invoices", "letters", "plain")
LABELS = {
    "tumours": frozenset({"dept=oncology", "sensitivity=high"}),
    "invoices": frozenset({"dept=billing"}),
    "letters": frozenset({"dept=billing", "dept=oncology"}),
}
POLICY = Policy(
    labels={"dept": ("oncology", "billing"), "sensitivity": ("high",)},
    roles={"doctor": ("ada", "bo"), "clerk": ("bo", "cy"), "auditor": ("di",)},
    rules=(
        Rule("doctors use oncology", "allow", roles=("doctor",), adapter=("dept=oncology",)),
        Rule("clerks use what is cleared", "allow", roles=("clerk",), cleared=("dept",)),
        Rule("sensitive data stay where they may", "deny", uncleared=("sensitivity",)),
    ),
)


def permitted(caller: str, *labels: str, policy: Policy = POLICY) -> set[str]:
    return set(permission(policy, ADAPTERS, LABELS, Request(caller, frozenset(labels))).permitted)


def reasons(caller: str, *labels: str) -> dict[str, str]:
    found = permission(POLICY, ADAPTERS, LABELS, Request(caller, frozenset(labels)))
    return {verdict.adapter: verdict.reason for verdict in found.verdicts}


def test_roles_and_adapter_labels() -> None:
    assert permitted("ada") == {"tumours", "letters"}
    assert permitted("di") == set()  # known, but no rule speaks for auditors
    assert reasons("ada")["tumours"] == "allowed by 'doctors use oncology'"
    assert reasons("ada")["invoices"] == "no rule allows it"


def test_cleared_needs_every_label_of_the_data_and_at_least_one() -> None:
    assert permitted("cy") == set()
    assert permitted("cy", "dept=billing") == {"invoices", "letters"}
    assert permitted("cy", "dept=billing", "dept=oncology") == {"letters"}


def test_a_denial_beats_every_permission() -> None:
    assert permitted("ada", "sensitivity=high") == {"tumours"}
    assert reasons("ada", "sensitivity=high")["letters"] == "denied by 'sensitive data stay where they may'"
    assert permitted("bo", "sensitivity=high", "dept=billing") == {"tumours"}


def test_a_rule_about_the_request_holds_only_for_such_data() -> None:
    rule = Rule("billing data for auditors", "allow", roles=("auditor",), request=("dept=billing",))
    policy = replace(POLICY, rules=(*POLICY.rules, rule))
    assert permitted("di", policy=policy) == set()
    assert permitted("di", "dept=billing", policy=policy) == set(ADAPTERS)


def test_unknown_callers_get_the_base_or_an_error() -> None:
    found = permission(POLICY, ADAPTERS, LABELS, Request("eve"))
    assert found.roles == ()
    assert found.permitted == frozenset()
    assert {verdict.reason for verdict in found.verdicts} == {"the caller has no role"}
    with pytest.raises(AccessError, match="no role has the caller 'eve'; add it to a role"):
        permitted("eve", policy=replace(POLICY, unknown_caller="error"))
    everybody = replace(POLICY, rules=(Rule("all", "allow"),))
    assert permitted("eve", policy=everybody) == set()  # an unconditional rule still speaks of known callers only
    assert permitted("di", policy=everybody) == set(ADAPTERS)


def test_a_misspelt_label_permits_nothing() -> None:
    with pytest.raises(AccessError, match="declares no label 'dept=oncolgy'"):
        permitted("ada", "dept=oncolgy")
    misspelt = LABELS | {"tumours": LABELS["tumours"] | {"sensitivity=hihg"}}
    found = permission(POLICY, ADAPTERS, misspelt, Request("ada"))
    assert "tumours" not in found.permitted
    assert found.verdicts[0].reason == "its label 'sensitivity=hihg' is not declared"


def test_a_required_label_cannot_be_forgotten() -> None:
    policy = replace(POLICY, required=("dept",))
    with pytest.raises(AccessError, match="carries no label dept=…, which the policy requires"):
        permitted("ada", "sensitivity=high", policy=policy)
    assert permitted("ada", "dept=billing", policy=policy) == {"tumours", "letters"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": (Rule("a", "allow"), Rule("a", "deny"))}, "rule 'a': two rules have this name"),
        ({"rules": (Rule("a", "allow", roles=("surgeon",)),)}, "rule 'a': no role 'surgeon'"),
        ({"rules": (Rule("a", "allow", adapter=("dept=law",)),)}, "rule 'a': label 'dept=law' is not declared"),
        ({"rules": (Rule("a", "allow", request=("dept=law",)),)}, "rule 'a': label 'dept=law' is not declared"),
        ({"rules": (Rule("a", "allow", request=("law",)),)}, "rule 'a': label 'law' is not KEY=VALUE"),
        ({"rules": (Rule("a", "allow", cleared=("ward",)),)}, "rule 'a': key 'ward' is not declared"),
        ({"rules": (Rule("a", "deny", uncleared=("ward",)),)}, "rule 'a': key 'ward' is not declared"),
        ({"required": ("ward",)}, "required: key 'ward' is not declared"),
        ({"labels": {"de pt": ("x",)}, "rules": ()}, "labels: label 'de pt=x' is not KEY=VALUE"),
    ],
)
def test_what_cannot_be_a_policy(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        replace(POLICY, **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_labels_are_keys_with_values() -> None:
    assert checked_labels(["dept=oncology", "site=st.mary/2"]) == {"dept=oncology", "site=st.mary/2"}
    for wrong in ("", "dept", "=x", "dept=", "dept=a b", "a=b=c", "dept=a\n"):
        with pytest.raises(InputError, match="is not KEY=VALUE; write dept=oncology"):
            checked_labels([wrong])


subsets = st.sampled_from(
    [
        frozenset(c)
        for n in range(4)
        for c in itertools.combinations(("dept=oncology", "dept=billing", "sensitivity=high"), n)
    ]
)
conditions = st.fixed_dictionaries(
    {
        "effect": st.sampled_from(["allow", "deny"]),
        "roles": st.sampled_from([(), ("doctor",), ("clerk", "auditor")]),
        "adapter": subsets.map(tuple),
        "request": subsets.map(tuple),
        "cleared": st.sampled_from([(), ("dept",), ("dept", "sensitivity")]),
        "uncleared": st.sampled_from([(), ("dept",), ("sensitivity", "dept")]),
    }
)


@given(
    rules=st.lists(conditions, max_size=4),
    data=subsets,
    carried=subsets,
    caller=st.sampled_from(["ada", "bo", "cy", "di", "eve"]),
)
def test_no_rule_can_widen_what_a_denial_narrows(
    rules: list[dict[str, Any]], data: frozenset[str], carried: frozenset[str], caller: str
) -> None:
    """Order is nothing, more denials never permit more, and without an allowance nobody gets anything."""
    named = tuple(Rule(f"r{i}", **conditions) for i, conditions in enumerate(rules))
    asked = Request(caller, data)

    def allowed(*rules: Rule) -> bool:
        return "a" in permission(replace(POLICY, rules=rules), ["a"], {"a": carried}, asked).permitted

    found = allowed(*named)
    assert allowed(*named[::-1]) == found
    allowing = [rule for rule in named if rule.effect == "allow"]
    assert not allowed(*(rule for rule in named if rule.effect == "deny"))
    assert not found or (caller != "eve" and any(allowed(rule) for rule in allowing))
    assert not found or allowed(*allowing)
    assert not allowed(*named, Rule("never", "deny"))
