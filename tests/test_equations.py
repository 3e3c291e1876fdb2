"""One equation, one label: docs/math.md and the docstrings name the same ones."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import riemannian_modules

PACKAGE = Path(riemannian_modules.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            yield ast.get_docstring(node) or ""


def named(docstring: str) -> set[str]:
    return set(re.findall(r":eq:`([^`]+)`", docstring))


def implemented(docstring: str) -> set[str]:
    """Labels in the sentences that begin with "Implements"."""
    sentences = re.findall(r"Implements\b.*?(?:\.\s|\.$|\Z)", docstring, re.DOTALL)
    return {label for sentence in sentences for label in named(sentence)}


def labels() -> list[str]:
    text = (DOCS / "math.md").read_text(encoding="utf-8")
    return re.findall(r"^:label: (\S+)$", text, re.MULTILINE)


def package_docstrings() -> list[str]:
    return [
        docstring
        for path in sorted(PACKAGE.rglob("*.py"))
        for docstring in docstrings(path.read_text(encoding="utf-8"))
    ]


def test_labels_are_unique() -> None:
    assert len(labels()) == len(set(labels())) > 0


def test_every_equation_has_an_implementation() -> None:
    found = set().union(*(implemented(each) for each in package_docstrings()))
    assert set(labels()) <= found, "no docstring says that it implements these"


def test_every_named_equation_exists() -> None:
    found = set().union(*(named(each) for each in package_docstrings()))
    assert found <= set(labels()), "docstrings name these, docs/math.md lacks them"


def test_every_equation_that_a_page_refers_to_exists() -> None:
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        references = set(re.findall(r"\{eq\}`([^`]+)`", text))
        assert references <= set(labels()), page.name


def test_readers_see_what_they_should() -> None:
    source = '''
def f():
    """Say it. Implements :eq:`a` and :eq:`b`. See also :eq:`c`."""
'''
    (module, function) = docstrings(source)
    assert module == ""
    assert named(function) == {"a", "b", "c"}
    assert implemented(function) == {"a", "b"}
