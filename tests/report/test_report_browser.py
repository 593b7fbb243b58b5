"""The page in a real Chromium, offline, from file://: quiet, self-contained, sortable and filterable.

Driven over the WebDriver protocol with the standard library alone; the driver listens on 127.0.0.1 only.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from report_records import HOSTILE, hostile, record

from secateur.report import to_html

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs Debian's chromium and chromium-driver",
    ),
]


class Browser:
    """One session of a headless Chromium."""

    def __init__(self, address: str, profile: Path) -> None:
        self.address, self.opener = address, build_opener(ProxyHandler({}))
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = ""
        self.session = "/session/" + self.call("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.address + self.session + path, data, {"Content-Type": "application/json"}, method=method)
        with self.opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def show(self, page: Path) -> None:
        self.call("/url", {"url": page.as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        return self.call("/execute/sync", {"script": script, "args": args})

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def close(self) -> None:
        self.call("", method="DELETE")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert driver.stdout is not None
    try:
        ports = (re.search(r"on port (\d+)\.", line) for line in driver.stdout)
        port = next(found[1] for found in ports if found)
        session = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        yield session
        session.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)
        driver.stdout.close()


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    path = tmp_path / "report.html"
    path.write_text(to_html(record()), "utf-8")
    browser.show(path)
    return browser


COLUMN = (
    "return [...document.querySelectorAll('#layers tbody tr')].filter(r => !r.hidden).map(r => r.cells[arguments[0]].innerText)"
)
CLICK = "document.querySelectorAll('#layers thead button')[arguments[0]].click()"


def test_page_is_quiet_and_requests_nothing(page: Browser) -> None:
    assert page.complaints() == []
    assert (
        page.run("return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))") == []
    )
    assert page.run("return [...document.images].map(i => i.naturalWidth)") == [144, 144]
    assert page.run("return getComputedStyle(document.querySelector('section')).borderTopWidth") == "1px"


def test_policy_blocks_what_is_not_the_page_s_own(page: Browser) -> None:
    page.run("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    assert page.run("return window.ran === undefined")
    assert any("Content Security Policy" in said for said in page.complaints())


def test_sorting_by_click_goes_up_and_down(page: Browser) -> None:
    removed = [layer["removed"] for layer in record()["details"]["layers"]]
    page.run(CLICK, 1)
    assert [int(text) for text in page.run(COLUMN, 1)] == sorted(removed)
    assert page.run("return document.querySelectorAll('#layers thead th')[1].ariaSort") == "ascending"
    page.run(CLICK, 1)
    assert [int(text) for text in page.run(COLUMN, 1)] == sorted(removed, reverse=True)
    page.run(CLICK, 0)
    assert page.run(COLUMN, 0) == sorted(layer["name"] for layer in record()["details"]["layers"])


def test_filter_hides_other_layers(page: Browser) -> None:
    typed = (
        "const box = document.querySelector('.filter input'); box.value = arguments[0];"
        "box.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert page.run("return !document.querySelector('.filter').hidden")
    page.run(typed, "LAYER3.2")
    assert page.run(COLUMN, 0) == ["layer3.2.bn1", "layer3.2.bn2"]
    page.run(typed, "")
    assert len(page.run(COLUMN, 0)) == len(record()["details"]["layers"])


def test_page_fits_a_narrow_window(page: Browser) -> None:
    page.call("/window/rect", {"width": 500, "height": 900})
    try:
        assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        page.call("/window/rect", {"width": 1280, "height": 900})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_record_stays_text(browser: Browser, tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(to_html(hostile(text)), "utf-8")
    browser.show(path)
    assert browser.complaints() == []
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return document.querySelectorAll('[onerror], [onmouseover], a').length") == 0
