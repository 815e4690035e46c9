"""A page of text, tables and pictures, written as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_name("page_template.html")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Figures to be seen first, each with what it is."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    """Lines for a terminal."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: What it says.
        value: What a column is sorted by, a number, if it is one.
        strong: In bold type.
        link: Where its text leads to in Markdown; empty if nowhere.
    """

    text: str
    value: float | None = None
    strong: bool = False
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Returns which columns hold numbers."""
        columns = range(len(self.head))
        return [any(row[i].value is not None for row in self.rows) for i in columns]


@dataclass(frozen=True)
class Picture:
    """A picture: a PNG file for Markdown, and what HTML embeds.

    Args:
        name: File name without ending.
        alt: What it shows.
        png: The file.
        embedded: The same picture for HTML, SVG or WebP.
        mime: Its type.
    """

    name: str
    alt: str
    png: bytes
    embedded: bytes
    mime: str


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, each with its `alt` above it."""

    pictures: Sequence[Picture]


Block = Text | Points | Facts | Code | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; `level` is 2 or 3. In HTML, folded ones open at a click."""

    title: str
    level: int
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A title, what stands below it, and the sections."""

    title: str
    lead: Sequence[Block]
    sections: Sequence[Section]


def markdown(page: Page) -> str:
    """Returns the page as Markdown; its pictures are expected beside it."""
    parts = [f"# {escape_markdown(page.title)}", *map(_block_as_markdown, page.lead)]
    for section in page.sections:
        parts.append(f"{'#' * section.level} {escape_markdown(section.title)}")
        parts += map(_block_as_markdown, section.blocks)
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Returns text that Markdown shows as it is, in a table too."""
    one_line = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word is only that.
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)


def slug(title: str) -> str:
    """Returns a title as a part of file names."""
    return re.sub(r"\W+", "-", title.lower())


def _block_as_markdown(block: Block) -> str:
    match block:
        case Text(text):
            return escape_markdown(text)
        case Points(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Facts(items):
            return "\n".join(f"- **{escape_markdown(a)}** {escape_markdown(b)}" for a, b in items)
        case Code(lines):
            return code_as_markdown(lines)
        case Table():
            return table_as_markdown(block)
        case Picture(name, alt):
            return f"![{escape_markdown(alt)}]({name}.png)"
        case Gallery(pictures):
            shown = (f"{escape_markdown(p.alt)}:\n\n{_block_as_markdown(p)}" for p in pictures)
            return "\n\n".join(shown)


def code_as_markdown(lines: Sequence[str]) -> str:
    """Returns lines for a terminal as Markdown, fenced by more backticks than they hold."""
    inside = [len(run) for line in lines for run in re.findall("`+", line)]
    fence = "`" * max([3, *(length + 1 for length in inside)])
    return "\n".join([fence, *(" ".join(line.split()) for line in lines), fence])


def table_as_markdown(table: Table) -> str:
    """Returns a table as Markdown."""
    lines = [
        f"| {' | '.join(map(escape_markdown, table.head))} |",
        f"|{'|'.join('---:' if number else '---' for number in table.numeric)}|",
    ]
    for row in table.rows:
        lines.append(f"| {' | '.join(map(_cell_as_markdown, row))} |")
    return "\n".join(lines)


def _cell_as_markdown(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    text = f"[{text}]({cell.link})" if cell.link else text
    return f"**{text}**" if cell.strong else text


def as_html(page: Page) -> str:
    """Returns the page as one HTML file that needs no other."""
    body = [f"<h1>{html.escape(page.title)}</h1>", *map(_block_as_html, page.lead)]
    links = []
    for number, section in enumerate(page.sections):
        title = html.escape(section.title)
        if section.level == 2:
            links.append(f'<a href="#s{number}">{title}</a>')
        body.append(f'<h{section.level} id="s{number}">{title}</h{section.level}>')
        if section.folded:
            body.append("<details><summary>Show</summary>")
        body += map(_block_as_html, section.blocks)
        if section.folded:
            body.append("</details>")
    body.insert(1, f"<nav>{' '.join(links)}</nav>")
    template = Template(TEMPLATE.read_text("utf-8"))
    return template.substitute(title=html.escape(page.title), body="\n".join(body))


def _block_as_html(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Points(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Facts(items):
            shown = (
                f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(figure)}</dd></div>"
                for figure, what in items
            )
            return f'<dl class="facts">{"".join(shown)}</dl>'
        case Code(lines):
            return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"
        case Table():
            return _table_as_html(block)
        case Picture(alt=alt, embedded=embedded, mime=mime):
            data = base64.b64encode(embedded).decode("ascii")
            image = f'<img alt="{html.escape(alt)}" src="data:{mime};base64,{data}">'
            return f'<div class="wide">{image}</div>'
        case Gallery(pictures):
            shown = (
                f"<figure><figcaption>{html.escape(p.alt)}</figcaption>{_block_as_html(p)}</figure>"
                for p in pictures
            )
            return f'<div class="gallery">{"".join(shown)}</div>'


def _table_as_html(table: Table) -> str:
    marks = [' class="number"' if number else "" for number in table.numeric]
    head = "".join(
        f'<th scope="col"{mark}><button type="button">{html.escape(name)}</button></th>'
        for name, mark in zip(table.head, marks, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell_as_html, row, marks))}</tr>\n" for row in table.rows)
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>"
    return f'<div class="wide table"><table>{content}</table></div>'


def _cell_as_html(cell: Cell, mark: str) -> str:
    text = html.escape(cell.text)
    text = f"<strong>{text}</strong>" if cell.strong else text
    value = "" if cell.value is None else f' data-value="{cell.value}"'
    return f"<td{mark}{value}>{text}</td>"
