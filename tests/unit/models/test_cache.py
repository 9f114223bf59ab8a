from pathlib import Path

import pytest

from treadle.models.cache import cache_folder


def test_the_environment_chooses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "x" / ".." / "here"))
    assert cache_folder() == tmp_path / "here"


def test_without_it_the_platform_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TREADLE_CACHE", raising=False)
    assert cache_folder().is_absolute()
    assert "treadle" in cache_folder().parts
