"""The report page in a real Chromium: choosing, keys, filter, links, both widths, sections, hostile text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from conftest import Open
from report_samples import Said, Text, cos_of, make_run

from nla_engine.report import Section, write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

expect = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the dev extra)"
).expect

WIDE, NARROW = (1280, 860), (400, 800)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products and a text cut off; a row below 0, one unclosed, one without a score."""
    product = ["<|im_start|>", "6", "×", "7", "\n", "The", " answer", " is", " ", "4", "2", "."]
    said = {
        5: [Said("A reply begins.", cos_of(0.95))],
        9: [Said("The tens digit of 42.", cos_of(-0.4), rank=31)],
        10: [Said("The units digit of 42.", cos_of(0.75), "unclosed")],
        11: [Said("", None, "zero_vector", None, None)],
    }
    other = {place: [Said(f"Token {place} of the second.", cos_of(0.6))] for place in (4, 5)}
    sequences = [
        Text(product, said, 5, {"a": 6, "b": 7}),
        Text(["x"] * 8, {0: [Said("Of the long one.", cos_of(0.3))]}, 0, {"a": 16, "b": 1}),
        Text(["9", "×", "8", "\n", " It", " is", " 72"], other, 4, {"a": 9, "b": 8}),
    ]
    directory = tmp_path_factory.mktemp("small")
    write_report(*make_run(directory, sequences), directory / "page.html", title="Products")
    return directory / "page.html"


def shown(page: Page) -> list[str]:
    """The tokens that the filter leaves (all, without one), laid out or not: `inner_text` is "" outside the window."""
    which = "#hits .entry .mark" if page.locator("#views").is_visible() else "#sequences .t"
    return [text.replace("\u2423", " ") for text in page.locator(which).all_text_contents()]


def chosen_row(page: Page) -> str | None:
    """Asked of the page itself: `page.url` hears of a changed address some time after it changed."""
    return page.evaluate("document.querySelector('[data-i].here')?.dataset.i ?? null")


def expect_address(page: Page, ending: str) -> None:
    expect(page).to_have_url(re.compile(re.escape(ending) + "$"))


def test_a_click_shows_all_there_is_to_say(small: Path, open_page: Open) -> None:
    page = open_page(small)
    expect(page).to_have_title("Products")
    expect(page.locator("#found")).to_have_text("7 explained rows in 3 sequences")
    panel = page.locator("#panel")
    expect(panel).to_contain_text("Choose a token")
    page.locator(".t", has_text="4").first.click()
    expect(panel.locator(".explanation")).to_have_text("The tens digit of 42.")
    for text in (
        "row 1",
        "read 4, next 2",
        "generated · digits · among the first 50 tokens",
        "\u22120.400",
        "0.440",
        "rank among 7",
        "31",
        "100, 1.00 of the median",
    ):
        expect(panel).to_contain_text(text)
    expect(panel.locator("details.record")).to_contain_text("6")
    expect_address(page, "#row=1")
    page.locator(".t", has_text="2").first.click()
    expect(panel.locator(".status")).to_contain_text("unclosed The AV reached its limit of tokens")
    page.locator(".t.unscored").click()
    expect(panel.locator(".status")).to_contain_text("zero_vector")
    panel.get_by_role("button", name="Close").click()
    expect(panel).to_contain_text("Choose a token")
    panel.get_by_role("button", name="Lowest FVE").click()
    assert chosen_row(page) == "1"


def test_keys(small: Path, open_page: Open) -> None:
    page = open_page(small)
    walk = {"ArrowRight": "0", "ArrowDown": "4", "ArrowUp": "0", "ArrowLeft": "0"}
    for key, row in walk.items():
        page.keyboard.press(key)
        assert chosen_row(page) == row, key
    for row in range(1, 7):
        page.keyboard.press("ArrowRight")
        assert chosen_row(page) == str(row)
        expect(page.locator(".t.here")).to_be_in_viewport()
    page.keyboard.press("ArrowRight")
    assert chosen_row(page) == "6", "the last token has no next one"
    page.keyboard.press("Escape")
    assert chosen_row(page) is None
    page.keyboard.press("/")
    page.keyboard.type("digit")
    expect(page.locator("#found")).to_have_text("2 of 7 explained rows, in 1 sequence")
    page.keyboard.press("ArrowLeft")
    assert chosen_row(page) is None, "keys in a field are the field's"
    page.locator("#sequences").focus()
    page.locator("#filter [name=q]").fill("")
    page.locator("article").nth(1).locator(".t").first.click()
    page.locator("#filter [name=q]").fill("second")
    page.keyboard.press("Enter")
    expect(page.locator("#found")).to_have_text("2 of 7 explained rows, in 1 sequence")
    for key, row in {"ArrowDown": "5", "ArrowRight": "6"}.items():
        page.keyboard.press(key)
        assert chosen_row(page) == row, "from a row that the filter hides to one that it leaves"
    page.locator("#tab-text").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#area-distributions")).to_be_visible()


FILTERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "words": ({"q": "DIGIT of"}, ["4", "2"]),
    "whole explanation": ({"q": '"A reply begins."'}, ["The"]),
    "pattern": ({"q": "/^the (tens|units)/i"}, ["4", "2"]),
    "token": ({"token": "T"}, ["The", " It"]),
    "token exactly": ({"token": '" is"'}, [" is"]),
    "FVE from": ({"lo": "0.7"}, ["The", "2"]),
    "FVE to": ({"hi": "0.5"}, ["4", "x"]),
    "range": ({"lo": "0.25", "hi": "0.7"}, ["x", " It", " is"]),
    "status": ({"status": "unclosed"}, ["2"]),
    "field": ({"field": "a", "value": "6"}, ["The", "4", "2", ".", "x"]),
    "field exactly": ({"field": "a", "value": '"6"'}, ["The", "4", "2", "."]),
    "text of the sequence": ({"field": " text", "value": "×8"}, [" It", " is"]),
    "two at once": ({"field": "b", "value": "7", "q": "tens"}, ["4"]),
    "nothing": ({"q": "no such words"}, []),
}


def test_filter(small: Path, open_page: Open) -> None:
    page = open_page(small)
    for name, (values, expected) in FILTERS.items():
        for field, value in values.items():
            control = page.locator(f"#filter [name={field}]")
            control.select_option(value) if field in ("status", "field") else control.fill(value)
        expect(page.locator("#found"), name).to_contain_text(f"{len(expected)} of 7 explained rows")
        assert [text.strip() for text in shown(page)] == [text.strip() for text in expected], name
        expect(page.locator("#none"), name).to_be_visible(visible=not expected)
        link = page.evaluate("location.hash")
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#found")).to_have_text("7 explained rows in 3 sequences")
        page.evaluate("(link) => { location.hash = link }", link)
        expect(page.locator("#found"), name).to_contain_text(f"{len(expected)} of 7 explained rows")
        page.get_by_role("button", name="Clear").click()


def test_the_legend_filters_and_order_follows_fve(small: Path, open_page: Open) -> None:
    page = open_page(small)
    step = page.locator("#scale button", has_text="< 0")
    step.click()
    assert shown(page) == ["4"]
    expect(page.locator("#scale [aria-pressed=true]")).to_have_count(1)
    page.locator("#scale [aria-pressed=true]").click()
    assert len(shown(page)) == 7
    for order, numbers in {"low": ["1", "0", "2"], "high": ["2", "0", "1"], "": ["0", "1", "2"]}.items():
        page.locator("#filter [name=order]").select_option(order)
        expect(page.locator("article h2")).to_have_text(numbers)
    page.locator("#filter [name=q]").fill("/(/")
    expect(page.locator("#found")).to_contain_text("Not a valid pattern")
    assert len(shown(page)) == 7


def test_links(small: Path, open_page: Open) -> None:
    page = open_page(small, "#row=5")
    expect(page.locator(".explanation")).to_have_text("Token 4 of the second.")
    expect(page.locator(".t.here")).to_be_in_viewport()
    page.evaluate("location.hash = 'row=1&tab=text'")
    expect(page.locator(".explanation")).to_have_text("The tens digit of 42.")
    page = open_page(small, "#row=0&q=tens")
    assert chosen_row(page) == "0" and len(shown(page)) == 7, (
        "a row that the filter hides is shown all the same"
    )
    expect(page.locator("#notice")).to_have_text("The link\u2019s filter hides row 0: it was cleared.")
    page = open_page(small, "#tab=run")
    expect(page.locator("#area-run")).to_contain_text("sample/model")
    expect(page.locator("#notice")).to_be_hidden()


LOST = {
    "row=999": "asks for row 999, but the store has only 8 rows, counted from 0",
    "row=999&tab=distributions": "asks for row 999, but the store has only 8 rows, counted from 0",
    "row=7": "asks for row 7, which is in the store but was not explained",
    "row=nonsense": "asks for row \u201cnonsense\u201d, which is no row number",
    "row=": "asks for row \u201c\u201d, which is no row number",
    "row=1e0": "asks for row \u201c1e0\u201d, which is no row number",
    "tab=study": "leads to \u201cstudy\u201d, which this page does not have",
    "status=odd": "filters by status \u201codd\u201d, which this page does not have",
    "field=c&value=1": "filters by field \u201cc\u201d, which this page does not have",
}


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "400"])
def test_a_link_to_what_is_not_there_says_so(size: tuple[int, int], tmp_path: Path, open_page: Open) -> None:
    """Row 7 is in the store; the table does not explain it."""
    said = {place: [Said(f"Text {place}.")] for place in range(8)}
    store, table = make_run(tmp_path, [Text(["t"] * 8, said, record={"a": 1})])
    rows = pq.read_table(table)
    pq.write_table(rows.slice(0, 7).replace_schema_metadata(rows.schema.metadata), table)
    write_report(store, table, tmp_path / "x.html")
    page = open_page(tmp_path / "x.html", size=size)
    for link, fault in LOST.items():
        page.evaluate("(link) => { location.hash = link }", link)
        expect(page.locator("#notice"), link).to_contain_text(fault)
        expect(page.locator("#notice"), link).to_be_in_viewport()
        assert chosen_row(page) is None and page.locator(".t").count() == 7, link
    page.evaluate("location.hash = 'row=6'")
    expect(page.locator("#notice")).to_be_hidden()
    assert chosen_row(page) == "6"


def test_distributions_beside_their_controls(small: Path, tmp_path: Path, open_page: Open) -> None:
    page = open_page(small)
    page.get_by_role("tab", name="Distributions").click()
    expect(page.locator("#area-distributions figure")).to_have_count(5)
    expect(page.locator("#area-distributions")).to_contain_text("Mean FVE 0.47")
    page.locator("#filter [name=token]").fill("no such token")
    expect(page.locator("#area-distributions")).to_contain_text("No row fits")
    page.locator("#filter [name=token]").fill("4")
    expect(page.locator("#area-distributions")).to_contain_text("Of the 1 row that the filter leaves.")
    tens = {20: [Said("The tens digit of 42.", cos_of(-0.4))], **{i: [Said("x")] for i in range(10)}}
    write_report(*make_run(tmp_path, [Text(["t"] * 21, tens, norms={20: 300.0})]), tmp_path / "x.html")
    page = open_page(tmp_path / "x.html", "#tab=distributions")
    expect(page.locator("#area-distributions figure svg")).to_have_count(5)
    for figure in page.locator("#area-distributions figure").all():
        assert figure.locator(".own").count() and figure.locator(".control").count()
    plot = page.locator("figure", has_text="Norm against cos").locator("svg")
    path = plot.locator(".own").get_attribute("d") or ""
    x, y = re.findall(r"M([\d.]+) ([\d.]+)h0", path)[-1]
    frame = plot.bounding_box()
    assert frame
    plot.click(position={"x": float(x), "y": float(y)})
    expect(page.locator(".explanation")).to_have_text("The tens digit of 42.")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "400"])
def test_nothing_runs_out_at_the_side(size: tuple[int, int], small: Path, open_page: Open) -> None:
    page = open_page(small, "#row=1", size)
    for tab in ("text", "distributions", "run"):
        page.locator(f"#tab-{tab}").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], tab
    page.locator("#tab-text").click()
    page.locator("#panel").get_by_role("button", name="Next").click()
    assert chosen_row(page) == "2"
    box, panel = page.locator(".t.here").bounding_box(), page.locator("#panel").bounding_box()
    assert box and panel
    beside = box["x"] + box["width"] <= panel["x"]
    assert beside if size == WIDE else box["y"] + box["height"] <= panel["y"], (
        "the panel does not hide the token"
    )
    if size == NARROW:
        expect(page.locator("#filter [name=token]")).to_be_hidden()
        page.get_by_role("button", name="Filters").click()
        page.locator("#filter [name=token]").fill("4")
        expect(page.locator("#found")).to_contain_text("1 of 7")


HOSTILE = (
    "</script><script>window.pwned=1</script><!--<img src=x onerror=window.pwned=1>"
    "\u2028<svg onload=window.pwned=1>{{script}}&lt;b&gt;"
)


def test_hostile_text_stays_text(tmp_path: Path, open_page: Open) -> None:
    text = Text(
        [HOSTILE, "b", "\u202ec\x00"],
        {0: [Said(HOSTILE)], 2: [Said("\u202ereversed\x1b")]},
        record={HOSTILE: HOSTILE},
    )
    out = tmp_path / "x.html"
    write_report(*make_run(tmp_path, [text], av=HOSTILE, ar=HOSTILE), out, title=HOSTILE)
    page = open_page(out, "#row=0")
    expect(page.locator(".explanation")).to_have_text(HOSTILE, use_inner_text=False)
    assert page.locator(".t").first.text_content() == HOSTILE
    assert (
        page.locator("h1").text_content() == HOSTILE == page.title()
        or HOSTILE.split("\u2028")[0] in page.title()
    )
    assert HOSTILE in page.locator("#panel details.record").text_content()
    page.locator("#filter [name=value]").fill("pwned")
    for tab in ("distributions", "run", "text"):
        page.locator(f"#tab-{tab}").click()
    assert page.locator(".t").nth(1).text_content() == "\u202ec\u2400"
    assert page.locator(".t").nth(1).evaluate("(e) => getComputedStyle(e).unicodeBidi") == "isolate"
    assert page.locator("img, svg[onload], b b").count() == 0
    assert page.evaluate("window.pwned") is None


def test_a_script_that_comes_in_all_the_same_does_not_run(tmp_path: Path, browser: Browser) -> None:
    """The policy is a second wall: here the markup of a section plays the intruder."""
    run = "window.pwned=1"
    intruder = f"<p id=there onclick='{run}'>x</p><script>{run}</script><img src=x onerror='{run}'>"
    out = tmp_path / "x.html"
    write_report(
        *make_run(tmp_path, [Text(["a"], {0: [Said("a")]})]), out, sections=[Section("in", "In", intruder)]
    )
    page = browser.new_page()
    page.goto(out.as_uri() + "#tab=in")
    page.locator("#there").click()
    assert page.evaluate("fetch('data:,x').then(() => 'let through', () => 'refused')") == "refused"
    assert page.evaluate("window.pwned") is None
    page.close()


def test_sections_and_samples(tmp_path: Path, open_page: Open) -> None:
    three = [Said("first", cos_of(0.2)), Said("second", cos_of(0.8)), Said("third", cos_of(0.5))]
    store, table = make_run(tmp_path, [Text(["a", "b"], {0: three, 1: three})])
    section = Section("study", "Study", "<h2>Digits</h2><p><a href='#row=1'>row 1</a></p>")
    write_report(store, table, tmp_path / "x.html", sections=[section])
    page = open_page(tmp_path / "x.html")
    page.get_by_role("tab", name="Study").click()
    expect_address(page, "#tab=study")
    page.get_by_role("link", name="row 1").click()
    expect(page.locator(".sample .explanation")).to_have_text(["first", "second", "third"])
    expect(page.locator(".sample", has_text="second").locator("h3")).to_have_text("Sample 2 of 3 best cos")
    assert "s3" in page.locator(".t.here").get_attribute("class"), "a row's colour is the mean of its samples"
    page.locator("#filter [name=q]").fill("third")
    expect(page.locator("#found")).to_have_text("2 of 2 explained rows, in 1 sequence")


def test_a_run_without_any_score(tmp_path: Path, open_page: Open) -> None:
    nothing = Said("", None, "zero_vector", None, None)
    text = Text(["a", "b"], {0: [nothing], 1: [nothing]}, norms={0: 0.0, 1: 0.0})
    write_report(*make_run(tmp_path, [text], variance=float("nan")), tmp_path / "x.html")
    page = open_page(tmp_path / "x.html", "#row=1")
    expect(page.locator("#panel .status")).to_contain_text("The vector is zero")
    page.get_by_role("tab", name="Distributions").click()
    expect(page.locator("#area-distributions")).to_contain_text("Mean FVE \u2013")
