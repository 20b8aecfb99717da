"""`report.html`: the text of a report, its pictures, its runs to explore, and how to repeat them, in one file."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from lora_flow.pages import charts
from lora_flow.pages.markdown import inline, to_html
from lora_flow.storage.remote import RunPath
from lora_flow.version import __version__

PICTURES = 6_000_000  # bytes of pictures that a page holds; others are named


def page(
    text: str,
    folder: RunPath,
    *,
    runs: Sequence[Mapping[str, Any]] = (),
    short: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> str:
    """A page that needs neither server nor network.

    **Arguments:** the Markdown `text` of a report, whose first heading is the title, and the `folder` in which its
    pictures lie; `runs` to explore, each of `lora_flow.pages.data.of_run` with its `name`; the lines `short`, which
    answer what is asked first; `settings` and versions by name; and the `command` that repeats it.

    With `runs` the package must be installed with its extra `report`.
    """
    title, _, rest = text.removeprefix("# ").partition("\n")
    sections = {
        "In short": _list(short),
        "Repeat it": _command(command),
        "Explore": _read("explorer.html") if runs else "",
        "Report": to_html(rest, _Pictures(folder).source),
        "Settings": _settings(settings or {}),
    }
    body = "\n".join(one if name == "Explore" else _section(name, one) for name, one in sections.items() if one)
    names = {_anchor(name): name for name, one in sections.items() if one and name != "Explore"}
    if runs:
        names = {"curves": "Curves", "map": "Map", "cells": "Table"} | names
    order = ["in-short", "repeat-it", "curves", "map", "cells", "report", "settings"]
    links = " ".join(f'<a href="#{one}">{names[one]}</a>' for one in order if one in names)
    filled = {
        "title": html.escape(title.strip()),
        "style": _read("page.css"),
        "links": links,
        "body": body,
        "footer": f"<p>Written by lora_flow {html.escape(str(__version__))}. The page needs no network.</p>",
        "scripts": (_data(runs) if runs else "") + f"<script>(() => {{{_program(runs)}}})();</script>",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _read("page.html"))


def _data(runs: Sequence[Mapping[str, Any]]) -> str:
    specifications, script = charts.made()
    data = json.dumps({"runs": list(runs), "charts": specifications}, separators=(",", ":"), allow_nan=False)
    held = data.replace("</", r"<\/")  # which would end the script
    return f'<script type="application/json" id="data">{held}</script><script>{script}</script>'


def _program(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page's own program; in a function, for Vega's script gives names of a letter or two to everything."""
    names = ("page.js", "explorer.js", "motion.js") if runs else ("page.js",)
    return "".join(map(_read, names))


def _section(name: str, content: str) -> str:
    anchor = _anchor(name)
    return f'<section id="{anchor}" aria-labelledby="{anchor}-h"><h2 id="{anchor}-h">{name}</h2>{content}</section>'


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{inline(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _command(command: str) -> str:
    if not command:
        return ""
    return f'<pre id="command">{html.escape(command)}</pre><button type="button" data-copy="command">Copy</button>'


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th>{_value(value)}</tr>" for name, value in settings.items()
    )
    return (
        f'<details><summary>All settings and versions</summary><div class="wide"><table>{rows}</table></div></details>'
    )


def _value(value: Any) -> str:
    told = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f'<td class="text">{html.escape(told)}</td>'


class _Pictures:
    """The pictures of a folder as data URIs, as long as there is room."""

    def __init__(self, folder: RunPath):
        self._folder, self._room = folder, PICTURES

    def source(self, link: str) -> str:
        path = self._folder / link
        if "://" in link or not path.is_file():
            return ""
        content = path.read_bytes()
        self._room -= len(content)
        kind = {"svg": "svg+xml"}.get(link.rpartition(".")[2], "png")
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}" if self._room >= 0 else ""


def _read(name: str) -> str:
    return (files("lora_flow.pages") / name).read_text(encoding="utf-8")
