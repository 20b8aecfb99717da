"""The documentation as `make docs` builds it, page by page in Chromium: as wide as the window, quiet, and linked."""

import html
import http.server
import re
import threading
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PAGES = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html"))
WIDTHS = {1280: "light", 390: "dark"}

pytestmark = [pytest.mark.long, pytest.mark.skipif(not PAGES, reason="there is no site/ (make docs builds it)")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module", params=WIDTHS)
def window(request, chromium, served, tmp_path_factory):
    """A page of that width that reaches nothing but the site, what it has said, and its width."""
    kind, path = chromium
    context = kind.launch_persistent_context(
        str(tmp_path_factory.mktemp("site")),
        executable_path=path,
        args=["--headless", "--no-sandbox", "--disable-gpu"],
        viewport={"width": request.param, "height": 900},
        color_scheme=WIDTHS[request.param],
    )
    said = []
    page = context.pages[0]
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    aborted = "net::ERR_ABORTED"  # by the next page
    page.on("requestfailed", lambda asked: said.append(f"failed: {asked.url}") if asked.failure != aborted else None)

    def answer(route):
        if route.request.url.startswith((served, "data:", "blob:")):
            route.continue_()
        else:
            said.append(f"asked for {route.request.url}")
            route.abort()

    context.route("**/*", answer)
    yield page, said, request.param
    context.close()


# Words of table cells that are on more than one line, without a hyphen or a slash to break at.
BROKEN = """() => {
  const broken = [];
  for (const cell of document.querySelectorAll("article td, article th")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (node.parentElement.closest(".arithmatex, mjx-container")) continue;
      for (const found of node.data.matchAll(/[\\w.]+/g)) {
        const range = document.createRange();
        range.setStart(node, found.index);
        range.setEnd(node, found.index + found[0].length);
        if (new Set([...range.getClientRects()].map((one) => Math.round(one.top))).size > 1) broken.push(found[0]);
      }
    }
  }
  return broken;
}"""

# Elements that stick out of the window, and are not within something that scrolls by itself.
WIDE = """(width) => [...document.querySelectorAll("article *")].filter((one) => {
  const box = one.getBoundingClientRect();
  if (box.width === 0 || box.right <= width + 1) return false;
  for (let up = one; up && up.tagName !== "ARTICLE"; up = up.parentElement) {
    if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(up).overflowX)) return false;
  }
  return !one.closest("mjx-assistive-mml");
}).map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`)"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window_and_says_nothing(name, window, served):
    page, said, width = window
    said.clear()
    page.goto(served + name, wait_until="load")
    if page.query_selector(".arithmatex"):
        page.wait_for_function("!document.querySelector('.arithmatex:not(:has(mjx-container))')")
        assert not page.query_selector("mjx-merror"), page.text_content("mjx-merror")
        seen = "[...document.querySelectorAll('mjx-container svg')].map((one) => one.getBoundingClientRect().width)"
        assert min(page.evaluate(seen)) > 4
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(WIDE, width) == []
    assert page.evaluate(BROKEN) == []


def anchors(text):
    return set(re.findall(r"""\s(?:id|name)=["']?([^"'\s>]+)""", text))


def test_no_link_within_the_site_is_dead():
    texts = {name: (SITE / name).read_text() for name in PAGES}
    dead = []
    for name, text in texts.items():
        base = f"http://site/{name}"
        for found in re.findall(r"""\s(?:href|src)=["']?([^"'\s>]+)""", re.sub(r"(?s)<script.*?</script>", "", text)):
            link = urljoin(base, html.unescape(found))
            place, anchor = urldefrag(link)
            parts = urlparse(place)
            if parts.netloc != "site":
                continue
            path = unquote(parts.path).lstrip("/")
            path = path + "index.html" if path in ("",) or path.endswith("/") else path
            if not (SITE / path).is_file():
                dead.append(f"{name}: {found}")
            elif anchor and path in texts and unquote(anchor) not in anchors(texts[path]):
                dead.append(f"{name}: {found}, no such heading")
    assert dead == []


def test_search_finds_a_page_and_a_picture_opens_large(window, served):
    page, said, _ = window
    said.clear()
    page.goto(served, wait_until="load")
    page.click("article a.opens-large")
    page.wait_for_selector("dialog[open] img")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")
    page.keyboard.press("/")
    page.keyboard.type("sensitivity")
    page.wait_for_selector("a[href*='sensitivities']:visible")
    assert said == []


def test_the_footer_has_the_version_and_headings_of_the_api_are_names_to_import():
    from lora_flow.version import __version__

    assert f"lora_flow {__version__}" in (SITE / "index.html").read_text()
    api = (SITE / "api/index.html").read_text()
    for name in (
        "lora_flow.solve",
        "lora_flow.gaussian_init",
        "lora_flow.figures.plot_loss",
        "lora_flow.oracles.riccati",
    ):
        assert re.search(rf"<h3 id=\"?{re.escape(name)}\"?[ >]", api), name
