"""Hooks of MkDocs: pages that are made of files outside `docs/`, links to them, and docstrings as Markdown."""

import re
import textwrap
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# The pages of the site that show a file of the repository.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
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
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, **_):
    """Begin the home page with the README, and let links lead to pages of the site."""
    uri = page.file.src_uri
    if uri == "index.md":
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        # The table of pages follows the README in place of its own title and introduction.
        markdown = readme.partition("\n## More\n")[0] + "\n## All pages\n\n" + markdown.partition("\n\n")[2]
    up = "../" * uri.count("/")

    def lead(match):
        target = match[2]
        if "://" in target:
            return match[0]
        name = target.removeprefix(up + "../")
        if name in PAGES:
            return f"{match[1]}{up}{PAGES[name]}"
        return match[1] + (target.removeprefix("docs/") if uri in PAGES.values() else target)

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
