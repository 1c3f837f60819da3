import json
import re
from pathlib import Path

import pytest

from tests.backends import on_tensorflow
from tests.helpers import run_python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Other versions and processors train another model. Its percentages move as those of another seed do, by about 3, and
# each is a share of 100 images, whose standard error is up to 5. Twice the two together is about 10. Counts out of
# these 100 images move alike.
TOLERANCE = 10
RUN = """
import contextlib, io, json, os, shlex, sys
from keras_drsl import cli

os.chdir(sys.argv[1])
namespace, printed = {}, []
for language, code in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if language == "python":
            exec(code, namespace)
        else:
            assert cli.main(shlex.split(code)[1:]) == 0, code
    printed.append(output.getvalue())
print(json.dumps(printed))
"""


def blocks():
    """Return the code of the README in order: language, code, and the output printed below it."""
    found, waiting = [], []
    for language, text in FENCE.findall(README):
        if language == "python":
            waiting.append((language, text))
        elif language == "sh":
            waiting += [(language, line) for line in text.splitlines() if line.startswith("keras-drsl ")]
        elif language == "text":
            found += [(*block, text) for block in waiting]
            waiting = []
    assert not waiting, "each block of code needs its output below it"
    return found


def words_and_numbers(text):
    """Return the words between the numbers, and the numbers, without the seconds that attacks took."""
    text = re.sub(r"(?<=%) +[\d.]+$", "", text, flags=re.MULTILINE)
    return [part.split() for part in NUMBER.split(text)], [float(number) for number in NUMBER.findall(text)]


def links(page):
    """Return the relative links of a page, images included, as path and anchor."""
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target.partition("#")[::2] for target in targets if "://" not in target]


def anchors(page):
    """Return the anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_has_at_most_750_words():
    assert len(FENCE.sub("", README).split()) <= 750


@on_tensorflow
def test_readme_code_prints_what_the_readme_shows(tmp_path):
    done = run_python(RUN, str(tmp_path), json.dumps([block[:2] for block in blocks()]), timeout=600)
    for (_, code, expected), printed in zip(blocks(), json.loads(done.stdout.splitlines()[-1]), strict=True):
        words, numbers = words_and_numbers(printed)
        expected_words, expected_numbers = words_and_numbers(expected)
        assert words == expected_words, f"{code}\n{printed}"
        assert numbers == pytest.approx(expected_numbers, abs=TOLERANCE), f"{code}\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_results_named_on_a_page_exist(page):
    for path in re.findall(r"`(results/[^`]+)`", page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), path
