"""What a training step takes by each method of AdversarialTraining, over a step of plain training.

The CNN of `benchmarks.step_overhead` with DRSLoss, by `fit`, the methods taking turns. Beside flat training, which
takes the slope of the loss from a small step, its exact gradient penalty by a second backward pass, on TensorFlow. Two
noisy copies of half a batch make a step of equal size. About ten minutes on two cores.

    python -m benchmarks.method_steps --out results
"""

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import keras
import numpy as np

import keras_drsl
from benchmarks.step_overhead import EPS, cnn
from keras_drsl.training import METHODS, improved_kl_penalty

MOST = 2.2  # of flat training
TRAININGS = {
    "consistency": "consistency",
    "flat": "flat",
    "fgsm": "fgsm",
    "nfgsm": "nfgsm",
    "pgd, 10 steps": "pgd",
    "trades, 10 steps": "trades",
    "trades with the improved divergence": METHODS["trades"].replace(penalty=improved_kl_penalty),
    "mart, 10 steps": "mart",
}


def double_backprop(model):
    """Return a model on TensorFlow that trains another on the loss plus EPS times the L1 norm of its input gradient."""
    import tensorflow as tf

    class DoubleBackprop(keras.Model):
        def __init__(self):
            super().__init__()
            self.model = model

        def call(self, x, training=None):
            return self.model(x, training=training)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as outer:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    losses = keras_drsl.drs_loss(y, self.model(x, training=True), 0.3, from_logits=True)
                slopes = tf.reduce_sum(tf.abs(tape.gradient(losses, x)), axis=[1, 2, 3])
                loss = tf.reduce_mean(losses + EPS * slopes)
            variables = self.model.trainable_variables
            self.optimizer.apply_gradients(zip(outer.gradient(loss, variables), variables, strict=True))
            return {"loss": loss}

    return DoubleBackprop()


def trainings():
    """Return by name a compiled model and the size of its batch."""
    plain, batch, *_ = cnn(activation=None)
    made = {"plain": (plain, batch)}
    for name, method in TRAININGS.items():
        robust = keras_drsl.AdversarialTraining(cnn(activation=None)[0], EPS, method=method)
        made[name] = robust, batch // 2 if method == "consistency" else batch
    if keras.config.backend() == "tensorflow":
        made["flat by a second backward pass"] = double_backprop(cnn(activation=None)[0]), batch
    for model, _ in made.values():
        model.compile("adam", keras_drsl.DRSLoss(0.3, from_logits=True))
    return made


def main():
    steps, rounds = (2, 2) if ARGS.quick else (10, 15)
    rng, calls = np.random.default_rng(0), {}
    for name, (model, batch) in trainings().items():
        x, y = rng.random((steps * batch, 28, 28, 1), "float32"), rng.integers(0, 10, steps * batch)
        data = measure.fit_arguments(x, y, batch)
        calls[name] = lambda model=model, data=data: model.fit(**data, verbose=0)
    seconds = measure.interleave(calls, rounds)
    rows = []
    for name, values in seconds.items():
        found = measure.ratio(values, seconds["plain"])
        rows.append({"training": name, "seconds_a_step": [value / steps for value in values], **found})
        low, high = found["spread"]
        print(f"{name:36} {found['ratio']:6.2f}, turns {low:.2f} to {high:.2f}", flush=True)
    flat = next(row for row in rows if row["training"] == "flat")
    target = {"name": "a step of flat training / plain", "value": flat["ratio"], "spread": flat["spread"]}
    targets = measure.verdict([target | {"target": MOST}])
    measure.write(ARGS, "method_steps", {"rows": rows, "steps": steps, "rounds": rounds, "targets": targets})


if __name__ == "__main__":
    main()
