"""Scripts of the repository that are no part of the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).parents[1]


def loaded(path: str) -> ModuleType:
    """Return a script of the repository as a module, ``<name>_example``."""
    name = f"{Path(path).stem}_example"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
