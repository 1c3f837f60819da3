"""Models, data and reference computations that the tests of training share."""

import keras
import numpy as np

import keras_drsl
from tests import reference
from tests.backends import BACKEND

RATE, EPS, LAM = 0.5, 0.05, 0.3
# The weights of two classes are equal. So the cross-entropy increases along one direction, whatever the logits, and the
# worst input in the ball is known.
SLOPES = np.array([[1.0, -0.6, -0.6], [-0.4, 0.9, 0.9], [0.3, -0.8, -0.8], [-0.7, 0.2, 0.2]])
BIAS = np.array([0.1, 0.4, -0.3])


def data(count=12):
    rng = np.random.default_rng(0)
    return rng.uniform(0.2, 0.8, (count, 4)).astype("float32"), rng.integers(0, 3, count)


def linear(*last_layers):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), *last_layers])
    model.layers[0].set_weights([SLOPES, BIAS])
    return model


def smooth():
    """Return a model of two layers without kinks, with weights from NumPy."""
    rng = np.random.default_rng(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)])
    model.set_weights([rng.normal(size=weight.shape) for weight in model.get_weights()])
    return model


def wrap(model, *, loss=None, optimizer=None, graph=True, compiled=None, **options):
    """Return a compiled `AdversarialTraining`; without `graph`, one that runs eagerly where the backend can."""
    if "threat" not in options:
        options.setdefault("eps", EPS)
    # JAX unrolls the steps on a processor, and compiles few of them faster.
    robust = keras_drsl.AdversarialTraining(model, **{"steps": 3} | options)
    robust.compile(
        optimizer=keras.optimizers.SGD(RATE) if optimizer is None else optimizer,
        loss=keras_drsl.DRSLoss(LAM, from_logits=True) if loss is None else loss,
        metrics=["accuracy"],
        **{"run_eagerly": not graph and BACKEND != "jax"} | (compiled or {}),
    )
    return robust


def train(model, x, y, *, epochs=1, batch_size=12, fit=None, **options):
    """Train without shuffling. Return the weights and the history."""
    fit = {"epochs": epochs, "batch_size": batch_size, "shuffle": False, "verbose": 0} | (fit or {})
    history = wrap(model, **options).fit(x, y, **fit)
    return model.get_weights(), history.history


def softmax(z):
    return np.exp([reference.log_softmax(row) for row in z.tolist()])


def drs_losses(z, y, lam=LAM):
    return reference.each(reference.drs_loss, reference.one_hot(y, 3), z, lam=lam)


def drs_gradient(z, y, lam):
    """Compute the gradient of DRSLoss with respect to the logits, in closed form."""
    p, is_true = softmax(z), reference.one_hot(y, 3)
    others = np.where(is_true == 1, 0.0, np.log(p))
    mean = others.sum(1, keepdims=True) / 2
    return p - is_true + 2 * lam * np.where(is_true == 1, 0.0, others - mean)


def cross_entropies(z, y):
    return reference.each(reference.cross_entropy, reference.one_hot(y, 3), z)


def worst_inputs(x, y, eps=EPS, norm="inf"):
    """Return the inputs of the largest cross-entropy of the linear model in the ball."""
    direction = SLOPES[:, 1] - SLOPES[:, 0]
    direction = np.sign(direction) if norm == "inf" else direction / np.linalg.norm(direction)
    return x + eps * np.where(y == 0, 1, -1)[:, None] * direction


class NumPyMLP:
    """The smooth model and its training in float64."""

    def __init__(self, weights):
        self.weights = [weight.astype("float64") for weight in weights]

    def logits(self, x):
        kernel, bias, last_kernel, last_bias = self.weights
        self.hidden = np.tanh(x @ kernel + bias)
        return self.hidden @ last_kernel + last_bias

    def gradients(self, x, upstream):
        """Compute the gradients of the weights and of the inputs, for those of the logits."""
        kernel, _, last_kernel, _ = self.weights
        inner = (upstream @ last_kernel.T) * (1 - self.hidden**2)
        return [x.T @ inner, inner.sum(0), self.hidden.T @ upstream, upstream.sum(0)], inner @ kernel.T

    def attack(self, x, y, start, steps, step_size, eps):
        """Run PGD in L2 on the cross-entropy."""
        x_adv = x + start
        for _ in range(steps):
            z = self.logits(x_adv)
            _, gradient = self.gradients(x_adv, softmax(z) - reference.one_hot(y, 3))
            x_adv = x_adv + step_size * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
            size = np.linalg.norm(x_adv - x, axis=1, keepdims=True)
            x_adv = x + (x_adv - x) * np.minimum(1, eps / size)
        return x_adv

    def step(self, x, y, lam, sample_weight=1.0):
        upstream = drs_gradient(self.logits(x), y, lam) / len(x)
        gradients, _ = self.gradients(x, upstream * np.reshape(sample_weight, (-1, 1)))
        self.weights = [weight - RATE * gradient for weight, gradient in zip(self.weights, gradients, strict=True)]
