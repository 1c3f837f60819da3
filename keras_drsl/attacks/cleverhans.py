"""Attacks of the cleverhans library, set up so that a Keras 3 classifier is really attacked.

Left alone, cleverhans attacks the model's own prediction instead of the true label, starts PGD at the clean image,
starts Madry's attack in a ball of radius 0.3 whatever `eps` is, checks neither that it was given logits nor that the
image lies in the clip range, and traces the model again for every new callable. The classes here see to all that,
compile the whole attack, once for each model, and make its random starts depend on the seed and the example alone.

They need TensorFlow as the Keras backend, and `pip install "keras-drsl[attacks]"`.

The Carlini-Wagner and SPSA attacks of cleverhans 4.0.0 call optimizers in ways Keras 3 does not know, and are not
offered.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import numpy as np

from keras_drsl import _arguments
from keras_drsl.attacks import balls
from keras_drsl.attacks.attack import Attack, Batch
from keras_drsl.attacks.classifier import Classifier

NOT_OFFERED = {
    "CarliniWagnerL2": "it stops with an error on Keras 3's optimizers and, patched to run, reports 100 % robust",
    "SPSA": "it stops with an error on Keras 3's optimizers and takes one image at a time",
}


class _CleverhansAttack(Attack):
    """What the attacks share: the checks and one compiled program a model."""

    _function = ""
    _short = ""
    _random_start = False
    _losses: tuple[str, ...] = ("ce", "margin")  # what the library's function can be made to follow

    def __init__(
        self, eps: float, *, loss: str, norm: str | int, clip_min: float, clip_max: float, restarts: int, seed: int
    ) -> None:
        if keras.config.backend() != "tensorflow":
            raise RuntimeError(
                f"cleverhans needs `KERAS_BACKEND=tensorflow`. Received: KERAS_BACKEND={keras.config.backend()}"
            )
        _module(self._function)  # A missing library is reported before hours of training, not after.
        super().__init__(eps, norm=norm, clip_min=clip_min, clip_max=clip_max, seed=seed)
        self.loss = _arguments.check_choice("loss", loss, self._losses)
        self.restarts = _arguments.check_integer("restarts", restarts, at_least=1)

    @property
    def name(self) -> str:
        """What reports call the attack."""
        return f"cleverhans_{self._short}" + ("_margin" if self.loss == "margin" else "")

    def _knobs(self) -> dict[str, Any]:
        """Arguments of the library's function beside those that all of them take."""
        raise NotImplementedError

    def _search(self, classifier: Classifier, batch: Batch) -> np.ndarray:
        delta = np.zeros_like(batch.x)
        if self._random_start:
            delta = balls.random_points(batch.generators(self), batch.x.shape[1:], self.eps, self.norm)
        program = classifier.program(
            _whole_attack,
            attack=self._function,
            loss=self.loss,
            norm=self.norm,
            clip_min=self.clip_min,
            clip_max=self.clip_max,
            **self._knobs(),
        )
        return keras.ops.convert_to_numpy(program(batch.x, batch.y.astype("int64"), delta))


class FastGradientMethod(_CleverhansAttack):
    """One step of size `eps` along the gradient's sign (L-inf) or direction (L2).

    Use it for a first look only: whatever withstands it may still fall to any attack of more than one step.

    Formula: `x + eps * sign(g)`, or `x + eps * g / ||g||`, with `g` the gradient of the attack's loss at `x` and the
    true label; then clipped to `[clip_min, clip_max]`.

    Args:
        eps: the size of the perturbation, > 0, in units of the input.
        loss: what the attack drives up: `"ce"`, the cross-entropy, or `"margin"`, the largest rival's logit minus the
            true one's.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.

    Raises:
        ValueError: for arguments out of their range.
        ImportError: without cleverhans.
        RuntimeError: on a backend other than TensorFlow.

    Example:

    >>> from keras_drsl.attacks import cleverhans
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = cleverhans.FastGradientMethod(eps=0.1)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572.
    """

    _function = "fast_gradient_method"
    _short = "fgm"

    def __init__(
        self,
        eps: float,
        *,
        loss: str = "ce",
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
    ) -> None:
        super().__init__(eps, loss=loss, norm=norm, clip_min=clip_min, clip_max=clip_max, restarts=1, seed=0)

    def _knobs(self) -> dict[str, Any]:
        return {"eps": self.eps}


class BasicIterativeMethod(_CleverhansAttack):
    """Many small gradient steps from the input itself, each projected back into the ball around it.

    Use `ProjectedGradientDescent` instead, which is stronger by its random starts; this one is for comparison with
    published numbers.

    Formula: `x <- project(x + step_size * sign(g))`, or `g / ||g||` in L2, `steps` times; `g` as in
    `FastGradientMethod`. cleverhans keeps the last iterate, not the best.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        steps: how many steps, >= 1. The program, and the time to compile it, grow with them.
        step_size: the size of one, in (0, eps]; by default `2.5 * eps / steps`, at most `eps`.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.

    Raises:
        ValueError: for arguments out of their range.
        ImportError: without cleverhans.
        RuntimeError: on a backend other than TensorFlow.

    Example:

    >>> from keras_drsl.attacks import cleverhans
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = cleverhans.BasicIterativeMethod(eps=0.1, steps=5)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Kurakin et al., "Adversarial examples in the physical world", arXiv:1607.02533.
    """

    _function = "basic_iterative_method"
    _short = "bim"
    _losses: tuple[str, ...] = ("ce",)

    def __init__(
        self,
        eps: float,
        *,
        loss: str = "ce",
        steps: int = 40,
        step_size: float | None = None,
        restarts: int = 1,
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(eps, loss=loss, norm=norm, clip_min=clip_min, clip_max=clip_max, restarts=restarts, seed=seed)
        self.steps = _arguments.check_integer("steps", steps, at_least=1)
        if step_size is None:
            step_size = min(2.5 * self.eps / self.steps, self.eps)
        self.step_size = _arguments.check_number(
            "step_size", step_size, f"a number in (0, eps] = (0, {self.eps:g}]", lambda size: 0 < size <= self.eps
        )

    def _knobs(self) -> dict[str, Any]:
        return {"eps": self.eps, "eps_iter": self.step_size, "nb_iter": self.steps}


class ProjectedGradientDescent(BasicIterativeMethod):
    """Many small gradient steps, each projected back into the ball around the input, from random starts.

    Use it with both losses and take the worst case of the two: a model whose logits are large or whose rivals are
    alike blunts the gradient of the cross-entropy without being harder to break.

    Formula: as `BasicIterativeMethod`, starting anywhere in the ball.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        loss: `"ce"` or `"margin"`, as in `FastGradientMethod`.
        steps: how many steps, >= 1. The program, and the time to compile it, grow with them.
        step_size: the size of one, in (0, eps]; by default `2.5 * eps / steps`, at most `eps`.
        restarts: how many random starts, >= 1.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of the starts, >= 0.

    Raises:
        ValueError: for arguments out of their range.
        ImportError: without cleverhans.
        RuntimeError: on a backend other than TensorFlow.

    Example:

    >>> from keras_drsl.attacks import cleverhans
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> x, y = np.full((4, 8), 0.5), np.arange(4)
    >>> x_adv = cleverhans.ProjectedGradientDescent(eps=0.1, loss="margin", steps=5)(model, x, y)
    >>> bool(np.abs(x_adv - x).max() <= 0.1 + 1e-6)
    True

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083.
    """

    _function = "projected_gradient_descent"
    _short = "pgd"
    _random_start = True
    _losses: tuple[str, ...] = ("ce", "margin")

    def _knobs(self) -> dict[str, Any]:
        return super()._knobs() | {"rand_init": True}


class MadryEtAl(ProjectedGradientDescent):
    """`ProjectedGradientDescent` by cleverhans's other name, with starts in the ball of radius `eps`.

    See there for arguments, errors and reference; the loss is the cross-entropy.
    """

    _function = "madry_et_al"
    _short = "madry"
    _losses = ("ce",)

    def _knobs(self) -> dict[str, Any]:
        return BasicIterativeMethod._knobs(self)


class MomentumIterativeMethod(BasicIterativeMethod):
    """`BasicIterativeMethod` with steps along an accumulated gradient, on the cross-entropy.

    Formula: `v <- v + g / mean|g|`, `x <- project(x + step_size * sign(v))`, or `v / ||v||` in L2.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        steps: how many steps, >= 1. The program, and the time to compile it, grow with them.
        step_size: the size of one, in (0, eps]; by default `2.5 * eps / steps`, at most `eps`.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.

    Raises:
        ValueError: for arguments out of their range.
        ImportError: without cleverhans.
        RuntimeError: on a backend other than TensorFlow.

    Reference: Dong et al., "Boosting Adversarial Attacks with Momentum", arXiv:1710.06081.
    """

    _function = "momentum_iterative_method"
    _short = "mim"

    def __init__(
        self,
        eps: float,
        *,
        steps: int = 40,
        step_size: float | None = None,
        norm: str | int = "inf",
        clip_min: float = 0.0,
        clip_max: float = 1.0,
    ) -> None:
        super().__init__(eps, steps=steps, step_size=step_size, norm=norm, clip_min=clip_min, clip_max=clip_max)


def __getattr__(name: str) -> Any:
    if name in NOT_OFFERED:
        raise ImportError(f"{name} of cleverhans is not offered: {NOT_OFFERED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _module(function: str) -> Any:
    try:
        return importlib.import_module(f"cleverhans.tf2.attacks.{function}")
    except ImportError as error:
        raise ImportError('cleverhans attacks need `pip install "keras-drsl[attacks]"`') from error


def _whole_attack(
    classifier: Classifier, x: Any, y: Any, delta: Any, *, attack: str, loss: str, norm: str | int, **knobs: Any
) -> Any:
    """All steps of an attack of the library, from `x + delta` where it starts at random."""
    import tensorflow as tf

    def model_fn(x: Any) -> Any:
        return classifier(x)

    # cleverhans seeds nothing: the starts are drawn outside, and handed to it here while it is traced.
    descent = _module("projected_gradient_descent")
    margin = {"loss_fn": _margin} if loss == "margin" else {}
    with mock.patch.object(descent, "random_lp_vector", return_value=delta):
        x_adv = getattr(_module(attack), attack)(
            model_fn,
            x,
            y=y,
            norm=math.inf if norm == "inf" else norm,
            sanity_checks=False,
            **margin,
            **knobs,
        )
    return tf.convert_to_tensor(x_adv)


def _margin(labels: Any, logits: Any) -> Any:
    """The largest rival's logit minus the true one's, with the argument names cleverhans uses."""
    import tensorflow as tf

    is_true = tf.one_hot(labels, logits.shape[-1])
    # No logit is near 1e9, and a whole attack made of simple operations compiles in half the time.
    return tf.reduce_max(logits - 1e9 * is_true, axis=-1) - tf.reduce_sum(logits * is_true, axis=-1)


BY_NAME: dict[str, Callable[..., Attack]] = {
    "fgm": FastGradientMethod,
    "pgd": ProjectedGradientDescent,
    "bim": BasicIterativeMethod,
    "madry": MadryEtAl,
    "mim": MomentumIterativeMethod,
}
