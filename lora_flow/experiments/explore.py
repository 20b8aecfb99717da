"""The page of a run folder as it is served: what it shows of lanes is read when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import numpy as np

from lora_flow.checks import require
from lora_flow.experiments.on_page import repeated
from lora_flow.pages import charts
from lora_flow.pages.page import page
from lora_flow.pages.served import Served, asked_by_pages
from lora_flow.pages.server import server_of
from lora_flow.storage.checksums import RUN_ID
from lora_flow.storage.remote import RunPath, run_path
from lora_flow.sweeps.run import look_at


def explored_by_server(out: str | RunPath, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page of a folder's runs, at a port of this machine alone; 0 for a free one.

    **Raises:** `InputError` where the folder holds no runs, where the extra `report` is not installed, and for a port
    that is not to be had.
    """
    got = "neither or one (pip install 'lora-flow[report]')"
    require(charts.are_to_be_had(), "explore", "have altair and vl-convert-python installed", got)
    out = run_path("the run folder", out)
    with ThreadPoolExecutor(1) as beside:
        beside.submit(charts.made)  # takes a second where none are kept, in which the run is looked at
        runs = look_at(out)
        served = Served(runs)
        shown = served.outlines()
    told = dict(next(iter(runs.values())).dataset.attrs)
    told.pop(RUN_ID, None)
    settings = {str(name): one.tolist() if isinstance(one, np.ndarray) else one for name, one in told.items()}
    content = page(_text(out), out, runs=shown, settings=settings, command=repeated(out, settings)).encode()

    def whole(query: Mapping[str, str]) -> tuple[str, bytes]:
        return "text/html; charset=utf-8", content

    return server_of({"/": whole} | asked_by_pages(served), port)


def _text(out: RunPath) -> str:
    """The folder's report, or a heading where none is drawn yet."""
    report = out / "report.md"
    return report.read_bytes().decode() if report.is_file() else f"# {out}\n"
