"""The first minutes with the report page in a real Chromium: what is in view, hits, legend, spaces, hover, figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import Open
from report_samples import Said, Text, cos_of, large_run, make_run

from nla_engine.report import Section, write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (the dev extra)"
).expect

WIDE, NARROW = (1280, 900), (400, 800)
SIZES = pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "400"])
#: Distance of two colours in Oklab, where 0.02 is about what an eye tells apart side by side.
DISTANCE = """([a, b]) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const lab = (color) => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
    const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
    const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
    return [0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
      1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s, 0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s];
  };
  const [x, y] = [lab(a), lab(b)];
  return Math.hypot(...x.map((value, i) => value - y[i]));
}"""
CHAT = [
    "<|im_start|>",
    "user",
    "\n",
    "6",
    "×",
    "7",
    "?",
    "<|im_end|>",
    "\n",
    "<|im_start|>",
    "assistant",
    "\n",
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 tokens of 60 sequences, each explained in 40 words."""
    directory = tmp_path_factory.mktemp("large")
    write_report(*large_run(directory, 3000, 50, 40), directory / "x.html")
    return directory / "x.html"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat whose reply is explained, with spaces, a line end, a low FVE; two more sequences."""
    reply = [" The", " answer", " ", "4", "2", "\n", "<|im_end|>"]
    long = "word " * 200 + "needle and " + "thread " * 200
    fve = [0.95, 0.75, 0.6, -0.5, 0.95, 0.3, 0.95]
    said = {
        12 + i: [Said(long if i == 1 else f"Text {i}: a Digit.", cos_of(value))]
        for i, value in enumerate(fve)
    }
    other = {0: [Said("Nothing here.", cos_of(0.95))], 1: [Said("a digit again", cos_of(0.74), "unclosed")]}
    sequences = [
        Text([*CHAT, *reply], said, 12, {"topic": "sums"}),
        Text(["a", " b", "c"], other, 0, {"topic": "letters"}),
    ]
    directory = tmp_path_factory.mktemp("chat")
    write_report(*make_run(directory, sequences), directory / "x.html", title="A chat about products")
    return directory / "x.html"


def search(page: Page, **values: str) -> None:
    for name, value in values.items():
        control = page.locator(f"#filter [name={name}]")
        control.select_option(value) if name in ("status", "field", "order") else control.fill(value)


@SIZES
@pytest.mark.parametrize("name", ["large", "chat"])
def test_the_text_is_in_view_and_the_search_stays(
    name: str, size: tuple[int, int], open_page: Open, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(name), size=size)
    first = page.locator("#sequences .tokens").first.bounding_box()
    assert first and first["y"] + 24 <= (size[1] / 3 if size == WIDE else size[1])
    assert page.locator(".lead").is_hidden() and page.locator(".figures").is_hidden()
    page.locator(".about summary").click()
    assert page.locator(".lead").is_visible() and page.locator(".figures").is_visible()
    page.locator(".about summary").click()
    if name == "large":
        page.evaluate("scrollTo(0, 4000)")
        expect(page.locator("h1")).not_to_be_in_viewport()
        expect(page.locator("#filter [name=q]")).to_be_in_viewport()
        bar = page.locator("#bar").bounding_box()
        assert bar and bar["y"] == 0 and bar["height"] < size[1] / 4


def test_hits_are_a_list_of_tokens_snippets_and_scores(chat: Path, open_page: Open) -> None:
    page = open_page(chat)
    marks, hits = page.locator("#hits mark"), page.locator("#hits .entry")
    search(page, q="digit")
    expect(page.locator("#found")).to_contain_text("7 of 9 explained rows, in 2 sequences")
    assert page.locator("#sequences").is_hidden()
    expect(marks).to_have_text(["Digit"] * 6 + ["digit"])
    expect(hits.first.locator(".mark")).to_have_text("\u2423The")
    expect(hits.first.locator(".next")).to_have_text("next \u2423answer")
    expect(hits.first.locator(".end b")).to_have_text("0.95")
    expect(hits.first.locator(".end small")).to_have_text("sequence 0, position 12")
    search(page, q="NEEDLE and")
    expect(marks).to_have_text(["needle and"])
    assert 50 < len(hits.locator(".words").text_content() or "") < 300
    search(page, q="/Text [0-3]/", order="low")
    expect(marks).to_have_text(["Text 3", "Text 2", "Text 0"])
    expect(hits.locator(".end b")).to_have_text(["\u22120.50", "0.60", "0.95"])
    search(page, q='"Nothing here."', order="")
    expect(marks).to_have_text(["Nothing here."])
    search(page, q="", status="unclosed")
    expect(hits.locator(".words")).to_have_text(["a digit again"])
    expect(marks).to_have_count(0)
    search(page, status="", field=" text", value="6×")
    expect(hits).to_have_count(7)
    expect(hits.first.locator(".field mark")).to_have_text("6×")


def test_a_hit_opens_beside_the_list_and_in_its_text(chat: Path, open_page: Open) -> None:
    page = open_page(chat)
    whole = page.locator(".t[data-i='0']").evaluate("(e) => getComputedStyle(e).backgroundColor")
    search(page, q="digit")
    page.keyboard.press("Enter")
    for key, row in {"ArrowDown": "0", "ArrowRight": "2", "ArrowUp": "0"}.items():
        page.keyboard.press(key)
        assert page.locator(".entry.here").get_attribute("data-i") == row, key
    page.locator("#hits .entry").nth(3).click()
    expect(page.locator("#panel .explanation")).to_have_text("Text 4: a Digit.")
    page.get_by_role("button", name="Show in its text").click()
    assert page.locator("#hits").is_hidden() and page.locator(".t.here").get_attribute("data-i") == "4"
    expect(page.locator(".t.here")).to_be_in_viewport()
    assert "show=text" in page.evaluate("location.hash")
    assert page.locator(".t.hit").first.evaluate("(e) => getComputedStyle(e).display") == "inline"
    other = page.locator(".t:not(.hit)").first
    assert other.evaluate("(e) => getComputedStyle(e).color") == page.locator(".t.hit").first.evaluate(
        "(e) => getComputedStyle(e).color"
    )
    assert page.locator(".t[data-i='0']").evaluate("(e) => getComputedStyle(e).backgroundColor") == whole
    page.get_by_role("button", name="List").click()
    assert page.locator(".entry.here").get_attribute("data-i") == "4"


def test_many_hits_are_built_as_they_are_read(large: Path, open_page: Open) -> None:
    page = open_page(large, "#lo=-3")
    expect(page.locator("#found")).to_contain_text("3,000 of 3,000 explained rows")
    built = page.locator("#hits .entry").count()
    assert 0 < built < 1000
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.locator("#hits .entry").nth(built)).to_be_attached()
    page.evaluate("location.hash = 'lo=-3&row=2900'")
    expect(page.locator(".entry.here")).to_be_in_viewport()
    assert page.locator(".entry.here").get_attribute("data-i") == "2900"


def test_the_legend_is_made_of_buttons_and_empty_colours_are_empty(chat: Path, open_page: Open) -> None:
    page = open_page(chat)
    steps = page.locator("#scale button")
    style = "(e, name) => getComputedStyle(e)[name]"
    amounts = [int(text) for text in steps.locator(".amount").all_inner_texts()]
    assert amounts == [1, 0, 1, 1, 2, 0, 4] and sum(amounts) == 9
    for step, amount in zip(steps.all(), amounts, strict=True):
        empty = step.evaluate(style, "backgroundColor") == "rgba(0, 0, 0, 0)"
        assert (
            empty == step.is_disabled() == (step.evaluate(style, "borderStyle") == "dashed") == (amount == 0)
        )
        assert (step.evaluate(style, "cursor") == "pointer") == (amount > 0)
        assert ("Click to see only these" in (step.get_attribute("title") or "")) == (amount > 0)
    flat = steps.nth(0).evaluate(style, "boxShadow")
    steps.nth(0).hover()
    assert steps.nth(0).evaluate(style, "boxShadow") != flat
    steps.nth(4).click()
    expect(page.locator("#hits .entry")).to_have_count(2)
    assert [int(text) for text in steps.locator(".amount").all_inner_texts()] == amounts, (
        "from one to the next"
    )
    steps.nth(0).click()
    expect(page.locator("#hits .entry .end b")).to_have_text(["\u22120.50"])


def test_spaces_and_line_ends_can_be_seen(chat: Path, open_page: Open) -> None:
    page = open_page(chat)
    before = "(e) => getComputedStyle(e, '::before').content"
    tokens = page.locator("#sequences .t")
    assert tokens.nth(0).evaluate(before) == '"\u2423"' and tokens.nth(0).text_content() == " The"
    assert tokens.nth(2).text_content() == "\u2423" and tokens.nth(3).evaluate(before) == "none"
    assert tokens.nth(5).text_content() == "\u21b5\n"
    assert "user\u21b5" in page.locator(".gap").first.inner_text()
    for row, said in {
        2: "read \u2423, next 4",
        4: "read 2, next \u21b5",
        1: "read \u2423answer, next \u2423",
        6: "read <|im_end|>, the last token",
    }.items():
        tokens.nth(row).click()
        assert " ".join((page.locator("#panel h2").text_content() or "").split()) == said


def test_a_token_says_under_the_mouse_what_it_is(chat: Path, open_page: Open) -> None:
    page = open_page(chat)
    tokens, hover = page.locator("#sequences .t"), page.locator("#hover")
    expect(hover).to_be_hidden()
    tokens.nth(3).hover()
    expect(hover).to_contain_text("read 4, next 2FVE \u22120.50", use_inner_text=False)
    expect(hover).to_contain_text("Text 3: a Digit.")
    box, token = hover.bounding_box(), tokens.nth(3).bounding_box()
    assert box and token and box["y"] >= token["y"] + token["height"], "it does not hide its token"
    tokens.nth(1).hover()
    assert len(hover.inner_text()) < 300
    page.locator("h1").hover()
    expect(hover).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_is_told_from_paper_and_from_its_neighbours(
    scheme: str, tmp_path: Path, open_page: Open
) -> None:
    rows = {i: [Said("x", cos_of(fve))] for i, fve in enumerate([-0.5, 0.1, 0.3, 0.6, 0.75, 0.85, 0.95])}
    write_report(*make_run(tmp_path, [Text([*"abcdefg"], rows)]), tmp_path / "x.html")
    page = open_page(tmp_path / "x.html", scheme=scheme)
    style = "(e) => getComputedStyle(e).backgroundColor"
    colours = [token.evaluate(style) for token in page.locator("#sequences .t").all()]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for colour, following in zip(colours, [*colours[1:], paper], strict=True):
        assert page.evaluate(DISTANCE, [colour, paper]) > 0.08
        assert page.evaluate(DISTANCE, [colour, following]) > 0.04


def test_chat_markup_can_be_folded(chat: Path, open_page: Open, tmp_path: Path) -> None:
    page = open_page(chat)
    text = page.locator("#sequences .tokens").first
    assert "<|im_start|>user" in text.inner_text()
    page.get_by_role("button", name="Fold markup").click()
    assert "<|" not in text.locator(".gap").first.inner_text() and "6×7?" in text.inner_text()
    label = "(e) => getComputedStyle(e, '::before').content"
    assert [e.evaluate(label) for e in text.locator(".gap .markup").all()] == ['"user"', '"assistant"']
    width = text.locator(".t.markup").evaluate("(e) => e.getBoundingClientRect().width")
    assert 0 < width < 30, "an explained token stays, and can be clicked"
    assert "fold=1" in page.evaluate("location.hash")
    again = open_page(chat, "#fold=1")
    assert "<|" not in again.locator(".gap").first.inner_text()
    again.get_by_role("button", name="Fold markup").click()
    assert "<|im_start|>user" in again.locator(".gap").first.inner_text()
    write_report(*make_run(tmp_path, [Text(["a", "<b>", "c"], {0: [Said("x")]})]), tmp_path / "x.html")
    assert open_page(tmp_path / "x.html").locator("#fold").is_hidden()


@SIZES
def test_axes_have_names_and_nothing_ends_above_the_last_tick(
    size: tuple[int, int], large: Path, open_page: Open
) -> None:
    page = open_page(large, "#tab=distributions", size)
    names = {
        "How much came through": {"FVE", "share of explanations"},
        "Does it find its own vector?": {"rank among 1,024 vectors", "share of explanations"},
        "By position": {"FVE"},
        "By class of token": {"FVE", "class of the token read"},
        "Norm against cos": {"norm of the vector (logarithmic)", "cos"},
    }
    for title, expected in names.items():
        figure = page.locator("figure", has_text=title)
        shown = set(figure.locator(".axis").all_text_contents())
        assert expected <= shown and len(shown) == 2, title
        rules = figure.locator(".grid").evaluate_all("(all) => all.map((e) => e.getBBox().y)")
        for what in ("rect", ".control.line", ".dot"):
            tops = figure.locator(what).evaluate_all("(all) => all.map((e) => e.getBBox().y)")
            assert min(tops, default=1e9) >= min(rules, default=0) - 4, (title, what)
        bars = figure.locator("rect").evaluate_all("(all) => all.map((e) => e.getBBox().y)")
        assert min(bars, default=1e9) >= min(rules, default=0) - 0.01, title
    assert page.locator(".few").count() == 0


def test_a_figure_without_enough_cases_says_so(tmp_path: Path, open_page: Open) -> None:
    few = {i: [Said("x", cos_of(0.5))] for i in range(9)}
    write_report(*make_run(tmp_path, [Text(["t"] * 9, few)]), tmp_path / "x.html")
    page = open_page(tmp_path / "x.html", "#tab=distributions")
    assert page.locator("#area-distributions svg").count() == 0
    expect(page.locator(".few")).to_have_count(5)
    assert (
        "Too few cases for this figure: 9 scored explanations, and it takes 10."
        in page.locator(".few").all_text_contents()
    )
    expect(page.locator(".care")).to_contain_text("Few cases, only 9 explanations")
    same = [Text(["a" if i else "7"], {0: [Said("x", cos_of(0.5))]}) for i in range(12)]
    write_report(*make_run(tmp_path / "b", same), tmp_path / "y.html")
    page = open_page(tmp_path / "y.html", "#tab=distributions")
    position = page.locator("figure", has_text="By position").locator(".few")
    assert "every row is at the same position" in position.inner_text()
    classes = page.locator("figure", has_text="By class of token").locator("text")
    assert "too few cases" in classes.all_text_contents() and "digits" in classes.all_text_contents()


def test_a_section_with_a_picture_and_a_link_to_a_row(chat: Path, tmp_path: Path, open_page: Open) -> None:
    store, table = make_run(tmp_path, [Text(["a"] * 12, {i: [Said("a")] for i in range(12)})])
    section = Section("study", "Study", "<p><a href='#row=99'>row 99</a></p>")
    write_report(store, table, tmp_path / "x.html", sections=[section])
    page = open_page(tmp_path / "x.html", "#tab=study")
    page.get_by_role("link", name="row 99").click()
    expect(page.locator("#notice")).to_have_text(
        re.compile("asks for row 99, but the store has only 12 rows")
    )
