"""Print the table of docs/manifolds.md: what every manifold passes.

python docs/manifold_table.py           # print the tables
python docs/manifold_table.py --write   # put them into docs/manifolds.md
"""

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median

import geoopt
import torch

from riemannian_modules import retractions
from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds import ensure_contract
from riemannian_modules.retractions import Retraction
from riemannian_modules.testing import (
    CheckResult,
    check_base_manifold,
    check_retraction,
)

PAGE = Path(__file__).with_name("manifolds.md")
sys.path.insert(0, str(PAGE.parents[1] / "tests"))

from manifold_cases import GEOOPT, OURS, Case  # noqa: E402

START, END = "<!-- tables: start -->\n", "<!-- tables: end -->\n"
SEEDS = range(2)
PASS, FAIL, NONE = "pass", "**fail**", "-"


def rules() -> list[Retraction]:
    """Return one of every retraction that the library ships."""
    kinds = [getattr(retractions, name) for name in retractions.__all__]
    return [kind() for kind in kinds if not inspect.isabstract(kind)]


def points(case: Case) -> Iterator[tuple[geoopt.Manifold, torch.Tensor]]:
    """Yield a manifold and a point for every seed, with torch seeded for the rest."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        manifold = case.make()
        yield manifold, case.draw(manifold)


def refusal(case: Case) -> str:
    """Return why the manifold is refused; empty if it is not."""
    try:
        ensure_contract(case.make(), case.name)
    except ManifoldContractError as error:
        return str(error)
    return ""


@cache
def findings(case: Case) -> dict[str, list[CheckResult]]:
    """Return all findings of ``check_base_manifold`` by their names."""
    found: dict[str, list[CheckResult]] = {}
    for manifold, x in points(case):
        for result in check_base_manifold(manifold, x):
            found.setdefault(result.name, []).append(result)
    return found


@cache
def order(case: Case, rule: Retraction) -> str:
    """Return the measured order of a retraction, or that it is none.

    Without geodesics to measure against, the order that it states, in parentheses.
    """
    slopes, stated = [], 0
    for manifold, x in points(case):
        try:
            rule(manifold, x, torch.zeros_like(x))
        except ManifoldContractError:
            return NONE
        results, stated = check_retraction(manifold, rule, x), rule.order(manifold)
        if not all(result.passed for result in results):
            return FAIL
        slopes += [r.value for r in results if r.name == "retraction_order"]
    if not slopes:
        return f"({stated})"
    measured = median(slopes) - 1.0
    return "exact" if math.isinf(measured) else str(round(measured))


def row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |\n"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with left-aligned columns."""
    lines = [row(head), row(["---"] * len(head)), *(row(cells) for cells in body)]
    return "".join(lines)


def contract_table(cases: Sequence[Case]) -> str:
    """Return one row for every manifold and one column for every law."""
    rows = {case.name: findings(case) for case in cases}
    laws = list(dict.fromkeys(law for found in rows.values() for law in found))
    body = [
        [case.name, "refused" if refusal(case) else "yes"]
        + [
            (PASS if all(r.passed for r in rows[case.name][law]) else FAIL)
            if law in rows[case.name]
            else NONE
            for law in laws
        ]
        for case in cases
    ]
    return table(["", "accepted", *(law.replace("_", " ") for law in laws)], body)


def retraction_table(cases: Sequence[Case]) -> str:
    """Return one row for every manifold and one column for every retraction."""
    head = ["", *(type(rule).__name__ for rule in rules())]
    body = [[case.name, *(order(case, rule) for rule in rules())] for case in cases]
    return table(head, body)


def render() -> str:
    """Return the tables, computed in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            parts = [
                f"\n### {title}\n\n{make(cases)}"
                for title, make, cases in (
                    ("The contract here", contract_table, OURS),
                    ("The contract in geoopt 0.5.1", contract_table, GEOOPT),
                    ("Retractions here", retraction_table, OURS),
                    ("Retractions on geoopt's manifolds", retraction_table, GEOOPT),
                )
            ]
    finally:
        torch.set_default_dtype(before)
    return "".join(parts).lstrip("\n") + "\n"


def committed() -> str:
    """Return the tables that the page has now."""
    return PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]


def write() -> None:
    """Put fresh tables into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(before + START + render() + END + after, encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write()
    else:
        sys.stdout.write(render())
