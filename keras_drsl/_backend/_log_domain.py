"""Compute the logarithm of a tensor from the operations that made it, where these began with softmaxes.

The average of two saturated softmaxes is exactly 0 or 1 in float32, and its gradient is rounding noise. The logarithm
of the average is exact when it is computed from the log-softmaxes. The rules here replace each operation on positive
numbers by the one on their logarithms: a product becomes a sum, and a sum becomes a `logsumexp`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_drsl._typing import Tensor


class Operation(NamedTuple):
    """Describe how a tensor was computed.

    Attributes:
        kind: `"softmax"`, `"exp"`, `"sigmoid"`, `"identity"`, `"rearrange"`, `"add"`, `"subtract"`, `"multiply"`,
            `"divide"`, `"sum"`, `"mean"` or `"contract"`.
        inputs: Tensors or numbers.
        detail: The axis of a softmax; `(axes, keepdims)` of a sum or mean; the equation of a contraction, as of
            `einsum`; for a rearrangement, a function of the inputs that moves their elements.
    """

    kind: str
    inputs: tuple[Any, ...]
    detail: Any = None


# Maps a tensor to the operation that made it, or None where it is unknown.
Describe = Callable[[Any], Operation | None]


def logits_of(output: Tensor, describe: Describe) -> Tensor:
    """Return logits whose softmax is `output`, shape `(batch, C)`.

    Of a plain softmax they are its input, unchanged. Otherwise they are log-probabilities in float32.

    Raises:
        LookupError: If the output was not computed from softmaxes by operations that have a rule here.
    """
    x, operation = output, describe(output)
    while operation is not None and operation.kind == "identity":
        x = operation.inputs[0]
        operation = describe(x)
    if operation is not None and operation.kind == "softmax" and operation.detail in (-1, len(x.shape) - 1):
        logits = operation.inputs[0]
    else:
        try:
            logits = _Logs(describe).of(x)
        except RecursionError:  # a program of very many operations
            logits = None
    if logits is None:
        raise LookupError("The function does not end in softmaxes, or in operations on softmaxes that are known.")
    return logits


class _Logs:
    """The logarithms of the tensors of one program, each computed once."""

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        # Tensors are kept beside their logarithms, as ids of freed objects are used again.
        self._known: dict[int, tuple[Any, Tensor | None]] = {}

    def of(self, x: Any) -> Tensor | None:
        """Return the logarithm of a tensor in float32, finite, or None where no softmax is found behind it."""
        if id(x) not in self._known:
            self._known[id(x)] = x, self._compute(x)
        return self._known[id(x)][1]

    def _compute(self, x: Any) -> Tensor | None:
        operation = self._describe(x)
        if operation is None:
            return None
        kind, inputs, detail = operation
        if kind == "softmax":
            return ops.log_softmax(ops.cast(inputs[0], "float32"), axis=detail)
        if kind == "exp":
            return ops.cast(inputs[0], "float32")
        if kind == "sigmoid":
            return -ops.softplus(-ops.cast(inputs[0], "float32"))
        if kind == "subtract":
            return self._log_complement(*inputs)
        found = [self.of(value) for value in inputs]
        if all(log is None for log in found):
            return None
        logs = [_log_of_value(value) if log is None else log for log, value in zip(found, inputs, strict=True)]
        return _RULES[kind](logs, detail)

    def _log_complement(self, whole: Any, part: Any) -> Tensor | None:
        """Return `log(1 - sigmoid(z))`, or None for another difference."""
        operation = self._describe(part)
        while operation is not None and operation.kind == "identity":
            operation = self._describe(operation.inputs[0])
        if operation is None or operation.kind != "sigmoid":
            return None
        # With another minuend than 1 this is wrong, and is refused when it is compared with the outputs.
        shape_of = ops.zeros_like(ops.cast(ops.convert_to_tensor(whole), "float32"))
        return shape_of - ops.softplus(ops.cast(operation.inputs[0], "float32"))


def _log_of_value(x: Any) -> Tensor:
    """Return the logarithm of a number or tensor; for 0 and below, a finite number that adds nothing to a sum."""
    x = ops.cast(ops.convert_to_tensor(x), "float32")
    return ops.where(x > 0, ops.log(ops.maximum(x, 1e-37)), -1e30)


def _add(logs: list[Tensor], detail: Any) -> Tensor:
    total = logs[0]
    for log in logs[1:]:
        # Not `logaddexp`: its gradient is not finite where an operand is -inf.
        equal_shapes = [total + ops.zeros_like(log), log + ops.zeros_like(total)]
        total = ops.logsumexp(ops.stack(equal_shapes), axis=0)
    return total


def _sum(logs: list[Tensor], detail: Any) -> Tensor:
    axes, keepdims = detail
    return ops.logsumexp(logs[0], axis=axes, keepdims=keepdims)


def _mean(logs: list[Tensor], detail: Any) -> Tensor:
    # The mean of ones is 1, so their number is their sum.
    count = ops.sum(ops.ones_like(logs[0]), axis=detail[0], keepdims=detail[1])
    return _sum(logs, detail) - ops.log(count)


def _contract(logs: list[Tensor], detail: str) -> Tensor:
    """Sum products of the elements of two tensors, as `einsum` does."""
    operands, kept = detail.replace(" ", "").split("->")
    letters = kept + "".join(sorted(set(operands) - set(kept) - {","}))
    total: Tensor = 0.0
    for log, names in zip(logs, operands.split(","), strict=True):
        log = ops.transpose(log, [names.index(letter) for letter in letters if letter in names])
        for axis, letter in enumerate(letters):
            if letter not in names:
                log = ops.expand_dims(log, axis)
        total = total + log
    summed = tuple(range(len(kept), len(letters)))
    return ops.logsumexp(total, axis=summed) if summed else total


_RULES: dict[str, Callable[[list[Tensor], Any], Tensor]] = {
    "identity": lambda logs, detail: logs[0],
    "rearrange": lambda logs, detail: detail(*logs),
    "add": _add,
    "multiply": lambda logs, detail: logs[0] + logs[1],
    "divide": lambda logs, detail: logs[0] - logs[1],
    "sum": _sum,
    "mean": _mean,
    "contract": _contract,
}


def matmul_equation(rank: int, other: int, *, transpose: bool = False, transpose_other: bool = False) -> str:
    """Return the `einsum` equation of a matrix product of tensors of some ranks."""
    batch = "abcdefgh"[: max(rank, other, 2) - 2]
    first = "z" if rank == 1 else batch[len(batch) - rank + 2 :] + ("zy" if transpose else "yz")
    second = "z" if other == 1 else batch[len(batch) - other + 2 :] + ("xz" if transpose_other else "zx")
    return f"{first},{second}->{batch}{'y' * (rank > 1)}{'x' * (other > 1)}"


def product_equation(ranks: Sequence[int], contracted: Any, batched: Any = ((), ())) -> str:
    """Return the `einsum` equation of a product that sums over pairs of axes, and leaves other pairs, which come first.

    Args:
        ranks: How many axes each of the two tensors has.
        contracted: The axes of the first tensor to sum over, and those of the second.
        batched: The axes of the first tensor that are paired with axes of the second, and these.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    first, second = list(letters[: ranks[0]]), list(letters[ranks[0] : sum(ranks)])
    for axes, axes_other in (contracted, batched):
        for axis, axis_other in zip(axes, axes_other, strict=True):
            second[axis_other] = first[axis]
    shared = [first[axis] for axis in batched[0]]
    used = {*shared, *(first[axis] for axis in contracted[0])}
    kept = [*shared, *(letter for letter in [*first, *second] if letter not in used)]
    return f"{''.join(first)},{''.join(second)}->{''.join(kept)}"


def axes_of(axis: Any, rank: int) -> tuple[int, ...]:
    """Return the axes that an argument `axis` names: None names all."""
    if axis is None:
        return tuple(range(rank))
    return tuple(int(item) % rank for item in keras.tree.flatten(axis))
