"""PGD, APGD and Square follow, step by step, loops in NumPy written from their papers, on small models."""

import zlib

import keras
import numpy as np
import pytest

from keras_drsl.attacks import APGD, FGSM, PGD, Noise, Square
from tests.helpers import some_short

EPS = 0.2
RNG = np.random.default_rng(0)
HIDDEN, OUT = RNG.normal(0, 1.5, (6, 12)), RNG.normal(0, 1.0, (12, 5))
X = RNG.uniform(0.05, 0.95, (40, 6)).astype("float32")


def network():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(12, "tanh"), keras.layers.Dense(5)])
    model.set_weights([HIDDEN, np.zeros(12), OUT, np.zeros(5)])
    return model


def logits(x):
    return np.tanh(x @ HIDDEN) @ OUT


def loss_and_gradient(x, y, target, loss, targeted):
    """Return the loss of an attack and its gradient, by the chain rule."""
    z = logits(x)
    weights = np.zeros(5)
    other = target if targeted else max(set(range(5)) - {y}, key=lambda k: z[k])
    if loss == "margin":
        value = z[other] - z[y]
        weights[other] += 1
        weights[y] -= 1
    else:
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        value = np.log(p[target]) if targeted else -np.log(p[y])
        weights = np.eye(5)[target] - p if targeted else p - np.eye(5)[y]
    return value, HIDDEN @ ((1 - np.tanh(x @ HIDDEN) ** 2) * (OUT @ weights))


def project(point, x, norm):
    delta = point - x
    delta = np.clip(delta, -EPS, EPS) if norm == "inf" else delta * min(1, EPS / max(np.linalg.norm(delta), 1e-30))
    return np.clip(x + delta, 0, 1)


def direction(gradient, norm):
    return np.sign(gradient) if norm == "inf" else gradient / np.linalg.norm(gradient)


def draw_start(x, attack, restart, example):
    generator = np.random.Generator(np.random.Philox((attack.seed, zlib.crc32(attack.name.encode()), restart, example)))
    if attack.norm == "inf":
        return x + generator.uniform(-EPS, EPS, 6)
    point = generator.standard_normal(6)
    return x + EPS * generator.uniform() ** (1 / 6) * point / np.linalg.norm(point)


class Best:
    """The first misclassified point, or the one of the largest loss."""

    def __init__(self, y):
        self.y, self.loss, self.point, self.gradient, self.broken = y, -np.inf, None, None, False

    def see(self, point, value, gradient):
        wrong = logits(point).argmax() != self.y
        if not self.broken and (wrong or value > self.loss):
            self.point, self.loss, self.gradient = point, value, gradient
        self.broken = self.broken or wrong


def pgd(attack, x, y, target, start):
    best, point, velocity = Best(y), project(start, x, attack.norm), 0
    for _ in range(attack.steps + 1):
        value, gradient = loss_and_gradient(point, y, target, attack.loss, attack.targeted)
        best.see(point, value, gradient)
        velocity = attack.momentum * velocity + gradient / np.abs(gradient).mean()
        point = project(point + attack.step_size * direction(velocity, attack.norm), x, attack.norm)
    return best


def apgd(attack, x, y, target, start):
    checks, share, before = [], 0.22, 0.0
    while share <= 1:
        checks.append(int(np.floor(attack.steps * share + 1e-9)))
        share, before = share + max(share - before - 0.03, 0.06), share
    size, norm = 2 * EPS, attack.norm
    best = Best(y)
    point = old = project(start, x, norm)
    value, gradient = loss_and_gradient(point, y, target, attack.loss, attack.targeted)
    best.see(point, value, gradient)
    rises, last_check, checked, halved = 0, 0, best.loss, True
    for step in range(1, attack.steps + 1):
        ahead = project(point + size * direction(gradient, norm), x, norm)
        inertia = 0.25 if step > 1 else 0.0
        moved = point + (1 - inertia) * (ahead - point) + inertia * (point - old)
        old, point = point, project(moved, x, norm)
        before, (value, gradient) = value, loss_and_gradient(point, y, target, attack.loss, attack.targeted)
        best.see(point, value, gradient)
        rises += value > before
        if step in checks:
            few = rises <= 0.75 * (step - last_check)
            stuck = not halved and checked >= best.loss
            halved = few or stuck
            if halved:
                size, point, gradient = size / 2, best.point, best.gradient
            rises, last_check, checked = 0, step, best.loss
    return best


def whole_attack(search, attack, x, y, example):
    """Return the point of the largest margin over all restarts and targets, which end with the first success."""

    def margin(point):
        z = logits(point)
        return max(z[k] for k in range(5) if k != y) - z[y]

    x = x.astype("float64")
    if margin(x) > 0:
        return x
    order = sorted(set(range(5)) - {y}, key=lambda k: -logits(x)[k])
    found, runs = x, attack.restarts * (min(attack.targets, 4) if attack.targeted else 1)
    for restart in range(runs):
        target = order[restart // attack.restarts] if attack.targeted else order[0]
        start = draw_start(x, attack, restart, example) if getattr(attack, "random_start", True) else x
        best = search(attack, x, y, target, start)
        if best.broken or margin(best.point) > margin(found):
            found = best.point
        if best.broken:
            break
    return found


CASES = {
    "apgd ce": (apgd, lambda norm: APGD(EPS, steps=50, norm=norm)),
    "apgd margin": (apgd, lambda norm: APGD(EPS, loss="margin", steps=30, norm=norm, seed=3, restarts=2)),
    "apgd targeted": (apgd, lambda norm: APGD(EPS, loss="margin", targeted=True, targets=2, steps=20, norm=norm)),
    "apgd targeted ce": (apgd, lambda norm: APGD(EPS, targeted=True, steps=20, norm=norm)),
    "pgd ce": (pgd, lambda norm: PGD(EPS, steps=20, norm=norm)),
    "pgd momentum": (pgd, lambda norm: PGD(EPS, loss="margin", steps=15, momentum=0.9, step_size=0.07, norm=norm)),
    "pgd from the input": (pgd, lambda norm: PGD(EPS, steps=7, random_start=False, restarts=2, norm=norm)),
    "pgd targeted": (pgd, lambda norm: PGD(EPS, targeted=True, targets=3, restarts=2, steps=10, norm=norm)),
}


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize(
    "name",
    some_short(CASES, "apgd margin", "pgd momentum", more=["apgd ce", "apgd targeted ce", "pgd ce", "pgd targeted"]),
)
def test_an_attack_takes_the_steps_of_its_paper(name, norm):
    search, make = CASES[name]
    attack = make(norm)
    # A quarter of the labels is another class than the prediction.
    y = logits(X).argmax(1)
    y[::4] = (y[::4] + 1) % 5
    found = attack(network(), X, y, ids=np.arange(len(X)))
    expected = np.array([whole_attack(search, attack, *row) for row in zip(X, y, range(len(X)), strict=True)])
    equal = np.abs(found - expected).max(1) < 1e-3
    # Where two values are equal up to rounding, float32 may take another step.
    assert equal.mean() >= 0.9, np.flatnonzero(~equal)
    broken = logits(found).argmax(1) != y
    assert 0.2 < broken[1::2].mean() < 0.9
    np.testing.assert_array_equal(broken, logits(expected).argmax(1) != y)


HEIGHT, WIDTH, CHANNELS, QUERIES = 6, 7, 2, 120
IMAGES = RNG.uniform(0.02, 0.98, (30, HEIGHT, WIDTH, CHANNELS)).astype("float32")
LINEAR = RNG.normal(0, 1, (IMAGES[0].size, 4))
# The paper halves the area of the squares after these queries of 10,000.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def length(values):
    return np.sqrt((values**2).sum((0, 1)))


def bump(height, width):
    """Return a peak of nested squares in the upper half and its negative in the lower one, of length 1."""
    whole = np.zeros((height, width))
    for top, rows, sign in ((0, height // 2, 1), (height // 2, height - height // 2, -1)):
        for row in range(rows):
            for column in range(width):
                away = max(abs(row - rows // 2), abs(column - width // 2))
                rings = range(max(rows // 2, width // 2) + 1)
                whole[top + row, column] = sign * sum(1 / (ring + 1) ** 2 for ring in rings if ring >= away)
    return whole / np.sqrt((whole**2).sum())


def windows(drawn, height, width):
    """Return the two windows of a query as slices."""
    rooms = (HEIGHT - height + 1, WIDTH - width + 1)
    corners = [int(share * np.float32(room)) for share, room in zip(drawn[:4], rooms * 2, strict=True)]
    return [np.s_[top : top + height, left : left + width] for top, left in (corners[:2], corners[2:])]


def propose(query, x, delta, drawn, norm, eps):
    """Return the perturbation that a query tries."""
    area = 0.8 / 2 ** sum(query > after / 10000 * QUERIES for after in HALVED_AFTER) * HEIGHT * WIDTH
    side = round(np.sqrt(area))
    side = max(side, 1) if norm == "inf" else max(side + (side % 2 == 0), 3)
    height, width = min(side, HEIGHT), min(side, WIDTH)
    first, second = windows(drawn, height, width)
    signs = np.where(drawn[5:] < 0.5, -1.0, 1.0)
    if norm == "inf":
        changed = delta.copy()
        changed[first] = eps * signs
        return changed
    held = np.clip(x + delta, 0, 1) - x
    both = np.zeros((HEIGHT, WIDTH, 1))
    both[first] = both[second] = 1
    shape = bump(height, width)
    shape = shape.T if drawn[4] >= 0.5 and height == width else shape
    fresh = shape[:, :, None] * signs + held[first] / (length(held[first]) + 1e-12)
    unused = max(eps**2 - (held**2).sum(), 0) / CHANNELS
    fresh *= np.sqrt(unused + length(held * both) ** 2) / length(fresh)
    changed = held.copy()
    changed[second] = 0
    changed[first] = fresh
    return changed / np.sqrt((changed**2).sum()) * eps


def square(attack, x, y, example):
    x = x.astype("float64")

    def margin(point):
        z = point.ravel() @ LINEAR
        return max(z[k] for k in range(4) if k != y) - z[y]

    generator = np.random.Generator(np.random.Philox((attack.seed, zlib.crc32(b"square"), 0, example)))
    if attack.norm == "inf":
        delta = attack.eps * np.repeat(generator.choice((-1.0, 1.0), (1, WIDTH, CHANNELS)), HEIGHT, axis=0)
    else:
        # On images of fewer than ten pixels the tiles are single pixels, the lower halves of their bumps.
        delta = -generator.choice((-1.0, 1.0), x.shape)
        delta *= attack.eps / np.sqrt((delta**2).sum())
    best, reached = x, -np.inf
    for query in range(QUERIES):
        if query % 100 == 0:
            drawn = generator.random((100, 5 + CHANNELS), "float32")
        changed = propose(query, x, delta, drawn[query % 100], attack.norm, attack.eps) if query else delta
        if attack.norm == 2:
            changed = changed / np.sqrt((changed**2).sum()) * attack.eps
        point = np.clip(x + changed, 0, 1)
        if margin(point) > reached:
            best, reached, delta = point, margin(point), changed
        if reached > 0:
            break
    return best


@pytest.mark.parametrize(
    ("norm", "eps"), [pytest.param("inf", 0.05, marks=pytest.mark.short), pytest.param(2, 0.5, marks=pytest.mark.short)]
)
def test_square_makes_the_proposals_of_its_paper(norm, eps):
    model = keras.Sequential([keras.Input(IMAGES.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(4)])
    model.set_weights([LINEAR, np.zeros(4)])
    y = (IMAGES.reshape(len(IMAGES), -1) @ LINEAR).argmax(1)
    attack = Square(eps, queries=QUERIES, norm=norm, seed=2)
    found = attack(model, IMAGES, y, ids=np.arange(len(IMAGES)))
    expected = np.array([square(attack, *row) for row in zip(IMAGES, y, range(len(IMAGES)), strict=True)])
    equal = np.abs(found - expected).max((1, 2, 3)) < 1e-4
    assert equal.mean() >= 0.9, np.flatnonzero(~equal)
    broken = (found.reshape(len(IMAGES), -1) @ LINEAR).argmax(1) != y
    assert 0.1 < broken.mean() < 0.9


EVALUATIONS = {
    # A gradient costs about three evaluations. The start is evaluated too.
    "apgd": (lambda: APGD(0.1, steps=10), 33),
    "pgd": (lambda: PGD(0.1, steps=7, restarts=3), 24),
    "fgsm": (lambda: FGSM(0.1), 6),
    "square": (lambda: Square(0.1, queries=50), 50),
    "noise": (lambda: Noise(0.1, points=9), 9),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_work_of_a_search_is_estimated(name):
    make, expected = EVALUATIONS[name]
    assert make().num_evaluations == expected
