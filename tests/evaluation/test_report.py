import itertools
import json
import math
import re

import pytest

from keras_drsl import RobustnessReport, _schema
from keras_drsl._intervals import wilson
from keras_drsl.evaluation import Check, rendering
from keras_drsl.evaluation.checks import CHECKS
from tests.helpers import set_nested

BROKEN_BY = [None, None, None, "clean", "first", "first", "second", None, None, "second"]


def make(index=range(10), broken_by=BROKEN_BY, status="pass", model="a", eps=0.1, shard=None):
    settings = {"eps": eps, "norm": "inf", "clip_min": 0.0, "clip_max": 1.0, "suite": "custom", "shard": shard}
    attacks = [
        {"name": name, "settings": {"steps": 3}, "seconds": seconds}
        for name, seconds in (("first", 1.0), ("second", 2.0))
    ]
    checks = [Check("first", "pass", 0.5, "fine"), Check("second", status, math.nan, "so so")]
    per_example = {"index": list(index), "label": [0] * len(broken_by), "broken_by": list(broken_by)}
    return RobustnessReport(settings, attacks, checks, per_example, {"model": model})


def test_accuracies_are_counted():
    report = make()
    assert report.clean_accuracy == 0.9
    assert report.robust_accuracy == 0.5
    assert report.accuracy["first"] == {"cumulative": 0.7, "alone": pytest.approx(7 / 9), "tried": 9}
    assert report.accuracy["second"] == {"cumulative": 0.5, "alone": pytest.approx(5 / 7), "tried": 7}


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_the_interval_is_that_of_wilson(successes, count, expected):
    assert wilson(successes, count) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("count", [1, 10, 300, 1000, 99999])
def test_the_interval_of_none_begins_at_0_and_that_of_all_ends_at_1(count):
    assert wilson(0, count)[0] == 0
    assert wilson(count, count)[1] == 1
    assert 0 < wilson(1e-6, count)[0] < wilson(count - 1e-6, count)[1] < 1


def test_a_written_report_is_read_again(tmp_path):
    report, path = make(), tmp_path / "report.json"
    report.to_json(path)
    again = RobustnessReport.from_json(path)
    assert again.to_dict() == report.to_dict()
    assert math.isnan(again.checks[1].value)
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_an_existing_file_is_not_lost(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("mine")
    with pytest.raises(ValueError, match="`path` must be a path where nothing exists. Received: path=.*, which exists"):
        make().to_json(path, overwrite=False)
    with pytest.raises(ValueError, match="`path` must lie in a folder that can be written to"):
        make().to_json(tmp_path / "nowhere" / "report.json")
    assert path.read_text() == "mine"
    for _ in range(2):  # C9: as `keras.Model.save`
        make().to_json(path)
    assert RobustnessReport.from_json(path).num_examples == 10


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', "no"])
def test_a_file_without_a_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="`path` must be a file written by `RobustnessReport.to_json`"):
        RobustnessReport.from_json(path)


def test_failures_come_first():
    text = str(make(status="fail"))
    assert text.startswith("NOT TRUSTWORTHY")
    assert text.index("FAIL") < text.index("pass")
    assert "not trustworthy" in make(status="fail").to_markdown()
    assert not make(status="fail").trustworthy
    assert make(status="warn").trustworthy


@pytest.mark.parametrize(  # C6
    ("path", "value"),
    [
        (["format"], 3),
        (["format"], True),
        (["more"], 1),
        (["settings"], ...),
        (["settings", "eps"], "0.1"),
        (["settings", "eps"], -0.1),
        (["settings", "eps"], 10**400),
        (["settings", "norm"], "1"),
        (["settings", "suite"], None),
        (["settings", "shard"], [7, 3]),
        (["settings", "shard"], [0.0, 2]),
        (["settings", "shard"], [False, True]),
        (["settings", "shard"], [1, 2]),
        (["settings", "shard"], ...),
        (["settings", "shards"], [None]),
        (["settings", "seed"], -1),
        (["settings", "max_samples"], 9),
        (["settings", "clip_min"], 2),
        (["settings", "clip_max"], 0.05),
        (["settings", "clip_max"], ...),
        (["provenance", "model"], 3),
        (["provenance", "pool"], 7),
        (["attacks"], {}),
        (["attacks", 0], []),
        (["attacks", 0, "name"], "second"),
        (["attacks", 0, "name"], "clean"),
        (["attacks", 0, "name"], "check:unknown"),
        (["attacks", 0, "seconds"], -1),
        (["attacks", 0, "seconds"], None),
        (["attacks", 0, "gradients"], -1),
        (["attacks", 0, "queries"], 1.5),
        (["attacks", 0, "tried"], 8),
        (["attacks", 0, "cumulative"], 0.8),
        (["attacks", 0, "alone"], None),
        (["attacks", 0, "settings"], ...),
        (["checks", 0, "status"], "good"),
        (["checks", 0, "status"], []),
        (["checks", 0, "value"], "0.5"),
        (["checks", 0, "name"], "second"),
        (["checks", 0, "name"], "shards"),
        (["checks", 0, "message"], 1),
        (["per_example", "index"], [0] * 10),
        (["per_example", "index", 0], -1),
        (["per_example", "index", 0], 0.5),
        (["per_example", "index", 0], True),
        (["per_example", "label"], [0] * 9),
        (["per_example", "label", 0], "0"),
        (["per_example", "broken_by", 0], "third"),
        (["per_example", "broken_by", 0], "first"),
        (["per_example", "broken_by"], []),
        (["clean_accuracy"], 0.8),
        (["robust_accuracy"], 1.5),
        (["robust_accuracy"], "0.5"),
        (["confidence_interval"], [0.1]),
        (["num_examples"], 11),
        (["num_examples"], True),
        (["trustworthy"], False),
        (["trustworthy"], 1),
    ],
)
def test_a_report_that_breaks_a_rule_is_refused(tmp_path, path, value):
    content = make().to_dict()
    set_nested(content, path, value)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`path` must be a file written by `RobustnessReport.to_json`.*must"):
        RobustnessReport.from_json(file)


@pytest.mark.parametrize(  # C6
    "text",
    [
        "NaN",
        "[" * 100_000,
        '{"format": 2, "format": 2}',
        '{"format": ' + "9" * 5000 + "}",
        '{"format": 1, "checks": 3}',
        '{"format": 1, "checks": [], "per_example": {"broken_by": [1]}}',
        "\x00" * 9,
    ],
)
def test_json_that_is_no_report_is_refused(tmp_path, text):
    file = tmp_path / "report.json"
    for raw in (text.encode(), text.encode("utf-16")):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match="`path` must be a file written by"):
            RobustnessReport.from_json(file)


@pytest.fixture
def foreign():
    """Return a report whose names and messages are not harmless."""
    report = make(status="warn")
    name = "\x1b[31m|`<script>$x^$\n" + "long" * 30
    report.attacks[0]["name"] = name
    report.per_example["broken_by"] = [name if by == "first" else by for by in report.per_example["broken_by"]]
    report.checks[:] = [Check("first\u202e", "warn", 0.5, "<b>a|b</b>\r\x1b[2J" + "y" * 200)]
    report.settings["suite"] = "custom\x07|"
    return report


def test_foreign_text_is_escaped(foreign, tmp_path):  # C7, D4
    for text in (str(foreign), foreign.to_text(verbose=True)):
        assert all(line.isprintable() and len(line) <= 80 for line in text.split("\n"))
        assert r"\x1b[31m" in text
    markdown = foreign.to_markdown()
    assert all(line.isprintable() for line in markdown.split("\n"))
    assert "<" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6] * 4 + [5] * 3
    file = tmp_path / "report.json"
    content = foreign.to_dict()
    content["per_example"]["broken_by"][0] = "\x1b[31mred"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must hold names of `attacks`") as error:
        RobustnessReport.from_json(file)
    assert str(error.value).isprintable()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_foreign_text_can_be_drawn(foreign, tmp_path):  # C7
    pytest.importorskip("matplotlib")
    foreign.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_a_quick_report_says_upper_bound():  # D6
    pytest.importorskip("matplotlib")
    for suite, expected in (("quick", True), ("cleverhans", True), ("standard", False)):
        report = make()
        report.settings["suite"] = suite
        for text in (str(report).splitlines()[0], report.to_markdown().splitlines()[0], report.plot().get_title()):
            assert ("upper bound" in text) == expected


def test_the_report_names_what_did_not_pass():  # D4
    report = make(status="warn")
    report.checks.append(Check("converged", "fail", 0.2, "share that falls"))
    report.checks.append(Check("noise", "skipped", math.nan, "nothing left"))
    lines = str(report).splitlines()
    start = lines.index("FAIL: converged = 0.2")
    assert lines[start:] == [
        "FAIL: converged = 0.2",
        "    share that falls",
        "    Attack with more steps.",
        "WARN: second",
        "    so so",
        "1 of 4 checks passed (1 failed, 1 with a warning, 1 skipped)",
    ]
    assert report.to_text(verbose=True).splitlines()[-4:] == [
        "pass: first = 0.5",
        "    fine",
        "skipped: noise",
        "    nothing left",
    ]


def test_every_check_has_advice():  # D4
    # This one never warns. Checks of other tests are registered beside those of the package.
    built_in = {name for name, check in CHECKS.items() if check.function.__module__.startswith("keras_drsl")}
    assert built_in - {"few_classes"} <= set(rendering.ADVICE)


def shard(part, count, *, seconds, statuses, device="cpu"):
    """Return the report of a shard whose checks and times differ from those of the others."""
    broken_by = [None, "first", "clean", "check:first"] if part % 2 else ["first", None, None, "second"]
    report = make([part + count * place for place in range(4)], broken_by, shard=[part, count])
    for attack, time in zip(report.attacks, seconds, strict=True):
        attack |= {"seconds": time, "compile_seconds": time / 3}
    if part % 2:
        report.attacks.append({"name": "check:first", "settings": {}, "seconds": 0.1, "tried": 2})
    report.checks[:] = [Check(name, status, value, f"{name} of {part}") for name, (status, value) in statuses.items()]
    report.provenance |= {"device": device, "versions": {"keras": f"3.{part}", "numpy": "2"}}
    return report


@pytest.fixture
def four():
    """Return the reports of four shards of six."""
    nothing = ("skipped", math.nan)
    return [
        shard(0, 6, seconds=[0.1, 1e9 / 3], statuses={"first": ("pass", 0.1), "zero": ("pass", 0.0)}),
        shard(1, 6, seconds=[0.2, 1e-7], statuses={"first": ("warn", 0.1), "last": nothing}, device="gpu"),
        shard(3, 6, seconds=[0.3, 1 / 7], statuses={"second": ("fail", 0.2), "first": ("warn", 0.3)}),
        shard(4, 6, seconds=[0.7, 4e-7], statuses={"first": ("warn", math.nan), "zero": ("pass", -0.0)}),
    ]


def test_merging_does_not_depend_on_order_and_levels(four, tmp_path):  # C1
    merge = RobustnessReport.merge

    def write(*reports):
        merge(reports).to_json(tmp_path / "merged.json")
        return (tmp_path / "merged.json").read_bytes()

    expected = write(*four)
    for a, b, c, d in itertools.permutations(four):
        assert write(a, b, c, d) == expected
        assert write(merge([a, b]), merge([c, d])) == expected
        assert write(merge([a]), merge([b, merge([c, d])])) == expected
        assert write(merge([merge([merge([a, b]), c]), d])) == expected
    # Through files, as on a cluster.
    for name, pair in (("first", four[:2]), ("second", four[2:])):
        merge(pair).to_json(tmp_path / name)
    assert write(*(RobustnessReport.from_json(tmp_path / name) for name in ("second", "first"))) == expected


def test_a_merged_report_has_worst_outcomes_and_sums(four):  # C1
    merged = RobustnessReport.merge(four)
    assert [(check.name, check.status, check.message) for check in merged.checks] == [
        ("first", "warn", "first of 3"),
        ("last", "skipped", "last of 1"),
        ("second", "fail", "second of 3"),
        ("zero", "pass", "zero of 0"),
        ("shards", "warn", "shards are missing, 2/6, 5/6: this report is on the others"),
    ]
    assert [attack["seconds"] for attack in merged.attacks] == [1.3, 333333333.47619, 0.2]
    assert merged.compile_seconds == pytest.approx((1.3 + 333333333.47619) / 3)
    assert merged.provenance["device"] == ["cpu", "gpu"]
    assert merged.provenance["versions"] == {"keras": ["3.0", "3.1", "3.3", "3.4"], "numpy": "2"}
    assert "4 of 6 shards" in str(merged)


def test_two_reports_of_one_shard_are_refused(four):  # C6
    first, twin = four[0], shard(0, 6, seconds=[0, 0], statuses={})
    twin.per_example["index"] = [24, 30, 36, 42]
    one_shard = "`reports` must be of different shards. Received: two of one shard"
    for pair in ([first, twin], [make(range(10)), make(range(10, 20))]):
        with pytest.raises(ValueError, match=one_shard):
            RobustnessReport.merge(pair)
    with pytest.raises(ValueError, match="`reports` must be of one evaluation. Received: two of different settings"):
        RobustnessReport.merge([first, shard(1, 7, seconds=[0, 0], statuses={})])
    first.provenance["pool"], four[1].provenance["pool"] = "a", "b"
    with pytest.raises(ValueError, match="`reports` must be of one evaluation. Received: two of different pool"):
        RobustnessReport.merge(four[:2])


def test_a_shard_of_very_many_names_the_first_ones():  # C6, C8
    merged = RobustnessReport.merge([make([1], [None], shard=[1, 2**31])])
    assert merged.checks[-1].value == 2**31 - 1
    assert merged.checks[-1].message.startswith("shards are missing, 0/2147483648, 2/2147483648, ")
    assert "and 2147483637 more" in merged.checks[-1].message


def test_merged_reports_count_all_examples():
    parts = [
        make(range(0, 10, 2), BROKEN_BY[::2], shard=[0, 2]),
        make(range(1, 10, 2), BROKEN_BY[1::2], status="warn", shard=[1, 2]),
    ]
    merged = RobustnessReport.merge(parts[::-1])
    assert merged.per_example == make().per_example
    assert merged.accuracy == make().accuracy
    assert [check.status for check in merged.checks] == ["pass", "warn"]
    assert [attack["seconds"] for attack in merged.attacks] == [2.0, 4.0]


def test_calls_are_added_up_where_all_shards_have_them():
    parts = [make(range(start, 10, 2), BROKEN_BY[start::2], shard=[start, 2]) for start in range(2)]
    assert (parts[0].num_gradients, parts[0].num_queries) == (None, None)
    for number, part in enumerate(parts):
        for attack in part.attacks:
            attack |= {"gradients": 10**number, "queries": 3 * 10**number}
    merged = RobustnessReport.merge(parts)
    assert (merged.num_gradients, merged.num_queries) == (22, 66)
    assert [attack["gradients"] for attack in merged.attacks] == [11, 11]
    assert "22 gradients and 66 further queries" in merged.to_text(verbose=True)
    for key, expected in (("gradients", (None, 66)), ("queries", (22, None))):
        number = parts[1].attacks[0].pop(key)
        merged = RobustnessReport.merge(parts)
        assert key not in merged.attacks[0]
        assert (merged.num_gradients, merged.num_queries) == expected
        assert "further queries" not in merged.to_text(verbose=True) + merged.to_markdown()
        parts[1].attacks[0][key] = number


def test_a_missing_shard_is_reported():
    first, last = make(range(0, 20, 2), shard=[0, 3]), make(range(1, 20, 2), shard=[2, 3])
    first.per_example["broken_by"][0] = "check:restarts"
    first.attacks.append({"name": "check:restarts", "settings": {}, "seconds": 3.0, "tried": 5})
    for merged in (RobustnessReport.merge([first, last]), RobustnessReport.merge([last, first])):
        assert merged.robust_accuracy == 9 / 20
        assert list(merged.accuracy) == ["first", "second", "check:restarts"]
        assert merged.accuracy["check:restarts"]["tried"] == 5
        (missing,) = [check for check in merged.checks if check.name == "shards"]
        assert (missing.status, missing.value) == ("warn", 1)


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (make(range(9, 19)), "`reports` must be of different examples. Received: two that share some"),
        (make(range(10, 20), model="b"), "`reports` must be of one evaluation. Received: two of different model"),
        (make(range(10, 20), eps=0.2), "`reports` must be of one evaluation. Received: two of different settings"),
    ],
)
def test_reports_of_two_evaluations_are_refused(other, rule):
    with pytest.raises(ValueError, match=rule):
        RobustnessReport.merge([make(), other])
    with pytest.raises(ValueError, match="`reports` must hold at least one report"):
        RobustnessReport.merge([])


def test_a_model_card_has_metrics_and_a_verdict():
    report = make(status="fail")
    lines = report.to_model_card(name='a "model": x', dataset="digits").splitlines()
    assert (lines[0], lines[2]) == ("---", "---")
    (entry,) = json.loads(lines[1].removeprefix("model-index: "))
    assert entry["name"] == 'a "model": x'
    (result,) = entry["results"]
    assert (result["task"]["type"], result["dataset"]["name"]) == ("image-classification", "digits")
    assert [metric["value"] for metric in result["metrics"]] == [0.9, 0.5]
    assert result["metrics"][1]["name"] == "robust accuracy, norm inf, eps 0.1 of 0..1, suite custom"
    low, high = report.confidence_interval
    assert lines[4] == "## Robustness"
    assert "Of 10 test examples of digits, the model gets 90.0% right." in lines[6]
    assert f"it keeps 50.0% (95 % interval {low:.1%} to {high:.1%}). **Not trustworthy: a check failed.**" in lines[6]
    assert lines[6].endswith("1 of 2 checks passed (1 failed).")
    for name, dataset in (("", "digits"), ("a", None)):
        with pytest.raises(ValueError, match="` must be a text. Received: "):
            report.to_model_card(name=name, dataset=dataset)


def test_a_report_can_be_drawn(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    make().plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    axes = figures.Figure().subplots()
    assert make().plot(ax=axes) is axes
    # Without an attack, after the first one, and after the second one.
    assert [bar.get_width() for bar in axes.containers[0]] == pytest.approx([90, 70, 50])
    assert axes.get_legend() is not None


# D1
@pytest.mark.parametrize(("labels", "text"), [([0] * 5 + [1] * 5, "5"), ([0] * 4 + [1] * 6, "4 to 6")])
def test_the_text_says_how_many_examples_each_class_has(labels, text):
    report = make()
    report.per_example["label"] = labels
    assert report.class_counts == {label: labels.count(label) for label in (0, 1)}
    assert f"10 examples, {text} of each of 2 classes" in str(report)


@pytest.mark.parametrize(
    ("rule", "obeys", "breaks"),
    [
        (_schema.SHARE, [0, 0.5, 1], [-0.1, 1.1, math.nan, True, "0.5", None]),
        (_schema.SECONDS, [0, 1e10], [-1e-9, 2e10, math.inf, "1"]),
        (_schema.NOT_NEGATIVE, [0, 7.5], [-0.1, math.nan, False]),
        (_schema.NAME, ["a"], ["", 1, None]),
    ],
)
def test_rules_hold_at_their_limits(rule, obeys, breaks):
    assert all(rule.obeys(value) for value in obeys)
    assert not any(rule.obeys(value) for value in breaks)
