"""When nobody is meant: prompts that look no more like the bank's than public text does are left to the base.

    chance = (1 + public prompts whose best permitted score is as high) / (1 + public prompts)

Nearly a conformal p-value: were the prompt drawn as the public ones were, it would fall to `level` or below with a
probability of about `level`. It asks the permitted adapters alone, so nobody else's scores can move it.

Reference: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005, section 2.2. Deviations: the scores'
weights, centre and spread are fitted to the same public prompts, which look more ordinary than a new one for it: with
independent normal scores of 105 layers, 8 adapters and 600 prompts .05 and .9 are .06 and .91 in truth, with 60 prompts
.05 is .25 (.12 with one adapter). And real prompts are not drawn as the public ones are, so `level` bounds nothing but
what public text of that kind would do.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.decision import BASE, Decision, Mixture

LEVEL = 0.9
"""The chance above which the base acts, unless the caller says otherwise (docs/log.md has what it costs and saves)."""


def chances(
    value: Float[Tensor, "rows adapters"],
    public: Float[Tensor, "prompts adapters"],
    permitted: Bool[Tensor, "rows adapters"] | None,
) -> Float[Tensor, " rows"]:
    """The chance of each row's best score among the public prompts, above 0 and at most 1.

    Args:
        value: the prompts' scores, -inf for the forbidden and ineligible.
        public: those of the public prompts, NaN where unknown.
        permitted: who may act; None for all.
    """
    known = torch.nan_to_num(public.to(value.device), nan=-torch.inf)
    best = value.max(1).values
    if permitted is None:
        reached = (known.max(1).values[None] >= best[:, None]).sum(1)
    else:  # a row at a time: rows × prompts × adapters may be large
        rows = [
            (known.masked_fill(~allowed, -torch.inf).max(1).values >= score).sum()
            for allowed, score in zip(permitted, best, strict=True)
        ]
        reached = torch.stack(rows)
    return (1 + reached).double() / (1 + known.shape[0])


def abstained(decision: Decision, chance: Float[Tensor, " rows"], level: float) -> Decision:
    """The decision, with the base in the place of a winner whose chance is above `level`; it becomes the runner-up."""
    nobody = chance > level
    together = decision.together
    if together is not None:
        together = Mixture(together.adapter.masked_fill(nobody[:, None], BASE), together.weight)
    return replace(
        decision,
        winner=decision.winner.masked_fill(nobody, BASE),
        runner_up=torch.where(nobody, decision.winner, decision.runner_up),
        margin=decision.margin.masked_fill(nobody, 0.0),
        together=together,
        chance=chance,
    )
