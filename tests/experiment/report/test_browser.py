"""A report in a real browser: it asks for nothing, runs nothing, and fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kava_core.experiment.report.write_report import write_report
from tests.experiment.report.report_browser import Browser, chromium
from tests.experiment.report.report_runs import hostile

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium (apt-get install chromium)")

SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs whose names try to do harm."""
    folder = tmp_path_factory.mktemp("attacked")
    list(write_report([hostile(folder / "x")], folder / "out"))
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_page_is_harmless_and_fits(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.value("document.title") == "x: kava report"
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert browser.value("document.images.length") > 10
    assert browser.value("document.querySelectorAll('script').length") == 0
    wanted = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert {url for url in wanted if not url.startswith("data:")} == {page.as_uri()}
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert browser.said(*complaints, "Page.javascriptDialogOpening") == []


SHOWN = "[...document.images].filter(one => one.offsetWidth).map(one => one.className)"


def test_a_dark_page_has_dark_figures_and_prints_light_ones(browser: Browser, page: Path) -> None:
    for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 27, 34)")):
        browser.open(page, width=1280, scheme=scheme)
        assert browser.value("getComputedStyle(document.body).backgroundColor") == paper
        assert set(browser.value(SHOWN)) == {f"on-{scheme}"}
    browser.ask("Emulation.setEmulatedMedia", page=True, media="print")
    assert set(browser.value(SHOWN)) == {"on-light"}


def test_the_browser_would_notice(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    wide = "<div style='width:900px'>x</div>"
    bad.write_text(f"<title>a</title><script>document.title='hacked'</script><img src=x.png>{wide}")
    browser.open(bad, width=390)
    assert browser.value("document.title") == "hacked"
    assert browser.value("document.documentElement.scrollWidth") > 390
    assert not browser.value("[...document.images].every(one => one.naturalWidth > 0)")
    wanted = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert (tmp_path / "x.png").as_uri() in wanted
    assert browser.said("Log.entryAdded")
