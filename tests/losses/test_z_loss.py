import keras
import numpy as np
import pytest

from keras_drsl import DRSLoss, PRSLoss, Squentropy, ZLoss
from tests import reference
from tests.backends import needs_xla, values
from tests.losses.cases import draw, small_data, small_model


def test_adds_to_another_loss_with_its_options():
    z, ids, one_hot = draw((3, 4, 5))
    for inner, loop in ((DRSLoss, reference.drs_loss), (Squentropy, reference.squentropy)):
        loss = ZLoss(0.2, loss=inner(0.7, from_logits=True, axis=1), reduction=None)
        base = lambda y, z, loop=loop: loop(y, z, 0.7)
        expected = reference.each(reference.z_loss, one_hot, z, lam=0.2, base=base)
        np.testing.assert_allclose(values(loss(ids, np.moveaxis(z, -1, 1))), expected, rtol=1e-5)


def test_config_holds_the_other_loss():
    loss = ZLoss(0.2, loss=DRSLoss(0.7, from_logits=True, ignore_class=3))
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again.loss) is DRSLoss
    assert again.get_config() == loss.get_config()
    assert again.loss.lam == 0.7
    assert again.ignore_class == 3


def test_lam_0_is_the_other_loss_and_its_reduction():
    z, ids, _ = draw()
    inner = DRSLoss(0.7, from_logits=True, reduction="sum", dtype="float64")
    loss = ZLoss(0.0, loss=inner)
    np.testing.assert_allclose(values(loss(ids, z)), values(inner(ids, z)), rtol=1e-6)
    assert (loss.dtype, loss.name) == ("float64", "z_loss")
    assert ZLoss(loss=inner, reduction=None).reduction is None


@pytest.mark.parametrize("inner", ["mse", keras.losses.MeanSquaredError(), ZLoss(), PRSLoss()])
def test_errors_name_a_loss_of_another_kind(inner):
    rule = "`loss` must be a loss of keras_drsl other than PRSLoss and ZLoss, or None. Received: loss="
    with pytest.raises(ValueError, match=rule):
        ZLoss(loss=inner)


# A13
@needs_xla
def test_the_inner_loss_warns_of_a_changed_number_too():
    x, y = small_data()
    model = small_model(activation=None)
    model.compile(loss=ZLoss(loss=DRSLoss(from_logits=True)))
    model.fit(x, y, verbose=0)
    with pytest.warns(UserWarning, match="`lam` was changed after a program was compiled"):
        model.loss.loss.lam = 1.0
