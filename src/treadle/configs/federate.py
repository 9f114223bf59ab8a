"""The TOML of `treadle federate`: a run's, which the server reads, and a silo's, which no server can change."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from treadle.configs.train import RowsData, SiloLedger, refuse_limit
from treadle.toml import TomlTable
from treadle.train.federated.settings import LocalWork, RoundRules
from treadle.train.federated.variants import VariantSettings


class SuperLink(TomlTable):
    """The server that silos connect to, over TLS, with a key of its own for every silo.

    Attributes:
        host: name or address that the certificate is for.
        port: of all that it serves.
        certificate: PEM file.
        private_key: of the certificate.
        root_certificates: PEM file of the authority that signed it.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=9093, ge=1, le=65535)
    certificate: Path
    private_key: Path
    root_certificates: Path


class ClientPrivacy(TomlTable):
    """What a trusted server promises to whole clients, beside what each promises to its rows.

    Attributes:
        epsilon: of all rounds together, for one client's updates, or zeros in their place.
        delta: below 1 / the number of clients.
        max_update_norm: Frobenius norm to which a client's change is clipped.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    max_update_norm: float = Field(default=1.0, gt=0)


class Judge(TomlTable):
    """Public rows on which the server measures the adapter after every round: of what is noised already, free of ε.

    Attributes:
        data: the rows; a task's training split.
        base: where the family's base model is on the server, if its own label does not say.
        device: "auto", "cpu", "cuda", …
    """

    data: RowsData
    base: str | None = None
    device: str = "auto"


class FederateRun(TomlTable):
    """Which adapter a federation trains, and how.

    Attributes:
        family: the family's folder.
        name: the adapter's.
        out: the adapter's folder; the run's state is kept beside it, in `.NAME.federation`.
        work: what every client does in a round.
        rules: of the rounds: who takes part, how many it takes, how long to wait.
        variant: what is trained and how it is joined.
        client_privacy: noise on the mean of what clients send; None for none.
        silos: the silos' TOML files, to run all of them on this machine.
        grid: how: "in-process", one after the other, or "simulation", Flower's own on Ray, each in a worker process.
        superlink: the server that real silos connect to, in place of `silos`.
        judge: measures accuracy after every round, on public rows; None for no accuracy.
        page: an HTML page that is refreshed after every round.
        overwrite: whether a folder at `out` is replaced.
    """

    family: Path
    name: str
    out: Path
    work: LocalWork
    rules: RoundRules
    variant: VariantSettings = VariantSettings()
    client_privacy: ClientPrivacy | None = None
    silos: tuple[Path, ...] = ()
    grid: Literal["in-process", "simulation"] = "in-process"
    superlink: SuperLink | None = None
    judge: Judge | None = None
    page: Path | None = None
    overwrite: bool = False

    @model_validator(mode="after")
    def _sound(self) -> "FederateRun":
        if bool(self.silos) == (self.superlink is not None):
            raise ValueError("give either silos, to run them on this machine, or superlink")
        if self.superlink is not None and self.grid == "simulation":
            raise ValueError("grid 'simulation' has silos in the place of superlink")
        if self.variant.name == "local":
            raise ValueError("variant local joins nothing; run `treadle train` in every silo")
        return self


class SiloPrivacy(TomlTable):
    """What one run may cost a row of a silo.

    Attributes:
        epsilon: of all rounds of a run together, above 0; "none" for no noise and no guarantee.
        delta: below 1 / records.
        records: how many rows there are, or a lower bound of it; this number is public.
        share_records: whether the server is told it, to weigh by it.
    """

    epsilon: Annotated[float, Field(gt=0)] | Literal["none"]
    delta: float = Field(gt=0, lt=1)
    records: int = Field(ge=1)
    share_records: bool = False


class SuperNode(TomlTable):
    """How a silo reaches a real server.

    Attributes:
        superlink: HOST:PORT.
        root_certificates: PEM file of the authority that signed the server's certificate.
        private_key: the node's own key; its public half is registered with the server.
        port: of the node's own processes on this machine, on the loopback address.
    """

    superlink: str
    root_certificates: Path
    private_key: Path
    port: int = Field(default=9094, ge=1, le=65535)


class SiloRun(TomlTable):
    """One client.

    Attributes:
        name: what the server calls it.
        folder: where families that it receives are kept.
        data: its rows.
        privacy: what one run may cost.
        ledger: where that is written down.
        family: a family's folder, to work for no other; None for any over `base`.
        base: where the base model is; needed without `family`, so that no server names a model that is opened here.
        micro_batch: rows in one forward pass.
        device: "auto", "cpu", "cuda", …
        supernode: how it reaches the server; not needed in one process.
    """

    name: str
    folder: Path
    data: RowsData
    privacy: SiloPrivacy
    ledger: SiloLedger
    family: Path | None = None
    base: str | None = None
    micro_batch: int = Field(default=8, ge=1)
    device: str = "auto"
    supernode: SuperNode | None = None

    @model_validator(mode="after")
    def _sound(self) -> "SiloRun":
        if self.family is None and self.base is None:
            raise ValueError("neither base nor family is given: name the model that servers may have trained here")
        if self.privacy.epsilon != "none":
            refuse_limit(self.data)
        return self
