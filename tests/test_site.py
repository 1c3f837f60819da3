"""The pages of the site: what they must hold, whether or not MkDocs is installed."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_drsl
from keras_drsl.attacks import APGD
from keras_drsl.evaluation.rendering import ADVICE
from tests.test_signatures import public

DOCS = Path(__file__).parents[1] / "docs"
MODEL = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
X, Y = np.full((12, 4), 0.5, "float32"), np.arange(12) % 3
QUICK = {"suite": "quick", "checks": [], "verbose": 0}


def train(loss, *, y=Y):
    robust = keras_drsl.AdversarialTraining(MODEL, eps=0.1, method="clean")
    robust.compile(keras.optimizers.SGD(0.0), loss)
    robust.fit(X, y, verbose=0)


def change_a_state():
    for eps in (0.1, 0.2):
        keras_drsl.evaluate_robustness(MODEL, X, Y, eps=eps, state_path="state", **QUICK | {"attacks": ["fgsm_ce"]})


# By a few words of each error on the page, what raises it.
ERRORS = {
    "no larger than the range": lambda: keras_drsl.evaluate_robustness(MODEL, X, Y, eps=8, **QUICK),
    "no probabilities": lambda: train(keras.losses.SparseCategoricalCrossentropy()),
    "must hold class ids": lambda: keras_drsl.drs_loss(Y + 5, MODEL(X), from_logits=True),
    "must be finite": lambda: train(keras_drsl.DRSLoss(lam=1e38, from_logits=True)),
    "look like probabilities": lambda: APGD(0.1)(keras.Sequential([MODEL, keras.layers.Softmax()]), X, Y),
    "that of another one": change_a_state,
    "`precision` must be": lambda: keras_drsl.evaluate_robustness(MODEL, X, Y, eps=0.1, precision=0.01, **QUICK),
    "`draws` must be": lambda: keras_drsl.certify(MODEL, X, Y, sigma=0.1, draws=5, verbose=0),
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_are_quoted_word_for_word(words, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    MODEL.set_weights([np.zeros((4, 3)), np.array([-1.0, 2.0, 0.5])])
    quoted = re.findall(r"^```text\n(.*)\n```$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quoted) == len(ERRORS)
    (text,) = [line for line in quoted if words in line]
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ERRORS[words]()
    assert str(caught.value) == text


def test_each_check_is_explained():
    page = (DOCS / "checks.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(explained) == sorted({*ADVICE, "few_classes"})


def test_each_public_name_has_one_place():
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")]
    shown = sorted(name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    names = public()
    # Methods are shown with their classes.
    assert shown == sorted(name for name in names if name.rpartition(".")[0] not in names)


def test_each_page_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*pages, "changelog.md", "contributing.md", "getting-started.md", "security.md"])
