"""Text of foreign files, such as names and messages, made harmless for the place where it is shown."""

import re

# In words such as `pgd_margin`, Markdown takes an underscore as it is.
_OUTER_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", **{character: f"\\{character}" for character in "\\`*[]|~$"}}
)


def for_terminal(text: str) -> str:
    """Return text on one line, with escapes such as `\\x1b` in place of characters that cannot be printed.

    These are control characters, line ends, marks of writing direction, and halves of surrogate pairs.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def for_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, in a cell of a table too."""
    return _OUTER_UNDERSCORE.sub(r"\\_", for_terminal(text).translate(_MARKDOWN))


def for_figure(text: str) -> str:
    """Return text that matplotlib shows as it is, without formulas."""
    return for_terminal(text).replace("$", r"\$")


def error_line(error: BaseException) -> str:
    """Return the type and message of an error on one line."""
    return for_terminal(f"{type(error).__name__}: {' '.join(str(error).split())}")
