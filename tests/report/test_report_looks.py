"""How the report page looks and lasts in a real Chromium: contrast in both schemes, folded texts, 20,000 rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import Open
from report_samples import Said, Text, cos_of, large_run, make_run

from nla_engine.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the dev extra)"
).expect

# The contrast of WCAG 2, of an element's text against the nearest background under it.
CONTRAST = """(element) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    canvas.fillStyle = color;
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => {
    const value = rgb(color)[i] / 255;
    return sum + part * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  let under = element;
  while (rgb(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(under).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read_and_is_not_the_only_carrier(
    scheme: str, tmp_path: Path, open_page: Open
) -> None:
    steps = [-0.5, 0.1, 0.3, 0.6, 0.75, 0.85, 0.95]
    rows = {place: [Said("x", cos_of(fve))] for place, fve in enumerate(steps)}
    write_report(*make_run(tmp_path, [Text([*"abcdefg", " grey"], rows)]), tmp_path / "x.html")
    page = open_page(tmp_path / "x.html", scheme=scheme)
    tokens = page.locator(".t")
    assert len({tokens.nth(i).evaluate("(e) => getComputedStyle(e).backgroundColor") for i in range(7)}) == 7
    for what in [
        ".t",
        ".gap",
        ".brief p",
        ".lead",
        ".figures small",
        ".figures span",
        ".step",
        "#found",
        ".hint",
        ".record i",
        "#panel .words",
    ]:
        for element in page.locator(what).all():
            assert element.evaluate(CONTRAST) >= 4.5, f"{what} {element.inner_text()!r}"
    assert "dashed" in tokens.first.evaluate("(e) => getComputedStyle(e).textDecoration")
    page.locator(".about summary").click()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(252, 251, 248)"
    assert dark == (scheme == "dark")


def test_a_long_text_that_was_not_explained_is_folded(tmp_path: Path, open_page: Open) -> None:
    text = Text(["start ", *["word "] * 400, "end"], {401: [Said("x")]}, prompt=300)
    write_report(*make_run(tmp_path, [text]), tmp_path / "x.html")
    page = open_page(tmp_path / "x.html")
    assert len(page.locator(".tokens").inner_text()) < 1500
    page.locator(".unfold").first.click()
    assert len(page.locator(".gap").first.inner_text()) == len("start ") + 299 * len("word ")
    page.locator("#filter [name=field]").select_option(" text")
    page.locator("#filter [name=value]").fill("word end")
    expect(page.locator("#found")).to_contain_text("1 of 1")


def cpu_seconds(page: Page) -> float:
    """What the page has taken since it was opened: other processes do not count."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    told = session.send("Performance.getMetrics")["metrics"]
    session.detach()
    return next(each["value"] for each in told if each["name"] == "ProcessTime")


@pytest.mark.parametrize(("tokens", "words"), [(50, 100), (1, 20)], ids=["400 sequences", "20,000 sequences"])
def test_twenty_thousand_rows_open_in_seconds_and_scroll(
    tokens: int, words: int, tmp_path: Path, open_page: Open
) -> None:
    store, table = large_run(tmp_path, 20_000, tokens, words)
    summary = write_report(store, table, tmp_path / "large.html")
    assert summary.rows == 20_000 and summary.bytes < 8 << 20
    page = open_page(tmp_path / "large.html")
    page.wait_for_selector("article .t")
    opened = cpu_seconds(page)
    page.mouse.move(400, 600)
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 3000)
    while page.evaluate("scrollY") < before + 2000:  # the test's own timeout ends a page that does not scroll
        page.wait_for_timeout(20)
    while not page.locator("article").last.evaluate("(e) => e.getBoundingClientRect().top < innerHeight"):
        page.evaluate("scrollTo(0, document.body.scrollHeight)")  # the wheel may still be turning
        page.wait_for_timeout(20)
    before = cpu_seconds(page)
    page.locator("#filter [name=token]").fill(page.locator(".t").first.text_content() or "")
    expect(page.locator("#found")).to_contain_text(" of 20,000 explained rows")
    filtered = cpu_seconds(page) - before
    page.goto("about:blank")
    page.goto(f"{(tmp_path / 'large.html').as_uri()}#row=19876")
    expect(page.locator(".t.here")).to_be_in_viewport()
    print(f"{summary.bytes / 1e6:.1f} MB; opened in {opened:.2f} s of CPU time, filtered in {filtered:.2f} s")
    assert opened < 12  # a machine of 2024 needs a tenth of both
    assert filtered < 8
