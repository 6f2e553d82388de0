"""The layout is the data flow: who may import whom, what files say of themselves, whether the README's tree is true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nla_engine"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: A room is a directory of the package, or one of the modules at its root. A module imports from its own room and from
#: rooms on earlier lines, never from others on its own line or a later one.
ORDER = (
    {"errors", "provenance", "extension", "once", "progress"},
    {"codec", "options", "shard", "sites"},
    {"fields", "pair_fields"},
    {"config"},
    {"ops", "workers"},
    {"models"},
    {"engine"},
    {"store"},
    {"store.views"},
    {"store.care", "store.exchange"},
    {"capture", "roundtrip"},
    {"cluster", "train"},
    {"referee"},
    {"report"},
    {"demo"},
    {"studies"},
    {"studies.multiplication", "comparison"},
    {"bench", "cli"},
    {"interactive"},
    {"__main__"},
)
#: What the store may know of the engine: why a sequence ends.
STORE_MAY_IMPORT_OF_ENGINE = {"nla_engine.engine.request"}
#: Modules that the training recipe alone uses, and that must not load with the stages.
RECIPE = {"blocks", "checkpoint_layout", "evaluate", "rows", "tokenizer", "train"}
#: Names collected for users; they import from where these are defined, which may be a later room.
FACADES = ("nla_engine/__init__.py", "nla_engine/store/__init__.py")
#: The one file that may call torch.load, with weights_only=True: users run it to convert a pickled head.
UNPICKLES = "nla_engine/models/convert_head.py"
#: The one file that may pickle: messages between a run and worker processes that it started itself.
PICKLES = "nla_engine/workers/wire.py"
LONGEST = 400

NAMES = [str(path.relative_to(ROOT)) for path in MODULES]


ROOMS = {room: number for number, rooms in enumerate(ORDER) for room in rooms}


def module_of(path: Path) -> str:
    """The dotted name of a file inside the package; of a package's __init__ that of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The innermost room of a module, named inside the package."""
    parts = module.split(".")
    found = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in ROOMS]
    assert found, f"{module} has no place in ORDER"
    return found[0]


def imports(path: Path) -> Iterator[str]:
    """Every module of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FACADES])
def test_imports_follow_the_data_flow(name: str) -> None:
    path = ROOT / name
    room = room_of(module_of(path))
    for module in imports(path):
        if not module.startswith("nla_engine."):
            continue
        other = room_of(module.removeprefix("nla_engine."))
        if other != room:
            assert ROOMS[other] < ROOMS[room], f"{name} imports {module}, which comes later"
        if room.startswith("store") and module.startswith("nla_engine.store."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{name} imports the facade"
        if room.startswith("store") and other == "engine":
            assert module in STORE_MAY_IMPORT_OF_ENGINE, f"{name} imports {module}"
        if room == "demo" and module.split(".")[-1] in RECIPE:
            assert path.stem in RECIPE, f"{name} loads the training recipe"


def test_no_imports_in_a_circle() -> None:
    """Of modules, inside a room too; a facade stands for the modules that it names."""
    known = {module_of(ROOT / name): set(imports(ROOT / name)) for name in NAMES if name not in FACADES}
    graph = {
        module: {other.removeprefix("nla_engine.") for other in others} & known.keys()
        for module, others in known.items()
    }
    list(TopologicalSorter(graph).static_order())  # CycleError names the modules


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
    *sorted((ROOT / "tests").rglob("*.py")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_executed_or_unpickled(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if name == UNPICKLES and called == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
                continue
            assert called not in ("eval", "exec", "torch.load", "yaml.load"), f"{name}: {called}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            allowed = {"pickle"} if name == PICKLES else set()
            pickling = {"pickle", "cloudpickle", "dill", "joblib"} & {n.split(".")[0] for n in names}
            assert pickling <= allowed, name


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
