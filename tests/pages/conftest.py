"""One run for all tests of pages, and a Chromium that has no network."""

import os
import shutil

import matplotlib as mpl
import pytest
from runs_of_pages import presented

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    mpl.use("Agg")
    out = tmp_path_factory.mktemp("pages") / "run"
    presented(out)
    return out


@pytest.fixture(scope="session")
def chromium():
    """Opens a file in a window of its own, offline: the page, and what it has logged or asked for."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium was found on this machine (apt-get install chromium, or set CHROMIUM to its path)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium, found


@pytest.fixture
def opened(chromium, tmp_path):
    contexts = []

    def open_page(url, width=1280, height=900, scheme="light", offline=True):
        kind, path = chromium
        context = kind.launch_persistent_context(
            str(tmp_path / f"profile{len(contexts)}"), executable_path=path, args=FLAGS, offline=offline,
            viewport={"width": width, "height": height}, color_scheme=scheme,
        )  # fmt: skip
        contexts.append(context)
        page, said = context.pages[0], []
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if _is_outside(request.url, url) else None)
        page.goto(url)
        page.wait_for_selector("body[data-ready]", timeout=30_000)
        return page, said

    yield open_page
    for context in contexts:
        context.close()


def _is_outside(url, own):
    return not url.startswith(("data:", "blob:", own.rpartition("/")[0]))
