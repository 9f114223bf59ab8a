"""TRL's two trainers, their configurations and the tables that they read: an upgrade is one file's work."""

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import Dataset
from huggingface_hub import constants

from treadle.errors import UnavailableError

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise UnavailableError("TRL is not installed", remedy="pip install 'treadle[rl]'") from error

__all__ = ["Dataset", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer", "untold"]


@contextmanager
def untold() -> Iterator[None]:
    """A block in which TRL's trainers do not call home, as they do when they are made, whatever the environment says.

    Nothing leaves the machine unasked.
    """
    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before
