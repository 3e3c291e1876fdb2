"""The results file: one JSON object a line, appended as soon as it is known."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.race import Result

FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "geoopt",
    "riemannian-modules",
    "pytorch-optimizer",
    "curvlinops-for-pytorch",
)


class Store:
    """Results, the seconds that were planned for the problems, and the machines.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines: list[dict[str, Any]] = []
        self.plans: dict[str, dict[str, Any]] = {}
        self.results: dict[tuple[Any, ...], Result] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._take(json.loads(line))

    def forget(self, problems: Iterable[str]) -> None:
        """Drop all that is known of some problems."""
        gone = set(problems)
        plans = [plan for name, plan in self.plans.items() if name not in gone]
        kept = [each for each in self.results.values() if each.problem not in gone]
        lines = [*self.machines, *plans, *(result.line() for result in kept)]
        self.machines, self.plans, self.results = [], {}, {}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")
        for line in lines:
            self._take(line)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._take(line)

    def of(self, problem: str, stage: str) -> list[Result]:
        """Return the results that belong to a problem's last plan."""
        seconds = self.plans.get(problem, {}).get(
            "tuning" if stage == "tune" else "seconds"
        )
        return [
            each
            for each in self.results.values()
            if (each.problem, each.stage, each.seconds) == (problem, stage, seconds)
        ]

    def _take(self, line: dict[str, Any]) -> None:
        if line["stage"] == "machine":
            self.machines.append(line)
        elif line["stage"] == "plan":
            self.plans[line["problem"]] = line
        else:
            known = {each.name for each in fields(Result)}
            result = Result(**{k: v for k, v in line.items() if k in known})
            self.results[result.key()] = result


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(__file__).parents[1]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "stage": "machine",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit,
        "command": " ".join(sys.argv[1:]),
    }


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
