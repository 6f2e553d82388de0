"""The Python examples of the documentation run as they stand, and every public name is documented."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import nla_engine

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
#: The heading of the part that runs on the bundled models.
SECOND = "## Part 2"


def blocks(page: Path, heading: str = "") -> list[str]:
    """The Python code blocks of a page, of one section only if it is named."""
    text = page.read_text()
    if heading:
        text = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(code: str, names: dict[str, Any], where: str) -> Any:
    """Execute a block, or a cell. Returns the value of its last line, if that is an expression, as a notebook does."""
    tree = ast.parse(code, where)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, and figures without a screen."""
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")


def test_docs_python() -> None:
    names: dict[str, Any] = {}
    found = blocks(ROOT / "docs" / "python.md")
    assert len(found) > 8
    for number, block in enumerate(found, 1):
        run(block, names, f"docs/python.md, block {number}")
    text = (ROOT / "docs" / "python.md").read_text()
    assert repr(names["run"]) in text  # the page shows what is printed
    assert Path("report.html").stat().st_size > 10_000 and not Path("other.zarr").exists()


def test_readme() -> None:
    (block,) = blocks(ROOT / "README.md", "## From Python")
    names: dict[str, Any] = {}
    assert isinstance(run(block, names, "README.md"), nla_engine.Page)
    assert len(names["explained"]) == len(names["vectors"]) > 10
    assert names["explained"].cos.mean() > 0.8


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    missing = [name for name in nla_engine.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing
    for name in nla_engine.__all__:
        assert getattr(nla_engine, name).__doc__, name
    assert set(nla_engine.__all__) <= set(dir(nla_engine))


def cells(second: bool) -> list[str]:
    """The code of one part of the tutorial."""
    notebook = json.loads(TUTORIAL.read_text())
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    border = next(
        n for n, (kind, text) in enumerate(sources) if kind == "markdown" and text.startswith(SECOND)
    )
    return [text for kind, text in (sources[border:] if second else sources[:border]) if kind == "code"]


@pytest.mark.real
def test_the_tutorial_on_a_real_model(smollm2: Path) -> None:
    names: dict[str, Any] = {}
    for number, code in enumerate(cells(second=False), 1):
        run(code, names, f"tutorial, part 1, cell {number}")
    accuracy = names["accuracy"]
    assert accuracy[0] < accuracy[12] and accuracy[12] > 0.9  # as the text says
    assert names["share"][:2].sum() > 0.3


def test_the_tutorial_on_the_bundled_models() -> None:
    names: dict[str, Any] = {}
    for number, code in enumerate(cells(second=True), 1):
        shown = run(code, names, f"tutorial, part 2, cell {number}")
    assert isinstance(shown, nla_engine.Page)
    said = dict(zip(names["directions"], names["explained"].texts, strict=True))
    assert "product" in said["product, not sum"]
    assert "plus" in said["sum, not product"] or "sum" in said["sum, not product"]
    assert names["explained"].cos[0] > 0.9 > 0.6 > max(names["explained"].cos[1:])  # as the text says
    assert names["explained_rows"].fve.mean() > 0.8


def test_the_tutorial_is_a_notebook_without_outputs() -> None:
    notebook = json.loads(TUTORIAL.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
