"""TRL's two trainers, their configurations and the tables that they read: an upgrade is one file's work."""

from datasets import Dataset

from treadle.errors import UnavailableError

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise UnavailableError("TRL is not installed", remedy="pip install 'treadle[rl]'") from error

__all__ = ["Dataset", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]
