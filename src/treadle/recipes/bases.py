"""The base model that a family or a bank names, found and proved to be that one."""

from pathlib import Path

from treadle.errors import InputError, MismatchError
from treadle.models.catalogue import CATALOGUE
from treadle.models.fetch import fetched_folder, is_whole
from treadle.models.identity import BaseIdentity, identify_folder
from treadle.models.loading import model_folder
from treadle.progress import Progress, silent


def base_folder(identity: BaseIdentity, named: str | None = None, *, progress: Progress = silent) -> Path:
    """The folder of the base model with this identity, its weights compared with the identity's digest.

    Args:
        identity: of the base, as a family records it.
        named: a catalogue name, folder or hub id to look at instead of the identity's own label.
        progress: told that the base is being looked for.

    Raises:
        InputError: there is no such model.
        MismatchError: its weights are others.
        UnavailableError: it must be downloaded and cannot be.
    """
    progress(f"opening {named or identity.name}", 0, 0)
    try:
        folder = model_folder(named or identity.name)
    except InputError as error:
        if named is not None:
            raise
        raise InputError(
            f"the base {identity.name!r} is not found by its name", remedy="say where it is with --base FOLDER"
        ) from error
    found = identify_folder(folder, identity.name)
    if found != identity:
        raise MismatchError(
            f"its weights are {found.sha256[:12]}, those of the base {identity.name!r} are {identity.sha256[:12]}",
            where=named or identity.name,
            remedy="name the base that the family was made for",
        )
    return folder


def local_base(name: str) -> Path | None:
    """The base's folder if this machine has it already; None rather than a download or an error."""
    if name in CATALOGUE:
        folder = fetched_folder(name)
        return folder if is_whole(CATALOGUE[name], folder) else None
    folder = Path(name).expanduser()
    return folder if name and (folder / "config.json").is_file() else None
