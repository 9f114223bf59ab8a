"""What transformers and the hub say on stderr, held back: the faces of treadle draw its progress."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import huggingface_hub.utils as hub
from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which loading prints neither bars nor reports nor warnings; the settings come back after it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
