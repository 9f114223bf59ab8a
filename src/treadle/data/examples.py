"""A row of data as an example: the text that a model reads, and what its answer is held against."""

from treadle.data.metrics import Choices, Code, ExactMatch, LabelLikelihood, Metric
from treadle.data.prompts import Example, Row, fill, value_of
from treadle.errors import FormatError


def example_of(prompt: str, completion: str, metric: Metric | None, row: Row, *, where: object) -> Example:
    """The row's example: its label, candidates or program as the metric judges answers; none of them without one.

    Args:
        prompt: what stands before the answer, filled in already.
        completion: the template of the answer.
        metric: how answers are judged.
        row: of the data.
        where: what an error names.

    Raises:
        InputError: the row lacks a field that the template or the metric names.
        FormatError: its label is none of the metric's.
    """
    seen = shown(metric, row, where=where)
    if metric is None:
        return Example(prompt, fill(completion, seen, where=where))
    if isinstance(metric, Code):
        return Example(prompt, fill(completion, seen, where=where), program=metric.program(row, where=where))
    label = value_of(row, metric.field, where=where)
    if isinstance(metric, ExactMatch):
        expected = metric.normalise(label)
        if not expected:
            raise FormatError(f"no answer in {label!r}", where=where, remedy="mend the row or metric.extract")
        return Example(prompt, fill(completion, seen, where=where), label=expected)
    texts = metric.labels if isinstance(metric, LabelLikelihood) else {key: key for key in metric.options(row)}
    if label not in texts:
        raise FormatError(
            f"{metric.field} {label!r} is none of {', '.join(texts)}",
            where=where,
            remedy="mend the row or the task",
        )
    answers = {key: fill(completion, {**seen, metric.field: text}, where=where) for key, text in texts.items()}
    if len(set(answers.values())) < len(answers):
        raise FormatError("two answers are the same text", where=where, remedy="let the completion show the label")
    return Example(prompt, answers[label], label=label, candidates=tuple(answers.values()))


def shown(metric: Metric | None, row: Row, *, where: object) -> Row:
    """The row as templates see it: choices as lettered lines."""
    if not isinstance(metric, Choices):
        return row
    options = metric.options(row, where=where)
    return {**row, metric.choices: "\n".join(f"{letter}. {text}" for letter, text in options.items())}
