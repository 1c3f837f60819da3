"""Measure the loss of a vocabulary-sized linear head: dense logits against `linear_drs_loss` and `LinearHeadTraining`.

It prints seconds and the memory needed beyond the gradients for value and gradients with respect to features and
kernel; and, where keras-hub is installed, the same for a step of `fit` of its GPT2, with a small configuration and the
whole vocabulary, for each loss. Then the targets. About eight minutes on two cores.

    python -m benchmarks.linear_head --out results
"""

import importlib.util
import json

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import keras
import numpy as np
from keras import ops

import keras_drsl
from keras_drsl.training import LinearHeadTraining

LOSSES = {
    "drs": keras_drsl.DRSLoss(0.1, from_logits=True),
    "prs": keras_drsl.PRSLoss(from_logits=True),
    "cross_entropy": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
}
HAS_HUB = importlib.util.find_spec("keras_hub") is not None
SIZES = [(256, 128, 8_192), (512, 256, 32_768), (1_024, 256, 131_072)]


def dense(features, kernel, labels):
    return ops.mean(keras_drsl.drs_loss(labels, ops.matmul(features, kernel), from_logits=True))


def linear(features, kernel, labels):
    return ops.mean(keras_drsl.linear_drs_loss(labels, features, kernel))


def compiled(function, features, kernel, labels):
    """Return a function that computes value and gradients in a compiled program, and waits for them."""
    features, kernel, labels = (ops.convert_to_tensor(x) for x in (features, kernel, labels))
    if keras.config.backend() == "jax":
        import jax

        program = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        return lambda: jax.block_until_ready(program(features, kernel, labels))

    import tensorflow as tf

    @tf.function(jit_compile=True)
    def program(features, kernel, labels):
        with tf.GradientTape() as tape:
            tape.watch([features, kernel])
            value = function(features, kernel, labels)
        return value, tape.gradient(value, [features, kernel])

    return lambda: program(features, kernel, labels)[1][1][0, 0].numpy()


def contestants(tokens, size, classes):
    """Return both ways to compute value and gradients, and the size of the gradients."""
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (tokens, size)).astype("float32")
    kernel = rng.normal(0, size**-0.5, (size, classes)).astype("float32")
    labels = rng.integers(0, classes, tokens)
    calls = {function.__name__: compiled(function, features, kernel, labels) for function in (dense, linear)}
    return calls, features.nbytes + kernel.nbytes


def run_size(tokens, size, classes, quick):
    calls, _ = contestants(tokens, size, classes)
    seconds = measure.interleave(calls, 2 if quick else 7)
    for name, values in seconds.items():
        print(f"{tokens} x {size} x {classes}, {name}: {measure.quartiles(values)[1]:.3f} s", flush=True)
    return {"tokens": tokens, "features": size, "classes": classes, "seconds": seconds}


def losses_of_fit(quick):
    """Return the names of the losses that GPT2 is trained with, none without keras-hub."""
    return list(LOSSES)[: 1 if quick else None] if HAS_HUB else []


def steps_of_fit(quick, name):
    """Return functions that take one step of `fit` of GPT2 with a loss, with its logits and without."""
    import keras_hub

    vocabulary, length, batch = (1_000, 16, 2) if quick else (50_257, 128, 8)
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(0, vocabulary, (2, batch, length))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    calls = {}
    for way in ("dense", "linear"):
        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=vocabulary, num_layers=2, num_heads=4, hidden_dim=256, intermediate_dim=1024,
            max_sequence_length=length,
        )  # fmt: skip
        model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
        options = {"loss": LOSSES[name], "weighted_metrics": None}
        if way == "linear":
            model, options = LinearHeadTraining(model, LOSSES[name]), {}
        model.compile(keras.optimizers.SGD(0.01), jit_compile=True, **options)
        data = measure.fit_arguments(inputs, labels, batch)
        calls[f"{name}_{way}"] = lambda model=model, data=data: model.fit(**data, verbose=0)
    return calls


def run_fit(quick):
    """Measure the time of a step of `fit` with each loss, in both ways."""
    rows = []
    for name in losses_of_fit(quick):
        seconds = measure.interleave(steps_of_fit(quick, name), 2 if quick else 7)
        rows.append({"loss": name, "seconds": seconds})
        medians = {way: measure.quartiles(values)[1] for way, values in seconds.items()}
        print("fit of GPT2, " + ", ".join(f"{way} {median:.3f} s" for way, median in medians.items()), flush=True)
    return rows


def targets_of_fit(rows, needed):
    """Return the targets of `LinearHeadTraining`."""
    targets = []
    for row in rows:
        name = row["loss"]
        found = measure.ratio(row["seconds"][f"{name}_linear"], row["seconds"][f"{name}_dense"])
        what = f"LinearHeadTraining / fit, GPT2, {name}"
        targets.append({"name": f"{what}, time", "value": found["ratio"], "spread": found["spread"], "target": 1.2})
        if needed:
            share = needed[f"{name}_linear"] / needed[f"{name}_dense"]
            targets.append({"name": f"{what}, memory of a step", "value": share, "target": 0.1})
    return targets


def main():
    if ARGS.backend == "torch":
        raise SystemExit("linear_drs_loss needs TensorFlow or JAX. Received: --backend torch")
    sizes = SIZES[:1] if ARGS.quick else SIZES
    if ARGS.memory:
        calls, gradients = contestants(*sizes[-1])
        peaks = {name: measure.peak_bytes(call) - gradients for name, call in calls.items()}
        for name in losses_of_fit(ARGS.quick):
            peaks |= {way: measure.peak_bytes(call) for way, call in steps_of_fit(ARGS.quick, name).items()}
        print(json.dumps(peaks))
        return
    rows = [run_size(*size, ARGS.quick) for size in sizes]
    seconds = rows[-1]["seconds"]
    time = measure.ratio(seconds["linear"], seconds["dense"])
    targets = [{"name": "linear / dense, time", "value": time["ratio"], "spread": time["spread"], "target": 1.4}]
    fit = run_fit(ARGS.quick)
    needed = measure.memory_in_fresh_process(ARGS)
    if needed:
        print("memory beyond the gradients:", {name: f"{value / 2**20:.0f} MiB" for name, value in needed.items()})
        share = needed["linear"] / needed["dense"]
        targets.append({"name": "linear / dense, temporary memory", "value": share, "target": 0.1})
    targets = measure.verdict(targets + targets_of_fit(fit, needed))
    record = {"rows": rows, "fit": fit, "memory_bytes": needed, "targets": targets}
    measure.write(ARGS, "linear_head", record, {"keras-hub"} if HAS_HUB else ())


if __name__ == "__main__":
    main()
