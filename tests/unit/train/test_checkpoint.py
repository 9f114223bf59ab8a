"""A checkpoint restores a run exactly, belongs to one run only, and is never half a file."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from treadle.errors import FormatError, MismatchError, UnavailableError
from treadle.train.checkpoint import FILE, Run, discard

FACTS = {"learning_rate": 0.1, "max_tokens": None, "data": "d" * 8, "family": "f" * 8}


def run_of(facts: dict[str, str | int | float | bool | None] | None = None, rows: int = 3) -> Run:
    torch.manual_seed(0)
    lora_B = {name: nn.Parameter(torch.randn(rows, 2)) for name in ("one", "two")}
    return Run(FACTS if facts is None else facts, lora_B, torch.optim.AdamW(lora_B.values(), lr=0.1, fused=True))


def step(run: Run, seed: int) -> None:
    torch.manual_seed(seed)
    run.optimizer.zero_grad()
    sum((B * torch.randn(B.shape)).sum() for B in run.lora_B.values()).backward()
    run.optimizer.step()


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    unbroken, broken = run_of(), run_of()
    for seed in range(6):
        step(unbroken, seed)
    for seed in range(3):
        step(broken, seed)
    broken.save(tmp_path, [0.3, 0.2, 0.1])
    resumed = run_of()
    assert resumed.resume(tmp_path) == [0.3, 0.2, 0.1]
    for seed in range(3, 6):
        step(resumed, seed)
    for name, B in unbroken.lora_B.items():
        assert torch.equal(B, resumed.lora_B[name])


def test_without_a_checkpoint_a_run_begins(tmp_path: Path) -> None:
    assert run_of().resume(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.2}, "the checkpoint's learning_rate is 0.1, this run's 0.2; go back"),
        ({"data": "e" * 8}, "the checkpoint's data is 'dddddddd', this run's 'eeeeeeee'"),
        ({"family": "e" * 8}, "the checkpoint's family is 'ffffffff'"),
        ({"max_tokens": 9}, "the checkpoint's max_tokens is None, this run's 9"),
        ({"new": 1}, "the checkpoint's new is None, this run's 1"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, change: dict[str, str | float], message: str) -> None:
    run = run_of()
    step(run, 0)
    run.save(tmp_path, [1.0])
    with pytest.raises(MismatchError, match=message):
        run_of(FACTS | change).resume(tmp_path)


def saved(folder: Path) -> Path:
    run = run_of()
    step(run, 0)
    run.save(folder, [1.0])
    return folder / FILE


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for size in (0, 5, 100, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(FormatError, match=r"not a checkpoint .*; delete the folder to start afresh"):
            run_of().resume(tmp_path)
        saved(tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for metadata in (None, {"run": "3"}, {"run": '{"format": "x", "facts": {}, "losses": []}'}):
        save_file({"x": torch.zeros(1)}, tmp_path / FILE, metadata)
        with pytest.raises(FormatError, match="not a"):
            run_of().resume(tmp_path)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(FormatError, match="'one' is missing or of another shape"):
        run_of(rows=4).resume(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved(tmp_path).read_bytes()
    run = run_of()
    step(run, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left"):
        run.save(tmp_path, [1.0, 2.0])
    monkeypatch.undo()
    assert (tmp_path / FILE).read_bytes() == before
    assert run_of().resume(tmp_path) == [1.0]


def test_what_a_killed_write_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}.abc.part").write_bytes(b"half")
    run_of().resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_discarding_leaves_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saved(folder)
    discard(folder)
    assert not folder.exists()
    discard(folder)
    saved(folder)
    (folder / "notes.txt").write_text("mine")
    discard(folder)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
