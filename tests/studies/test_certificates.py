import json

import numpy as np
import pytest

from studies import certificates
from tests.backends import BACKEND, on_tensorflow


@pytest.mark.slow
@on_tensorflow
def test_models_are_certified_and_tabled(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("scipy")
    arguments = ["--quick", "--backend", BACKEND, "--out", str(tmp_path)]
    certificates.main(arguments)
    path = tmp_path / "certificates_digits_quick.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 2 * len(certificates.LAMS)
    certificates.main(arguments, run=lambda *arguments: pytest.fail("A run was repeated."))
    assert path.with_suffix(".md").read_text().count("| 0.12 |") == len(certificates.LAMS)


def test_the_table_counts_radii(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    study = certificates.STUDIES["digits"]
    with (tmp_path / "certificates_digits.jsonl").open("w") as file:
        for seed in range(study["seeds"]):
            for sigma in study["sigmas"]:
                for lam in certificates.LAMS:
                    radii = [0.0, 0.6 * sigma, 1.2 * sigma, (3.0 if lam else 2.0) * sigma]
                    record = {"sigma": sigma, "lam": lam, "seed": seed, "radii": radii}
                    file.write(json.dumps(record | {"abstentions": 1, "draws_used": 0.5}) + "\n")
    certificates.main(["--out", str(tmp_path)], run=lambda *arguments: pytest.fail("A run was repeated."))
    rows = [line for line in (tmp_path / "certificates_digits.md").read_text().splitlines() if "| 0.25 |" in line]
    cells = [cell.strip() for cell in rows[1].split("|")[1:-1]]
    assert cells[4:10] == [
        "75.0 +- 0.0",
        "75.0 +- 0.0",
        "50.0 +- 0.0",
        "25.0 +- 0.0",
        "1.200",
        "+25.0 (+25.0 to +25.0)",
    ]
    # Image by image 0, 0, 0, 1: a standard deviation of 1/2.
    assert cells[10] == f"+- {100 * 1.96 * np.std([0, 0, 0, 1], ddof=1) / 2:.1f}"
    assert cells[11:] == ["25.0 +- 0.0", "50.0 +- 0.0"]
