"""What the docs show of the output of commands, and what it is for an output printed anew to agree with it.

A comment with the command, `<!-- lora-flow figure kappa -->`, stands above each table or block of text that shows some
of what the command prints: of a table all rows and some columns, of a text some lines.
"""

import re
from pathlib import Path

from stored import DECADES, SHARE

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"^<!-- ((?:lora-flow|python) .*) -->\n\n((?:\|.*\n)+|```text\n(?:.*\n)+?```\n)", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
SMALL = 1e-7  # a positive number below is an error, or a loss near its end: right to a factor on another machine
FACTOR = 20


def shown():
    """Command -> page -> what the page shows of its output, in the page's order."""
    commands = {}
    for page in PAGES:
        for command, text in MARKED.findall((ROOT / page).read_text()):
            commands.setdefault(command, {}).setdefault(page, []).append(text)
    return commands


def differences(texts, output):
    """What an output has otherwise than the texts of a page, a line each; nothing where they agree."""
    for header in dict.fromkeys(text.splitlines()[0] for text in texts if text.startswith("|")):
        told = [row for text in texts if text.startswith(header) for row in rows_of(text)]
        yield from _in_tables(cells(header), told, output)
    printed = [" ".join(line.split()) for line in output.splitlines()]
    for text in texts:
        if text.startswith("```"):
            for line in (" ".join(line.split()) for line in text.splitlines()[1:-1]):
                if not any(agree(line, one) for one in printed):
                    yield f"not printed: {line}"


def _in_tables(columns, told, output):
    fresh = []
    for text in dict.fromkeys(re.findall(r"(?:^\|.*\n)+", output, re.MULTILINE)):  # each once, where it is told twice
        if places := _places(columns, cells(text.splitlines()[0])):
            fresh += [[row[i] for i in places] for row in rows_of(text)]
    if len(told) != len(fresh):
        yield f"{len(told)} rows are shown and {len(fresh)} printed of {' | '.join(columns)}"
    for old, new in zip(told, fresh, strict=False):
        if not all(map(agree, old, new)):
            yield f"shown: {' | '.join(old)}\n     printed: {' | '.join(new)}"


def _places(columns, header):
    """Where a table's header has the columns, in their order; nothing if it lacks one."""
    places, start = [], 0
    for column in columns:
        if column not in header[start:]:
            return []
        places.append(header.index(column, start))
        start = places[-1] + 1
    return places


def cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def rows_of(text):
    return [cells(row) for row in text.splitlines()[2:]]


def agree(old, new):
    """The same words; numbers to two units of the last digit that is shown, or to 3 %.

    Negative ones are logarithms: to 0.1; small ones to a factor.
    """
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        return False
    return all(map(_near, NUMBER.findall(old), NUMBER.findall(new)))


def _near(old, new):
    before, after = float(old), float(new)
    if 0 < before < SMALL and 0 < after < SMALL:
        return 1 / FACTOR < before / after < FACTOR
    spread = DECADES if before < 0 else SHARE * before
    return abs(before - after) <= max(2.01 * _unit(old), 2.01 * _unit(new), spread)


def _unit(number):
    """The size of the last digit."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
