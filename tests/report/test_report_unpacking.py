"""The report page before its data are unpacked, without a script, and with data that cannot be unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_samples import Said, Text, cos_of, make_run

from nla_engine.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

#: Scripts that run before the page's own.
WAITS = "Response.prototype.text = () => new Promise(() => {})"
FAILS = "Response.prototype.text = () => Promise.reject(new Error('broken'))"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacking")
    text = Text(["a", "b"], {0: [Said("Words.", cos_of(0.5))]}, 0)
    write_report(*make_run(directory, [text]), directory / "page.html")
    return directory / "page.html"


@pytest.fixture(params=["waits", "fails", "no script"])
def page(request: pytest.FixtureRequest, browser: Browser, file: Path) -> Iterator[tuple[str, Page]]:
    context = browser.new_context(java_script_enabled=request.param != "no script")
    opened = context.new_page()
    if request.param != "no script":
        opened.add_init_script(WAITS if request.param == "waits" else FAILS)
    opened.goto(file.as_uri())
    yield request.param, opened
    context.close()


def test_what_is_shown_without_data(page: tuple[str, Page]) -> None:
    how, opened = page
    if how == "fails":
        opened.wait_for_selector("#notice:not([hidden])")
        assert "cannot be unpacked (broken)" in opened.locator("#notice").inner_text()
    shown = {name: opened.locator(f"#{name}").is_visible() for name in ("unpacking", "area-run", "tab-run")}
    waits = how == "waits"
    assert shown == {"unpacking": waits, "area-run": not waits, "tab-run": not waits}
