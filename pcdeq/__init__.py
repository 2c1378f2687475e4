"""Positive concave deep equilibrium models: layers, solvers, networks and certificates.

Gabor, Piotrowski, Cavalcante: Positive Concave Deep Equilibrium Models, ICML 2024,
arXiv 2402.04029. This floor of the package needs torch alone; ``pcdeq.experiments`` trains.
"""

from pcdeq.activations import ACTIVATIONS, Activation
from pcdeq.block import PcDEQConv2d, PcDEQLinear, project, register_projection
from pcdeq.certificates import Certificate, certify
from pcdeq.implicit import Equilibrium
from pcdeq.networks import NETWORKS, Network, build_network
from pcdeq.robustness import logit_bounds, robust
from pcdeq.solvers import SOLVERS
from pcdeq.weights import CheckpointError, load_network, load_weights

__version__ = "1.0.0"

__all__ = [
    "ACTIVATIONS",
    "NETWORKS",
    "SOLVERS",
    "Activation",
    "Certificate",
    "CheckpointError",
    "Equilibrium",
    "Network",
    "PcDEQConv2d",
    "PcDEQLinear",
    "build_network",
    "certify",
    "load_network",
    "load_weights",
    "logit_bounds",
    "project",
    "register_projection",
    "robust",
]
