"""The layout is the data flow: who may import whom, what files say of themselves, whether the README's tree is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nla_engine"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: A module imports from earlier lines and from its own directory, never from its own line or a later one.
ORDER = (
    {"errors", "provenance", "extension", "claims"},
    {"codec_loops", "cards", "logits"},
    {"codec", "chat", "prompt_files"},
    {"decoder", "weights"},
    {"config", "tokens", "checkpoint", "prompts"},
    {"hub"},
    {"models"},
    {"ops"},
    {"engine"},
    {"store"},
    {"tap", "score", "results"},
    {"appender", "calibrate", "job", "verbalize", "reconstruct"},
    {"capture", "roundtrip", "audit"},
    {"estimate"},
    {"report"},
    {"demo"},
    {"studies"},
    {"cli", "bench"},
    {"__main__"},
)
#: What the store may know of the engine: why a sequence ends.
STORE_MAY_IMPORT_OF_ENGINE = {"nla_engine.engine.request"}
#: Modules that the training recipe alone uses, and that must not load with the stages.
RECIPE = {"checkpoint_layout", "evaluate", "fit", "rows", "tokenizer", "train"}
LONGEST = 400

NAMES = [str(path.relative_to(ROOT)) for path in MODULES]


def place(unit: str) -> int:
    found = [i for i, units in enumerate(ORDER) if unit in units]
    assert found, f"{unit} has no place in ORDER"
    return found[0]


def unit_of(path: Path) -> str:
    """The name in ORDER of a file of the package: its module, or the directory it lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nla_engine":
            yield from (f"nla_engine.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nla_engine/__init__.py"])
def test_imports_follow_the_data_flow(name: str) -> None:
    path = ROOT / name
    unit = unit_of(path)
    for module in imports(path):
        if not module.startswith("nla_engine."):
            continue
        other = module.split(".")[1]
        if other != unit:
            assert place(other) < place(unit), f"{name} imports {module}, which comes later"
        if unit == "store" and other == "engine":
            assert module in STORE_MAY_IMPORT_OF_ENGINE, f"{name} imports {module}"
        if unit == "demo" and module.split(".")[-1] in RECIPE:
            assert path.stem in RECIPE, f"{name} loads the training recipe"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    if not name.endswith("__main__.py") or tree.body:
        assert ast.get_docstring(tree), f"{name} does not say what it is for"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


SOURCES = [
    *MODULES,
    *sorted((PACKAGE / "report" / "static").iterdir()),
    *sorted((ROOT / "csrc").iterdir()),
    *sorted((ROOT / "tests").glob("*.py")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_executed_or_unpickled(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "yaml.load"), f"{name}: {called}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {"pickle", "cloudpickle", "dill", "joblib"} & {n.split(".")[0] for n in names}, name


def readme_tree() -> dict[str, str]:
    """Path -> comment of the annotated tree in README.md: the code block that starts with `nla_engine/`'s parent."""
    block = re.search(r"```text\n(\.\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md has no tree"
    paths: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines()[1:]:
        match = re.fullmatch(r"((?:    )*)(\S+(?:, \S+)*)(?:  +(.*))?", line)
        assert match, f"a line of the tree that cannot be read: {line!r}"
        depth = len(match[1]) // 4
        parents = parents[:depth]
        for name in match[2].split(", "):
            paths["/".join([*parents, name.rstrip("/")])] = match[3] or ""
        if match[2].endswith("/"):
            parents.append(match[2].rstrip("/"))
    return paths


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = readme_tree()
    missing = [name for name in tree if not (ROOT / name).exists()]
    assert not missing, f"README.md names what is not there: {missing}"
    top = {
        f"nla_engine/{p.name}"
        for p in PACKAGE.iterdir()
        if (p.suffix == ".py" and not p.name.startswith("__")) or (p / "__init__.py").exists()
    }
    assert not top - set(tree), f"README.md does not name {sorted(top - set(tree))}"
    assert not [name for name, comment in tree.items() if not comment], "every entry says what it is"


def test_what_a_repository_needs_is_there() -> None:
    for name in [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        "CMakeLists.txt",
        ".gitignore",
        ".ci/run",
        "csrc",
        "nla_engine",
        "tests",
        "docs/store_format.md",
        "docs/roundtrip.md",
        "docs/report.md",
        "docs/where.md",
        "docs/demo_models.md",
    ]:
        assert (ROOT / name).exists(), f"{name} is missing"


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
