"""`lora-flow explore`: the page of a run, served to the browser of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import webbrowser
from typing import Annotated

import tyro

from lora_flow.runtime import interrupts


@dataclasses.dataclass(frozen=True)
class Explore:
    """Explore a run in the browser, however large it is: its page, served from this machine to this machine.

    The page is that of `lora-flow report`, but what it shows of a cell is read from the run when it is asked for, so
    that a run of a million lanes opens at once, and nothing is thinned but the map. An unfinished run shows what is
    stored. Nothing is written. The command goes on until Ctrl-C. Needs the extra: pip install 'lora-flow[report]'.

    For example: lora-flow explore runs/big

    On another machine, whose page is to be seen here: ssh -L 8000:127.0.0.1:8000 node7, and there
    lora-flow explore runs/big --port 8000 --no-browser
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """The run folder, or its URL in an object store."""
    port: int = 0
    """The port to serve at; 0 for a free one."""
    browser: bool = True
    """Open the page in a browser; --no-browser only prints its address."""

    def run(self) -> int:
        from lora_flow.experiments.explore import explored_by_server
        from lora_flow.pages.server import address_of

        with explored_by_server(self.out, self.port) as server:
            print(f"page: {address_of(server)} (Ctrl-C ends it)", flush=True)
            if self.browser and _has_a_screen():
                webbrowser.open(address_of(server))
            with interrupts.regular(), contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        return 0


def _has_a_screen() -> bool:
    """Whether a browser would have a window of its own, and not take over the terminal."""
    return sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
