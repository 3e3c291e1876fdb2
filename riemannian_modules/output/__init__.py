"""Output metrics: what a distance between two outputs of a model means.

An :class:`OutputMetric` turns a batch of outputs into a factor ``L`` with
``L^T L = G_o``, the metric on the output space of each example. Write your own by
subclassing it, or one below, with one method, ``factor``: what is made of the rows is
then the default's, unless you write that too.

=====================  ==========================================================
:class:`Euclidean`     squared distance (least squares)
:class:`Categorical`   Fisher metric of a softmax over the last dimension
:class:`Bernoulli`     Fisher metric of independent coins, given by logits
:class:`Poisson`       Fisher metric of independent counts, given by log rates
:class:`Gaussian`      Fisher metric of a normal, fixed covariance or learned variance
:class:`OnManifold`    outputs that are points of a geoopt manifold
:class:`Sampled`       a few random rows in the place of all rows of another metric
:class:`Weighted`      another metric whose terms do not all count alike
=====================  ==========================================================
"""

from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.categorical import Categorical
from riemannian_modules.output.euclidean import Euclidean
from riemannian_modules.output.gaussian import Gaussian
from riemannian_modules.output.independent import Bernoulli, Poisson
from riemannian_modules.output.on_manifold import OnManifold
from riemannian_modules.output.sampled import Sampled
from riemannian_modules.output.weighted import Weighted

__all__ = [
    "Bernoulli",
    "Categorical",
    "Euclidean",
    "Gaussian",
    "OnManifold",
    "OutputMetric",
    "Poisson",
    "Sampled",
    "Weighted",
]
