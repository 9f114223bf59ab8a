"""AdaRank: from a model and some text to a rank plan.

for each module m, alone:
    shake W_m by noise of its own deviation, twice     d_m = mean |outputs − outputs'|, over texts and trials
    put W_m back
r_m ∝ d_m,  Σ c_m r_m ≤ budget
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.configs.plan import PlanRun, ProbeText
from treadle.data.public_text import public_texts
from treadle.errors import InputError
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.ranks.allocation import allocate
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.perturbation import perturbation
from treadle.ranks.scores import ProbeScores

PLAN, SCORES = "plan.json", "scores.json"


def plan(config: PlanRun, progress: Progress = silent) -> RankPlan:
    """The plan for `config.base`, also written as plan.json, with scores.json beside it, in the folder `config.out`.

    Raises:
        InputError: `config.out` exists, or the model, text or budget cannot be used.
        UnavailableError: the base must be fetched and cannot be, or the disk refuses.
    """
    if config.out.exists() and not config.overwrite:  # said before minutes of work, not after
        raise InputError("already exists", where=config.out, remedy="choose another name or set overwrite")
    base, text = identity_of(config.base), config.text
    # Two words a token, so that even a passage of half that length fills its tokens.
    passages = public_texts(text.source, limit=text.sequences, words=2 * text.tokens, seed=config.seed).passages
    tokenizer, model = load_tokenizer(config.base), load_model(config.base, device=config.device)
    scores, shared = probed(config, model, tokenizer, passages, progress)
    if not text.public:
        scores = replace(scores, text_sha256=None)
    made = replace(shared, provenance={**shared.provenance, **_provenance(scores, base, text)})
    with files.new_folder(config.out, overwrite=config.overwrite) as folder:
        scores.save(folder / SCORES)
        made.save(folder / PLAN)
    return made


def probed(
    config: PlanRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str],
    progress: Progress = silent,
) -> tuple[ProbeScores, RankPlan]:
    """The scores of the configured modules on these passages, and the ranks that they earn within the budget.

    Raises:
        InputError: no such module, a passage that is too short, or a budget that cannot be met.
    """
    inputs = ProbeInputs.of_texts(tokenizer, passages, tokens=config.text.tokens)
    shapes = linear_shapes(model, config.modules)
    scores = perturbation(model, inputs, shapes, settings=config.probe, seed=config.seed, progress=progress)
    return scores, allocate(scores.means(), shapes, budget=config.budget_for(shapes), settings=config.allocation)


def _provenance(scores: ProbeScores, base: BaseIdentity, text: ProbeText) -> dict[str, str]:
    source = "pydoc" if text.source == "pydoc" else "file"
    return {
        "base": base.name,
        "base_sha256": base.sha256,
        "probe": scores.probe,
        "probe_settings": json.dumps(dict(scores.settings)),
        "probe_seed": str(scores.seed),
        "probe_text": f"public: {source}" if text.public else "private",
        "probe_text_sha256": scores.text_sha256 or "",
    }
