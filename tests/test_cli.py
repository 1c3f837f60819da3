import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, version
from unittest.mock import Mock

import keras
import numpy as np
import pytest

import keras_drsl
import keras_drsl_command
from keras_drsl import cli
from keras_drsl.evaluation.suites import SUITE_ALIASES, SUITES
from keras_drsl.threat import NORM_NAMES
from tests.helpers import run_module, run_python
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


def test_numbers_per_feature_and_an_output_are_read(tmp_path):
    pytest.importorskip("matplotlib")
    x, y = inputs(40)
    np.savez(tmp_path / "data.npz", x=100 * x, y=y)
    image = keras.Input((4,))
    outputs = {"cat": linear_model()(image), "other": keras.layers.Flatten()(image)}
    keras.Model(image, outputs).save(tmp_path / "model.keras")
    files = ["--out", str(tmp_path / "report.json"), "--plot", str(tmp_path / "curve.png")]
    options = ["--eps", "20,8/2,0,1e1", "--clip-min=-1,0,0,0", "--clip-max", "100", "--mask", "0,0,0,1"]
    assert evaluate(tmp_path, *options, "--output", "cat", *files) == 0
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert settings["eps"] == [20, 4, 0, 10]
    assert settings["clip_min"] == [-1, 0, 0, 0]
    assert settings["clip_max"] == 100
    assert settings["mask"] == [False, False, False, True]
    assert settings["output"] == "cat"
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_an_evaluation_ends_early(tmp_path, capsys):
    x, y = inputs(300)
    linear_model().save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y)
    files = ["--state", tmp_path / "eval.state", "--out", tmp_path / "report.json"]
    assert evaluate(tmp_path, "--eps", 0.05, "--at-least", 0.1, "--precision", 0.2, *files) == 0
    printed = capsys.readouterr().out
    assert re.search(r"stopped early    after \d+ of 300 examples\nat least 10.0%   yes\n", printed)
    settings = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert (settings["precision"], settings["at_least"], settings["num_given"]) == (0.2, 0.1, 300)
    assert evaluate(tmp_path, "--eps", 0.05, "--precision", 0.7) == 2
    assert "`precision` must be a number in (0, 0.5). Received: precision=0.7" in capsys.readouterr().err


def test_a_curve_is_drawn(files, tmp_path):
    pytest.importorskip("matplotlib")
    assert evaluate(files, "--eps", "1/10", "--plot", tmp_path / "curve.png") == 0
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_pages_show_curve_and_comparisons(files, tmp_path, capsys):
    for module in ("jinja2", "matplotlib", "PIL"):
        pytest.importorskip(module)
    page, curve = tmp_path / "page.html", tmp_path / "curve.png"
    assert evaluate(files, "--eps", 0.1, "--html", page, "--plot", curve, "--out", tmp_path / "r.json") == 0
    assert "How the accuracy falls with the size of the change" in page.read_text(encoding="utf-8")
    x, y = inputs(40)
    other = linear_model()
    other.set_weights([-weights for weights in other.get_weights()])
    options = {"threat": keras_drsl.ThreatModel(0.1), "suite": "quick", "verbose": 0}
    keras_drsl.evaluate_robustness(other, x, y, **options).to_json(tmp_path / "other.json")
    show = ["show", str(tmp_path / "r.json"), "--compare", str(tmp_path / "other.json")]
    assert cli.main([*show, "--html", str(page), "--overwrite"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Compared with other models" in text
    assert '<th scope="row">r</th><th scope="row">other</th><td>robust</td>' in text
    with pytest.raises(SystemExit):
        cli.main(show)
    assert "`compare` needs --html" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*show, "--html", str(tmp_path / "other.json"), "--overwrite"])
    assert "must be different files" in capsys.readouterr().err


def test_strict_reports_a_failed_check(files, tmp_path):
    assert evaluate(files, "--eps", 0.1, "--out", tmp_path / "r.json", "--strict") == 0
    content = json.loads((tmp_path / "r.json").read_text())
    content["checks"][0]["status"] = "fail"
    content["trustworthy"] = False
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert cli.main(["show", str(tmp_path / "bad.json")]) == 0
    assert cli.main(["show", str(tmp_path / "bad.json"), "--strict"]) == 3


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command and expects status 2 and a sentence."""

    def check(arguments, reason):
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        printed = capsys.readouterr().err
        assert reason in printed, printed
        assert "Traceback" not in printed

    return check


def test_a_saved_model_may_stand_in_front(files, tmp_path, capsys):
    x, y = inputs(40)
    np.savez(tmp_path / "data.npz", x=(255 * x), y=y)
    keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255)]).save(tmp_path / "front.keras")
    command = ["evaluate", files / "model.keras", "--dataset", tmp_path / "data.npz", "--suite", "quick", "--quiet"]
    options = ["--preprocessing", tmp_path / "front.keras", "--clip-max", 255, "--eps", 51, "--out"]
    assert cli.main([str(part) for part in (*command, *options, tmp_path / "255.json")]) == 0
    assert evaluate(files, "--eps", 0.2, "--out", tmp_path / "1.json") == 0
    in_255, in_1 = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("255", "1"))
    assert in_255["per_example"]["broken_by"] == in_1["per_example"]["broken_by"]
    assert 0 < in_1["robust_accuracy"] < 1
    assert in_255["settings"]["preprocessing"].startswith("Sequential ")
    capsys.readouterr()
    assert evaluate(files, "--eps", 0.2, "--preprocessing", tmp_path / "data.npz") == 2
    assert "`preprocessing` must be a file that Keras can load" in capsys.readouterr().err


@pytest.fixture
def command(files):
    return ["evaluate", files / "model.keras", "--dataset", files / "data.npz", "--suite", "quick", "--quiet"]


@pytest.mark.parametrize(  # C8
    ("options", "reason"),
    [
        ([], "--eps"),
        (["--eps", "x"], "must be a number, as 0.1 or 8/255"),
        (["--eps", "8/0"], "must be a number, as 0.1 or 8/255"),
        (["--eps", "1" + "0" * 400 + "/1"], "must be a number, as 0.1 or 8/255"),
        (["--eps", "1" + "0" * 5000 + "/1"], "must be a number, as 0.1 or 8/255"),
        (["--eps", "nan"], "must be a finite number"),
        (["--eps", "1e400"], "must be a finite number"),
        (["--eps", "0"], "`eps` must be a positive number"),
        (["--eps=-1/255"], "`eps` must be a positive number"),
        (["--eps", "0.1", "--norm", "3"], "`norm` must be one of"),
        (["--eps", "0.1", "--suite", "best"], "`suite` must be one of"),
        (["--eps", "0.1", "--shard", "3"], "must be I/N, as 0/4"),
        (["--eps", "0.1", "--shard", "4/4"], "must be I/N, as 0/4"),
        (["--eps", "0.1", "--shard", f"0/{10**30}"], "must be I/N, as 0/4"),
        (["--eps", "0.1", "--seed", "-1"], "must be an integer from 0 to 2147483647"),
        (["--eps", "0.1", "--seed", "9" * 5000], "must be an integer from 0 to 2147483647"),
        (["--eps", "0.1", "--batch-size", "0"], "must be an integer from 1 to 2147483647"),
        (["--eps", "0.1", "--max-samples", str(2**31)], "must be an integer from 1 to 2147483647"),
        (["--eps", "0.1", "--clip-max", "inf"], "must be a finite number"),
        (["--eps", "0.1", "--clip-min", "2"], "`clip_min` must be below `clip_max`"),
        (["--eps", "2"], "`eps` must be no larger than the range"),
        (["--eps", "0.1", "--out", ""], "must be a path"),
        (["--eps", "0.1,-1,0.1,0.1"], "`eps` must be a number >= 0"),
        (["--eps", "0.1,,0.1"], "must be a number, as 0.1 or 8/255"),
        (["--eps", "0.1,0.2"], "`eps` must be one number or fit inputs of shape (4,)"),
        (["--eps", "0.1", "--mask", "0,2,0,0"], "must be 0 or 1 for each channel"),
        (["--eps", "0.1", "--mask", "1,1,1,1"], "`mask` must leave at least one feature that may change"),
        (["--eps", "0.1", "--output", "cat"], "`output` must be None for a model with one output"),
        (["--eps", "0.1", "--out", "/nowhere/r.json"], "`out` must lie in a folder that can be written to"),
    ],
)
def test_bad_arguments_end_with_status_2(command, fails, options, reason):
    fails([*command, *options], reason)


def test_bad_files_end_with_status_2(files, command, fails, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("mine")
    eps = ["--eps", "0.1"]
    fails(["evaluate", "m", "--dataset", "digits", *eps], "`MODEL` must be a file that Keras can load")
    fails(
        [*command, *eps, "--dataset", "my images"],
        "`dataset` must be one of digits, mnist, cifar10, another name of tensorflow-datasets, an npz file or a folder",
    )
    expected = "name='fashion_mnis'. Names like it: fashion_mnist"
    fails([*command, *eps, "--dataset", "fashion_mnis", "--data-dir", tmp_path], expected)
    fails(
        [*command, *eps, "--dataset", "photos"], "or for the command a folder or npz file that exists. Received: name"
    )
    fails([*command, *eps, "--dataset", "x.npz"], "`dataset` must be a file that exists")
    fails([*command, *eps, "--out", there], "which exists")
    fails(["show", there], "`path` must be a file written by")
    fails(["evaluate", files / "data.npz", *command[2:], *eps], "`MODEL` must be a file that Keras can load")
    assert there.read_text() == "mine"


@pytest.mark.parametrize("largest", [["--batch-size", 2**31 - 1], ["--seed", 2**31 - 1], ["--max-samples", 2**31 - 1]])
def test_the_largest_integers_are_taken(files, largest):  # C8
    assert evaluate(files, "--eps", 0.1, *largest) == 0


def test_aliases_mean_what_people_type(files, capsys):  # D7
    def shown(*options):
        capsys.readouterr()
        assert evaluate(files, *options) == 0
        return re.sub(r"[\d.]+$", "", capsys.readouterr().out, flags=re.MULTILINE)

    expected = shown("--eps", 0.1, "--norm", "2", "--suite", "quick")
    assert shown("--eps", "1/10", "--norm", "L2", "--suite", "QUICK") == expected
    assert shown("--eps", 0.1, "--norm", "Linf") == shown("--eps", 0.1)
    args = keras_drsl_command._parser().parse_args(
        ["evaluate", "m", "--dataset", "MNIST", "--eps", "8/255", "--suite", "AutoAttack"]
    )
    assert (args.suite, args.dataset, args.eps) == ("standard", "mnist", pytest.approx(0.031372549))


def test_the_command_knows_the_names_of_the_package():
    assert tuple(SUITES) == keras_drsl_command.SUITES
    assert keras_drsl_command.ALIASES == SUITE_ALIASES
    assert keras_drsl_command.NORMS == NORM_NAMES
    assert keras_drsl_command.DATASETS == keras_drsl.datasets.NAMES
    assert keras_drsl_command.DATASET == keras_drsl.datasets.NAME


def test_one_file_in_two_places_is_refused(files, command, fails, tmp_path):  # C3
    model, data = tmp_path / "model.keras", tmp_path / "data.npz"
    shutil.copy(files / "model.keras", model)
    shutil.copy(files / "data.npz", data)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    os.link(data, tmp_path / "hard.npz")
    (tmp_path / "dangling.json").symlink_to(tmp_path / "r.json")
    before = {path: path.read_bytes() for path in (model, data)}
    start = ["evaluate", model, "--dataset", data, "--suite", "quick", "--eps", "0.1", "--overwrite"]
    for outputs in (
        ["--out", tmp_path / "p.png", "--plot", f"{tmp_path}/./p.png"],
        ["--out", tmp_path / "r.json", "--state", tmp_path / "link" / "r.json"],
        ["--out", tmp_path / "r.json", "--state", tmp_path / "R.JSON"],
        ["--out", tmp_path / "r.json", "--state", tmp_path / "dangling.json"],
        ["--out", data],
        ["--out", tmp_path / "link" / "data.npz"],
        ["--out", tmp_path / "hard.npz"],
        ["--plot", model],
        ["--state", data],
        ["--undefended", data, "--out", data],
        ["--preprocessing", data, "--out", data],
    ):
        fails([*start, *outputs], "must be different files")
    assert {path: path.read_bytes() for path in before} == before
    report = tmp_path / "report.json"
    report.write_text("{}")
    fails(["merge", report, "--out", tmp_path / "link" / "report.json", "--overwrite"], "must be different files")


def test_a_report_that_cannot_be_written_is_printed(files, command, tmp_path, monkeypatch, capsys):  # C2
    folder = tmp_path / "gone"
    folder.mkdir()
    state = tmp_path / "e.state"
    measure = cli.evaluate_robustness

    def lose_folder(*args, **kwargs):
        report = measure(*args, **kwargs)
        folder.rmdir()
        return report

    monkeypatch.setattr(cli, "evaluate_robustness", lose_folder)
    assert evaluate(files, "--eps", 0.1, "--out", folder / "r.json", "--state", state) == 2
    out, err = capsys.readouterr()
    assert "robust accuracy" in out
    assert "could not be written" in err
    assert f"The state in {str(state)!r} holds the result" in err
    monkeypatch.undo()
    assert evaluate(files, "--eps", 0.1, "--out", tmp_path / "r.json", "--state", state) == 0
    again = capsys.readouterr().out
    assert again.startswith(out)
    # A command that has succeeded ends with three lines.
    content = json.loads((tmp_path / "r.json").read_text())
    verdict = f"{content['robust_accuracy']:.1%} robust, {content['clean_accuracy']:.1%} without an attack"
    assert again.removeprefix(out).splitlines() == [
        "",
        f"verdict  {verdict}",
        f"trust    {len(content['checks'])} of {len(content['checks'])} checks passed",
        f"files    {tmp_path / 'r.json'}",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.state", "r.json"]


LIMITED = """
import resource, sys
from keras_drsl import cli
# A file may not grow beyond this size, as on a disk that is full.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.more
def test_a_full_disk_loses_no_report(files, command, tmp_path):  # C2
    out, state = tmp_path / "r.json", tmp_path / "e.state"
    outputs = ["--out", out, "--state", state]
    assert evaluate(files, "--eps", 0.1, *outputs) == 0
    sizes = [path.stat().st_size for path in (state, out)]
    assert sizes[0] < sizes[1] - 100
    state.unlink()
    out.unlink()
    arguments = [*command, "--eps", "0.1", *outputs]
    done = run_python(LIMITED, sizes[1] - 50, *arguments, check=False)
    assert done.returncode == 2
    assert "robust accuracy" in done.stdout
    assert "could not be written" in done.stderr
    assert "holds the result" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["e.state"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "keras_drsl", *map(str, arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "could not be printed" in done.stderr
    assert json.loads(out.read_text())["num_examples"] == 40


def test_the_curve_of_a_plot_has_the_pool_of_the_report(files, tmp_path, monkeypatch):
    pools = []
    for name in ("evaluate_robustness", "robustness_curve"):
        function = getattr(cli, name)

        def record(model, x, y, *, function=function, x_pool=None, **options):
            pools.append(len(x) if x_pool is None else len(x_pool[0]))
            return function(model, x, y, x_pool=x_pool, **options)

        monkeypatch.setattr(cli, name, record)
    assert evaluate(files, "--eps", "0.1", "--max-samples", 10, "--plot", tmp_path / "curve.png") == 0
    assert pools == [40, 40]


def test_a_standard_plot_draws_standard_figures(files, command, tmp_path, monkeypatch):  # D6
    pytest.importorskip("matplotlib")
    suites = []
    monkeypatch.setattr(cli, "robustness_curve", lambda *args, suite, **options: suites.append(suite) or Mock())
    monkeypatch.setattr(cli, "evaluate_robustness", lambda *args, suite, **options: measured(suite))
    arguments = [*command, "--eps", "0.1", "--plot", tmp_path / "p.png", "--suite", "standard"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert suites == ["standard"]


def measured(suite):
    """Return a report of one example."""
    settings = {"eps": 0.1, "norm": "inf", "suite": suite, "shard": None}
    per_example = {"index": [0], "label": [0], "broken_by": [None]}
    return keras_drsl.RobustnessReport(settings, [], [], per_example, {})


IMPORTS = """
import json, sys
import keras_drsl_command
try:
    status = keras_drsl_command.main(json.loads(sys.argv[1]))
except SystemExit as stop:
    status = stop.code
heavy = {"keras", "tensorflow", "jax", "torch", "numpy", "keras_drsl"}
print(json.dumps([status, sorted(heavy & set(sys.modules))]))
"""


@pytest.mark.parametrize(  # D3
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["evaluate", "--help"], 0),
        (["evaluate", "model.keras"], 2),
        (["evaluate", "model.keras", "--dataset", "digits", "--eps", "x"], 2),
        (["evaluate", "missing.keras", "--dataset", "digits", "--eps", "0.1"], 2),
        (["merge", "setup.cfg", "--out", "./setup.cfg", "--overwrite"], 2),
        (["destroy"], 2),
    ],
)
def test_help_and_errors_do_not_import_keras(arguments, status):
    done = run_python(IMPORTS, json.dumps(arguments))
    assert json.loads(done.stdout.splitlines()[-1]) == [status, []]


def test_the_package_runs_as_a_module():  # D3
    done = run_module("keras_drsl", "--version")
    assert done.stdout.strip() == version("keras-drsl")
    (script,) = entry_points(group="console_scripts", name="keras-drsl")
    assert script.dist.name == "keras-drsl"


def test_verbose_prints_every_check(files, tmp_path, capsys):  # D4
    assert evaluate(files, "--eps", 0.1, "--out", tmp_path / "r.json") == 0
    names = [check["name"] for check in json.loads((tmp_path / "r.json").read_text())["checks"]]
    short = capsys.readouterr().out
    assert f"{len(names)} of {len(names)} checks passed" in short
    assert cli.main(["show", str(tmp_path / "r.json"), "--verbose"]) == 0
    long = capsys.readouterr().out
    for name in names:
        assert f"pass: {name}" not in short
        assert f"pass: {name}" in long
    assert max(len(line) for line in (short + long).splitlines() if not line.startswith("files")) <= 80


@pytest.mark.parametrize(  # C8
    ("arrays", "reason"),
    [
        ({}, "it holds nothing"),
        ({"x": np.zeros((3, 4))}, "it holds x"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(3), "x_test": np.zeros((3, 4)), "y_test": np.zeros(3)}, "it holds x, y"),
        ({"x": np.float32(1), "y": np.zeros(3)}, "x must hold numbers"),
        ({"x": np.zeros((3, 4)), "y": np.int64(1)}, "y must hold numbers"),
        ({"x": np.zeros((3, 4), complex), "y": np.zeros(3)}, "x must hold numbers"),
        ({"x": np.zeros((3, 4), "timedelta64[s]"), "y": np.zeros(3)}, "x must hold numbers"),
        ({"x": np.zeros((3, 4), "datetime64[s]"), "y": np.zeros(3)}, "x must hold numbers"),
        ({"x": np.zeros((3, 4)), "y": np.array(["0", "1", "2"])}, "y must hold numbers"),
        ({"x": np.zeros(3, [("a", int)]), "y": np.zeros(3)}, "x must hold numbers"),
        ({"x": np.array([{}] * 3, object), "y": np.zeros(3)}, "without pickles"),
        ({"x": np.full((3, 4), np.nan), "y": np.zeros(3)}, "x must hold finite numbers"),
        ({"x": np.zeros((3, 4)), "y": np.array([0, np.inf, 1])}, "y must hold finite numbers"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(2)}, "one label for each input"),
        ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, "at least one"),
        ({"\x1b[31mx": np.zeros(3)}, "\\x1b[31mx"),
    ],
)
def test_npz_files_without_data_are_refused(tmp_path, arrays, reason):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match="`path` must be an npz file") as error:
        keras_drsl.datasets.load_npz(tmp_path / "data.npz")
    assert reason in str(error.value)


def test_files_that_are_no_npz_are_refused(tmp_path):  # C8
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x", "text")
        archive.writestr("y", "text")
    np.savez_compressed(tmp_path / "whole.npz", x=np.random.default_rng(0).random((9, 4)), y=np.arange(9))
    raw = bytearray((tmp_path / "whole.npz").read_bytes())
    raw[200] ^= 1
    (tmp_path / "flipped.npz").write_bytes(raw)
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    for name in ("array.npy", "text.npz", "flipped.npz", "empty.npz", "folder.npz", "missing.npz"):
        with pytest.raises(ValueError, match="`path` must be an npz file"):
            keras_drsl.datasets.load_npz(tmp_path / name)
    assert keras_drsl.datasets.load_npz(tmp_path / "whole.npz")[0].shape == (9, 4)


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
