"""What holds for every attack of the package, on every backend."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_drsl
from keras_drsl._data import content_keys
from keras_drsl.attacks import APGD, FGSM, PGD, FastAPGD, FastSquare, Noise, Square, Transfer
from keras_drsl.attacks.apgd import checkpoints
from keras_drsl.attacks.square import bump, tiling, window_shape
from keras_drsl.models import Classifier
from tests.backends import on_tensorflow
from tests.helpers import few_of, some_short
from tests.layers import Quantised
from tests.linear import WEIGHTS, distance, exact_robust, inputs, linear_model

ATTACKS = {
    "fgsm": FGSM,
    "pgd_ce": lambda eps, **options: PGD(eps, steps=10, **options),
    "pgd_momentum": lambda eps, **options: PGD(eps, steps=10, momentum=0.9, loss="margin", **options),
    "apgd_ce": lambda eps, **options: APGD(eps, steps=20, **options),
    "apgd_t_dlr": lambda eps, **options: APGD(eps, steps=20, loss="dlr", targeted=True, **options),
    "apgd_t_margin": lambda eps, **options: APGD(eps, steps=20, loss="margin", targeted=True, **options),
    "square": lambda eps, **options: Square(eps, queries=150, **options),
    "noise": lambda eps, **options: Noise(eps, points=10, **options),
    "fast_apgd": FastAPGD,
    "fast_square": lambda eps, **options: FastSquare(eps, queries=300, **options),
}
NORMS = ["inf", 2, 1]


@pytest.fixture(scope="module")
def linear():
    return Classifier(linear_model())


def withstands(classifier, x_adv, y):
    return ops.convert_to_numpy(classifier(ops.convert_to_tensor(x_adv))).argmax(1) == y


@pytest.mark.parametrize(
    ("name", "norm"),
    few_of(
        ATTACKS,
        NORMS,
        keep=[
            ("fgsm", 1),
            ("pgd_momentum", "inf"),
            ("apgd_ce", 2),
            ("apgd_t_dlr", "inf"),
            ("square", 1),
            ("noise", 1),
            ("fast_apgd", 2),
            ("fast_square", "inf"),
        ],
    ),
)
def test_results_are_valid_and_no_better_than_exact(linear, name, norm):
    make = ATTACKS[name]
    x, y = inputs()
    x_adv = make(0.15, norm=norm)(linear, x, y)
    delta = np.abs(x_adv.astype("float64") - x)
    sizes = {"inf": delta.max(1), 2: np.sqrt((delta**2).sum(1)), 1: delta.sum(1)}
    assert sizes[norm].max() <= 0.15 + 1e-6
    withstood = withstands(linear, x_adv, y)
    assert np.all(withstood >= exact_robust(x, y, 0.15, norm))
    assert withstood.mean() < 1
    x[:10], x[10:20] = 0.0, 1.0
    x_adv = make(0.3, norm=norm)(linear, x, y)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "family", [pytest.param(PGD, marks=pytest.mark.more), pytest.param(APGD, marks=pytest.mark.short)]
)
def test_targeted_margin_is_exact_on_a_linear_model(linear, family, norm):
    x, y = inputs(100)
    # Within a thousandth either answer is right for float32.
    clear = np.abs(distance(x, y, norm) - 0.15) > 1e-3
    x, y = x[clear], y[clear]
    expected = exact_robust(x, y, 0.15, norm)
    assert 0.2 < expected.mean() < 0.8
    attack = family(0.15, loss="margin", targeted=True, norm=norm)
    np.testing.assert_array_equal(withstands(linear, attack(linear, x, y), y), expected)


@pytest.mark.parametrize("norm", some_short(NORMS, "inf", more=[2]))
def test_square_is_nearly_exact_on_a_linear_model(linear, norm):
    x, y = inputs(100)
    expected = exact_robust(x, y, 0.15, norm)
    withstood = withstands(linear, Square(0.15, queries=2000, norm=norm)(linear, x, y), y)
    assert np.all(withstood >= expected)
    assert withstood.mean() <= expected.mean() + 0.03


@pytest.mark.parametrize("name", some_short(ATTACKS, more=["fgsm", "pgd_ce", "apgd_ce", "apgd_t_dlr", "fast_square"]))
def test_equal_seeds_give_equal_results_in_any_order(linear, name):
    make = ATTACKS[name]
    x, y = inputs(40)
    # Nothing is broken at this radius, so nothing leaves.
    robust = distance(x, y, "inf") > 0.03
    x, y = x[robust], y[robust]
    whole = make(0.02)(linear, x, y)
    np.testing.assert_array_equal(make(0.02)(linear, x, y), whole)
    np.testing.assert_allclose(make(0.02)(linear, x[::-1], y[::-1])[::-1, :3], whole[:, :3], atol=1e-6)
    parts = [make(0.02)(linear, x[part], y[part]) for part in (slice(0, 5), slice(5, None))]
    # The last input has the same weight for all classes: rounding decides in which direction it is moved.
    np.testing.assert_allclose(np.concatenate(parts)[:, :3], whole[:, :3], atol=1e-6)
    if make is not FGSM:
        assert np.abs(make(0.02, seed=1)(linear, x, y) - whole).max() > 0
        assert np.abs(make(0.02)(linear, x, y, ids=np.arange(len(x))) - whole).max() > 0


# B5
@pytest.mark.parametrize(
    ("name", "norm"),
    few_of(
        ATTACKS,
        NORMS,
        keep=[
            ("fgsm", 2),
            ("pgd_momentum", "inf"),
            ("apgd_t_margin", 1),
            ("square", 2),
            ("noise", 1),
            ("fast_apgd", "inf"),
        ],
    ),
)
def test_an_attack_scales_with_the_input_range(linear, name, norm):
    make = ATTACKS[name]
    x, y = inputs(30)
    expected = make(0.1, norm=norm)(linear, x, y)
    # A power of two changes no rounding.
    in_pixels = Classifier(lambda pixels: linear(pixels / 256))
    scaled = make(25.6, norm=norm, clip_max=256)(in_pixels, 256 * x, y, ids=content_keys(x))
    np.testing.assert_allclose(scaled / 256, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["inf", 2])
def test_restarts_in_one_batch_break_the_same(linear, norm):
    x, y = inputs(60)
    attack = PGD(0.15, loss="margin", targeted=True, restarts=3, steps=10, norm=norm)
    alone, together = (attack(linear, x, y, batch_size=size) for size in (None, 500))
    np.testing.assert_array_equal(withstands(linear, alone, y), withstands(linear, together, y))
    # Inputs that nothing broke are attacked by all restarts either way.
    left = withstands(linear, alone, y)
    np.testing.assert_allclose(together[left][:, :3], alone[left][:, :3], atol=1e-5)


@on_tensorflow
@pytest.mark.parametrize("name", some_short(["apgd_t_margin", "square"], more=["square"]))
def test_compiled_and_eager_results_agree(name):
    import tensorflow as tf

    make = ATTACKS[name]
    x, y = inputs(20)
    compiled = make(0.1)(linear_model(), x, y)
    eager = []

    def logits(x):
        eager.append(tf.executing_eagerly())
        return linear_model()(x)

    tf.config.run_functions_eagerly(True)
    try:
        np.testing.assert_allclose(make(0.1)(logits, x, y), compiled, atol=1e-6)
    finally:
        tf.config.run_functions_eagerly(False)
    assert eager
    assert all(eager)


def test_huge_logits_blind_the_cross_entropy_only():
    x, y = inputs()
    huge = Classifier(linear_model(WEIGHTS * 1e4))
    expected = exact_robust(x, y, 0.15, "inf")
    left = lambda attack: withstands(huge, attack(huge, x, y), y)
    assert left(APGD(0.15)).mean() > expected.mean() + 0.1
    np.testing.assert_array_equal(left(APGD(0.15, loss="margin", targeted=True)), expected)


def test_hidden_gradients_fall_to_square_and_transfer():
    open_model = linear_model()
    hidden = keras.Sequential([keras.Input((4,)), Quantised(), open_model])
    x, y = inputs()
    x = np.round(x, 1)
    y = (x @ WEIGHTS).argmax(1)
    left = lambda attack: withstands(Classifier(hidden), attack(hidden, x, y), y).mean()
    apgd = APGD(0.2, loss="margin", targeted=True)
    exact = exact_robust(x, y, 0.2, "inf").mean()
    assert left(apgd) > exact + 0.2
    assert left(Square(0.2, queries=500)) <= exact + 0.05
    assert left(Transfer(open_model, apgd)) <= exact + 0.05


def test_dlr_of_three_classes_is_the_margin(linear):
    x, y = inputs()
    for targeted in (False, True):
        options = {"targeted": targeted, "steps": 10, "random_start": False}
        dlr, margin = (PGD(0.1, loss=loss, **options)(linear, x, y) for loss in ("dlr", "margin"))
        np.testing.assert_array_equal(dlr, margin)


def test_misclassified_inputs_stay_and_nan_is_broken(linear):
    x, y = inputs(10)
    wrong = (y + 1) % 3
    np.testing.assert_array_equal(APGD(0.1)(linear, x, wrong), x)
    broken = Classifier(lambda x: ops.where(x[:, :3] > 0.7, float("nan"), ops.matmul(x, WEIGHTS)))
    x = np.full((2, 4), 0.65, "float32")
    y = (x @ WEIGHTS).argmax(1)
    x_adv = Noise(0.2)(broken, x, y)
    assert np.isnan(broken.logits(x_adv)).any(axis=1).all()


def test_one_program_serves_all_sizes_and_radii():
    model, calls = linear_model(), []

    def logits_fn(x):
        calls.append(1)
        return model(x)

    classifier = Classifier(logits_fn)
    x, y = inputs(16)
    APGD(0.1, steps=10)(classifier, x, y)
    if keras.config.backend() == "torch":
        pytest.skip("torch runs eagerly")
    count = len(calls)
    APGD(0.2, steps=15)(classifier, x[:9], y[:9])
    assert len(calls) == count


def test_weights_are_read_in_each_call():
    model = linear_model()
    attack = PGD(0.15, loss="margin", targeted=True)
    x, y = inputs()
    attack(model, x, y)
    other = WEIGHTS[:, [1, 2, 0]]
    model.layers[0].set_weights([other, np.zeros(3)])
    y = (x @ other).argmax(1)
    expected = exact_robust(x, y, 0.15, "inf", other)
    np.testing.assert_array_equal(withstands(Classifier(model), attack(model, x, y), y), expected)


def test_weights_of_a_method_are_read_in_each_call():
    class Headed(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(3, use_bias=False)

        def logits(self, x):
            return self.head(x)

    model = Headed()
    x, y = inputs()
    model.head.build((None, 4))
    model.head.set_weights([WEIGHTS])
    attack = PGD(0.15, loss="margin", targeted=True)
    attack(model.logits, x, y)
    other = WEIGHTS[:, [1, 2, 0]]
    model.head.set_weights([other])
    y = (x @ other).argmax(1)
    left = withstands(Classifier(linear_model(other)), attack(model.logits, x, y), y)
    np.testing.assert_array_equal(left, exact_robust(x, y, 0.15, "inf", other))


@pytest.mark.parametrize(
    ("norm", "shape"),
    few_of(
        NORMS,
        [(5,), (6, 4), (6, 6, 3), (2, 6, 6, 3)],
        keep=[("inf", (5,)), (2, (6, 4)), (1, (2, 6, 6, 3))],
    ),
)
def test_square_takes_any_number_of_axes(shape, norm):
    model = keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(3)])
    x = np.random.default_rng(0).random((4, *shape)).astype("float32")
    y = model.predict(x, verbose=0).argmax(1)
    x_adv = Square(0.2, queries=30, norm=norm)(model, x, y)
    assert x_adv.shape == x.shape
    assert np.abs(x_adv - x).max() > 0.01


def test_apgd_checkpoints_are_those_of_the_paper():
    # w_j = p_j * steps with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in whole steps.
    p = [0, 22]
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    assert list(checkpoints(100)) == [step for step in p[1:] if step <= 100]
    assert checkpoints(100)[41] == 19
    assert list(checkpoints(3)) == [1, 2, 3]


def test_square_windows_are_those_of_the_paper():
    assert window_shape(0.8, 28, 28, at_least=1, odd=False) == (25, 25)
    assert window_shape(0.8 / 512, 28, 28, at_least=1, odd=False) == (1, 1)
    assert window_shape(0.4, 64, 1, at_least=1, odd=False) == (26, 1)
    # Odd sides in L2 and L1.
    assert window_shape(0.8, 28, 28, at_least=3, odd=True) == (25, 25)
    assert window_shape(0.4, 28, 28, at_least=3, odd=True) == (19, 19)
    assert window_shape(0.8 / 512, 28, 28, at_least=3, odd=True) == (3, 3)
    assert window_shape(1.0, 8, 8, at_least=1, odd=True) == (8, 8)
    np.testing.assert_allclose(np.abs(bump(5, 5, 1)).sum(), 1)
    np.testing.assert_array_equal(np.abs(bump(1, 1, 1)), 1)
    pattern = bump(5, 5)
    np.testing.assert_allclose((pattern**2).sum(), 1)
    assert np.all(pattern[:2] > 0)
    assert np.all(pattern[2:] < 0)
    tiles = tiling(8, 8, 3, np.random.default_rng(0))
    assert tiles.shape == (8, 8, 3)
    np.testing.assert_allclose((tiles**2).sum(), 1)
    # Five tiles along the shorter side of an image that is not square; those at its end are cut.
    for height, width in ((10, 23), (23, 10)):
        tiles = tiling(height, width, 1, np.random.default_rng(0))[..., 0]
        pattern = np.tile(np.abs(bump(2, 2)), (-(-height // 2), -(-width // 2)))[:height, :width]
        np.testing.assert_allclose(np.abs(tiles), pattern / np.sqrt((pattern**2).sum()))
        assert len(np.unique(np.sign(tiles))) == 2


def test_repr_constructs_an_equal_attack():  # B10
    for name, make in {**ATTACKS, "named": lambda eps, **options: PGD(eps, step_size=0.01)}.items():
        attack = make(0.1, norm=2, clip_max=2.0, seed=3) if name != "named" else make(0.1)
        again = eval(repr(attack))
        assert again == attack, name
        assert hash(again) == hash(attack)
        assert again != type(attack)(0.2)
    assert PGD(0.1) != APGD(0.1)


def test_the_settings_of_a_transfer_hold_the_attack_and_the_second_model():
    source, attack = linear_model(), PGD(0.1, steps=3)
    settings = Transfer(source, attack).settings
    assert settings["attack"] == {"name": "pgd_ce", **attack.settings}
    assert settings["attack"]["steps"] == 3
    assert settings["source"] == keras_drsl.models.fingerprint(source)


def test_a_threat_model_replaces_the_four_arguments():
    threat = keras_drsl.ThreatModel(0.1, norm=2, clip_min=-1.0)
    for make in ATTACKS.values():
        assert make(None, threat=threat) == make(0.1, norm=2, clip_min=-1.0)
        with pytest.raises(ValueError, match=r"`threat` must be given without .* Received: threat=.* and norm='inf'"):
            make(None, threat=threat, norm="inf")


def test_an_attack_cannot_be_changed():  # B10
    attack = PGD(0.1)
    for name, value in (("seed", -5), ("steps", 3), ("threat", None)):
        with pytest.raises(AttributeError, match=f"`{name}` of an attack cannot be changed.* Received: {name}={value}"):
            setattr(attack, name, value)
    assert attack == PGD(0.1)


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "rule"),
        [
            (lambda: APGD(0), "`eps` must be a positive number. Received: eps=0"),
            (lambda: APGD(0.1, norm=3), "`norm` must be one of 'inf', 2, 1. Received: norm=3"),
            (lambda: APGD(0.1, loss="x"), "`loss` must be one of 'ce', 'margin', 'dlr', 'js'. Received: loss='x'"),
            (lambda: APGD(0.1, steps=0), "`steps` must be an integer of 1 or more. Received: steps=0"),
            (lambda: APGD(0.1, targets=0), "`targets` must be an integer of 1 or more. Received: targets=0"),
            (lambda: PGD(0.1, step_size=0), "`step_size` must be a positive number. Received: step_size=0"),
            (lambda: PGD(0.1, momentum=2), r"`momentum` must be a number in \[0, 1\]. Received: momentum=2"),
            (lambda: PGD(0.1, seed=-1), "`seed` must be an integer of 0 or more. Received: seed=-1"),
            (lambda: Square(0.1, queries=0), "`queries` must be an integer of 1 or more. Received: queries=0"),
            (lambda: Square(0.1, p_init=0), r"`p_init` must be a number in \(0, 1\]. Received: p_init=0"),
            (lambda: Noise(0.1, points=0), "`points` must be an integer of 1 or more. Received: points=0"),
            (
                lambda: FGSM(0.1, clip_min=1),
                "`clip_min` must be below `clip_max`. Received: clip_min=1.0, clip_max=1.0",
            ),
            (lambda: Transfer(None, 3), "`attack` must be an attack of keras_drsl.attacks. Received: attack=3"),
        ],
    )
    def test_arguments_are_named(self, make, rule):
        with pytest.raises(ValueError, match=rule):
            make()

    def test_inputs_outside_the_range_are_refused(self, linear):
        x, y = inputs(5)
        for bad in (x * 255, np.where(x > 0.5, np.nan, x)):
            with pytest.raises(
                ValueError, match=r"`x` must lie in \[clip_min, clip_max\] = \[0, 1\]. Received: values"
            ):
                APGD(0.1)(linear, bad, y)

    def test_probabilities_are_not_taken_for_logits(self):
        x, y = inputs(5)
        with pytest.raises(ValueError, match="`logits_fn` must return logits, but its outputs look like probabilities"):
            FGSM(0.1)(linear_model(WEIGHTS, keras.layers.Softmax()), x, y)

    def test_labels_must_match(self, linear):
        x, y = inputs(5)
        with pytest.raises(ValueError, match=r"`y` must hold one label for each input. Received"):
            FGSM(0.1)(linear, x, y[:4])
        with pytest.raises(ValueError, match=r"`y` must hold class ids in \[0, 3\). Received: 3"):
            FGSM(0.1)(linear, x, y + 3 * (np.arange(5) == 0) - y * (np.arange(5) == 0))
