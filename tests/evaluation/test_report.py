import json
import math

import pytest

from keras_drsl import RobustnessReport
from keras_drsl.evaluation import Check
from keras_drsl.evaluation.intervals import wilson

BROKEN_BY = [None, None, None, "clean", "first", "first", "second", None, None, "second"]


def make(index=range(10), broken_by=BROKEN_BY, status="pass", model="a", eps=0.1, shard=None):
    settings = {"eps": eps, "norm": "inf", "suite": "custom", "shard": shard}
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
        make().to_json(path)
    with pytest.raises(ValueError, match="`path` must lie in a folder that can be written to"):
        make().to_json(tmp_path / "nowhere" / "report.json")
    assert path.read_text() == "mine"
    make().to_json(path, overwrite=True)
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


def test_a_report_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    make().plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
