"""Rows and voters make labels: which system answers each example.

rows        any source
voters      held against the rows first, so that nothing is paid for before a mistake is found; then asked in turn
verdicts    the majority, ties by the declared rule
labels      the rows again with label, votes and agreement, in a file of their own; and a summary
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from treadle import files
from treadle.configs.classify import ClassifyRun
from treadle.data.prompts import Row, fill, value_of
from treadle.data.sources import read_rows
from treadle.data.voting import Kappa, Verdict, decide, fleiss_kappa
from treadle.errors import FormatError, InputError
from treadle.evaluation.voters import Ballots, Poll, Question, Vote, prepared
from treadle.progress import Progress, silent
from treadle.recipes.voter_accuracy import VoterAccuracy, voter_accuracy


@dataclass(frozen=True)
class Classified:
    """What a run found.

    Attributes:
        name: of the data.
        out: the labelled rows.
        rows: how many were read.
        counts: system → rows that have it as their label.
        undecided: the numbers of the rows without a label, from 1.
        kappa: how far the voters agree beyond chance; None for a single voter.
        ballots: voter → votes, cost and remarks.
        verdicts: one a row.
        accuracy: where the right labels are known.
    """

    name: str
    out: Path
    rows: int
    counts: dict[str, int]
    undecided: tuple[int, ...]
    kappa: Kappa | None
    ballots: dict[str, Ballots]
    verdicts: tuple[Verdict, ...]
    accuracy: VoterAccuracy | None = None

    def votes_on(self, index: int) -> dict[str, Vote]:
        """Voter → vote on row `index`, from 0."""
        return {name: ballots.votes[index] for name, ballots in self.ballots.items()}

    def agreement_with_majority(self, voter: str) -> float | None:
        """The share of the voter's votes that equal the label, of the rows with both; None where there are none."""
        pairs = [
            vote.system == verdict.system
            for vote, verdict in zip(self.ballots[voter].votes, self.verdicts, strict=True)
            if vote.system is not None and verdict.system is not None
        ]
        return sum(pairs) / len(pairs) if pairs else None

    def to_json(self) -> dict[str, object]:
        """The summary: counts, agreement, what each voter did and cost, every disagreement and every missing vote."""
        return {
            "data": self.name,
            "rows": self.rows,
            "counts": self.counts,
            "undecided": list(self.undecided),
            "kappa": None if self.kappa is None else asdict(self.kappa),
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "voters": {name: self._voter(name) for name in self.ballots},
            "disagreements": [
                {
                    "row": index + 1,
                    "label": verdict.system,
                    "agreement": verdict.agreement,
                    "tied": verdict.tied,
                    "votes": {name: vote.system for name, vote in self.votes_on(index).items()},
                }
                for index, verdict in enumerate(self.verdicts)
                if 0.0 < verdict.agreement < 1.0
            ],
            "missing_votes": [
                {"row": index + 1, "voter": name, "reason": vote.reason}
                for name, ballots in self.ballots.items()
                for index, vote in enumerate(ballots.votes)
                if vote.system is None
            ],
        }

    def _voter(self, name: str) -> dict[str, object]:
        ballots = self.ballots[name]
        voted = Counter(vote.system for vote in ballots.votes if vote.system is not None)
        return {
            "votes": {system: voted[system] for system in self.counts},
            "missing": len(ballots.votes) - voted.total(),
            "agreement_with_majority": self.agreement_with_majority(name),
            "cost": asdict(ballots.cost),
            "remarks": list(ballots.remarks),
        }


def classify(config: ClassifyRun, progress: Progress = silent) -> Classified:
    """The verdicts on the configured rows, also saved at `config.out` and `config.summary`.

    A run that was stopped, by anything, keeps the answers that it paid for in `config.answers`; the same run again
    asks only for those that it lacks.

    Raises:
        InputError: `config.out` exists, or is the source; a row lacks a field, or already has a column of the label's
            name; a voter does not fit the rows; no row, or not every row where that is demanded, gets a label.
        UnavailableError: a voter cannot be reached or has spent what it may spend; or the disk refuses.
    """
    _check_out(config)
    rows = read_rows(config.data.source, split=config.data.split, limit=config.data.limit)
    poll = _poll(config, rows)
    truth = _truth(config, rows)
    voters = {settings.name: prepared(settings, poll) for settings in config.voters}
    ballots = {name: vote(progress) for name, vote in voters.items()}
    found = _counted(config, ballots, truth)
    _check_verdicts(config, found)
    labelled = _labelled(config, rows, found)
    files.write_json(config.summary, found.to_json())
    files.write_bytes(config.out, labelled)
    return found


def _check_out(config: ClassifyRun) -> None:
    for path in (config.out, config.summary):
        if path.resolve() == Path(config.data.source).resolve():
            raise InputError("the labels would replace the data", where=path, remedy="choose another out file")
    # A summary without labels, which are written after it, is of a run that was cut short.
    files.refuse_existing(config.out, overwrite=config.overwrite, kind="file")


def _poll(config: ClassifyRun, rows: Sequence[Row]) -> Poll:
    source, added = config.data.source, _columns(config)
    questions: list[Question] = []
    for index, row in enumerate(rows):
        where = f"{source}, row {index + 1}"
        taken = [column for column in added if column in row]
        if taken:
            raise InputError(
                f"it has a column {taken[0]!r} already", where=where, remedy="choose another label_field for the labels"
            )
        question = fill(config.data.question, row, where=where)
        if not question.strip():
            raise InputError("its question is empty", where=where, remedy="drop it or fill its field")
        answer = None if config.data.answer is None else fill(config.data.answer, row, where=where)
        questions.append(Question(question, answer))
    return Poll(rows, questions, config.systems, config.target, config.answers, source)


def _columns(config: ClassifyRun) -> tuple[str, str, str]:
    """The columns of the label, the votes and the agreement."""
    return config.label_field, f"{config.label_field}_votes", f"{config.label_field}_agreement"


def _truth(config: ClassifyRun, rows: Sequence[Row]) -> tuple[str, ...] | None:
    """The right labels, where the run names their column."""
    column, systems = config.data.truth, config.rule.systems
    if column is None:
        return None
    truth = tuple(value_of(row, column, where=f"{config.data.source}, row {i + 1}") for i, row in enumerate(rows))
    for i, label in enumerate(truth):
        if label not in systems:
            raise InputError(
                f"the truth {label!r} is none of {', '.join(systems)}",
                where=f"{config.data.source}, row {i + 1}",
                remedy="mend the row, or take data.truth out",
            )
    return truth


def _counted(config: ClassifyRun, ballots: dict[str, Ballots], truth: tuple[str, ...] | None) -> Classified:
    votes = [[vote.system for vote in row] for row in zip(*(b.votes for b in ballots.values()), strict=True)]
    rule = config.rule
    verdicts = tuple(decide(row, rule) for row in votes)
    found = [verdict.system for verdict in verdicts]
    by_voter = {name: [vote.system for vote in cast.votes] for name, cast in ballots.items()}
    return Classified(
        _name(config),
        config.out,
        len(votes),
        {system: found.count(system) for system in rule.systems},
        tuple(index + 1 for index, verdict in enumerate(verdicts) if verdict.system is None),
        fleiss_kappa(votes, rule.systems) if len(ballots) > 1 else None,
        ballots,
        verdicts,
        None if truth is None else voter_accuracy(found, by_voter, truth, rule.systems),
    )


def _name(config: ClassifyRun) -> str:
    """What the data are called: never a path."""
    if config.data.name is not None:
        return config.data.name
    stored = Path(config.data.source.removeprefix("hf:"))
    return stored.name if stored.exists() else config.data.source


def _check_verdicts(config: ClassifyRun, found: Classified) -> None:
    if len(found.undecided) == found.rows:
        reasons = Counter(vote.reason for b in found.ballots.values() for vote in b.votes if vote.reason)
        common = f", most often for: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise InputError(
            f"no row gets a label{common}", where=config.data.source, remedy="see quorum, tie and the voters"
        )
    if found.undecided and config.undecided == "fail":
        raise InputError(
            f"{len(found.undecided)} of {found.rows} rows get no label, row {found.undecided[0]} first",
            where=config.data.source,
            remedy='set undecided = "drop" or "keep", declare a tie rule, or add a voter',
        )


def _labelled(config: ClassifyRun, rows: Sequence[Row], found: Classified) -> bytes:
    """The rows as JSON lines, with the three columns added."""
    label, votes, agreement = _columns(config)
    lines: list[str] = []
    for index, (row, verdict) in enumerate(zip(rows, found.verdicts, strict=True)):
        if verdict.system is None and config.undecided == "drop":
            continue
        added = {
            label: verdict.system,
            votes: {name: vote.system for name, vote in found.votes_on(index).items()},
            agreement: verdict.agreement,
        }
        try:
            lines.append(json.dumps({**row, **added}, ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise FormatError(
                f"the row is no JSON ({error})",
                where=f"{config.data.source}, row {index + 1}",
                remedy="keep only columns of text, numbers and lists",
            ) from error
    return "".join(lines).encode()
