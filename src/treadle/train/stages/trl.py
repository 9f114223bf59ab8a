"""TRL's two trainers and their configurations: its one importer, so that an upgrade is one file's work."""

from treadle.errors import UnavailableError

try:
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise UnavailableError("TRL is not installed", remedy="pip install 'treadle[rl]'") from error

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]
