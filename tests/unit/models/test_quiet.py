import sys
import warnings

import pytest
from transformers.utils import logging

from treadle.models.quiet import quiet


def test_nothing_is_said_inside_and_the_settings_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr)
    with quiet():
        sys.stderr.write("a bar")
        warnings.warn("a warning", stacklevel=1)
        logging.get_logger("transformers.modeling_utils").warning("a report")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr) == before
    assert capfd.readouterr().err == ""


def test_an_error_passes_through_and_the_settings_come_back() -> None:
    before = logging.get_verbosity()
    with pytest.raises(KeyError), quiet():
        raise KeyError("x")
    assert logging.get_verbosity() == before
