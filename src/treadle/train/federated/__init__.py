"""Federated training over Flower: one ClientApp, one Strategy, and a Grid that needs neither sockets nor Ray.

flwr is imported in this package alone. Importing it switches off all that Flower would tell its makers, before any
module of flwr can be loaded.
"""

from treadle.train.federated.quiet import stay_at_home

stay_at_home()
