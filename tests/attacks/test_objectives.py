import numpy as np
import pytest
from keras import ops

from keras_drsl.attacks.objectives import objective
from tests.backends import values


def by_hand(loss, z, y, t, targeted):
    """Compute the formulas for one row in float64."""
    z = z.astype("float64")
    other = z[t] if targeted else max(z[k] for k in range(len(z)) if k != y)
    log_total = np.log(np.exp(z).sum())
    if loss == "ce":
        return z[t] - log_total if targeted else log_total - z[y]
    if loss == "margin":
        return other - z[y]
    ordered = sorted(z, reverse=True)
    low = (ordered[2] + ordered[3]) / 2 if targeted else ordered[2]
    return (other - z[y]) / (ordered[0] - low)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_each_loss_equals_its_formula(loss, targeted):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (20, 6)).astype("float32")
    y = rng.integers(0, 6, 20)
    t = (y + rng.integers(1, 6, 20)) % 6
    expected = [by_hand(loss, *row, targeted) for row in zip(z, y, t, strict=True)]
    got = values(objective(loss, ops.convert_to_tensor(z), y, t, targeted=targeted))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
