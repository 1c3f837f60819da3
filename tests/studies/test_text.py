import json

import numpy as np
import pytest

from studies import text
from tests.backends import on_tensorflow


@on_tensorflow
@pytest.mark.slow
def test_each_loss_restrains_its_own_variance(tmp_path, capsys):
    text.main(["--epochs", "2", "--steps", "3", "--eps", "3", "--max-windows", "200", "--out", str(tmp_path)])
    assert (tmp_path / "text.md").read_text() in capsys.readouterr().out
    record = json.loads((tmp_path / "text.json").read_text())
    plain, drs, prs = (row["runs"][0] for row in record["rows"])
    for run in (plain, drs, prs):
        assert run["next word right"] >= run["after PGD on CE"] >= run["and on the margin"]
        # Better than a blind guess, and a large attack breaks most.
        assert run["next word right"] > 0.01
        assert run["perplexity"] < 1000
        assert run["and on the margin"] < run["next word right"] / 2
    assert drs["variance of wrong words"] < plain["variance of wrong words"]
    between = "variance of their top 4 between places"
    assert prs[between] < plain[between]


def test_test_windows_occur_in_no_training_topic():
    (x_train, y_train), (x_test, y_test), size = text.read_text()
    assert size == text.VOCABULARY
    assert x_train.shape[1:] == y_train.shape[1:] == x_test.shape[1:] == (text.TIME,)
    assert np.array_equal(x_test[:, 1:], y_test[:, :-1])
    train = {tuple(window) for window in np.concatenate([x_train, y_train[:, -1:]], axis=1).tolist()}
    assert not train & {tuple(window) for window in np.concatenate([x_test, y_test[:, -1:]], axis=1).tolist()}
