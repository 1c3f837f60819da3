"""Attacks of the cleverhans library, with the settings that a Keras 3 classifier needs.

By default, cleverhans attacks the predicted class in place of the true one, starts PGD at the clean image, starts
Madry's attack in a ball of radius 0.3 whatever `eps` is, checks neither logits nor the clip range, and traces the model
again for each new callable. The classes here correct this, compile the whole attack once per model, and draw the random
starts from the seed and the example only.

They need TensorFlow as the Keras backend, and the package cleverhans. The Carlini-Wagner and SPSA attacks of cleverhans
4.0.0 call optimizers in ways that Keras 3 does not support, so they are not available.
"""

import importlib
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_drsl import _backend, _validation
from keras_drsl._typing import Array, Norm, Tensor
from keras_drsl.attacks.base import Attack, Batch
from keras_drsl.models.classifier import Classifier

NOT_AVAILABLE = {
    "CarliniWagnerL2": "it stops with an error on Keras 3's optimizers and, patched to run, reports 100 % robust",
    "SPSA": "it stops with an error on Keras 3's optimizers and takes one image at a time",
}


class CleverhansAttack(Attack):
    """The base of the attacks here: the checks, and one compiled program per model.

    Args:
        eps: The radius of the ball, > 0, in units of the input.
        loss: The loss that the attack increases: `"ce"`, the cross-entropy, or, where the class takes it, `"margin"`,
            the largest non-true logit minus the true one.
        restarts: How many random starts, >= 1.
        **options: `norm`, `clip_min`, `clip_max`, `threat` and `seed` of `keras_drsl.attacks.Attack`.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: Without cleverhans.
        RuntimeError: On a backend other than TensorFlow.
    """

    _function: ClassVar[str]  # the module and the function of cleverhans
    _short_name: ClassVar[str]
    _losses: ClassVar[tuple[str, ...]] = ("ce",)  # the losses that the function can be given

    def __init__(self, eps: float | None = None, *, loss: str = "ce", restarts: int = 1, **options: Any) -> None:
        _backend.require_tensorflow("cleverhans")
        _cleverhans_function(self._function)  # reports a missing library before hours of training
        super().__init__(eps, **options)
        self.loss = _validation.check_choice("loss", loss, self._losses)
        self.restarts = _validation.check_integer("restarts", restarts, at_least=1)

    @property
    def name(self) -> str:
        """The name of the attack in reports."""
        return f"cleverhans_{self._short_name}" + ("_margin" if self.loss == "margin" else "")

    def _params(self) -> dict[str, Any]:
        """Return the arguments of the library's function that not all of them take."""
        return {}

    def _start(self, batch: Batch) -> Array:
        """Return the perturbation that each row starts with."""
        return np.zeros_like(batch.x)

    def run(self, classifier: Classifier, batch: Batch) -> Array:
        """Search by the library's function; see the base class for arguments and result."""
        params = self.threat.to_dict() | self._params()
        program = classifier.compile(_whole_attack, attack=self._function, loss=self.loss, **params)
        found: Array = ops.convert_to_numpy(program(batch.x, batch.y.astype("int64"), self._start(batch)))
        return found


class FastGradientMethod(CleverhansAttack):
    """Take one step of size `eps` along the gradient's sign (L-inf) or direction (L2).

    Use it for a first look only. A model that withstands it may fall to any attack of several steps. Arguments and
    errors are those of `CleverhansAttack`; it takes both losses.

    Formula: `x + eps * sign(g)`, or `x + eps * g / ||g||`, clipped to `[clip_min, clip_max]`, with `g` the gradient of
    the attack's loss at `x` and the true label.

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572.
    """

    _function, _short_name, _losses = "fast_gradient_method", "fgm", ("ce", "margin")


class IterativeAttack(CleverhansAttack):
    """The base of the attacks of several steps.

    Args:
        eps: As in `CleverhansAttack`.
        steps: How many steps, >= 1. The program, and the time to compile it, grow with them.
        step_size: The size of a step, in (0, eps]; by default `2.5 * eps / steps`, at most `eps`.
        **options: All others of `CleverhansAttack`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, eps: float | None = None, *, steps: int = 40, step_size: float | None = None, **options: Any
    ) -> None:
        super().__init__(eps, **options)
        self.steps = _validation.check_integer("steps", steps, at_least=1)
        if step_size is None:
            step_size = min(2.5 * self.eps / self.steps, self.eps)
        self.step_size = _validation.check_number(
            "step_size", step_size, f"a number in (0, eps] = (0, {self.eps:g}]", lambda size: 0 < size <= self.eps
        )

    @property
    def num_evaluations(self) -> int:
        """About how many times one search evaluates the model per example; a gradient counts as three."""
        return 3 * self.steps

    def _params(self) -> dict[str, Any]:
        return {"eps_iter": self.step_size, "nb_iter": self.steps}


class BasicIterativeMethod(IterativeAttack):
    """Take small gradient steps on the cross-entropy from the input, each projected into the ball around it.

    Use `ProjectedGradientDescent` in its place: its random starts make it stronger. This attack is for comparison with
    published numbers. cleverhans returns the last iterate, not the best.

    Formula: `x <- project(x + step_size * sign(g))`, or `g / ||g||` in L2, `steps` times, with `g` as in
    `FastGradientMethod`.

    Reference: Kurakin et al., "Adversarial examples in the physical world", arXiv:1607.02533.
    """

    _function, _short_name = "basic_iterative_method", "bim"


class MomentumIterativeMethod(IterativeAttack):
    """Take the steps of `BasicIterativeMethod` along an accumulated gradient.

    Formula: `v <- v + g / mean|g|`, `x <- project(x + step_size * sign(v))`, or `v / ||v||` in L2.

    Reference: Dong et al., "Boosting Adversarial Attacks with Momentum", arXiv:1710.06081.
    """

    _function, _short_name = "momentum_iterative_method", "mim"


class ProjectedGradientDescent(IterativeAttack):
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

    _function, _short_name = "projected_gradient_descent", "pgd"
    _losses: ClassVar[tuple[str, ...]] = ("ce", "margin")

    def _params(self) -> dict[str, Any]:
        return super()._params() | {"rand_init": True}

    def _start(self, batch: Batch) -> Array:
        return self.threat.sample(batch.generators(self), batch.x.shape[1:])


class MadryEtAl(ProjectedGradientDescent):
    """Run `ProjectedGradientDescent` on the cross-entropy by cleverhans's function `madry_et_al`.

    The random starts lie in the ball of radius `eps`.
    """

    _function, _short_name = "madry_et_al", "madry"
    _losses: ClassVar[tuple[str, ...]] = ("ce",)

    def _params(self) -> dict[str, Any]:
        return IterativeAttack._params(self)


def __getattr__(name: str) -> Any:
    if name in NOT_AVAILABLE:
        raise ImportError(f"{name} of cleverhans is not available: {NOT_AVAILABLE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _cleverhans_function(name: str) -> FunctionType:
    try:
        function: FunctionType = getattr(importlib.import_module(f"cleverhans.tf2.attacks.{name}"), name)
    except ImportError as error:
        raise ImportError("The attacks of cleverhans need `pip install cleverhans`") from error
    return function


def _with_start(function: FunctionType, delta: Tensor) -> FunctionType:
    """Return a copy of a function of cleverhans that starts at `x + delta`.

    The library draws its starts without a seed and takes no start as an argument. Only the copy sees another
    `random_lp_vector`; the library itself is not patched.
    """
    names = {**function.__globals__, "random_lp_vector": lambda *arguments, **options: delta}
    inner = names.get("projected_gradient_descent")
    if isinstance(inner, FunctionType) and inner is not function:
        names["projected_gradient_descent"] = _with_start(inner, delta)
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _whole_attack(
    classifier: Classifier, x: Tensor, y: Tensor, delta: Tensor, *, attack: str, loss: str, norm: Norm, **params: Any
) -> Tensor:
    """Run all steps of an attack of the library, from `x + delta` where it starts at random."""
    margin = {"loss_fn": _margin} if loss == "margin" else {}
    x_adv = _with_start(_cleverhans_function(attack), delta)(
        lambda x: classifier(x),  # the library needs a plain function
        x,
        y=y,
        norm=math.inf if norm == "inf" else norm,
        sanity_checks=False,
        **margin,
        **params,
    )
    return ops.convert_to_tensor(x_adv)


def _margin(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the largest non-true logit minus the true one; cleverhans passes these argument names."""
    is_true = ops.one_hot(labels, logits.shape[-1])
    # Subtracting 1e9 excludes the true class. The program of an attack of such operations compiles in half the time.
    return ops.max(logits - 1e9 * is_true, axis=-1) - ops.sum(logits * is_true, axis=-1)


BY_NAME: dict[str, Callable[..., Attack]] = {
    "fgm": FastGradientMethod,
    "pgd": ProjectedGradientDescent,
    "bim": BasicIterativeMethod,
    "madry": MadryEtAl,
    "mim": MomentumIterativeMethod,
}
