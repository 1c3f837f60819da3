"""The pages of the site: what they must hold, whether or not MkDocs is installed."""

import re
from pathlib import Path

from tests.test_signatures import public

DOCS = Path(__file__).parents[1] / "docs"


def test_each_public_name_has_one_place():
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")]
    shown = sorted(name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    names = public()
    # Methods are shown with their classes.
    assert shown == sorted(name for name in names if name.rpartition(".")[0] not in names)


def test_each_page_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*pages, "changelog.md", "contributing.md"])
