"""Attacks on classifiers: `attack(logits_fn, x, y)` returns the worst inputs found near `x`."""

from keras_drsl.attacks.apgd import APGD
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.attacks.fast import FastAPGD, FastSquare
from keras_drsl.attacks.noise import Noise
from keras_drsl.attacks.pgd import FGSM, PGD
from keras_drsl.attacks.pool import Pool
from keras_drsl.attacks.square import Square
from keras_drsl.attacks.transfer import Transfer

__all__ = ["APGD", "FGSM", "PGD", "Attack", "Batch", "FastAPGD", "FastSquare", "Noise", "Pool", "Square", "Transfer"]
