"""A plan, a base and a seed make a family: one frozen lora_A a module, drawn by a generator of its own."""

from pathlib import Path

from transformers import PreTrainedModel

from treadle.configs.family import FamilyRun
from treadle.errors import MismatchError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.models.loading import identity_of, load_model


def new_family(config: FamilyRun) -> AdapterFamily:
    """The family of the configured plan, also saved in the folder `config.out`.

    Raises:
        InputError: `config.out` exists, or there is no such plan or base.
        MismatchError: the plan was made for another base, or names layers that this one lacks.
        UnavailableError: the base must be fetched and cannot be, or the disk refuses.
    """
    plan = RankPlan.load(config.plan)
    base = identity_of(config.base)
    if plan.provenance.get("base_sha256", base.sha256) != base.sha256:
        raise MismatchError(
            f"the plan was made for {plan.provenance.get('base')!r}, whose weights are not those of {base.name!r}",
            where=config.plan,
            remedy="name that base or plan again",
        )
    model = load_model(config.base, device="cpu")
    return store_family(
        config.out, model, plan, base=base, seed=config.seed, init=config.init, overwrite=config.overwrite
    )


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
    """The family of this plan over `model`, whose stored identity is `base`, also saved in `folder`.

    Raises:
        InputError: the folder exists and `overwrite` is false, or there is no such `init`.
        MismatchError: the plan names layers that the model lacks.
        UnavailableError: the disk refuses.
    """
    plan.check(linear_shapes(model))
    family = AdapterFamily.create(base=base, plan=plan, seed=seed, init=init)
    family.save(folder, overwrite=overwrite)
    return family
