"""The base model that a family or a bank names, found and proved to be that one."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError, MismatchError
from treadle.models.catalogue import CATALOGUE
from treadle.models.fetch import fetched_folder, is_whole
from treadle.models.identity import BaseIdentity, identify_folder
from treadle.models.loading import load_model, load_tokenizer, model_folder
from treadle.progress import Progress, silent

_SAY_WHERE = "say where it is with --base FOLDER, or `base` in a run's TOML"


def base_folder(identity: BaseIdentity, named: str | None = None, *, progress: Progress = silent) -> Path:
    """The folder of the base model with this identity, its weights compared with the identity's digest.

    Args:
        identity: of the base, as a family records it. Its label leads to a catalogued model or one of the hub; that of
            a model that was given as a folder does not (see `identity_of`).
        named: a catalogue name, folder or hub id to look at instead of the identity's own label.
        progress: told that the base is being looked for.

    Raises:
        InputError: there is no such model.
        MismatchError: its weights are others.
        UnavailableError: it must be downloaded and cannot be.
    """
    if named is None and not _leads_somewhere(identity.name):
        raise InputError(
            f"the base {identity.name!r} was given as a folder, whose path is not recorded", remedy=_SAY_WHERE
        )
    progress(f"opening {named or identity.name}", 0, 0)
    try:
        folder = model_folder(named or identity.name)
    except InputError as error:
        if named is not None:
            raise
        raise InputError(f"the base {identity.name!r} is not found by its name", remedy=_SAY_WHERE) from error
    found = identify_folder(folder, identity.name)
    if found != identity:
        raise MismatchError(
            f"its weights are {found.sha256[:12]}, those of the base {identity.name!r} are {identity.sha256[:12]}",
            where=named or identity.name,
            remedy="name the base that the family was made for",
        )
    return folder


def loaded_base(
    identity: BaseIdentity, named: str | None = None, *, device: str = "auto", progress: Progress = silent
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with this identity and its tokenizer; `named` and what may go wrong as in `base_folder`."""
    place = str(base_folder(identity, named, progress=progress))
    progress("loading the base model", 0, 0)
    return load_model(place, device=device), load_tokenizer(place)


def local_base(name: str) -> Path | None:
    """The folder of the base with this label if this machine has it already; None rather than a download or an error.

    A foreign adapter's label is whatever PEFT was told, so it may be a path.
    """
    if name in CATALOGUE:
        folder = fetched_folder(name)
        return folder if is_whole(CATALOGUE[name], folder) else None
    folder = Path(name).expanduser()
    return folder if _leads_somewhere(name) and (folder / "config.json").is_file() else None


def _leads_somewhere(label: str) -> bool:
    """Whether a label is a catalogue name, a hub id or a path: no folder is guessed from a bare name."""
    return label in CATALOGUE or "/" in label or "\\" in label
