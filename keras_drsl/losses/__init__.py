"""Losses, one a file."""

from keras_drsl.losses.drs import DRSLoss, drs_loss
from keras_drsl.losses.linear_drs import linear_drs_loss

__all__ = ["DRSLoss", "drs_loss", "linear_drs_loss"]
