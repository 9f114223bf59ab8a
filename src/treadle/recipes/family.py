"""A plan and a base make a family: one frozen lora_A a module, under one fingerprint.

kaiming, orthonormal    drawn, by a generator of its own for every module
weight-svd              the right singular vectors of the layer's weight
public-pca              the principal directions of what the layer sees of a public text
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from treadle.configs.family import EqualRanks, FamilyRun, PublicText
from treadle.data.public_text import public_texts
from treadle.errors import MismatchError
from treadle.family.family import INITS, AdapterFamily
from treadle.family.initial import weight_svd
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.files import refuse_existing
from treadle.models.identity import BaseIdentity
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.recipes.calibration import text_label
from treadle.recipes.public_pca import public_pca


def new_family(config: FamilyRun, progress: Progress = silent) -> AdapterFamily:
    """The family of the configured plan, also saved in the folder `config.out`.

    Raises:
        InputError: `config.out` exists, there is no such plan, base or text, or the text is too short for the ranks.
        MismatchError: the plan was made for another base, or names layers that this one lacks.
        UnavailableError: the base must be fetched and cannot be, or the disk refuses.
    """
    refuse_existing(config.out, overwrite=config.overwrite)
    planned = RankPlan.load(config.plan) if config.plan else None
    progress("opening the base model", 0, 0)
    base = identity_of(config.base)
    if planned is not None and planned.provenance.get("base_sha256", base.sha256) != base.sha256:
        raise MismatchError(
            f"the plan was made for {planned.provenance.get('base')!r}, whose weights are not those of {base.name!r}",
            where=config.plan,
            remedy="name that base or plan again",
        )
    model = load_model(config.base, device=config.device)
    plan = planned or _equal(model, config.equal)
    plan.check(linear_shapes(model))
    if config.init in INITS:
        return store_family(
            config.out, model, plan, base=base, seed=config.seed, init=config.init, overwrite=config.overwrite
        )
    lora_A, origin = _of_the_base(config, model, plan, progress)
    family = AdapterFamily.of_tensors(
        base=base, plan=plan, lora_A=lora_A, init=config.init, seed=config.seed, origin=origin
    )
    family.save(config.out, overwrite=config.overwrite)
    return family


def _equal(model: PreTrainedModel, ranks: EqualRanks | None) -> RankPlan:
    assert ranks is not None  # the configuration has a plan or these
    return RankPlan.uniform(linear_shapes(model, ranks.kinds), rank=ranks.rank, scaling=ranks.scaling)


def store_family(
    folder: Path,
    model: PreTrainedModel,
    plan: RankPlan,
    *,
    base: BaseIdentity,
    seed: int,
    init: str = "kaiming",
    overwrite: bool = False,
) -> AdapterFamily:
    """The family of this plan over `model`, whose stored identity is `base`, A drawn, also saved in `folder`.

    Raises:
        InputError: the folder exists and `overwrite` is false, or A of this `init` is not drawn.
        MismatchError: the plan names layers that the model lacks.
        UnavailableError: the disk refuses.
    """
    plan.check(linear_shapes(model))
    family = AdapterFamily.create(base=base, plan=plan, seed=seed, init=init)
    family.save(folder, overwrite=overwrite)
    return family


def _of_the_base(
    config: FamilyRun, model: PreTrainedModel, plan: RankPlan, progress: Progress
) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """A made from the model, and what else it was made from."""
    if config.init == "weight-svd":
        return weight_svd(model, plan, progress), {}
    wanted = config.text or PublicText()
    text = public_texts(wanted.source, limit=wanted.passages, words=wanted.words, seed=config.seed, field=wanted.field)
    lora_A = public_pca(model, load_tokenizer(config.base), plan, text.passages, progress)
    return lora_A, {"text": text_label(wanted.source), "text_sha256": text.sha256}
