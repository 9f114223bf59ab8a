"""Every error treadle raises on purpose, one line each.

TreadleError
├── InputError            what the caller gave is wrong; the command line exits with 2
│   ├── ConfigError       a run configuration: unknown key, wrong type, value out of range
│   ├── FormatError       a file is damaged, truncated, or not what its name says
│   ├── MismatchError     parts that do not belong together: another base, family or shape
│   ├── UnsupportedError  a real feature of the field that treadle refuses (DoRA, pickles, …)
│   ├── AccessError       a caller named adapters it may not use, or named none where it must
│   └── BudgetError       a release would spend more privacy than the silo allows for its data
└── UnavailableError      something outside is missing: network, an optional extra, disk space
"""


class TreadleError(Exception):
    """The root: `str(error)` is one line that names the place, the fault and the remedy."""

    def __init__(self, what: str, *, where: object = None, remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        line = f"{where}: {what}" if where is not None else what
        line = f"{line}; {remedy}" if remedy else line
        super().__init__(" ".join(line.split()))


class InputError(TreadleError):
    """What the caller gave cannot be used."""


class ConfigError(InputError):
    """A run configuration is wrong."""


class FormatError(InputError):
    """A file is damaged, truncated or of another format."""


class MismatchError(InputError):
    """Two parts do not belong together."""


class UnsupportedError(InputError):
    """A feature that treadle knows and refuses."""


class AccessError(InputError):
    """A caller's set of permitted adapters is missing or wrong."""


class BudgetError(InputError):
    """A release would spend more privacy than the silo allows for its data."""


class UnavailableError(TreadleError):
    """Something outside the program is missing."""


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Nothing, where a setting is what it must be.

    Raises:
        ConfigError: it is not; names the setting, its value and what is expected.
    """
    if not holds:
        raise ConfigError(f"{name} is {value}", remedy=f"it must be {expected}")
