"""Measure time and memory of value and gradient: DRSLoss and PRSLoss against Keras's cross-entropy.

It prints milliseconds per call (medians of interleaved turns), the memory that a call needs beyond the gradient, and
whether the targets are met; it writes JSON. About four minutes on two cores.

`xla` is the whole computation compiled, as under `jit_compile=True`, and `compiled` by `torch.compile`. The others are
the default on TensorFlow without a GPU, and eager on PyTorch. `formula` is DRSLoss without its fused form. `copy` reads
the logits and writes as many numbers: nothing that makes a gradient can be faster. With torch installed,
`authors_torch` and `authors_prs_torch` are the computations of the papers' published code; the second sorts each row.

    python -m benchmarks.loss_speed --backend tensorflow --out results

With `--family`, the other forms and losses: DRSLoss on probabilities and in softmax space, and its peers, each against
Keras's cross-entropy on the same predictions.

    python -m benchmarks.loss_speed --backend tensorflow --out results --family
"""

import importlib.util
import json
import shutil

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(
        __doc__, more=lambda parser: parser.add_argument("--family", action="store_true", help="other forms and losses")
    )

import keras
import numpy as np
from keras import ops

import keras_drsl
from keras_drsl import losses as family
from keras_drsl._backend._common import available_cores

SIZES = [
    *((128, 10), (65_536, 10), (256, 100), (256, 1_000), (1_024, 1_000), (512, 32_000), (128, 262_144)),
    (32_768, 1_000),
]
FAMILY_SIZES = [(128, 10), (65_536, 10), (256, 1_000), (1_024, 1_000)]
FAMILY_RATIO = 1.15
PEERS = (
    *(family.ComplementObjective, family.GuidedComplementEntropy, family.LogitSqueezing, family.PRSLoss),
    *(family.ProbabilisticallyCompactLoss, family.Squentropy, family.ZLoss),
)
OVER_CLASSES = [(256, classes) for classes in (10, 100, 1_000, 10_000, 32_000)]
OVER_BATCH = [(batch, 1_000) for batch in (16, 64, 256, 1_024, 4_096)]
MEMORY_SIZE = (512, 32_000)
SMALL = 128 * 10  # the batch x C up to which the overhead of a call dominates
LAM = 0.3
PRS = {"lam": 1e-4, "start": 0, "end": 4}


class Formula(keras_drsl.DRSLoss):
    """DRSLoss by automatic differentiation of the formula."""

    def _fused_values(self, inputs):
        return None


def draw(batch, classes):
    """Return logits and class ids."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (batch, classes)).astype("float32"), rng.integers(0, classes, batch)


def calls_of(losses, z):
    """Return functions without arguments that compute value and gradient of each loss, by name."""
    return {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}[keras.config.backend()](losses, z)


def relatives(batch, classes):
    """Return the calls of the family by name; `"p: "` begins the names of those on probabilities."""
    z, ids = draw(batch, classes)
    losses = {
        "cross_entropy": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), ids),
        "DRSLoss, softmax space": (keras_drsl.DRSLoss(LAM, space="softmax", from_logits=True), ids),
        **{peer.__name__: (peer(from_logits=True), ids) for peer in PEERS},
    }
    of_probabilities = {
        "p: cross_entropy": (keras.losses.SparseCategoricalCrossentropy(), ids),
        "p: DRSLoss": (keras_drsl.DRSLoss(LAM), ids),
        "p: DRSLoss, softmax space": (keras_drsl.DRSLoss(LAM, space="softmax"), ids),
    }
    p = ops.convert_to_numpy(ops.softmax(z, axis=-1))
    return calls_of(losses, z) | calls_of(of_probabilities, p)


def contestants(batch, classes):
    """Return the calls of DRSLoss, PRSLoss and Keras's cross-entropy."""
    z, ids = draw(batch, classes)
    losses = {
        "cross_entropy": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), ids),
        "drs": (keras_drsl.DRSLoss(LAM, from_logits=True), ids),
        "formula": (Formula(LAM, from_logits=True), ids),
        "prs": (keras_drsl.PRSLoss(**PRS, from_logits=True), ids),
    }
    if batch * classes <= 512 * 32_000:
        one_hot = np.eye(classes, dtype="float32")[ids] if classes <= 1_000 else ops.one_hot(ids, classes)
        losses["cross_entropy_one_hot"] = (keras.losses.CategoricalCrossentropy(from_logits=True), one_hot)
        losses["drs_one_hot"] = (keras_drsl.DRSLoss(LAM, from_logits=True), one_hot)
        smooth = {"from_logits": True, "label_smoothing": 0.1}
        losses["cross_entropy_smoothed"] = (keras.losses.CategoricalCrossentropy(**smooth), one_hot)
        losses["drs_smoothed"] = (keras_drsl.DRSLoss(LAM, **smooth), one_hot)
    return calls_of(losses, z) | copies(z) | authors(z, ids)


def _on_tensorflow(losses, z):
    import tensorflow as tf

    z = tf.constant(z)
    calls = {}
    for name, (loss, labels) in losses.items():
        labels = tf.constant(labels)

        def both(labels, z, loss=loss):
            with tf.GradientTape() as tape:
                tape.watch(z)
                value = loss(labels, z)
            return value, tape.gradient(value, z)

        for suffix, options in (("", {}), ("_xla", {"jit_compile": True})):
            program = tf.function(both, **options)
            calls[name + suffix] = lambda program=program, labels=labels: _finish(program(labels, z))
    return calls


def _finish(outputs):
    """Wait for the gradient, without copying it."""
    outputs[0].numpy()
    return outputs[1][0, 0].numpy()


def _on_jax(losses, z):
    import jax

    z = jax.numpy.asarray(z)
    calls = {}
    for name, (loss, labels) in losses.items():
        program = jax.jit(jax.value_and_grad(lambda z, labels, loss=loss: loss(labels, z)))
        labels = jax.numpy.asarray(labels)
        calls[name + "_xla"] = lambda program=program, labels=labels: jax.block_until_ready(program(z, labels))
    return calls


def _on_torch(losses, z):
    import torch

    device = _torch_device()
    z = torch.tensor(z, device=device, requires_grad=True)
    calls = {}
    for name, (loss, labels) in losses.items():
        labels = torch.as_tensor(ops.convert_to_numpy(labels), device=device)
        calls[name] = lambda loss=loss, labels=labels: _torch_gradient(loss(labels, z), z)
        if name in ("cross_entropy", "drs") and shutil.which("c++"):
            torch.compiler.reset()
            program = torch.compile(lambda labels, z, loss=loss: loss(labels, z))
            calls[f"{name}_compiled"] = lambda program=program, labels=labels: _torch_gradient(program(labels, z), z)
    return calls


def _torch_device():
    return "cuda" if ARGS.device == "gpu" else "cpu"


def _torch_gradient(value, z):
    import torch

    (gradient,) = torch.autograd.grad(value, z)
    return gradient[0, 0].item()


def copies(z):
    """Return the call that reads the logits and writes as many numbers, where there is XLA."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(z)
        copy = tf.function(lambda x: (x[0, 0], x * 1.0001), jit_compile=True)
        return {"copy_xla": lambda: _finish(copy(x))}
    if keras.config.backend() == "jax":
        import jax

        x = jax.numpy.asarray(z)
        copy = jax.jit(lambda x: (x[0, 0], x * 1.0001))
        return {"copy_xla": lambda: jax.block_until_ready(copy(x))}
    return {}


def authors(z, ids):
    """Return the computations of both papers' code, by name, where torch is installed."""
    if keras.config.backend() == "jax" or importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(available_cores())
    z = torch.tensor(z, device=_torch_device(), requires_grad=True)
    ids = torch.as_tensor(ids, device=_torch_device())

    def drs():
        """Mean cross-entropy plus b times the sum, over batch and classes, of the squared centred non-true logits."""
        non_true = 1 - torch.nn.functional.one_hot(ids, z.shape[1]).to(z.dtype)
        mean = (z * non_true).sum(1, keepdim=True) / (z.shape[1] - 1)
        penalty = (((z - mean) * non_true) ** 2).sum()
        return _torch_gradient(torch.nn.functional.cross_entropy(z, ids) + LAM / len(ids) * penalty, z)

    def prs():
        """Mean cross-entropy minus lam times the sum of the log-softmax over rows of the mean largest logits."""
        ordered = z.scatter(1, ids[:, None], -torch.inf).sort(1, descending=True).values
        means = ordered[:, PRS["start"] : PRS["end"]].mean(1)
        penalty = -torch.log_softmax(means, 0).sum()
        return _torch_gradient(torch.nn.functional.cross_entropy(z, ids) + PRS["lam"] * penalty, z)

    return {"authors_torch": drs, "authors_prs_torch": prs}


def run_size(make, batch, classes, quick):
    """Measure the times of one size of the calls that `make` returns."""
    calls = make(batch, classes)
    rounds = 3 if quick else int(np.clip(3e7 / (batch * classes), 9, 200))
    seconds = measure.interleave(calls, rounds)
    row = {"batch": batch, "classes": classes, "rounds": rounds, "seconds": seconds}
    medians = {name: measure.quartiles(values)[1] * 1e3 for name, values in seconds.items()}
    print(f"{batch} x {classes}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians.items()), flush=True)
    return row


def memory(batch, classes):
    """Measure the memory of each call beyond logits and gradient, as a share of the logits."""
    size = batch * classes * 4
    return {name: measure.peak_bytes(call) / size - 1 for name, call in contestants(batch, classes).items()}


def compare(rows, memory):
    """Return the targets, as ratios of medians in this run."""
    by_size = {(row["batch"], row["classes"]): row for row in rows}
    targets = []

    def add(name, size, a, b, target):
        seconds = by_size.get(size, {}).get("seconds", {})
        if a in seconds and b in seconds:
            measured = measure.ratio(seconds[a], seconds[b])
            name = f"{name} {size[0]} x {size[1]}"
            targets.append({"name": name, "value": measured["ratio"], "spread": measured["spread"], "target": target})

    for size in SIZES:
        target = 1.05 if size[0] * size[1] <= SMALL else 1.0
        eager = 1.5 if keras.config.backend() == "torch" else target
        for labels, name in (("", "class ids"), ("_one_hot", "one-hot"), ("_smoothed", "one-hot, smoothed")):
            for suffix, how in (("", "default"), ("_xla", "XLA"), ("_compiled", "torch.compile")):
                of = f"DRSLoss / cross-entropy, {name}, {how},"
                others = f"drs{labels}{suffix}", f"cross_entropy{labels}{suffix}"
                add(of, size, *others, target if suffix else eager)
        if size[0] * size[1] >= 512 * 32_000:
            add("DRSLoss XLA / copy,", size, "drs_xla", "copy_xla", 2.2)
    add(
        "DRSLoss on TensorFlow, XLA / the authors' computation in torch,",
        (512, 32_000),
        "drs_xla",
        "authors_torch",
        0.5,
    )
    add("PRSLoss on TensorFlow, XLA / sorting in torch,", (512, 32_000), "prs_xla", "authors_prs_torch", 0.5)
    for name, other in (("drs_xla", "cross_entropy_xla"), ("drs", "cross_entropy")):
        if memory and name in memory:
            what = f"memory beyond logits and gradient / logits, {name}, {' x '.join(map(str, MEMORY_SIZE))}"
            targets.append({"name": what, "value": memory[name], "target": 0.02})
            targets.append(
                {"name": f"{what}, less that of {other}", "value": memory[name] - memory[other], "target": 0}
            )
    growth = [by_size.get(size, {}).get("seconds", {}).get("drs_xla") for size in ((32_768, 1_000), (128, 262_144))]
    if all(growth):
        # Both have as many logits.
        narrow, wide = (measure.quartiles(seconds)[1] for seconds in growth)
        targets.append({"name": "time per logit, 128 x 262144 / 32768 x 1000", "value": wide / narrow, "target": 1.3})
    return targets


def compare_family(rows):
    """Return the targets of the family, as ratios of medians in this run."""
    targets = []
    for row in rows:
        seconds = row["seconds"]
        for name in seconds:
            bare, suffix = name.removesuffix("_xla"), "_xla" if name.endswith("_xla") else ""
            reference = f"{'p: ' if name.startswith('p: ') else ''}cross_entropy{suffix}"
            if name == reference:
                continue
            what = f"{bare} / cross-entropy, {'XLA' if suffix else 'default'}, {row['batch']} x {row['classes']}"
            measured = measure.ratio(seconds[name], seconds[reference])
            targets.append(
                {"name": what, "value": measured["ratio"], "spread": measured["spread"], "target": FAMILY_RATIO}
            )
    return targets


def main():
    if ARGS.family:
        sizes = [(8, 10)] if ARGS.quick else FAMILY_SIZES
        rows = [run_size(relatives, *size, ARGS.quick) for size in sizes]
        record = {"rows": rows, "targets": measure.verdict(compare_family(rows))}
        measure.write(ARGS, "loss_family", record, module="loss_speed")
        return
    if ARGS.memory:
        print(json.dumps(memory(*((64, 1_000) if ARGS.quick else MEMORY_SIZE))))
        return
    sizes = [(8, 10), (4, 1_000)] if ARGS.quick else list(dict.fromkeys(SIZES + OVER_CLASSES + OVER_BATCH))
    rows = [run_size(contestants, *size, ARGS.quick) for size in sizes]
    needed = measure.memory_in_fresh_process(ARGS)
    shares = {name: round(share, 3) for name, share in (needed or {}).items()}
    print("memory beyond logits and gradient / logits:", shares)
    targets = measure.verdict(compare(rows, needed))
    measure.write(ARGS, "loss_speed", {"rows": rows, "memory_over_logits": needed, "targets": targets})


if __name__ == "__main__":
    main()
