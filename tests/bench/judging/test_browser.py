"""report.html in a browser: on a phone, in the dark, and printed."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.chromium

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars"
)
PHONE, DESK = (360, 740), (1280, 900)
OPEN = "document.querySelectorAll('details').forEach(each => each.open = true)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


def show(browser: Any, report: Path, size: tuple[int, int], scheme: str = "light") -> None:
    width, height = size
    shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(report.as_uri())


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_sticks_out_and_nothing_is_complained_of(
    browser: Any, report: Path, size: tuple[int, int]
) -> None:
    show(browser, report, size)
    widths = "return [document.documentElement.scrollWidth, innerWidth]"
    for before in ("", OPEN):
        browser.execute_script(before)
        needed, there = browser.execute_script(widths)
        assert needed <= there == size[0]
    assert browser.get_log("browser") == []


def test_text_in_figures_is_legible_on_a_phone(browser: Any, report: Path) -> None:
    show(browser, report, PHONE)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.plot text')].map(each => {"
        "  const at = each.getScreenCTM();"
        "  return Math.hypot(at.a, at.b) * parseFloat(getComputedStyle(each).fontSize); })"
    )
    assert len(heights) > 50
    assert min(heights) >= 8  # CSS pixels; ticks are the smallest


def contrast(one: str, two: str) -> float:
    """Contrast of two colours rgb(...), as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = (int(part) / 255 for part in colour[4:-1].split(","))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """
const of = (selector, property) =>
  [...document.querySelectorAll(selector)].map(each => getComputedStyle(each)[property]);
return {
  paper: getComputedStyle(document.body).backgroundColor,
  words: [...new Set([...of('p, li, td, th, a, summary, figcaption, h2', 'color'),
                      ...of('.plot text', 'fill')])],
  lines: [...new Set(of('.plot [id*="line2d"] path', 'stroke'))].filter(c => c.startsWith('rgb(')),
};
"""


def test_dark_differs_and_both_can_be_read(browser: Any, report: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        show(browser, report, DESK, scheme)
        seen[scheme] = browser.execute_script(COLOURS)
    assert seen["light"]["paper"] != seen["dark"]["paper"]
    for found in seen.values():
        assert min(contrast(word, found["paper"]) for word in found["words"]) >= 4.5
    light, dark = (set(seen[scheme]["lines"]) for scheme in ("light", "dark"))
    assert not light & dark  # every line of every figure takes its colour from the page


def test_it_prints(browser: Any, report: Path) -> None:
    show(browser, report, DESK, "dark")
    asked = {"printBackground": True, "preferCSSPageSize": True}
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", asked)["data"])
    assert printed.startswith(b"%PDF")
    assert 3 <= printed.count(b"/Type /Page\n") <= 12


def test_no_figure_is_wider_than_its_page_when_printed(browser: Any, report: Path) -> None:
    show(browser, report, (680, 900))  # A4 between its margins
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    sides = browser.execute_script(
        "return [...document.querySelectorAll('figure, table, pre')].map("
        "each => [each.getBoundingClientRect().left, each.getBoundingClientRect().right])"
    )
    assert sides
    assert all(left >= 0 and right <= 681 for left, right in sides)
