"""The Markdown of reports as HTML: headings, paragraphs, lists, tables and pictures, as reports write them."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator

Picture = Callable[[str], str]
"""The source of a picture by its link, such as a data URI; "" for one that is left out."""


def to_html(text: str, picture: Picture, level: int = 1) -> str:
    """The blocks of a text, with `level` added to that of every heading."""
    return "\n".join(_block(block, picture, level) for block in re.split(r"\n\s*\n", text.strip()) if block.strip())


def _block(block: str, picture: Picture, level: int) -> str:
    lines = block.splitlines()
    if heading := re.fullmatch(r"(#+) (.*)", lines[0]):
        depth = min(len(heading[1]) + level, 6)
        rest = "\n".join(lines[1:]).strip()
        return f"<h{depth}>{inline(heading[2])}</h{depth}>" + (_block(rest, picture, level) if rest else "")
    if image := re.fullmatch(r"!\[([^\]]*)\]\(([^)]+)\)", block.strip()):
        source = picture(image[2])
        about = html.escape(image[1] or image[2])
        return f'<p><img alt="{about}" src="{source}"></p>' if source else f"<p>Picture: {html.escape(image[2])}</p>"
    if all(line.startswith("|") for line in lines) and len(lines) > 1:
        return _table(lines)
    if all(line.startswith(("- ", "  ")) for line in lines):
        items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{inline(' '.join(item.split()))}</li>" for item in items) + "</ul>"
    parts = list(_split(lines))
    if len(parts) > 1:
        return "\n".join(_block(part, picture, level) for part in parts)
    return f"<p>{inline(' '.join(lines))}</p>"


def _split(lines: list[str]) -> Iterator[str]:
    """Runs of lines of one sort, where a text is followed by a table or a list without a line between."""
    sort, part = "", list[str]()
    for line in lines:
        found = "table" if line.startswith("|") else "list" if line.startswith("- ") or line[:2] == "  " else "text"
        if part and found != sort:
            yield "\n".join(part)
            part = []
        sort, part = found, [*part, line]
    yield "\n".join(part)


def _table(lines: list[str]) -> str:
    header, rows = _cells(lines[0]), [_cells(line) for line in lines[2:]]
    head = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    tall = " tall" if len(rows) > 40 else ""
    return (
        f'<div class="wide{tall}" tabindex="0" role="region" aria-label="{html.escape(", ".join(header[:3]))}">'
        f'<table class="told-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    return f'<td class="text">{inline(text)}</td>' if len(text) > 60 else f"<td>{inline(text)}</td>"


def _cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def inline(text: str) -> str:
    """Code, bold text and links of a line; all else as it is."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(f"<code>{html.escape(one[1:-1])}</code>" if i % 2 else _plain(one) for i, one in enumerate(parts))


def _plain(text: str) -> str:
    told = html.escape(text, quote=False)
    told = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", told)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', told)
