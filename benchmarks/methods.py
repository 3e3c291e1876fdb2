"""All methods, by name; a new one is an entry in ``ours.py`` or ``peers.py``."""

from benchmarks.method import Method
from benchmarks.ours import OURS
from benchmarks.peers import PEERS

METHODS: dict[str, Method] = {each.name: each for each in [*OURS, *PEERS]}
# Always in the final, for comparison with other pages and papers.
REFERENCES = ("adam", "geoopt-sgd")
