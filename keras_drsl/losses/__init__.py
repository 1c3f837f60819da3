"""Losses, one a file."""

from keras_drsl.losses.drs import DRSLoss, drs_loss

__all__ = ["DRSLoss", "drs_loss"]
