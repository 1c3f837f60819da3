"""Provide the losses, one per module, and everything that a new loss needs.

To add a loss, derive from `ClassificationLoss` and write its `values` method, which receives `LossInputs`. The
functions `cross_entropy` and `logits_of` compute the terms that most formulas use. CONTRIBUTING.md has a complete
example.
"""

from keras_drsl.losses.base import ClassificationLoss, cross_entropy, logits_of
from keras_drsl.losses.bilateral_softmax import BilateralSoftmaxLoss
from keras_drsl.losses.complement_objective import ComplementObjective
from keras_drsl.losses.drs import DRSLoss, drs_loss
from keras_drsl.losses.guided_complement_entropy import GuidedComplementEntropy
from keras_drsl.losses.linear_drs import linear_drs_loss
from keras_drsl.losses.logit_squeezing import LogitSqueezing
from keras_drsl.losses.probabilistically_compact import ProbabilisticallyCompactLoss
from keras_drsl.losses.prs import PRSLoss, prs_loss
from keras_drsl.losses.squentropy import Squentropy
from keras_drsl.losses.z_loss import ZLoss
from keras_drsl.predictions import LossInputs

__all__ = [
    "BilateralSoftmaxLoss",
    "ClassificationLoss",
    "ComplementObjective",
    "DRSLoss",
    "GuidedComplementEntropy",
    "LogitSqueezing",
    "LossInputs",
    "PRSLoss",
    "ProbabilisticallyCompactLoss",
    "Squentropy",
    "ZLoss",
    "cross_entropy",
    "drs_loss",
    "linear_drs_loss",
    "logits_of",
    "prs_loss",
]
