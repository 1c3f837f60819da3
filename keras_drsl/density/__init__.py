"""Density-Softmax: probabilities that become less sure away from the training data."""

from keras_drsl.density.density_softmax import DensitySoftmax
from keras_drsl.density.real_nvp import RealNVP

__all__ = ["DensitySoftmax", "RealNVP"]
