"""Hooks of MkDocs: pages that are made of files outside `docs/`, links to them, and docstrings as Markdown."""

import re
import textwrap
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# The pages of the site that show a file of the repository.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
# The README is two pages: the second begins with this title, and ends before the other one.
GETTING_STARTED = "getting-started.md"
SECOND, END = "## How robust is my model?", "## More"
LINK = re.compile(r"(\]\()([^)#]+)")
# The parts of a docstring that the parser does not know, and the code of its examples.
TITLE = re.compile(r"^(Formula|Shapes|Momentum|Reference|Note|Suites|Example):", re.MULTILINE)
CODE = re.compile(r"(^>>> .*\n(?:.+\n?)*)", re.MULTILINE)
OF_A_CALL = re.compile(r"^(Call arguments|Returns):\n((?:    .*\n|\n)+)", re.MULTILINE)
ARGUMENT = re.compile(r"^(\w+): ", re.MULTILINE)


def on_files(files, config):
    """Add the pages of files outside `docs/`."""
    for name, page in PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=read(name)))
    second = read("README.md").partition(SECOND)[2].partition(END)[0]
    files.append(File.generated(config, GETTING_STARTED, content=f"# Getting started\n\n{SECOND}{second}"))
    return files


def read(name):
    """Return the text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def on_page_markdown(markdown, page, **_):
    """Begin the home page with the README, and let links lead to pages of the site."""
    uri = page.file.src_uri
    if uri == "index.md":
        # The table of pages follows, without its own title and introduction.
        begin = f"How robust is it now? [Getting started]({GETTING_STARTED}) measures it.\n\n## All pages\n\n"
        markdown = read("README.md").partition(SECOND)[0] + begin + markdown.partition("\n\n")[2].partition("\n\n")[2]
    up = "../" * uri.count("/")

    def lead(match):
        target = match[2]
        if "://" in target:
            return match[0]
        name = target.removeprefix(up + "../")
        if name in PAGES:
            return f"{match[1]}{up}{PAGES[name]}"
        is_outside = uri in (*PAGES.values(), GETTING_STARTED)
        return match[1] + (target.removeprefix("docs/") if is_outside else target)

    return LINK.sub(lead, markdown)


class Docstrings(griffe.Extension):
    """Write the parts of docstrings that the parser does not know as Markdown."""

    def on_object(self, *, obj, **_):
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj.is_class)


def as_markdown(text, is_class):
    """Return a docstring with bold titles and fenced code; of a class, also with what its instances take and return."""
    if is_class:
        text = OF_A_CALL.sub(_of_a_call, text + "\n")
    return CODE.sub(r"```pycon\n\1\n```\n", TITLE.sub(r"**\1:**", text) + "\n")


def _of_a_call(match):
    body = textwrap.dedent(match[2])
    if match[1] == "Call arguments":
        body = ARGUMENT.sub(r"- `\1`: ", body)
    return f"**{match[1]}:**\n\n{body}"
