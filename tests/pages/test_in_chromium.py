"""The page in a browser: it opens from the disk without a network, and its controls move what they are about."""

import dataclasses
import threading

import pytest
from runs_of_pages import SETTINGS, presented

from lora_flow.cli import main
from lora_flow.experiments.explore import explored_by_server
from lora_flow.pages.server import address_of

pytestmark = pytest.mark.long


def curve(page, panel=0):
    """The thick line of a panel, as SVG draws it."""
    paths = page.query_selector_all(f"#chart-{panel} path[stroke-width='3'][aria-roledescription='line mark']")
    assert len(paths) == 1, "one cell is chosen"
    return paths[0].get_attribute("d")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_opens_without_errors_network_or_overflow(folder, opened, width, scheme):
    page, said = opened((folder / "report.html").as_uri(), width=width, scheme=scheme)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(page.query_selector_all(".chart svg.marks")) == 3


def test_a_slider_and_a_click_and_a_row_each_choose_a_cell(folder, opened):
    page, said = opened((folder / "report.html").as_uri())
    before = curve(page)
    page.focus("#axis-alpha")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#told').textContent.includes('alpha 0.001')")
    page.wait_for_timeout(300)
    assert curve(page) != before, "the thick curve is another"
    assert page.text_content("output[for=axis-alpha]") == "0.001"
    cells = page.query_selector_all("#chart-map path[aria-roledescription='rect mark']")
    assert len(cells) == 6, "alpha across, and rank up"
    cells[0].click()
    page.wait_for_function("!document.querySelector('#told').textContent.includes('alpha 0.001:')")
    chosen = page.get_attribute("tr[aria-selected=true]", "data-cell")
    page.click("tr[data-cell='11'] button")
    assert page.get_attribute("tr[aria-selected=true]", "data-cell") == "11" != chosen
    assert "spectral, alpha 0.0001, rank 2" in page.text_content("#told")
    assert said == []


def test_the_table_filters_by_values_however_they_are_written_and_sorts(folder, opened):
    page, _ = opened((folder / "report.html").as_uri())
    page.fill("#filter", "gaussian alpha=1e-4")
    assert page.text_content("#count") == "2 of 12 cells"
    page.fill("#filter", "")
    page.click("#table th:nth-child(5) button")
    assert page.get_attribute("#table th:nth-child(5)", "aria-sort") == "ascending"
    losses = [float(cell.text_content()) for cell in page.query_selector_all("#table td:nth-child(5)")]
    assert losses == sorted(losses)
    assert len(losses) == 12


def test_axes_bands_and_time_change_the_picture(folder, opened):
    page, said = opened((folder / "report.html").as_uri())
    for box in ("log-time", "log-value-0"):
        before = curve(page)
        page.click(f"#{box}")
        page.wait_for_timeout(500)
        assert curve(page) != before, box
    bands = "getComputedStyle(document.querySelector(\"#chart-0 path[aria-roledescription='area mark']\")).fillOpacity"
    shown = page.evaluate(bands)
    page.click("#bands")
    page.wait_for_timeout(500)
    assert float(shown) != float(page.evaluate(bands)) or page.evaluate(bands.replace("fillOpacity", "opacity")) == "0"
    page.select_option("#quantity-1", label="‖Z1‖")
    page.wait_for_timeout(500)
    assert said == []


def test_the_chosen_cell_moves_to_a_time_and_plays(folder, opened):
    page, said = opened((folder / "report.html").as_uri())
    page.select_option("#axis-init", label="gaussian")
    arrow = "[...document.querySelectorAll('#compass line.layer-1')].map((line) => Number(line.getAttribute('y2')))[0]"
    before = page.evaluate(arrow)
    page.focus("#moment")
    page.keyboard.press("End")
    page.wait_for_timeout(300)
    assert abs(page.evaluate(arrow)) < 0.1 < abs(before), "it has turned to the task"
    assert "t = 3;" in page.text_content("#moment-told")
    page.click("#play")
    page.wait_for_timeout(700)
    assert page.text_content("#play") == "Pause"
    page.click("#play")
    assert 0 < float(page.input_value("#moment")) < 20
    assert said == []


@pytest.fixture
def served(folder):
    with explored_by_server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield address_of(server)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_served_page_shows_what_a_page_of_its_own_does(folder, served, opened, width, scheme):
    whole, _ = opened((folder / "report.html").as_uri(), width=width, scheme=scheme)
    page, said = opened(served, width=width, scheme=scheme, offline=False)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for one in (whole, page):
        one.focus("#axis-alpha")
        one.keyboard.press("ArrowRight")
        one.wait_for_function("document.querySelector('#told').textContent.includes('alpha 0.001')")
        one.select_option("#axis-init", label="spectral")
        one.wait_for_function("document.querySelector('#told').textContent.includes('spectral')")
        one.wait_for_timeout(1000)
    assert page.text_content("#told") == whole.text_content("#told")
    assert curve(page) == curve(whole)
    assert page.text_content("#moment-told") == whole.text_content("#moment-told")
    cells = [one.query_selector_all("#chart-map path[aria-roledescription='rect mark']") for one in (page, whole)]
    assert [cell.get_attribute("fill") for cell in cells[0]] == [cell.get_attribute("fill") for cell in cells[1]]
    assert page.text_content("#map-told") == "6 of 12 cells."
    assert page.text_content("#count") == "6 of 6 cells"
    page.click("#table tbody tr:nth-child(6) button")
    page.wait_for_function("document.querySelector('#told').textContent.includes('alpha 0.0001, rank 2')")
    assert said == []


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    presented(out / "weaker", dataclasses.replace(SETTINGS, shift_scale=(3.0,), rank=(1,)))
    assert main(["compare", str(folder), str(out / "weaker"), "--out", str(out / "both")]) == 0
    return out / "both" / "compare.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_runs_are_compared_cell_by_cell(compared, opened, width, scheme):
    page, said = opened(compared.as_uri(), width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    lines = page.query_selector_all("#chart-0 path[aria-roledescription='line mark']")
    assert len(lines) == 2, "one of each run"
    before = [line.get_attribute("d") for line in lines]
    page.focus("#axis-alpha")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#told').textContent.includes('alpha 0.001')")
    page.wait_for_timeout(300)
    after = page.query_selector_all("#chart-0 path[aria-roledescription='line mark']")
    assert all(line.get_attribute("d") not in before for line in after), "both have moved"
    page.select_option("#run", label="weaker")
    page.wait_for_timeout(500)
    assert page.query_selector("#axis-rank") is None, "which that run does not vary"
    assert "alpha 0.001" in page.text_content("#told"), "the cell is kept where the other run has it"
    assert page.text_content("td:has-text('shift_scale') + td").startswith("5")
    assert said == []
