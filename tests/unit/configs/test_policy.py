"""The policy file: strict, and wrong in one line."""

from pathlib import Path

import pytest

from treadle.configs.policy import load_policy
from treadle.errors import ConfigError
from treadle.routing.policy import Rule

POLICY = """
required = ["dept"]
unknown_caller = "error"

[labels]
dept = ["oncology", "billing"]

[roles]
doctor = ["ada"]

[[rules]]
name = "own department"
effect = "allow"
roles = ["doctor"]
cleared = ["dept"]
"""


def written(tmp_path: Path, old: str = "", new: str = "") -> Path:
    assert old in POLICY
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.replace(old, new))
    return path


def test_a_file_is_its_policy(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path))
    assert policy.rules == (Rule("own department", "allow", roles=("doctor",), cleared=("dept",)),)
    assert policy.labels == {"dept": ("oncology", "billing")}
    assert policy.roles == {"doctor": ("ada",)}
    assert (policy.required, policy.unknown_caller) == (("dept",), "error")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('effect = "allow"', 'effect = "permit"', r"key 'rules\.0\.effect'"),
        ('effect = "allow"', "", r"key 'rules\.0\.effect'"),
        ('cleared = ["dept"]', 'clear = ["dept"]', r"unknown key 'rules\.0\.clear'; did you mean 'cleared'"),
        ('cleared = ["dept"]', 'cleared = "dept"', r"key 'rules\.0\.cleared'"),
        ('unknown_caller = "error"', 'unknown_caller = "all"', "key 'unknown_caller'"),
        ('unknown_caller = "error"', "default = 1", "unknown key 'default'"),
        ("[roles]\ndoctor", "[groups]\ndoctor", "unknown key 'groups'; the keys are labels, roles"),
        ('roles = ["doctor"]', 'roles = ["nurse"]', "rule 'own department': no role 'nurse'; add it under"),
        ('dept = ["oncology", "billing"]', 'dept = ["on cology"]', "labels: label 'dept=on cology' is not KEY=VALUE"),
        ('dept = ["oncology", "billing"]', 'ward = ["1"]', "required: key 'dept' is not declared"),
        ("[labels]", "[labels", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.toml: {message}") as caught:
        load_policy(written(tmp_path, old, new))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load_policy(tmp_path / "none.toml")
