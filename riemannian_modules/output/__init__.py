"""Output metrics: what a distance between two outputs of a model means.

An :class:`OutputMetric` turns a batch of outputs into a factor ``L`` with
``L^T L = G_o``, the metric on the output space of each example. Write your own by
subclassing it with one method, ``factor``; the classes below are final.

=====================  ==========================================================
:class:`Euclidean`     squared distance (least squares)
:class:`Categorical`   Fisher metric of a softmax over the last dimension
:class:`Bernoulli`     Fisher metric of independent coins, given by logits
:class:`Poisson`       Fisher metric of independent counts, given by log rates
:class:`Gaussian`      Fisher metric of a normal, fixed covariance or learned variance
:class:`OnManifold`    outputs that are points of a geoopt manifold
:class:`Sampled`       a few random rows in the place of all rows of another metric
=====================  ==========================================================
"""

from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.categorical import Categorical
from riemannian_modules.output.euclidean import Euclidean
from riemannian_modules.output.gaussian import Gaussian
from riemannian_modules.output.independent import Bernoulli, Poisson
from riemannian_modules.output.on_manifold import OnManifold
from riemannian_modules.output.sampled import Sampled

__all__ = [
    "Bernoulli",
    "Categorical",
    "Euclidean",
    "Gaussian",
    "OnManifold",
    "OutputMetric",
    "Poisson",
    "Sampled",
]
