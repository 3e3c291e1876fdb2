"""Run every example in a short setting: python tests/run_examples.py FOLDER.

Each has a process of its own, forked off one that has imported what all of them need,
which takes half of their time.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # noqa: F401

import riemannian_modules  # noqa: F401
import riemannian_modules.interop.pymanopt  # noqa: F401

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "digits": "--epochs 1",
    "char_transformer": f"--text {EXAMPLES.parent / 'README.md'} --steps 8",
    "pymanopt_rayleigh": "",
    "pymanopt_digits": "--quick",
    "heat_equation": "--seconds 1",
    "poisson": "--seconds 1",
    "ode_fit": "--seconds 1",
    "autoencoder": "--seconds 1",
    "stability": "--sizes 40 --replaced 2",
    "oscillators": "",
    "gene_regulation": "",
}


def run(path: Path, argv: list[str]) -> int:
    """Run a script as a program in a process of its own and return its exit status."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        sys.argv = [str(path), *argv]
        sys.path[0] = str(path.parent)
        runpy.run_path(str(path), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main(folder: Path) -> int:
    """Run all, and return the number of those that failed or drew nothing."""
    failed = []
    for name, options in SHORT.items():
        print(f"=== {name}", flush=True)
        picture = folder / f"{name}.png"
        picture.unlink(missing_ok=True)
        argv = [*options.split(), "--plot", str(picture)]
        if run(EXAMPLES / f"{name}.py", argv) or not picture.is_file():
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all examples ran")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
