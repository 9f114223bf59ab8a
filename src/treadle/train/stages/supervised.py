"""A stage of supervised fine-tuning, by TRL's SFTTrainer."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from treadle.errors import InputError
from treadle.train.rows import Row
from treadle.train.stages.acting import Acting
from treadle.train.stages.hosting import Hosting, Told, adamw, common_arguments, following, run_to_the_end, with_padding
from treadle.train.stages.settings import SftStage
from treadle.train.stages.trl import Dataset, SFTConfig, SFTTrainer, untold

_IGNORED = -100


def train_supervised(
    acting: Acting,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    stage: SftStage,
    hosting: Hosting,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Told:
    """What was told on the way; the acting factors have moved.

    The loss is the cross-entropy on targets alone. Rows are tokenised by `rows.encoded`, as everywhere in treadle, so
    TRL prepares nothing.

    Args:
        acting: the model with the ranks to be trained.
        tokenizer: the model's.
        rows: of the stage's system.
        stage: the choices.
        hosting: how it is run.
        optimizer: over the acting parameters; None takes AdamW, as the Trainer would.

    Raises:
        InputError: there is no row.
        TreadleError: the loss is not finite.
    """
    if not rows:
        raise InputError("there is no example to train on", where="stage", remedy="check the labels of the data")
    columns = [
        {"input_ids": [*row.prompt, *row.target], "labels": [_IGNORED] * len(row.prompt) + list(row.target)}
        for row in rows
    ]
    told = Told()
    with with_padding(tokenizer), untold():
        trainer = SFTTrainer(
            model=acting.model,
            args=SFTConfig(
                **common_arguments(acting, stage, hosting),
                per_device_train_batch_size=stage.batch_size,
                gradient_accumulation_steps=stage.gradient_accumulation_steps,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_list(columns),
            processing_class=tokenizer,
            callbacks=list(following(hosting, told)),
            optimizers=(optimizer or adamw(acting, stage), None),
        )
        run_to_the_end(trainer, hosting, told)
    return told
