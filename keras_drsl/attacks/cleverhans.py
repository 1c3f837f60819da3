"""Attacks of the cleverhans library, set up so that a Keras 3 classifier is really attacked.

Left alone, cleverhans attacks the model's own prediction instead of the true label, starts PGD at the clean image,
checks neither that it was given logits nor that the image lies in the clip range, and traces the model again for
every new callable. The classes here see to all that and compile the whole attack, once for each model.

They need TensorFlow as the Keras backend, and `pip install "keras-drsl[attacks]"`.

The Carlini-Wagner and SPSA attacks of cleverhans 4.0.0 call optimizers in ways Keras 3 does not know, and are not
offered.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_drsl import _arguments

LOSSES = ("ce", "margin")


class _CleverhansAttack:
    """What the attacks share: the checks, one compiled program a model, the best of several starts."""

    def __init__(
        self, eps: float, *, loss: str, norm: str | int, clip_min: float, clip_max: float, restarts: int, seed: int
    ) -> None:
        if keras.config.backend() != "tensorflow":
            raise RuntimeError(
                f"cleverhans needs `KERAS_BACKEND=tensorflow`. Received: KERAS_BACKEND={keras.config.backend()}"
            )
        _import_attacks()  # A missing library is reported before hours of training, not after.
        self.eps = _arguments.check_positive("eps", eps)
        self.loss = _arguments.check_choice("loss", loss, LOSSES)
        self.norm = _arguments.check_choice("norm", "inf" if norm == math.inf else norm, ("inf", 2))
        self.clip_min, self.clip_max = float(clip_min), float(clip_max)
        if not self.clip_min < self.clip_max:
            raise ValueError(f"`clip_min` must be below `clip_max`. Received: clip_min={clip_min}, clip_max={clip_max}")
        self.restarts = _arguments.check_integer("restarts", restarts, at_least=1)
        self.seed = _arguments.check_integer("seed", seed)
        self._programs: dict[Any, Any] = {}

    def __call__(self, logits_fn: Callable, x: Any, y: Any) -> np.ndarray:
        """Attack a batch.

        Args:
            logits_fn: a `keras.Model` or any function that maps `x` to **logits**, shape `(batch, C)`. Keep one and
                pass it again: a new one is compiled anew. The attack keeps it as long as it lives itself.
            x: inputs within `[clip_min, clip_max]`, shape `(batch, ...)`.
            y: the true labels, class ids `(batch,)` or `(batch, 1)` or one-hot `(batch, C)`.

        Returns:
            Inputs of the same shape, within `eps` of `x` and within the clip range: for each the first start's result
            that is misclassified, or else the last start's. What one start broke, the next ones leave alone.

        Raises:
            ValueError: for inputs outside the clip range, labels that don't match or are no classes, or a function
                that returns probabilities.
        """
        x = np.asarray(x, dtype="float32")
        if len(x) == 0:
            return x
        if not (x.min() >= self.clip_min and x.max() <= self.clip_max):
            raise ValueError(
                f"`x` must lie in [clip_min, clip_max] = [{self.clip_min:g}, {self.clip_max:g}]. "
                f"Received: values from {x.min():g} to {x.max():g}"
            )
        key = (logits_fn, x.shape[1:])
        if key not in self._programs:
            classes = _count_classes(_logits(logits_fn, x[:100]))
            self._programs[key] = self._compile(*key), classes
        program, classes = self._programs[key]
        y = _class_ids(y, len(x), classes)
        x_adv, standing = np.empty_like(x), np.arange(len(x))
        for _ in range(self.restarts):
            attacked, broken = program(x[standing], y[standing])
            x_adv[standing] = attacked
            standing = standing[~broken.numpy()]
            if len(standing) == 0:
                break
        return x_adv

    def _compile(self, logits_fn: Callable, shape: tuple[int, ...]) -> Any:
        import tensorflow as tf

        # cleverhans traces its gradient once for each callable, so there must be one.
        def model_fn(x: Any) -> Any:
            return _logits(logits_fn, x)

        loss_fn = _margin if self.loss == "margin" else tf.nn.sparse_softmax_cross_entropy_with_logits

        @tf.function(autograph=False)
        def program(x: Any, y: Any) -> Any:
            # Inside a trace this seeds the traced program alone.
            tf.random.set_seed(self.seed)
            x_adv = self._attack(
                model_fn,
                x,
                y=y,
                norm=math.inf if self.norm == "inf" else self.norm,
                loss_fn=loss_fn,
                clip_min=self.clip_min,
                clip_max=self.clip_max,
                sanity_checks=False,
            )
            return x_adv, tf.argmax(model_fn(x_adv), axis=-1) != y

        return program.get_concrete_function(tf.TensorSpec((None, *shape)), tf.TensorSpec((None,), "int64"))

    def _attack(self, model_fn: Callable, x: Any, **knobs: Any) -> Any:
        raise NotImplementedError


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

    def _attack(self, model_fn: Callable, x: Any, **knobs: Any) -> Any:
        fast_gradient_method, _ = _import_attacks()
        return fast_gradient_method(model_fn, x, self.eps, **knobs)


class ProjectedGradientDescent(_CleverhansAttack):
    """Many small gradient steps, each projected back into the ball around `x`, from random starts.

    Use it with both losses and take the worst case of the two: a model whose logits are large or whose rivals are
    alike blunts the gradient of the cross-entropy without being harder to break.

    Formula: `x <- project(x + step_size * sign(g))`, or `g / ||g||` in L2, `steps` times, starting anywhere in the
    ball; `g` as in `FastGradientMethod`. cleverhans keeps the last iterate, not the best.

    Args:
        eps: the radius of the ball, > 0, in units of the input.
        loss: `"ce"` or `"margin"`, as in `FastGradientMethod`.
        steps: how many steps, >= 1.
        step_size: the size of one, in (0, eps]; by default `2.5 * eps / steps`, at most `eps`.
        restarts: how many random starts, >= 1.
        norm: `"inf"` or 2.
        clip_min: the smallest valid input value.
        clip_max: the largest valid input value.
        seed: the seed of the starts. A new attack with the same seed makes the same starts.

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

    def _attack(self, model_fn: Callable, x: Any, **knobs: Any) -> Any:
        _, projected_gradient_descent = _import_attacks()
        return projected_gradient_descent(model_fn, x, self.eps, self.step_size, self.steps, rand_init=True, **knobs)


def _import_attacks() -> tuple[Callable, Callable]:
    try:
        from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
        from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent
    except ImportError as error:
        raise ImportError('cleverhans attacks need `pip install "keras-drsl[attacks]"`') from error
    return fast_gradient_method, projected_gradient_descent


def _margin(labels: Any, logits: Any) -> Any:
    """The largest rival's logit minus the true one's, with the argument names cleverhans uses."""
    import tensorflow as tf

    is_true = tf.one_hot(labels, logits.shape[-1])
    # No logit is near 1e9, and a whole attack made of simple operations compiles in half the time.
    return tf.reduce_max(logits - 1e9 * is_true, axis=-1) - tf.reduce_sum(logits * is_true, axis=-1)


def _logits(logits_fn: Callable, x: Any) -> Any:
    """Logits in float32, as at inference: no dropout, no input noise, BatchNormalization's own statistics."""
    logits = logits_fn(x, training=False) if isinstance(logits_fn, keras.Layer) else logits_fn(x)
    return keras.ops.cast(logits, "float32")


def _count_classes(outputs: Any) -> int:
    """The number of classes, if the outputs can be logits."""
    outputs = keras.ops.convert_to_numpy(outputs)
    if outputs.min() >= 0 and np.allclose(outputs.sum(axis=-1), 1.0, atol=1e-3):
        raise ValueError(
            "`logits_fn` must return logits, but its outputs look like probabilities: they are not negative and sum to "
            "1. Give the model before its softmax."
        )
    return outputs.shape[-1]


def _class_ids(y: Any, count: int, classes: int) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim == 2:
        y = y[:, 0] if y.shape[1] == 1 else y.argmax(axis=1)
    if y.shape != (count,):
        raise ValueError(f"`y` must hold one label for each of the {count} inputs. Received: y.shape={y.shape}")
    if not np.isin(y, np.arange(classes)).all():
        wrong = y[~np.isin(y, np.arange(classes))][0]
        raise ValueError(f"`y` must hold class ids in [0, {classes}). Received: {wrong}")
    return y.astype("int64")
