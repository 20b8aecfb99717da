"""The charts of a page as Vega-Lite, without their data, which the page's program gives them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_flow.runtime import kept_files

MISSING = "no report.html: it needs Altair and vl-convert, to be had with pip install 'lora-flow[report]'"

PHASES = {"align": "#8a8a8a", "grow": "#c9c9c9", "converge": "#4a90d9", "slow tail": "#e6b422"}
VEGA_LITE = "6.4"


def are_to_be_had() -> bool:
    """Whether what draws them is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("altair", "vl_convert"))


@functools.cache
def made() -> tuple[dict[str, Any], str]:
    """The charts by name, as Vega-Lite's JSON, and Vega, Vega-Lite and Vega-Embed as one script.

    They are the same for every page and take more than a second to make, so a command keeps them for those that follow.
    """
    folder = kept_files.folder()
    file = folder / f"charts-{_key()}" if folder else None
    content = kept_files.read(file) if file else None
    if content is None:
        content = json.dumps([{"curves": _curves(), "map": _map()}, _javascript()]).encode()
        if file:
            with contextlib.suppress(OSError):
                kept_files.write(file, content)
    specifications, script = json.loads(content)
    return specifications, script


def _key() -> str:
    """A digest of all that they depend on: this module and the packages' versions."""
    versions = [version("altair"), version("vl-convert-python")]
    return hashlib.sha256(f"{versions} {Path(__file__).read_text(encoding='utf-8')}".encode()).hexdigest()


def _javascript() -> str:
    import vl_convert

    script: Any = vl_convert.javascript_bundle
    return str(script(vl_version=VEGA_LITE))


def _curves() -> dict[str, Any]:
    """Medians as lines and quartiles as bands over time, the phases and times of one cell behind them.

    Data: `curves` (time, low, middle, high, colour, dash, selected, cell), `phases` (begin, end, phase), `marks` (time,
    what), `floors` (value, what) and `now` (time).
    """
    import altair as alt

    def over(field: str) -> Any:
        return alt.Y(field, type="quantitative", title=None, axis=alt.Axis(tickCount=7), scale=alt.Scale(type="linear"))

    # the same for all layers, so that each picks up the type that the page's program sets
    time = alt.X("time", type="quantitative", axis=alt.Axis(tickCount=6), scale=alt.Scale(type="linear", nice=False))
    colour = alt.Color(
        "colour", type="ordinal", sort=None, legend=alt.Legend(orient="bottom", columns=3, symbolOpacity=1)
    )
    dash = alt.StrokeDash("dash", type="nominal", sort=None, legend=alt.Legend(orient="bottom", columns=3))
    thick = alt.condition("datum.selected", alt.value(3), alt.value(1.5))
    clear = alt.condition("datum.selected", alt.value(1), alt.value(0.75))
    near = alt.selection_point("near", nearest=True, on="pointerover", fields=["time", "cell"], empty=False)
    told = [alt.Tooltip("name:N", title="cell"), alt.Tooltip("time:Q", format=".4~g")]
    told += [alt.Tooltip(f"{name}:Q", title=title, format=".3~g") for name, title in
             (("middle", "median"), ("low", "lower quartile"), ("high", "upper quartile"))]  # fmt: skip
    base = alt.Chart(alt.NamedData("curves"))
    shades = alt.Color(
        "phase:N",
        scale=alt.Scale(domain=list(PHASES), range=list(PHASES.values())),
        legend=alt.Legend(orient="bottom", title=None, columns=4, symbolOpacity=0.4),
    )
    phases = alt.Chart(alt.NamedData("phases")).mark_rect(opacity=0.18, tooltip=True)
    phases = phases.encode(x=alt.X("begin", type="quantitative"), x2="end", color=shades)
    band = base.mark_area(opacity=0.22, clip=True).encode(
        x=time, y=over("low"), y2="high", color=colour, detail="cell:N"
    )
    line = base.mark_line(clip=True).encode(
        x=time, y=over("middle"), color=colour, strokeDash=dash, strokeWidth=thick, opacity=clear, detail="cell:N"
    )
    point = base.mark_point(filled=True, size=90, clip=True).encode(
        x=time, y=over("middle"), color=colour, tooltip=told, opacity=alt.condition(near, alt.value(1), alt.value(0))
    )
    marks = alt.Chart(alt.NamedData("marks")).encode(x=alt.X("time", type="quantitative"))
    rule = marks.mark_rule(strokeDash=[2, 3], strokeWidth=1.5).encode(tooltip="what:N")
    text = marks.mark_text(align="left", baseline="bottom", dx=-4, dy=-4).encode(text="what:N", y=alt.value(0))
    floors = alt.Chart(alt.NamedData("floors")).encode(y=alt.Y("value", type="quantitative"))
    floor = floors.mark_rule(strokeDash=[1, 3]).encode(tooltip="what:N")
    named = floors.mark_text(align="right", baseline="bottom", dx=-4, dy=-3).encode(text="what:N", x=alt.value("width"))
    now = alt.Chart(alt.NamedData("now")).encode(x=alt.X("time", type="quantitative")).mark_rule(strokeWidth=1)
    drawn = alt.layer(band, floor, named, rule, line, point.add_params(near), text, now)
    shown = alt.layer(phases, drawn).resolve_scale(color="independent")  # the phases have colours of their own
    return dict(shown.properties(width="container", height=320).to_dict(validate=False))


def _map() -> dict[str, Any]:
    """A rectangle for each cell over two axes. Data: `cells` (x, y, value, told, cell, selected)."""
    import altair as alt

    base = alt.Chart(alt.NamedData("cells")).encode(
        x=alt.X("x", type="ordinal", sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("y", type="ordinal", sort=None, axis=alt.Axis(labelOverlap=True)),
    )
    colour = alt.Color(
        "value", type="quantitative", scale=alt.Scale(scheme="viridis"), legend=alt.Legend(orient="right")
    )
    bold = alt.condition("datum.selected", alt.value(4), alt.value(0))
    told = [alt.Tooltip("name:N", title="cell"), alt.Tooltip("told:N", title="value")]
    cells = base.mark_rect(cursor="pointer", stroke="#d55e00", invalid=None).encode(
        color=alt.condition("isValid(datum.value)", colour, alt.value("#9995")), strokeWidth=bold, tooltip=told
    )
    return dict(cells.properties(width="container").to_dict(validate=False))
