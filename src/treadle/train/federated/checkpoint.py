"""The server's state on disk: one file, replaced as a whole after every round, and one line a round for the pages."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from treadle import files
from treadle.errors import FormatError, MismatchError
from treadle.family.peft_format import read_tensors
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.federation import Federation, Progressed
from treadle.train.federated.standing import Member, RoundReport

FORMAT = "treadle.federation/1"
STATE, ROUNDS = "state.safetensors", "rounds.jsonl"
_LOST = "delete the folder to start afresh"


@dataclass(frozen=True)
class RunFolder:
    """Where a federation keeps its state.

    Attributes:
        path: the folder.
        facts: what the run is, by name; a state of other facts is not continued.
    """

    path: Path
    facts: dict[str, object]

    def save(self, progressed: Progressed, report: RoundReport) -> None:
        """Keep what a round made: first its line, then the state that makes it count."""
        line = json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False)
        files.append_line(self.path / ROUNDS, line.encode())
        self.save_state(progressed)

    def save_state(self, progressed: Progressed) -> None:
        """Replace the state.

        Raises:
            UnavailableError: the disk refuses; the state is as it was.
        """
        header = {
            "format": FORMAT,
            "facts": self.facts,
            "run": progressed.run,
            "server_round": progressed.server_round,
            "members": {name: asdict(member) for name, member in progressed.members.items()},
            "task_type": progressed.task_type,
            "transposed": progressed.transposed,
        }
        files.write_bytes(self.path / STATE, save(progressed.state.tensors(), {"run": json.dumps(header)}))

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / STATE).exists()

    def load(self, federation: Federation) -> Progressed:
        """How far the run here has come.

        Raises:
            FormatError: the state is damaged.
            MismatchError: it is of another run; names what differs.
        """
        for remnant in self.path.glob(f".{STATE}.*.part"):  # of a write that was killed
            remnant.unlink(missing_ok=True)
        path = self.path / STATE
        try:
            with safe_open(path, framework="pt") as stream:
                header = json.loads((stream.metadata() or {})["run"])
            if header["format"] != FORMAT:
                raise FormatError(f"not a {FORMAT}", where=path, remedy=_LOST)
            members = {str(name): Member(**row) for name, row in header["members"].items()}
            facts, run, server_round = dict(header["facts"]), str(header["run"]), int(header["server_round"])
            task_type, transposed = header["task_type"], bool(header["transposed"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a federation's state ({error})", where=path, remedy=_LOST) from error
        for name in [*self.facts, *facts]:
            if facts.get(name) != self.facts.get(name):
                raise MismatchError(
                    f"the state's {name} is {facts.get(name)!r}, this run's {self.facts.get(name)!r}",
                    where=path,
                    remedy=f"go back to the state's {name}, or {_LOST}",
                )
        state = GlobalState.of_tensors(federation.family, read_tensors(path))
        return Progressed(run, server_round, state, members, task_type, transposed)


def facts_of(federation: Federation) -> dict[str, object]:
    """What decides a federation's result, by name, as JSON has it."""
    rules = asdict(federation.rules)
    for name in ("timeout", "patience", "pause", "too_few"):  # how long somebody waits decides nothing
        del rules[name]
    content = {
        "family": federation.family.fingerprint,
        "variant": federation.variant.name,
        "variant_sha256": hashlib.sha256(repr(federation.variant).encode()).hexdigest(),
        "client_privacy": asdict(federation.client_privacy.settings) if federation.client_privacy else None,
        **federation.work.facts(),
        **rules,
    }
    return json.loads(json.dumps(content))


def read_reports(folder: Path) -> list[RoundReport]:
    """The reports of the rounds that are done, in their order.

    A round that was done twice, because the server died before its state was kept, counts as it was the last time. A
    line that was not written to its end says nothing: what a run needs to go on is in its state, and not here.

    Raises:
        FormatError: a line is of something else.
    """
    path = folder / ROUNDS
    found: dict[int, RoundReport] = {}
    for _, content in files.json_lines(path):
        report = RoundReport.of_json(content, where=path)
        found[report.server_round] = report
    return [found[number] for number in sorted(found)]
