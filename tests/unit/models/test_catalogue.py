import re

import pytest

from treadle.errors import InputError
from treadle.files import checked_name
from treadle.models.catalogue import CATALOGUE, CatalogueEntry, entry, gguf_members, plain_members


@pytest.mark.parametrize("pinned", CATALOGUE.values(), ids=lambda pinned: pinned.name)
def test_every_entry_is_pinned_to_the_byte(pinned: CatalogueEntry) -> None:
    digests = [pinned.identity, *(wheel.sha256 for wheel in pinned.wheels)]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert bool(pinned.gguf) == any(gguf_members(wheel) for wheel in pinned.wheels)
    for wheel in pinned.wheels:
        assert sorted(gguf_members(wheel) + plain_members(wheel)) == sorted(wheel.members)
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement)
        assert wheel.file.startswith(wheel.project.replace("-", "_"))


def test_no_member_can_be_written_outside_the_folder() -> None:
    names = [m.rpartition("/")[2] for e in CATALOGUE.values() for w in e.wheels for m in w.members]
    assert [checked_name(name) for name in names] == names


def test_gguf_parts_are_joined_in_their_own_order() -> None:
    parts = [member for wheel in CATALOGUE["gemma3-270m"].wheels for member in gguf_members(wheel)]
    assert [part[-2:] for part in parts] == ["00", "01", "02", "03"]


def test_an_unknown_name_lists_the_known_and_the_one_that_was_meant() -> None:
    with pytest.raises(InputError, match=r"did you mean smollm2-135m\? known: smollm2-135m, gemma3-270m, minilm-l6"):
        entry("smolm2-135m")
