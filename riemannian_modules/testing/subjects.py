"""What is under test, with its check and the failures that are known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import geoopt
import torch

from riemannian_modules.testing.composition_checks import check_composition
from riemannian_modules.testing.geoopt_checks import check_geoopt_manifold
from riemannian_modules.testing.optimizer_checks import check_optimizer
from riemannian_modules.testing.raising import raise_failures
from riemannian_modules.testing.report import report
from riemannian_modules.testing.result import CheckResult, failures

__all__ = ["Subject"]

Check = Callable[[torch.Generator], Sequence[CheckResult]]


@dataclass(frozen=True)
class Subject:
    """Something under test.

    Args:
        name: its name in reports and test ids.
        check: returns its findings for a source of randomness.
        expected_failures: ``{law: reason}``. They are strict: a law in here that holds
            for every seed is an error, like a law outside that fails for one.

    >>> sphere = Subject.manifold(
    ...     geoopt.Sphere(), (3,), expected_failures={"dist_zero": "acos is clamped"}
    ... )
    >>> sphere.run(seeds=[0])
    """

    name: str
    check: Check
    expected_failures: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def manifold(
        cls,
        manifold: geoopt.Manifold,
        shape: Sequence[int],
        *,
        name: str | None = None,
        expected_failures: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "Subject":
        """Return a geoopt manifold under :func:`check_geoopt_manifold`.

        Args:
            manifold: the manifold.
            shape: shape of a point.
            name: None: the manifold's own.
            expected_failures: as above.
            **options: of the check.
        """

        def check(generator: torch.Generator) -> list[CheckResult]:
            return check_geoopt_manifold(
                manifold, shape, generator=generator, **options
            )

        return cls(name or str(manifold.name), check, expected_failures or {})

    @classmethod
    def pymanopt(
        cls,
        manifold: Any,
        *,
        name: str | None = None,
        expected_failures: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "Subject":
        """Return a pymanopt manifold under :func:`check_pymanopt_manifold`.

        Args:
            manifold: the manifold.
            name: None: the manifold's own.
            expected_failures: as above.
            **options: of the check.
        """
        from riemannian_modules.testing.pymanopt_checks import check_pymanopt_manifold

        def check(generator: torch.Generator) -> list[CheckResult]:
            seed = generator.initial_seed()
            return check_pymanopt_manifold(manifold, seed=seed, **options)

        return cls(name or str(manifold), check, expected_failures or {})

    @classmethod
    def optimizer(
        cls,
        name: str,
        factory: Callable[..., Any],
        *,
        expected_failures: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "Subject":
        """Return an optimizer under :func:`check_optimizer`.

        Args:
            name: its name.
            factory: of the check.
            expected_failures: as above.
            **options: of the check.
        """

        def check(generator: torch.Generator) -> list[CheckResult]:
            return check_optimizer(factory, generator=generator, **options)

        return cls(name, check, expected_failures or {})

    @classmethod
    def composition(
        cls,
        name: str,
        factory: Callable[..., Any],
        children: Callable[[], Sequence[Any]],
        *,
        expected_failures: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "Subject":
        """Return a composition under :func:`check_composition`.

        Args:
            name: its name.
            factory: of the check.
            children: of the check.
            expected_failures: as above.
            **options: of the check.
        """

        def check(generator: torch.Generator) -> list[CheckResult]:
            return check_composition(factory, children, generator=generator, **options)

        return cls(name, check, expected_failures or {})

    def findings(self, seed: int) -> list[CheckResult]:
        """Return the findings for one seed."""
        return list(self.check(torch.Generator().manual_seed(seed)))

    def report(self, seed: int = 0) -> str:
        """Return the findings for one seed as a table."""
        return report(
            self.findings(seed),
            title=self.name,
            expected_failures=self.expected_failures,
        )

    def run(self, seeds: Sequence[int] = (0, 1, 2)) -> None:
        """Check for several seeds.

        Args:
            seeds: each makes another draw.

        Raises:
            AssertionError: lists the laws that are not as expected.
        """
        broken: set[str] = set()
        for seed in seeds:
            broken |= self.run_once(seed)
        missing = [
            CheckResult.yes(name, True, "")
            for name in self.expected_failures
            if name not in broken
        ]
        raise_failures(
            missing,
            expected_failures={
                result.name: self.expected_failures[result.name] for result in missing
            },
        )

    def run_once(self, seed: int) -> set[str]:
        """Check for one seed, where an expected failure may be missing.

        Args:
            seed: makes the draw.

        Returns:
            Names of the expected laws that failed.

        Raises:
            AssertionError: lists the laws that fail and are not expected to.
        """
        failed = failures(self.findings(seed))
        unexpected = [r for r in failed if r.name not in self.expected_failures]
        if unexpected:
            lines = [f"{self.name}, seed {seed}:", *map(str, unexpected)]
            raise AssertionError("\n".join(lines))
        return {result.name for result in failed}
