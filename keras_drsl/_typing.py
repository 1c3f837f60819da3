"""The types that annotations name."""

from typing import Any, Literal, TypeAlias

import numpy.typing as npt

# A tensor of the running backend, or a symbolic `keras.KerasTensor`. No common base class exists.
Tensor: TypeAlias = Any
Array: TypeAlias = npt.NDArray[Any]
# One number, or one per channel or feature: an array, or nested lists or tuples.
Numbers: TypeAlias = Any
Norm: TypeAlias = Literal["inf", 2, 1]
Status: TypeAlias = Literal["skipped", "pass", "warn", "fail"]
