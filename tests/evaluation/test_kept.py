"""The perturbed inputs that an evaluation keeps."""

import json
import os
import sys
import tracemalloc
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from keras_drsl import RobustnessReport, cli, evaluate_robustness
from keras_drsl._intervals import wilson
from keras_drsl.attacks import APGD, Attack
from keras_drsl.evaluation import Outcome, check, kept
from tests.helpers import run_python
from tests.linear import WEIGHTS, distance, inputs, linear_model

EPS = 0.1
OPTIONS = {"eps": EPS, "attacks": [APGD(EPS, loss="margin", targeted=True, steps=20)], "checks": [], "verbose": 0}


class Nothing(Attack):
    def run(self, classifier, batch):
        return batch.x


def data(count=60):
    """Return inputs of which some are misclassified: their labels are those of the next class."""
    x, y = inputs(count)
    return x, np.where(np.arange(count) % 10 == 0, (y + 1) % 3, y)


def without_times(report):
    content = report.to_dict()
    return content | {"attacks": [attack | {"seconds": 0, "compile_seconds": 0} for attack in content["attacks"]]}


@pytest.fixture(scope="module")
def whole():
    """Return the report of an evaluation that keeps examples in memory."""
    return evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=True)


@pytest.mark.short
def test_the_points_are_the_worst_of_the_ball(whole):
    x, y = data()
    logits = whole.x_adv.astype("float64") @ WEIGHTS
    margins = np.where(np.eye(3)[y], -np.inf, logits).max(1) - logits[np.arange(60), y]
    broken = np.array([name is not None for name in whole.per_example["broken_by"]])
    assert 10 < broken.sum() < 50
    assert (margins[broken] >= -1e-6).all()
    # Each other class gains eps times the sum of |differences of weights|, and the nearest one counts.
    clean = x.astype("float64") @ WEIGHTS
    gains = np.abs(WEIGHTS[:, y].T[:, :, None] - WEIGHTS[None]).sum(1) * EPS
    worst = np.where(np.eye(3)[y], -np.inf, clean + gains).max(1) - clean[np.arange(60), y]
    np.testing.assert_allclose(margins[~broken], worst[~broken], atol=1e-5)
    assert np.abs(whole.x_adv - x).max() <= EPS + 1e-6


def test_predictions_and_distances_are_those_of_the_points(whole):
    x, y = data()
    np.testing.assert_array_equal(whole.x, x)
    np.testing.assert_array_equal(whole.prediction, (whole.x_adv @ WEIGHTS).argmax(1))
    np.testing.assert_allclose(whole.distance, np.abs(whole.x_adv.astype("float64") - x).max(1))
    is_clean = np.array([name == "clean" for name in whole.per_example["broken_by"]])
    assert is_clean.sum() == 6
    assert (whole.distance[is_clean] == 0).all()
    assert (whole.prediction[is_clean] != y[is_clean]).all()
    second = evaluate_robustness(
        linear_model(), x, y, **OPTIONS | {"norm": 2, "attacks": [APGD(EPS, norm=2)]}, keep_examples=True
    )
    np.testing.assert_allclose(second.distance, np.linalg.norm(second.x_adv.astype("float64") - x, axis=1))


def test_classes_have_accuracies_and_are_read_as_others(whole):
    _, y = data()
    broken_by = np.array(whole.per_example["broken_by"], dtype=object)
    assert list(whole.by_class) == [0, 1, 2]
    for class_id, found in whole.by_class.items():
        names = broken_by[y == class_id]
        robust = sum(name is None for name in names)
        assert found == (len(names), np.mean(names != "clean"), robust / len(names), wilson(robust, len(names)))
    expected = np.zeros((3, 3), int)
    for label, prediction in zip(y, whole.prediction, strict=True):
        expected[label, prediction] += 1
    np.testing.assert_array_equal(whole.read_as, expected)
    assert np.trace(whole.read_as) == broken_by.tolist().count(None)


def test_a_table_has_a_row_for_each_example(whole, monkeypatch):
    pandas = pytest.importorskip("pandas")
    table = whole.to_dataframe()
    assert list(table) == ["index", "broken_by", "label", "prediction_adv", "distance"]
    assert isinstance(table, pandas.DataFrame)
    assert table["label"].tolist() == whole.per_example["label"]
    assert (table.groupby("label")["broken_by"].apply(lambda names: names.isna().mean()).tolist()) == [
        found.robust_accuracy for found in whole.by_class.values()
    ]
    without = evaluate_robustness(linear_model(), *data(), **OPTIONS)
    assert list(without.to_dataframe()) == ["index", "broken_by", "label"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="`to_dataframe` needs `pip install pandas`"):
        whole.to_dataframe()


def test_keeping_changes_no_verdict(whole):
    content = without_times(whole)
    assert content.pop("checks") == [
        {"name": "kept_examples", "status": "pass", "value": 0.0, "message": whole.checks[0].message}
    ]
    assert without_times(evaluate_robustness(linear_model(), *data(), **OPTIONS)) == content | {"checks": []}


def test_a_file_holds_what_memory_does(whole, tmp_path):
    path = tmp_path / "kept.npz"
    path.write_bytes(b"an earlier one")
    report = evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=path)
    assert os.listdir(tmp_path) == ["kept.npz"]
    again = RobustnessReport.from_npz(str(path))
    assert again.to_dict() == report.to_dict()
    with np.load(path) as file:
        for name in kept.ARRAYS:
            np.testing.assert_array_equal(file[name], getattr(again, name))
            np.testing.assert_array_equal(getattr(report, name), getattr(again, name))
            np.testing.assert_allclose(getattr(report, name), getattr(whole, name), atol=1e-6)
    whole.to_npz(tmp_path / "other.npz")
    assert without_times(RobustnessReport.from_npz(tmp_path / "other.npz")) == without_times(whole)
    with pytest.raises(ValueError, match="which exists"):
        whole.to_npz(path, overwrite=False)


def test_a_file_that_another_one_replaced_is_not_read(whole, tmp_path):
    parts = []
    for i in (0, 1):
        path = tmp_path / f"{i}.npz"
        options = OPTIONS | {"shard": (i, 2), "keep_examples": path}
        parts.append(evaluate_robustness(linear_model(), *data(), **options))
    merged, again = RobustnessReport.merge(parts), RobustnessReport.merge(parts)
    merged.to_npz(tmp_path / "0.npz")
    np.testing.assert_allclose(merged.x_adv, whole.x_adv, atol=1e-6)
    for report in (parts[0], again):
        with pytest.raises(ValueError, match="The kept examples are gone: .*0.npz' was replaced"):
            _ = report.x_adv
    os.unlink(tmp_path / "1.npz")
    with pytest.raises(ValueError, match="The kept examples are gone: .*1.npz' was replaced"):
        _ = parts[1].x_adv


def test_shards_are_merged_with_their_examples(whole, tmp_path):
    parts = [evaluate_robustness(linear_model(), *data(), **OPTIONS, shard=(i, 2), keep_examples=True) for i in (1, 0)]
    merged = RobustnessReport.merge(parts)
    for name in kept.ARRAYS:
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), atol=1e-6)
    parts[0].to_json(tmp_path / "0.json")
    merged = RobustnessReport.merge([RobustnessReport.from_json(tmp_path / "0.json"), parts[1]])
    assert merged.kept is None


KILLED = """
import os
import sys
import numpy as np
from keras_drsl import evaluate_robustness
from keras_drsl.attacks import APGD
from keras_drsl.evaluation import evaluator
from tests.evaluation.test_kept import OPTIONS, data
from tests.linear import linear_model

save, calls = evaluator.State.save, []

def save_or_die(self):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    save(self)

evaluator.State.save = save_or_die
evaluate_robustness(
    linear_model(), *data(), **OPTIONS, batch_size=16, state_path=sys.argv[1], keep_examples=sys.argv[2]
)
"""


def test_examples_outlive_a_killed_process(tmp_path):
    state, path = tmp_path / "state", tmp_path / "kept.npz"
    killed = run_python(KILLED, str(state), str(path), check=False)
    assert killed.returncode == -9, killed.stderr
    assert sorted(os.listdir(tmp_path)) == ["kept.npz.partial", "state"]
    options = OPTIONS | {"batch_size": 16, "state_path": state}
    with pytest.raises(
        ValueError, match="`keep_examples` must name the file that the evaluation in `state_path` began"
    ):
        evaluate_robustness(linear_model(), *data(), **options, keep_examples=tmp_path / "other.npz")
    report = evaluate_robustness(linear_model(), *data(), **options, keep_examples=path)
    assert sorted(os.listdir(tmp_path)) == ["kept.npz", "state"]
    expected = evaluate_robustness(linear_model(), *data(), **OPTIONS, batch_size=16, keep_examples=True)
    assert without_times(report) == without_times(expected)
    for name in kept.ARRAYS:
        np.testing.assert_array_equal(getattr(report, name), getattr(expected, name))


def test_an_evaluation_that_has_ended_is_read_again(tmp_path):
    state, path = tmp_path / "state", tmp_path / "kept.npz"
    options = OPTIONS | {"state_path": state, "keep_examples": path}
    report = evaluate_robustness(linear_model(), *data(), **options)
    assert evaluate_robustness(linear_model(), *data(), **options).to_dict() == report.to_dict()
    # The points of another evaluation are not those of the state.
    other = evaluate_robustness(linear_model(), *data(), **OPTIONS, seed=5, keep_examples=True)
    other.to_npz(path)
    with pytest.raises(ValueError, match="`keep_examples` must name the file that the evaluation in `state_path`"):
        evaluate_robustness(linear_model(), *data(), **options)
    path.write_bytes(b"no report")
    with pytest.raises(ValueError, match="`keep_examples` must name the file that the evaluation in `state_path`"):
        evaluate_robustness(linear_model(), *data(), **options)


def test_two_evaluations_at_a_time_need_two_files(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "kept.npz"

    class Second(Attack):
        def run(self, classifier, batch):
            with pytest.raises(ValueError, match="must be a file of this evaluation only, and another one that runs"):
                evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=path)
            return batch.x

    report = evaluate_robustness(
        linear_model(), *data(), **OPTIONS | {"attacks": [Second(EPS), *OPTIONS["attacks"]]}, keep_examples=path
    )
    assert np.abs(report.x_adv - report.x).max() > 0
    assert os.listdir(tmp_path) == ["kept.npz"]


def test_a_state_without_examples_is_another_evaluation(tmp_path):
    evaluate_robustness(linear_model(), *data(), **OPTIONS, state_path=tmp_path / "state")
    with pytest.raises(ValueError, match="`state_path` .* another one. Different: keep_examples"):
        evaluate_robustness(
            linear_model(), *data(), **OPTIONS, state_path=tmp_path / "state", keep_examples=tmp_path / "kept.npz"
        )


def test_what_a_check_breaks_is_kept():
    x, y = data()
    options = OPTIONS | {"attacks": [Nothing(EPS)], "checks": ["noise"]}
    report = evaluate_robustness(linear_model(), x, y, **options, keep_examples=True)
    broken = np.array([name == "check:noise" for name in report.per_example["broken_by"]])
    assert broken.any()
    assert (report.prediction[broken] != y[broken]).all()
    assert (report.distance[broken] > 0).all()
    assert (report.distance <= EPS * (1 + 1e-5)).all()


def test_a_point_that_misleads_nobody_fails_a_check():
    x, y = data()

    @check()
    def lies(context):
        return Outcome("warn", 0.0, "", broken=[1, 2], x_adv={1: x[1], 2: x[2]})

    @check()
    def says_little(context):
        return Outcome("warn", 0.0, "", broken=[1])

    @check()
    def gives_other_shapes(context):
        return Outcome("warn", 0.0, "", broken=[1], x_adv={1: x[:2]})

    options = OPTIONS | {"attacks": [Nothing(EPS)]}
    report = evaluate_robustness(linear_model(), x, y, **options | {"checks": [gives_other_shapes]}, keep_examples=True)
    assert report.checks[0].status == "fail"
    assert report.checks[0].message.endswith("`x_adv` must hold points of shape (4,). Received: one of shape (2, 4)")
    report = evaluate_robustness(linear_model(), x, y, **options | {"checks": [lies]}, keep_examples=True)
    found = report.checks[-1]
    assert (found.name, found.status, found.value) == ("kept_examples", "fail", 2)
    assert found.message.endswith("; the first is at position 1, broken by check:lies")
    report = evaluate_robustness(linear_model(), x, y, **options | {"checks": [says_little]}, keep_examples=True)
    assert report.per_example["broken_by"][1] == "check:says_little"
    np.testing.assert_array_equal(report.x_adv[1], x[1])


def test_models_of_labels_keep_the_point_of_the_label_that_falls():
    x, _ = inputs(40)
    kernel = np.array([[1.0, 0.2], [0.3, -1.0], [-0.5, 0.4], [0.1, 0.6]])
    dense = layers.Dense(2)
    model = keras.Sequential([keras.Input((4,)), dense])
    dense.set_weights([kernel, -0.5 * kernel.sum(0)])
    z = (x - 0.5) @ kernel
    y = (z > 0).astype(int)
    options = OPTIONS | {"task": "multilabel", "keep_examples": True}
    report = evaluate_robustness(model, x, y, **options)
    reached = (np.abs(z) < EPS * np.abs(kernel).sum(0)).any(1)
    broken = np.array([name is not None for name in report.per_example["broken_by"]])
    np.testing.assert_array_equal(broken, reached)
    assert report.x_adv.shape == (40, 4)
    np.testing.assert_array_equal(report.prediction, ((report.x_adv - 0.5) @ kernel > 0).astype(int))
    np.testing.assert_array_equal((report.prediction != y).any(1), broken)
    # The input itself, where a label is wrong without an attack.
    flipped = np.where(np.arange(40)[:, None] % 4 == 0, [[1, 0]], 0) ^ y
    report = evaluate_robustness(model, x, flipped, **options)
    is_clean = np.array([name == "clean" for name in report.per_example["broken_by"]])
    assert is_clean.sum() == 10
    assert (report.distance[is_clean] == 0).all()


def test_models_of_positions_keep_the_point_with_most_wrong():
    x = np.random.default_rng(0).uniform(0.3, 0.7, (20, 5, 1)).astype("float32")
    y = (x[..., 0] > 0.5).astype(int)
    dense = layers.Dense(2, use_bias=True)
    model = keras.Sequential([keras.Input((5, 1)), dense])
    dense.set_weights([np.array([[-1.0, 1.0]]), np.array([0.5, -0.5])])
    attacks = [APGD(EPS, loss="margin", steps=20)]
    report = evaluate_robustness(model, x, y, **OPTIONS | {"attacks": attacks}, task="positions", keep_examples=True)
    assert report.to_dataframe()["prediction_adv"][3].tolist() == report.prediction[3].tolist()
    with pytest.raises(ValueError, match="`report.read_as` needs one class per example"):
        _ = report.read_as
    assert report.prediction.shape == (20, 5)
    wrong = ((report.x_adv[..., 0] > 0.5) != y).sum(1)
    np.testing.assert_array_equal(wrong, (np.abs(x[..., 0] - 0.5) < EPS).sum(1))
    assert wrong.tolist() == [row[-1] for row in report.per_example["wrong"]]


def test_of_several_inputs_the_attacked_one_is_kept():
    image, other = keras.Input((4,), name="image"), keras.Input((2,), name="other")
    dense = layers.Dense(3)
    model = keras.Model({"image": image, "other": other}, dense(layers.Concatenate()([image, other])))
    dense.set_weights([np.vstack([WEIGHTS, np.zeros((2, 3))]), np.zeros(3)])
    x, y = data()
    both = {"image": x, "other": np.ones((60, 2), "float32")}
    report = evaluate_robustness(model, both, y, **OPTIONS, attack_input="image", keep_examples=True)
    assert report.x_adv.shape == (60, 4)
    np.testing.assert_array_equal(report.x, x)
    np.testing.assert_array_equal(report.prediction, (report.x_adv @ WEIGHTS).argmax(1))
    robust = distance(x, y, "inf") > EPS
    broken = np.array([name is not None for name in report.per_example["broken_by"]])
    np.testing.assert_array_equal(broken[np.arange(60) % 10 > 0], ~robust[np.arange(60) % 10 > 0])


def test_memory_does_not_grow_with_the_examples(tmp_path):
    x = np.zeros((50_000, 8, 8, 1), "float32")  # 12.2 MiB
    tracemalloc.start()
    try:
        store = kept.Store(tmp_path / "kept.npz", x, "0" * 64, resumes=False)
        for start in range(0, len(x), 1000):
            rows = np.arange(start, start + 1000)
            store.update(rows, x[rows] + 1, np.ones(1000, "float32"))
            store.flush()
        with open(tmp_path / "kept.npz", "wb") as file:
            zeros = np.zeros(len(x))
            kept.write(file, "{}", {"x": x, "x_adv": store.x_adv, "prediction": zeros, "distance": zeros})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    with np.load(tmp_path / "kept.npz") as file:
        assert (file["x_adv"] == 1).all()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "kept.npz"
    path.write_bytes(b"an earlier one")

    def fail(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        with pytest.raises(ValueError, match="must lie on a disk with room for 0 MiB. .*No space left"):
            evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=path)
    assert os.listdir(tmp_path) == ["kept.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(kept, "write", fail)
        with pytest.warns(RuntimeWarning, match="The examples could not be written, and stay in .*kept.npz.partial"):
            report = evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=path)
    assert path.read_bytes() == b"an earlier one"
    # The points are in the file that another evaluation would need.
    with pytest.raises(ValueError, match="must be a file of this evaluation only"):
        evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=path)
    report.to_npz(tmp_path / "elsewhere.npz")
    again = RobustnessReport.from_npz(tmp_path / "elsewhere.npz")
    np.testing.assert_array_equal(again.x_adv, report.x_adv)


def test_an_error_leaves_no_file_without_a_state(tmp_path):
    class Fails(Attack):
        def run(self, classifier, batch):
            raise ArithmeticError

    options = OPTIONS | {"attacks": [Fails(EPS)]}
    for state, left in ((None, []), (tmp_path / "state", ["kept.npz.partial", "state"])):
        with pytest.raises(ArithmeticError):
            evaluate_robustness(
                linear_model(), *data(), **options, keep_examples=tmp_path / "kept.npz", state_path=state
            )
        assert sorted(os.listdir(tmp_path)) == left


def test_wrong_arguments_are_named(tmp_path, whole):
    def evaluate(keep_examples, **options):
        evaluate_robustness(linear_model(), *data(), **OPTIONS, keep_examples=keep_examples, **options)

    with pytest.raises(ValueError, match="`keep_examples` must name a file where `state_path` is given"):
        evaluate(True, state_path=tmp_path / "state")
    for wrong in (None, 3, ["kept.npz"]):
        with pytest.raises(ValueError, match="`keep_examples` must be True, False or a path. Received: keep_examples="):
            evaluate(wrong)
    with pytest.raises(ValueError, match="`keep_examples` must lie in a folder that can be written to"):
        evaluate(tmp_path / "nowhere" / "kept.npz")
    with pytest.raises(ValueError, match="`keep_examples` must be a path where nothing exists"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="`keep_examples` and `state_path` must be different files"):
        evaluate(tmp_path / "same", state_path=tmp_path / "same")
    (tmp_path / "kept.npz.partial").write_text("mine")
    with pytest.raises(ValueError, match="needs the name .*kept.npz.partial' meanwhile, where another file exists"):
        evaluate(tmp_path / "kept.npz")
    assert (tmp_path / "kept.npz.partial").read_text() == "mine"
    (tmp_path / "kept.npz.partial").unlink()
    report = evaluate_robustness(linear_model(), *data(), **OPTIONS)
    for name in kept.ARRAYS:
        with pytest.raises(ValueError, match=f"`report.{name}` needs the examples: evaluate with `keep_examples=True`"):
            getattr(report, name)
    with pytest.raises(ValueError, match="needs the examples"):
        report.to_npz(tmp_path / "kept.npz")
    assert os.listdir(tmp_path) == []


def test_files_of_something_else_are_refused(whole, tmp_path):
    path = tmp_path / "kept.npz"
    whole.to_npz(path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def refused(reason, **changes):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (members | changes).items():
                if content is not None:
                    archive.writestr(name, content)
        with pytest.raises(ValueError, match=rf"`path` must be a file written by `RobustnessReport.to_npz`.*{reason}"):
            RobustnessReport.from_npz(path)

    def array(values):
        np.save(tmp_path / "array.npy", values, allow_pickle=True)
        return (tmp_path / "array.npy").read_bytes()

    refused("it holds", **{"x.npy": None})
    refused("it holds", **{"more.npy": array(np.zeros(3))})
    refused("x_adv must hold finite numbers for 60", **{"x_adv.npy": array(np.zeros((59, 4)))})
    refused("distance must hold finite numbers", **{"distance.npy": array(np.full(60, np.nan))})
    refused("x and x_adv must have equal shapes", **{"x.npy": array(np.zeros((60, 5)))})
    refused("", **{"prediction.npy": array(np.array([{}] * 60))})
    for wrong in (np.full(60, -1), np.zeros(60), np.zeros((60, 2), int)):
        refused("prediction must hold class ids", **{"prediction.npy": array(wrong)})
    content = json.loads(members["report.json"]) | {"robust_accuracy": 1.0}
    refused("as the examples say", **{"report.json": json.dumps(content)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="it is compressed"):
        RobustnessReport.from_npz(path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="must be a file written by"):
        RobustnessReport.from_npz(path)
    path.write_bytes(good.replace(members["x_adv.npy"][200:260], bytes(60)))
    with pytest.raises(ValueError, match=r"x_adv.npy is damaged"):
        RobustnessReport.from_npz(path)


def test_the_command_keeps_merges_and_shows(tmp_path, capsys):
    linear_model().save(tmp_path / "model.keras")
    x, y = data()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    command = ["evaluate", str(tmp_path / "model.keras"), "--dataset", str(tmp_path / "data.npz"), "--eps", str(EPS)]
    command += ["--suite", "quick", "--quiet"]
    parts = [str(tmp_path / f"{part}.npz") for part in (0, 1)]
    for part in (0, 1):
        assert cli.main([*command, "--shard", f"{part}/2", "--keep", parts[part]]) == 0
    out, kept_file = str(tmp_path / "all.json"), str(tmp_path / "all.npz")
    assert cli.main(["merge", *parts, "--out", out, "--keep", kept_file]) == 0
    report = RobustnessReport.from_npz(kept_file)
    np.testing.assert_array_equal(report.x, x)
    capsys.readouterr()
    assert cli.main(["show", kept_file]) == 0
    assert capsys.readouterr().out.strip() == str(RobustnessReport.from_json(out))
    assert cli.main(["compare", kept_file, out]) == 0
    page = tmp_path / "page.html"
    assert cli.main(["show", kept_file, "--html", str(page)]) == 0
    assert "<h1>all</h1>" in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", kept_file, "--html", str(page)])
    assert cli.main([*command, "--html", str(page), "--overwrite"]) == 0
    assert "<h1>model.keras</h1>" in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--keep", kept_file])
    assert cli.main([*command, "--keep", kept_file, "--overwrite"]) == 0
    assert cli.main(["merge", out, "--out", str(tmp_path / "new.json"), "--keep", str(tmp_path / "new.npz")]) == 2
    assert "`keep` needs the examples of all shards" in capsys.readouterr().err
    assert not (tmp_path / "new.json").exists()
