"""Files are complete or absent, and killed processes leave nothing for good."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from keras_drsl import _escape, _files
from tests.helpers import run_python

HOLD = """
import os, sys
from keras_drsl import _files
with _files.replace(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("open", flush=True)
    sys.stdin.readline()
"""


def start_writing(path):
    """Start a process that is in the middle of writing a file, until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.more
def test_a_killed_write_leaves_nothing_for_good(tmp_path):  # C10
    path, other = tmp_path / "report.json", tmp_path / ".report.json.backup00.tmp.txt"
    path.write_text("old")
    other.write_text("mine")
    dead, alive = start_writing(path), start_writing(path)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(names(tmp_path)) == 4
    _files.check_new("out", path, overwrite=True)
    assert len(names(tmp_path)) == 3  # that of the living process stays
    alive.communicate("\n")
    assert alive.returncode == 0
    assert path.read_text() == "half"
    assert names(tmp_path) == sorted([path.name, other.name])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    code = """
    import resource, sys
    from keras_drsl import _files
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        _files.write(sys.argv[1], "x" * 1000)
    except OSError as error:
        print(error.strerror)
    """
    assert run_python(code, path).stdout.splitlines()[-1] == os.strerror(errno.EFBIG)
    assert names(tmp_path) == ["report.json"]
    assert path.read_text() == "old"


def test_a_link_keeps_leading_to_its_file(tmp_path):  # C3
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    for text in ("first", "second"):
        _files.write(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert names(tmp_path) == ["link.json", "target.json"]


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "a\nb\r\n", "\u202eabc", "\u2066x\u2069", "\x07\x00", "\ud800", "\u2028"]
)
def test_nothing_unprintable_reaches_the_terminal(text):  # C7
    for escape in (_escape.for_terminal, _escape.for_markdown, _escape.for_figure):
        assert escape(text).isprintable()
    assert _escape.error_line(ValueError(text)).isprintable()


@pytest.mark.parametrize(  # C7
    ("text", "shown"),
    [
        ("pgd_margin", "pgd_margin"),
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("&amp;", "&amp;amp;"),
        ("`code`", r"\`code\`"),
        ("![x](http://a)", r"!\[x\](http://a)"),
        ("_it_ **b** ~~s~~", r"\_it\_ \*\*b\*\* \~\~s\~\~"),
        ("\\|", r"\\\|"),
    ],
)
def test_markdown_shows_text_as_it_is(text, shown):
    assert _escape.for_markdown(text) == shown
