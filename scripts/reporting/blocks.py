"""The blocks of a page that scripts write."""

import re
import sys
from pathlib import Path


def write_block(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the two marks of a block.

    Args:
        path: The page.
        name: Of the block. Its marks are two comments, `NAME: written by a script` and
            `end of NAME`.
        text: Markdown.

    Raises:
        SystemExit: The file lacks the marks.
    """
    begin, end = _begin(name), f"<!-- end of {name} -->"
    content = path.read_text("utf-8")
    if begin not in content or end not in content:
        sys.exit(f"{path} lacks the lines {begin!r} and {end!r}")
    head, rest = content.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", "utf-8")


def has_block(path: Path, name: str) -> bool:
    """Returns whether a page has a block of a name."""
    return _begin(name) in path.read_text("utf-8")


def find_heading(path: Path, name: str) -> str:
    """Returns the heading that the block of a name stands under; empty if there is none."""
    above, mark, _ = path.read_text("utf-8").partition(_begin(name))
    headings: list[str] = re.findall(r"^##+ (.+?)\s*$", above, re.MULTILINE) if mark else []
    return headings[-1] if headings else ""


def anchor(heading: str) -> str:
    """Returns what leads to a heading on GitHub, behind the #; no two of a page may be the same."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _begin(name: str) -> str:
    """Returns the mark before a block."""
    return f"<!-- {name}: written by a script -->"


def find_blocks(path: Path, kind: str) -> list[str]:
    """Returns what stands before `kind` in the names of a page's blocks."""
    mark = re.compile(rf"^<!-- (.+) {kind}: written by a script -->$", re.MULTILINE)
    return mark.findall(path.read_text("utf-8"))
