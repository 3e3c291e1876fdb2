import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import riemannian_modules

PACKAGE = Path(riemannian_modules.__file__).parent
REPOSITORY = Path(__file__).parents[1]
FILES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}

# A module may import from its own row and the rows above it, never from below.
LAYERS = (
    {"_version", "errors", "finite", "precision", "reading", "twice"},
    {"capture"},
    {"woodbury"},
    {"manifolds", "mass", "retractions", "tangent"},
    {"factors"},
    {
        "block",
        "conjugate",
        "coordinates",
        "cost_model",
        "inverse",
        "iterative",
        "memory_model",
        "metric",
        "preconditioner",
        "solution",
        "strategy",
    },
    {"output"},
    {"layout", "leaves", "nested", "place", "tape", "untraced"},
    {"rules"},
    {"model_checks", "module_tree"},
    {"declared", "reverse"},
    {"heads", "room", "watch", "weights"},
    {"carry", "checks", "deferred", "linearization", "linearize", "whitening"},
    {"assembly", "carry_rows", "explore", "joining", "probing", "rows"},
    {"exchange", "graph_kinds", "survey"},
    {"gradient_alone"},
    {"gradients", "recorder"},
    {"model_metric"},
    {"functional", "layerwise"},
    {"contraction"},
    {"nn"},
    {"action", "distributed", "optim"},
    {"__init__"},
    {"interop", "testing"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LEAVES = LAYERS[-1]


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one, but for the bodies of ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from run_time_nodes(child)


def imported_names(source: str) -> set[str]:
    """Names of the package's top-level modules that the source imports anywhere."""
    found: set[str] = set()
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            names = [node.module or ""]
        else:
            continue
        paths = [name.split(".") for name in names]
        found |= {[*path, "__init__"][1] for path in paths if path[0] == PACKAGE.name}
    return found


@pytest.mark.parametrize("name", FILES, ids=str)
def test_imports_point_one_way(name: Path) -> None:
    here = name.parts[0].removesuffix(".py")
    assert here in LEVEL, f"give {here} a row in LAYERS"
    for other in imported_names(FILES[name].read_text(encoding="utf-8")) - {here}:
        assert other in LEVEL, f"{name} imports {other}, which has no row in LAYERS"
        assert LEVEL[other] <= LEVEL[here], f"{name} must not import {other}"
        assert other not in LEAVES, f"nothing may import {other}, {name} does"


def test_import_reader_sees_every_form() -> None:
    source = """
import riemannian_modules.nn, torch.nn
from riemannian_modules import tape, optim
if TYPE_CHECKING:
    from riemannian_modules import testing
def f():
    from riemannian_modules.factors.dense import DenseFactor
    import riemannian_modules as rm
"""
    assert imported_names(source) == {"nn", "__init__", "tape", "optim", "factors"}


@pytest.mark.parametrize("name", FILES, ids=str)
def test_files_stay_short(name: Path) -> None:
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= 350, f"{name} has {lines} lines: split it by idea"


def test_every_part_has_a_place_in_the_order_and_in_the_docs() -> None:
    parts = {name.parts[0].removesuffix(".py") for name in FILES}
    assert parts == set(LEVEL)
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)(?:\.py|/)", page))
    assert parts - {"__init__", "_version"} <= named


def test_version_has_a_changelog_entry() -> None:
    version = riemannian_modules.__version__
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{version}]" in changelog
    assert re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE)


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_every_example_is_run() -> None:
    """By tox, or on made-up data by a test where the real data may be missing."""
    tox = (REPOSITORY / "tox.ini").read_text(encoding="utf-8")
    tests = "".join(p.read_text("utf-8") for p in (REPOSITORY / "tests").glob("*.py"))
    for example in sorted((REPOSITORY / "examples").glob("*.py")):
        if "__main__" in example.read_text(encoding="utf-8"):
            called = f'"{example.stem}"' in tests or f"{example.stem}.main(" in tests
            assert called or f"examples/{example.name}" in tox, example.name


def test_every_direct_dependency_is_pinned() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[\[<>=~! ;]", line)[0] for line in wanted} - {project["name"]}
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert names <= {line.split("==")[0] for line in pins.splitlines() if "==" in line}
