"""A stage of group-relative policy optimisation, by TRL's GRPOTrainer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from treadle.data.prompts import Example
from treadle.errors import InputError
from treadle.train.stages.acting import Acting
from treadle.train.stages.hosting import Hosting, Told, adamw, common_arguments, following, run_to_the_end, with_padding
from treadle.train.stages.rewards import Reward, Rollout, worth
from treadle.train.stages.settings import GrpoStage
from treadle.train.stages.trl import Dataset, GRPOConfig, GRPOTrainer, untold


def train_by_rollouts(
    acting: Acting,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rewards: Mapping[str, Reward],
    stage: GrpoStage,
    hosting: Hosting,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Told:
    """What was told on the way, `reward` and `frac_reward_zero_std` among it; the acting factors have moved.

    Watch those two: the loss is near 0 by construction, and a group whose rewards are all equal teaches nothing.

    Args:
        acting: the model with the ranks to be trained.
        tokenizer: the model's.
        examples: of the stage's system; see `fitting`.
        rewards: by name, as the stage weighs them.
        stage: the choices.
        hosting: how it is run.
        optimizer: over the acting parameters; None takes AdamW, as the Trainer would.

    Raises:
        TreadleError: a reward fails or gives no finite number, or the loss is not finite.
    """
    told = Told()
    whole = stage.prompts * stage.group
    micro = stage.micro_batch or whole
    names = list(stage.rewards)
    with with_padding(tokenizer), untold():
        trainer = GRPOTrainer(
            model=acting.model,
            reward_funcs=cast("Any", [_for_trl(name, rewards[name], examples, stage) for name in names]),
            args=GRPOConfig(
                **common_arguments(acting, stage, hosting),
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=whole // micro,
                num_generations=stage.group,
                max_completion_length=stage.max_completion_length,
                temperature=stage.temperature,
                beta=stage.kl,
                epsilon=stage.clip,
                loss_type=stage.loss,
                scale_rewards="group" if stage.scale_rewards else "none",
                num_iterations=stage.iterations,
                reward_weights=[stage.rewards[name] for name in names],
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": example.prompt, "place": place} for place, example in enumerate(examples)]
            ),
            processing_class=tokenizer,
            callbacks=list(following(hosting, told)),
            optimizers=(optimizer or adamw(acting, stage), None),
        )
        run_to_the_end(trainer, hosting, told)
    return told


def fitting(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], stage: GrpoStage) -> list[Example]:
    """The examples whose prompt has at most `stage.max_prompt_length` tokens.

    Raises:
        InputError: they are fewer than the prompts of a step, so that the trainer would make no step at all.
    """
    fit = [e for e in examples if len(tokenizer(e.prompt)["input_ids"]) <= stage.max_prompt_length]
    if not fit:
        raise InputError("there is no example to roll out", where="stage", remedy="check labels and max_prompt_length")
    if len(fit) < stage.prompts:
        raise InputError(
            f"{len(fit)} examples can be rolled out, fewer than prompts = {stage.prompts}",
            where="stage",
            remedy="lower prompts, raise max_prompt_length, or give more rows",
        )
    return fit


def _for_trl(name: str, reward: Reward, examples: Sequence[Example], stage: GrpoStage) -> Callable[..., list[float]]:
    """The reward as TRL calls it."""

    def score(
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        place: Sequence[int],
        **_: Any,  # noqa: ANN401  # what TRL passes to every reward
    ) -> list[float]:
        permitted = stage.max_completion_length
        return [
            worth({name: reward}, Rollout(examples[where], text, len(ids), permitted))[name]
            for where, text, ids in zip(place, completions, completion_ids, strict=True)
        ]

    score.__name__ = name
    return score
