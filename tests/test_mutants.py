from types import SimpleNamespace

from tests.mutants import GROUPS, SIGNATURES, Mutant, draw, files_of_tests, select_tests, table

POSSIBLE = [Mutant("losses", path, "core/NumberReplacer", number) for path in ("a.py", "b.py") for number in range(50)]


def test_a_draw_depends_on_the_seed_and_is_repeated():
    drawn = draw(POSSIBLE, 20, seed=0)
    assert draw(POSSIBLE[::-1], 20, seed=0) == drawn
    assert len(set(drawn)) == 20
    assert set(draw(POSSIBLE, 20, seed=1)) != set(drawn)


def test_a_longer_file_keeps_what_was_drawn_from_others():
    more = [*POSSIBLE, *(Mutant("losses", "a.py", "core/NumberReplacer", number) for number in range(50, 60))]
    kept = set(draw(POSSIBLE, 20, seed=0)) & set(draw(more, 20, seed=0))
    assert len(kept) >= 16


def test_tests_that_run_the_changed_line_are_chosen():
    mutant = Mutant("metrics", "keras_drsl/metrics.py", "core/NumberReplacer", 0)
    own, other, third = "tests/test_metrics.py::test_a[x|y]", "tests/test_b.py::test_b", "tests/test_c.py::test_c"
    lines = {7: [f"{other}|run", f"{own}|run", f"{own}|setup"], 8: [f"{third}|run", f"{third}2|run"], 9: [""]}
    seconds = {own: 1.0, other: 0.5, third: 0.1, f"{third}2": 3.0}
    assert select_tests(mutant, 7, {mutant.path: lines}, seconds) == [own, other]
    # A line that is run by an import, or not known: all tests of the module, slow ones last.
    for line in (9, 10):
        assert select_tests(mutant, line, {mutant.path: lines}, seconds) == [SIGNATURES, own, other, third, f"{third}2"]
    # A module that only other processes run.
    assert select_tests(mutant, 9, {mutant.path: {9: [""]}}, seconds) == files_of_tests("metrics")


def test_the_table_counts_and_lists_what_was_not_noticed():
    def record(group, outcome, by, **text):
        return {"group": group, "possible": 50, "outcome": outcome, "by": by, "path": f"keras_drsl/{group}/x.py"} | text

    change = {"line": 7, "before": "a | b", "after": "a ^ b"}
    records = [
        record("losses", "killed", "tests/x.py::test_it", **change),
        record("losses", "killed", "import of tests/x.py", **change),
        record("losses", "survived", "", **change),
        record("attacks", "survived", "", line=3, before="if x:", after=""),
    ]
    page = table(records, SimpleNamespace(count=3, seed=0))
    assert "| losses | 50 | 3 | 2 | 66.7% | 1 |" in page
    assert "| attacks | 50 | 1 | 0 | 0.0% | 0 |" in page
    assert "| all | 100 | 4 | 2 | 50.0% | 1 |" in page
    assert page.count("| losses/x.py | 7 |") == 1
    assert r"| losses/x.py | 7 | ``a \| b`` | ``a ^ b`` |" in page
    assert "| attacks/x.py | 3 | ``if x:`` | (nothing) |" in page
    assert set(GROUPS) == {"losses", "metrics", "attacks", "evaluation"}
