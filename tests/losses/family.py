"""List the losses with their arguments and formulas, for the tests of what all losses must do."""

import math
from typing import NamedTuple

import numpy as np
import pytest

import keras_drsl
from keras_drsl.losses import ClassificationLoss
from tests import reference


class Case(NamedTuple):
    """Hold a loss, its arguments, and the formula as a loop over one sample (PRSLoss: over the batch)."""

    loss: type[ClassificationLoss]
    options: dict
    loop: object
    bad: dict  # maps an argument to a value out of its range and to the rule of the error

    def make(self, **more):
        return self.loss(**self.options, **more)

    def expected(self, y, z):
        """Compute one value per position from label distributions and logits, in float64."""
        y, z = np.asarray(y, "float64"), np.asarray(z, "float64")
        if self.loss is not keras_drsl.PRSLoss:
            return reference.each(self.loop, y, z, **self.options)
        rows = self.loop(y.reshape(-1, y.shape[-1]).tolist(), z.reshape(-1, z.shape[-1]).tolist(), **self.options)
        return np.array(rows).reshape(z.shape[:-1])


NEGATIVE = {"lam": (-1.0, "a non-negative number")}
FAMILY = [
    Case(keras_drsl.DRSLoss, {"lam": 0.7}, reference.drs_loss, NEGATIVE),
    Case(
        keras_drsl.PRSLoss,
        {"lam": 0.2, "start": 1, "end": 3},
        reference.prs_loss,
        NEGATIVE | {"start": (-1, "an integer of 0 or more"), "end": (2.0, "an integer")},
    ),
    Case(keras_drsl.Squentropy, {"lam": 0.7}, reference.squentropy, NEGATIVE),
    Case(
        keras_drsl.GuidedComplementEntropy,
        {"alpha": 0.4},
        reference.guided_complement_entropy,
        {"alpha": (math.nan, "a non-negative number")},
    ),
    Case(keras_drsl.ComplementObjective, {"lam": 1.5}, reference.complement_objective, NEGATIVE),
    Case(
        keras_drsl.ProbabilisticallyCompactLoss,
        {"margin": 0.8, "lam": 0.3},
        reference.probabilistically_compact,
        NEGATIVE | {"margin": (1.5, r"a number in \[0, 1\]")},
    ),
    Case(keras_drsl.LogitSqueezing, {"lam": 0.2}, reference.logit_squeezing, NEGATIVE),
    Case(keras_drsl.ZLoss, {"lam": 0.2}, reference.z_loss, NEGATIVE),
    Case(
        keras_drsl.BilateralSoftmaxLoss,
        {"positive_temperature": 0.7, "negative_temperature": 0.4},
        reference.bilateral_softmax,
        dict.fromkeys(("positive_temperature", "negative_temperature"), (0.0, "a positive number")),
    ),
]
BY_NAME = {case.loss.__name__: case for case in FAMILY}
each_loss = pytest.mark.parametrize("name", BY_NAME)
