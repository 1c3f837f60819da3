"""A state continues the evaluation that it belongs to, and no other; a damaged one is refused."""

import hashlib
import json

import numpy as np
import pytest

from keras_drsl import _files, evaluate_robustness
from keras_drsl.evaluation.state import FORMAT, State
from tests.linear import inputs, linear_model

OPTIONS = {"eps": 0.1, "suite": "quick", "checks": ["noise"], "verbose": 0}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Return a model, examples, and the bytes of a finished state."""
    model, (x, y) = linear_model(), inputs(12)
    path = tmp_path_factory.mktemp("state") / "e.state"
    evaluate_robustness(model, x, y, attacks=["fgsm_ce", "pgd_ce"], state_path=path, **OPTIONS)
    return model, x, y, path.read_bytes()


def test_another_order_of_attacks_is_another_evaluation(evaluation, tmp_path):  # C4
    model, x, y, raw = evaluation
    path = tmp_path / "e.state"
    path.write_bytes(raw)
    for attacks in (["pgd_ce", "fgsm_ce"], ["fgsm_ce"], ["fgsm_ce", "pgd_margin"], ["fgsm_ce", "pgd_ce", "noise"]):
        with pytest.raises(ValueError, match="it holds that of another one. Different: attacks"):
            evaluate_robustness(model, x, y, attacks=attacks, state_path=path, **OPTIONS)
    assert path.read_bytes() == raw
    evaluate_robustness(model, x, y, attacks=["fgsm_ce", "pgd_ce"], state_path=path, **OPTIONS)


def test_each_flipped_bit_is_found(evaluation, tmp_path):  # C5
    raw = evaluation[3]
    path = tmp_path / "e.state"
    rng = np.random.default_rng(0)
    damaged = [raw[: len(raw) // 2], raw[:-1], raw + b"\n", raw + b"x", b"", raw[1:], b"\0" * len(raw)]
    for position in [*range(120), *rng.integers(0, len(raw), 200)]:
        flipped = bytearray(raw)
        flipped[position] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="`state_path` must hold the state of an evaluation.*damaged"):
            State(path, {}, 12)
        assert path.read_bytes() == content


@pytest.mark.parametrize(  # C5
    ("field", "value"),
    [
        ("broken_by", {}),
        ("broken_by", [1]),
        ("broken_by", ["clean"] * 11),
        ("done", {"fgsm_ce": -1}),
        ("done", {"fgsm_ce": 1.5}),
        ("done", {"fgsm_ce": True}),
        ("seconds", {"fgsm_ce": -1.0}),
        ("seconds", {"fgsm_ce": "1"}),
        ("seconds", []),
        ("compile_seconds", {"fgsm_ce": -1.0}),
        ("gradients", {"fgsm_ce": -1}),
        ("queries", {"fgsm_ce": 0.5}),
        ("audit", {"outside": -1}),
        ("audit", None),
        ("checks", {"noise": {}}),
        ("checks", {"noise": {"name": "noise", "status": "good", "value": 0.0, "message": ""}}),
        ("checks", {"noise": {"name": "noise", "status": "pass", "value": "0", "message": ""}}),
        ("identity", None),
        ("identity", {}),
        ("more", 1),
    ],
)
def test_wrong_content_is_refused_with_a_right_checksum(evaluation, tmp_path, field, value):
    model, x, y, raw = evaluation
    content = json.loads(raw.splitlines()[1]) | {field: value}
    body = json.dumps(content).encode()
    header = json.dumps({"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    path = tmp_path / "e.state"
    path.write_bytes(header + b"\n" + body + b"\n")
    with pytest.raises(ValueError, match="`state_path` must hold the state of"):
        evaluate_robustness(model, x, y, attacks=["fgsm_ce", "pgd_ce"], state_path=path, **OPTIONS)


def test_a_state_that_cannot_be_written_is_kept(evaluation, tmp_path, monkeypatch):  # C2
    model, x, y, _ = evaluation
    attacks, path = ["fgsm_ce", "pgd_ce"], tmp_path / "e.state"
    expected = evaluate_robustness(model, x, y, attacks=attacks, **OPTIONS)
    write, calls = _files.write, []

    def fill_disk(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(_files, "write", fill_disk)
    with pytest.warns(RuntimeWarning, match="keeps its earlier progress: .*No space left"):
        report = evaluate_robustness(model, x, y, attacks=attacks, state_path=path, **OPTIONS)
    assert report.per_example == expected.per_example
    # From the beginning, it is an error.
    with pytest.raises(ValueError, match="`state_path` must be a path that can be written.*No space left"):
        evaluate_robustness(model, x, y, attacks=attacks, state_path=path, **OPTIONS)
    monkeypatch.undo()
    again = evaluate_robustness(model, x, y, attacks=attacks, state_path=path, **OPTIONS)
    assert again.per_example == expected.per_example
