"""Measure the loss of a vocabulary-sized linear head: dense logits against `linear_drs_loss`.

It prints seconds and the memory needed beyond the gradients for value and gradients with respect to features and
kernel, and the targets. About three minutes on two cores.

    python -m benchmarks.linear_head --out results
"""

import json

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import keras
import numpy as np
from keras import ops

import keras_drsl

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


def main():
    if ARGS.backend == "torch":
        raise SystemExit("linear_drs_loss needs TensorFlow or JAX. Received: --backend torch")
    sizes = SIZES[:1] if ARGS.quick else SIZES
    if ARGS.memory:
        calls, gradients = contestants(*sizes[-1])
        print(json.dumps({name: measure.peak_bytes(call) - gradients for name, call in calls.items()}))
        return
    rows = [run_size(*size, ARGS.quick) for size in sizes]
    seconds = rows[-1]["seconds"]
    time = measure.ratio(seconds["linear"], seconds["dense"])
    targets = [{"name": "linear / dense, time", "value": time["ratio"], "spread": time["spread"], "target": 1.4}]
    needed = measure.memory_in_fresh_process(ARGS)
    if needed:
        print("memory beyond the gradients:", {name: f"{value / 2**20:.0f} MiB" for name, value in needed.items()})
        share = needed["linear"] / needed["dense"]
        targets.append({"name": "linear / dense, temporary memory", "value": share, "target": 0.1})
    targets = measure.verdict(targets)
    measure.write(ARGS, "linear_head", {"rows": rows, "memory_bytes": needed, "targets": targets})


if __name__ == "__main__":
    main()
