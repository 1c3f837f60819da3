"""Attacks of the cleverhans library, with the settings that a Keras 3 classifier needs.

By default, cleverhans attacks the predicted class in place of the true one, draws without a seed, checks neither logits
nor the clip range, and traces the model for each new callable. The classes here correct this, and compile the whole
attack once per model. They need cleverhans, and TensorFlow as the Keras backend.
"""

import importlib
import math
from types import FunctionType
from typing import Any

import numpy as np
from keras import ops

from keras_drsl import _backend, _validation
from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.models.classifier import Classifier


class FastGradientMethod(Attack):
    """Take one step of size `eps` along the gradient's sign (L-inf) or direction (L2); the base of the attacks here.

    Use it for a first look only: a model that withstands it may fall to any attack of several steps.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        loss: The loss to increase: `"ce"`, the cross-entropy, or, here and in `ProjectedGradientDescent`, `"margin"`,
            the largest non-true logit minus the true one.
        restarts: How many searches per example, >= 1.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: Without cleverhans.
        RuntimeError: On a backend other than TensorFlow.

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572.
    """

    _function, _short_name = "fast_gradient_method", "fgm"  # in cleverhans, and in reports
    _losses: tuple[str, ...] = ("ce", "margin")
    _takes_fixed = False
    _start: dict[str, Any] = {}  # noqa: RUF012 -- never changed

    def __init__(self, eps: float | None = None, *, loss: str = "ce", restarts: int = 1, **options: Any) -> None:
        _backend.require_tensorflow("cleverhans")
        _load(self._function)  # reports a missing library before hours of training
        super().__init__(eps, **options)
        for name in ("eps", "clip_min", "clip_max", "mask"):
            if isinstance(getattr(self, name), tuple):
                raise ValueError(
                    f"`{name}` must be one number for attacks of cleverhans. For one per channel or feature, use suite "
                    f"'standard' or 'quick'. Received: {name}={getattr(self, name)!r:.60}"
                )
        if self.norm == 1:
            raise ValueError(
                "`norm` must be 'inf' or 2 for attacks of cleverhans, whose steps in L1 change one feature at a time. "
                "Use suite 'standard' or 'quick'. Received: norm=1"
            )
        self.loss = _validation.check_choice("loss", loss, self._losses)
        self._steps: dict[str, Any] = {}  # what only attacks of many steps pass to the library
        self.restarts = _validation.check_integer("restarts", restarts, at_least=1)

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return f"cleverhans_{self._short_name}" + ("_margin" if self.loss == "margin" else "")

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by the library's function; see the base class for arguments and result."""
        start = np.zeros_like(batch.x)
        if self._start:
            start = self.threat.sample(batch.generators(self), batch.x.shape[1:])
        params = self.threat.to_dict() | self._steps
        program = classifier.compile(_whole_attack, attack=self._function, loss=self.loss, **params)
        classifier.count_gradients(len(batch.x) * self._steps.get("nb_iter", 1))
        return np.asarray(program(batch.x, batch.y.astype("int64"), start))


class BasicIterativeMethod(FastGradientMethod):
    """Take small gradient steps on the cross-entropy from the input, each projected into the ball around it.

    Use `ProjectedGradientDescent` in its place: its random starts make it stronger. This attack is for comparison with
    published numbers. cleverhans returns the last iterate, not the best.

    Args:
        eps: The radius of the ball.
        steps: How many steps, >= 1. The program, and the time to compile it, grow with them.
        step_size: The size of a step, in (0, eps]; by default `2.5 * eps / steps`, at most `eps`.
        **options: All others of `FastGradientMethod`.

    Raises:
        ValueError: If an argument is out of its range.

    Reference: Kurakin et al., "Adversarial examples in the physical world", arXiv:1607.02533.
    """

    _function, _short_name = "projected_gradient_descent", "bim"
    _losses: tuple[str, ...] = ("ce",)

    def __init__(
        self, eps: float | None = None, *, steps: int = 40, step_size: float | None = None, **options: Any
    ) -> None:
        super().__init__(eps, **options)
        self.steps = _validation.check_integer("steps", steps, at_least=1)
        step_size = min(2.5 * self.eps / self.steps, self.eps) if step_size is None else step_size
        rule = f"a number in (0, eps] = (0, {self.eps:g}]"
        self.step_size = _validation.check_number("step_size", step_size, rule, lambda size: 0 < size <= self.eps)
        self._steps = {"eps_iter": self.step_size, "nb_iter": self.steps} | self._start

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the model per example; a gradient counts as three."""
        return 3 * self.steps


class MomentumIterativeMethod(BasicIterativeMethod):
    """Take the steps of `BasicIterativeMethod` along an accumulated gradient, `v <- v + g / mean|g|`.

    Reference: Dong et al., "Boosting Adversarial Attacks with Momentum", arXiv:1710.06081.
    """

    _function, _short_name = "momentum_iterative_method", "mim"


class ProjectedGradientDescent(BasicIterativeMethod):
    """Take the steps of `BasicIterativeMethod` from random starts, on the cross-entropy or the margin.

    Use it with both losses, and take the worst case of the two. The gradient of the cross-entropy is small for large
    logits and for equal non-true logits, although such a model is not harder to break.

    Example:

    >>> from keras_drsl.attacks import cleverhans
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(10)])
    >>> attack = cleverhans.ProjectedGradientDescent(eps=0.1, loss="margin", steps=5)
    >>> attack(model, np.full((4, 8), 0.5), np.arange(4)).shape
    (4, 8)

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083.
    """

    _short_name, _start = "pgd", {"rand_init": True}
    _losses: tuple[str, ...] = ("ce", "margin")


class MadryEtAl(ProjectedGradientDescent):
    """Run `ProjectedGradientDescent` on the cross-entropy, with all starts in the ball (cleverhans: within 0.3)."""

    _short_name = "madry"
    _losses = ("ce",)


def _load(name: str) -> FunctionType:
    try:
        function: FunctionType = getattr(importlib.import_module(f"cleverhans.tf2.attacks.{name}"), name)
    except ImportError as error:
        raise ImportError("The attacks of cleverhans need `pip install cleverhans`") from error
    return function


def _whole_attack(
    classifier: Classifier, x: Tensor, y: Tensor, start: Tensor, *, attack: str, loss: str, norm: Norm, **params: Any
) -> Tensor:
    """Run all steps of an attack of the library; projected gradient descent begins at `x + start`."""
    original = _load(attack)
    # The library takes no start as an argument. Only this copy of its function draws `start`.
    names = {**original.__globals__, "random_lp_vector": lambda *args, **options: start}
    function = FunctionType(original.__code__, names, argdefs=original.__defaults__)
    params |= {"norm": math.inf if norm == "inf" else norm} | ({"loss_fn": _margin} if loss == "margin" else {})
    return ops.convert_to_tensor(function(lambda x: classifier(x), x, y=y, sanity_checks=False, **params))


def _margin(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the largest non-true logit minus the true one; cleverhans passes these argument names."""
    is_true = ops.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    # Subtracting 1e9 excludes the true class, and such operations compile in half the time.
    return ops.max(logits - 1e9 * is_true, axis=-1) - ops.sum(logits * is_true, axis=-1)


_ATTACKS = (FastGradientMethod, ProjectedGradientDescent, BasicIterativeMethod, MadryEtAl, MomentumIterativeMethod)
BY_NAME = {attack._short_name: attack for attack in _ATTACKS}
