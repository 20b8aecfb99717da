"""Runs a notebook, and writes what it says, its code and its outputs as a page of the documentation.

    python -m notebooks.page figure1        one of them, or several; all by default

Markdown cells become text. Other cells become code, and below it what the cell shows: a picture or printed text.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("figure1", "own_target", "sensitivities")


class Cell(NamedTuple):
    """The code of a cell without marimo's return, the text of one that is Markdown, and its place among all cells."""

    code: str
    text: str | None


def cells(name: str) -> list[Cell]:
    """The cells of a notebook, in the order of its file."""
    source = (ROOT / "notebooks" / f"{name}.py").read_text()
    return [_cell(node, source) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def executed(name: str) -> list[Any]:
    """What each cell shows, in the order of the file."""
    outputs, _ = importlib.import_module(f"notebooks.{name}").app.run()
    return list(outputs)


def page(name: str, outputs: list[Any]) -> tuple[str, dict[str, Any]]:
    """The page's Markdown, and its pictures by the names of their files."""
    parts, pictures = [], {}
    for cell, output in zip(cells(name), outputs, strict=True):
        if cell.text is not None:
            parts.append(cell.text)
            continue
        parts.append(f"```python\n{cell.code}\n```")
        if hasattr(output, "savefig"):
            picture = f"notebook-{name}{len(pictures) + 1 if pictures else ''}"
            pictures[picture] = output
            parts.append(f"![What the code above draws](images/{picture}.png)")
        elif (told := _told(output)) is not None:
            parts.append(f"```text\n{told}\n```")
    how = f"*The notebook `notebooks/{name}.py`, executed. `marimo edit notebooks/{name}.py` opens it.*"
    heading, *rest = parts
    return "\n\n".join([heading, how, *rest]) + "\n", pictures


def main(names: list[str]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.figures.over_time import save_with_numbers

    for name in names or NOTEBOOKS:
        text, pictures = page(name, executed(name))
        save_with_numbers(pictures, ROOT / "docs/images")
        (ROOT / "docs" / f"notebook-{name}.md").write_text(text)
        print(f"docs/notebook-{name}.md")


def _cell(node: ast.FunctionDef, source: str) -> Cell:
    body = [one for one in node.body if not isinstance(one, ast.Return)]
    lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    only = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
    is_text = isinstance(only, ast.Call) and ast.unparse(only.func) == "mo.md"
    text = inspect.cleandoc(ast.literal_eval(only.args[0])) if is_text else None
    return Cell(textwrap.dedent("\n".join(lines)), text)


def _told(output: Any) -> str | None:
    """A table or an object as text; None for nothing, and for what only a browser shows."""
    if output is None or type(output).__module__.startswith("marimo"):
        return None
    return output.to_string() if hasattr(output, "to_string") else str(output)


if __name__ == "__main__":
    main(sys.argv[1:])
