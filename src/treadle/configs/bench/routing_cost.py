"""What a routed decision costs in time and memory, and whether it is exact."""

from pydantic import Field

from treadle.configs.fleet import FleetRun
from treadle.routing.routed import Granularity
from treadle.toml import TomlTable


class RandomBanks(TomlTable):
    """Every combination of these; every eighth adapter is the one before it, moved by a millionth.

    Attributes:
        inner: of the layer.
        outer: of the layer, at least the largest rank.
        ranks: of B.
        adapters: in the bank, the last one left out under --quick.
        conditions: the largest singular value of B over the smallest.
        decisions: tokens asked of each bank and dtype, an eighth of it under --quick.
    """

    inner: int = Field(ge=1)
    outer: int = Field(ge=1)
    ranks: tuple[int, ...] = Field(min_length=1)
    adapters: tuple[int, ...] = Field(min_length=1)
    conditions: tuple[float, ...] = Field(min_length=1)
    decisions: int = Field(ge=8)


class RoutingExactnessRun(TomlTable):
    """`routing-exactness`.

    Attributes:
        fleet: what is trained on the spot.
        decisions: (token, layer) decisions of each scorer and dtype.
        quick_decisions: likewise under --quick.
        random: banks of random adapters at one layer.
    """

    fleet: FleetRun
    decisions: int = Field(ge=1)
    quick_decisions: int = Field(ge=1)
    random: RandomBanks


class LayerShapeRow(TomlTable):
    """A layer whose routing is timed: `inner` to `outer`, adapters of this `rank`."""

    inner: int = Field(ge=1)
    outer: int = Field(ge=1)
    rank: int = Field(ge=1)


class RoutingCostRun(TomlTable):
    """`routing-cost`.

    Attributes:
        tokens: of a call.
        adapters: in the bank.
        threads: of torch.
        rounds: the median of so many.
        most_of_arrow: adapters up to which PEFT's ARROW is timed.
        judged: the shape that the goals speak of.
        shapes: all shapes.
    """

    tokens: tuple[int, ...]
    adapters: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int = Field(ge=1)
    most_of_arrow: int
    judged: LayerShapeRow
    shapes: tuple[LayerShapeRow, ...]


class RoutingModelCostRun(TomlTable):
    """`routing-model-cost`.

    Attributes:
        base: the base model.
        rank: of every adapter at every layer.
        size: deviation of the entries of lora_B.
        adapters: in the bank.
        judged: the number that the goals speak of.
        granularities: that are timed.
        tokens: of a prompt.
        prompts: in a round.
        rounds: medians are over rounds and prompts.
        memory: bytes of lora_B held at once.
        seed: of adapters and prompts.
    """

    base: str = "smollm2-135m"
    rank: int = Field(ge=1)
    size: float = Field(gt=0)
    adapters: tuple[int, ...] = Field(min_length=1)
    judged: int
    granularities: tuple[Granularity, ...]
    tokens: int = Field(ge=1)
    prompts: int = Field(ge=1)
    rounds: int = Field(ge=1)
    memory: int = Field(ge=1)
    seed: int = 0


class RoutingMemoryRun(TomlTable):
    """`routing-memory`.

    Attributes:
        base: the base model.
        rank: of every adapter at every layer.
        adapters: in the bank.
        requests: to be answered.
        memory: bytes of lora_B held at once.
        seed: of adapters, requests and prompts.
    """

    base: str = "smollm2-135m"
    rank: int = Field(ge=1)
    adapters: int = Field(ge=1)
    requests: int = Field(ge=1)
    memory: int = Field(ge=1)
    seed: int = 0


class LayerSpectra(TomlTable):
    """One layer of trained adapters.

    Attributes:
        module: its full name.
        latent_mean: mean of z = A·x over public text, (rank,).
        latent_covariance: of the same, (rank, rank).
        norms: ‖B‖_F of every adapter that was trained there, scaling folded in.
        shares: of each, the squared singular values of B divided by their sum, descending.
    """

    module: str
    latent_mean: tuple[float, ...]
    latent_covariance: tuple[tuple[float, ...], ...]
    norms: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]


class Spectra(TomlTable):
    """The file that `RoutingLargeRun.spectra` names."""

    layers: tuple[LayerSpectra, ...] = Field(min_length=1)


class RoutingLargeRun(TomlTable):
    """`routing-large`.

    Attributes:
        spectra: the file with trained adapters' spectra, beside the configuration.
        modules: whose inputs are used, the first under --quick.
        adapters: in the bank; the largest number is judged.
        threads: of torch.
        seed: of the synthetic adapters.
        sample: z's that the indexes are built with.
        queries: tokens that are asked about.
        quick_queries: likewise under --quick.
        rounds: the median of so many.
        probes: lists that the approximate search reads.
        candidates: adapters that it scores.
    """

    spectra: str
    modules: tuple[str, ...] = Field(min_length=1)
    adapters: tuple[int, ...] = Field(min_length=1)
    threads: tuple[int, ...] = Field(min_length=1)
    seed: int = 0
    sample: int = Field(ge=4)
    queries: int = Field(ge=1)
    quick_queries: int = Field(ge=1)
    rounds: int = Field(ge=1)
    probes: int = Field(ge=1)
    candidates: int = Field(ge=1)
