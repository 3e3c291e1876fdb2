"""The code of README and docs runs as it stands there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scripts import REPOSITORY

NEEDS = {"conformance": "pymanopt", "contraction": "matplotlib", "interop": "pymanopt"}

# What a page says in words before its first block.
SETTING = """
import geoopt
import torch
import torch.nn.functional as F
import riemannian_modules as rm

x, y = torch.randn(16, 64), torch.randint(10, (16,))
loader = [(x, y)]
output = rm.output.Categorical()
model = torch.nn.Sequential(
    torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)
)
metric = rm.LayerwiseMetric(model, output)
"""
CONFORMANCE = """
import pymanopt
import torch
import riemannian_modules as rm

MyManifold, Mine = rm.manifolds.Stiefel, torch.optim.SGD
x = torch.randn(8, 3)
children = lambda: (rm.nn.Linear(3, 3),)
"""
RECIPES = """
from types import SimpleNamespace

lightning, Trainer = SimpleNamespace(LightningModule=object), object
"""
FRAGMENTS = ("steps", "rows", "solvers", "distributed", "interop-geoopt")
BEFORE = {
    "conformance": CONFORMANCE,
    "recipes": RECIPES,
    **dict.fromkeys(FRAGMENTS, SETTING),
}


def python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python")
    return blocks


PAGES = {
    page.stem: blocks
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
    if (blocks := python_blocks(page))
}


@pytest.mark.parametrize("name", PAGES)
def test_code_of_the_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDS.get(name, "torch"))
    hooks = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    if name == "tasks" and not hooks:
        pytest.skip("attention with dropout needs a newer torch")
    torch.set_default_dtype(torch.float32)  # what a reader has
    monkeypatch.chdir(tmp_path)
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    namespace: dict[str, object] = {"__name__": name}
    exec(BEFORE.get(name, ""), namespace)
    try:
        for number, block in enumerate(PAGES[name]):
            needed = re.search(r"# pip install (\w+)", block)
            if needed and find_spec(needed[1]) is None:
                continue
            exec(compile(block, f"{name}.md, block {number}", "exec"), namespace)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
