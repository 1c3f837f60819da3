import json

import keras
import numpy as np
import pytest

from keras_drsl import cli
from tests.linear import inputs, linear_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    linear_model().save(folder / "model.keras")
    x, y = inputs(40)
    np.savez(folder / "data.npz", x=x, y=y)
    return folder


def evaluate(files, *options):
    return cli.main(
        ["evaluate", str(files / "model.keras"), "--dataset", str(files / "data.npz"), "--suite", "quick", "--quiet"]
        + [str(option) for option in options]
    )


def test_shards_are_evaluated_merged_and_shown(files, tmp_path, capsys):
    for part in (0, 1):
        assert evaluate(files, "--eps", 0.1, "--shard", f"{part}/2", "--out", tmp_path / f"{part}.json") == 0
    parts = [str(tmp_path / f"{part}.json") for part in (0, 1)]
    assert cli.main(["merge", *parts, "--out", str(tmp_path / "all.json")]) == 0
    assert evaluate(files, "--eps", 0.1, "--out", tmp_path / "whole.json") == 0
    merged, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "whole"))
    assert merged["per_example"] == whole["per_example"]
    assert cli.main(["merge", parts[0], "--out", str(tmp_path / "part.json"), "--strict"]) == 3
    capsys.readouterr()
    assert cli.main(["show", str(tmp_path / "all.json")]) == 0
    assert f"robust accuracy  {whole['robust_accuracy']:7.1%}" in capsys.readouterr().out
    assert cli.main(["show", str(tmp_path / "all.json"), "--markdown"]) == 0
    assert "| attack |" in capsys.readouterr().out


def test_a_curve_is_drawn(files, tmp_path):
    pytest.importorskip("matplotlib")
    assert evaluate(files, "--eps", "1/10", "--plot", tmp_path / "curve.png") == 0
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_strict_reports_a_failed_check(files, tmp_path):
    assert evaluate(files, "--eps", 0.1, "--out", tmp_path / "r.json", "--strict") == 0
    content = json.loads((tmp_path / "r.json").read_text())
    content["checks"][0]["status"] = "fail"
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert cli.main(["show", str(tmp_path / "bad.json")]) == 0
    assert cli.main(["show", str(tmp_path / "bad.json"), "--strict"]) == 3


def test_bad_arguments_end_with_status_2(files, tmp_path, capsys):
    def fails(run, reason):
        capsys.readouterr()
        try:
            status = run()
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert reason in capsys.readouterr().err

    (tmp_path / "there.json").write_text("mine")
    fails(lambda: evaluate(files), "--eps")
    fails(lambda: evaluate(files, "--eps", "x"), "must be a number, as 0.1 or 8/255")
    fails(lambda: cli.main(["evaluate", "m", "--dataset", "fashion", "--eps", "0.1"]), "`MODEL` must be a file")
    fails(lambda: evaluate(files, "--eps", 0), "`eps` must be a positive number")
    fails(lambda: evaluate(files, "--eps", 0.1, "--norm", "1"), "`norm` must be one of")
    fails(lambda: evaluate(files, "--eps", 0.1, "--shard", "3"), "must be I/N, as 0/4")
    fails(lambda: evaluate(files, "--eps", 0.1, "--out", tmp_path / "there.json"), "which exists")
    fails(lambda: cli.main(["show", str(tmp_path / "there.json")]), "`path` must be a file written by")
    model = str(files / "model.keras")
    fails(lambda: cli.main(["evaluate", model, "--dataset", "x.npz", "--eps", "0.1"]), "`path` must be an npz file")
    fails(
        lambda: cli.main(["evaluate", str(files / "data.npz"), "--dataset", str(files / "data.npz"), "--eps", "0.1"]),
        "`MODEL` must be a file that Keras can load",
    )
    assert (tmp_path / "there.json").read_text() == "mine"


def test_pickles_and_code_in_models_are_not_run(files, tmp_path, capsys):
    np.savez(tmp_path / "pickle.npz", x=np.array([{"a": 1}], dtype=object), y=np.zeros(1))
    assert (
        cli.main(["evaluate", str(files / "model.keras"), "--dataset", str(tmp_path / "pickle.npz"), "--eps", "0.1"])
        == 2
    )
    assert "without pickles" in capsys.readouterr().err
    unsafe = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x), keras.layers.Dense(3)])
    unsafe.save(tmp_path / "unsafe.keras")
    data = str(files / "data.npz")
    assert cli.main(["evaluate", str(tmp_path / "unsafe.keras"), "--dataset", data, "--eps", "0.1"]) == 2
    assert "`MODEL` must be a file that Keras can load" in capsys.readouterr().err
