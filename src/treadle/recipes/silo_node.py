"""The process that answers one message for a silo: `python -m treadle.recipes.silo_node SILO.toml ARGUMENTS`.

A SuperNode starts it in place of Flower's own; see `treadle.train.federated.node`, which also says why the rest is
imported late.
"""

import sys
from pathlib import Path

from treadle.train.federated.node import ClientApp, answer_by


def main() -> None:
    """Answer, by the silo whose TOML is the first argument; the rest are Flower's."""
    path = Path(sys.argv.pop(1))

    def app() -> ClientApp:
        from treadle.configs.federate import SiloRun
        from treadle.configs.toml import load_toml
        from treadle.recipes.silo import silo_client
        from treadle.train.federated.client import client_app

        return client_app(lambda context: silo_client(load_toml(path, SiloRun)))

    answer_by(app)


if __name__ == "__main__":
    main()
