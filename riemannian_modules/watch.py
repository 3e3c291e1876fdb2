"""Which modules are recorded, and which of them explains which parameter."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError
from riemannian_modules.place import Finder
from riemannian_modules.rules import GENERIC, SHARED, Entry, entry_of
from riemannian_modules.rules.job import Job
from riemannian_modules.rules.parametrized import advice
from riemannian_modules.rules.ways import find_shared, shared_places
from riemannian_modules.tape import Tape, Use, Watched
from riemannian_modules.untraced import is_compiled

__all__ = ["Watch", "above"]


class Watch:
    """Every parameter's factors come from the calls of one kind of module.

    At first that is the module that holds the parameter, by the rule of its type or
    by the generic one. Where the calls of this module do not tell everything about a
    parameter (it is used elsewhere too, or its output is shared by all examples), the
    parameter is handed up to the next module above, by the generic rule: slower,
    never wrong.

    Args:
        model: the model.
        parameters: its trainable parameters.

    Attributes:
        compiled: whether the model or a part of it is compiled by torch.compile.
        jobs: by path of a module, what its calls explain.
        generation: counts the changes of ``jobs`` between passes.
        name_of: the name of a trainable parameter, None for any other tensor.
    """

    def __init__(self, model: nn.Module, parameters: DeclaredParameters) -> None:
        self._model = model
        self._parameters = parameters
        self._raised: dict[str, tuple[str, Entry]] = {}
        self._kept: dict[str, tuple[str, Entry]] = {}
        self._reasons: dict[str, str] = {}
        # Parameters that need no replay, as a first pass has shown.
        self._proved: set[str] = set()
        self._recorded: dict[bool, list[Watched]] = {}
        self.generation = 0
        self.jobs: dict[str, list[Job]] = {}
        self.name_of = parameters.name_of
        self._assign()

    def _assign(self) -> None:
        self.jobs = {}
        self._recorded = {}
        claimed: set[nn.Module] = set()
        self._modules = list(self._model.modules())
        self._plain = [_is_plain(module) for module in self._modules]
        self.compiled = any(map(is_compiled, self._modules))
        for path, module in self._model.named_modules():
            entry = entry_of(module) if _is_plain(module) else None
            deep = entry is not None and entry.deep
            if module not in claimed:
                own = module.named_parameters(recurse=deep)
                wanted = tuple(rel for rel, p in own if self._is_own(p))
                if wanted:
                    self.jobs[path] = [self._job(entry or SHARED, module, wanted)]
            if deep:
                claimed.update(module.modules())
        higher: dict[tuple[str, Entry], list[str]] = {}
        for name, (path, entry) in self._raised.items():
            below = name[len(path) + 1 if path else 0 :]
            higher.setdefault((path, entry), []).append(below)
        for (path, entry), names in higher.items():
            job = self._job(entry, self._model.get_submodule(path), names)
            self.jobs.setdefault(path, []).append(job)

    def _job(self, entry: Entry, module: nn.Module, wanted: Sequence[str]) -> Job:
        tensors = tuple(map(module.get_parameter, wanted))
        names = tuple(self._parameters.of(tensor).name for tensor in tensors)
        return Job(entry, tuple(wanted), names, tensors)

    def _is_own(self, tensor: Tensor) -> bool:
        name = self._parameters.name_of(tensor)
        return name is not None and name not in self._raised

    def modules(self, *, exploring: bool) -> list[Watched]:
        """Return what to record.

        Args:
            exploring: also the modules above, to which a parameter may be handed.

        Returns:
            Arguments of :meth:`Tape.watch`.
        """
        if exploring not in self._recorded:
            kept = dict.fromkeys(self.jobs, False)
            for path, jobs in self.jobs.items():
                kept[path] = any(
                    job.entry.compares and not job.entry.finder
                    for job in jobs
                    if not (job.entry is SHARED and self._proved >= {*job.names})
                )
            if exploring:
                for declared in self._parameters:
                    kept.update((path, True) for path in above(declared.name))
            self._recorded[exploring] = [
                Watched(
                    path,
                    module,
                    kept[path],
                    tuple(self._held(path, module)),
                    *self._finder(path),
                )
                for path, module in self._model.named_modules()
                if path in kept
            ]
        return self._recorded[exploring]

    def _finder(self, path: str) -> tuple[Finder | None, bool]:
        """Return what finds linear maps in a module, and whether it may do without."""
        jobs = self.jobs.get(path, [])
        for job in jobs:
            if job.entry.finder is not None:
                return job.entry.finder, job.entry.compares
        leaves = self._shared(path)
        return (partial(find_shared, leaves), False) if leaves else (None, False)

    def _shared(self, path: str) -> list[Tensor]:
        jobs = self.jobs.get(path, [])
        return [t for job in jobs if job.entry is SHARED for t in job.tensors]

    def seek(self, tape: Tape) -> bool:
        """Look into calls for parameters that were handed up since they were recorded.

        Args:
            tape: the recorded pass; changed.

        Returns:
            Whether there are other places than before.
        """
        found = False
        for use in tape.uses:
            leaves = self._shared(use.name)
            names = tuple(map(id, leaves))
            if names and names != use.sought:
                outputs = use.edges[: len(use.places)]
                starts = [edge.node for edge in outputs]
                use.look(shared_places(leaves, starts, use.origins), names)
                found = True
        return found

    def _held(
        self, path: str, module: nn.Module
    ) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Yield the parameters that a call of a module has to find in their places."""
        jobs = self.jobs.get(path, [])
        alone = bool(jobs) and not any(job.entry.deep for job in jobs)
        for owner in [module] if alone else module.modules():
            for attribute, tensor in owner._parameters.items():
                if tensor is not None and self.name_of(tensor) is not None:
                    yield owner, attribute, tensor

    def explaining(self, tape: Tape) -> list[Use]:
        """Return the uses of a tape that have something to explain."""
        return [use for use in tape.uses if use.name in self.jobs]

    def names_of(self, use: Use) -> list[str]:
        """Return the parameters that a use is to explain."""
        return [name for job in self.jobs[use.name] for name in job.names]

    def is_leaf(self, use: Use) -> bool:
        """Whether nothing lies behind a use but what it is to explain."""
        jobs = self.jobs[use.name]
        return jobs[0].entry.deep is False or not list(use.module.children())

    def refuse_rule(self, name: str, reason: str) -> None:
        """Refuse a parameter whose layer has a rule that gives a wrong gradient.

        Args:
            name: the parameter.
            reason: what is wrong.

        Raises:
            LinearizationError: a rule, not the generic one, explains it.
        """
        for path, jobs in self.jobs.items():
            module = self._model.get_submodule(path)
            for job in jobs:
                if name in job.names and job.entry not in (GENERIC, SHARED):
                    raise LinearizationError(
                        f"parameter '{name}': {reason}. The rule of "
                        f"{type(module).__name__} is wrong, or a hook changes what the "
                        "layer returns; test the rule with "
                        "riemannian_modules.testing.check_rule"
                    )

    def covers(self, use: Use, name: str) -> bool:
        """Whether the replay of a module around this call explains a parameter."""
        return any(
            job.entry in (GENERIC, SHARED) and name in job.names
            for path in (use.name, *above(use.name))
            for job in self.jobs.get(path, [])
        )

    def keep(self, unreached: Collection[str]) -> None:
        """Make what was handed up since the last call permanent.

        Args:
            unreached: parameters that this pass left out, and so tells nothing about.
        """
        if self._kept != self._raised:
            self.generation += 1
        jobs = [job for own in self.jobs.values() for job in own]
        shared = {n for job in jobs if job.entry is SHARED for n in job.names}
        proved = (self._proved & shared) | shared.difference(unreached)
        if proved != self._proved:
            self._proved, self._recorded = proved, {}
        self._kept, self._reasons = dict(self._raised), {}

    def refresh(self) -> None:
        """Notice hooks, and other ``forward`` methods, that came or went."""
        plain = [_is_plain(module) for module in self._modules]
        if plain != self._plain:
            self.generation += 1
            self._proved = set()
            self._assign()

    def forget(self) -> None:
        """Go back to what was kept last."""
        self._raised, self._reasons = dict(self._kept), {}
        self._assign()

    def raise_up(self, name: str, tape: Tape, reason: str) -> None:
        """Hand a parameter up to the next recorded module.

        Args:
            name: the parameter.
            tape: the recorded pass; only modules in it can explain anything.
            reason: why, for the error.

        Raises:
            LinearizationError: there is no such module; names the parameter.
        """
        first = self._reasons.setdefault(name, reason)
        recorded = {use.name for use in tape.uses if use.values}
        tensor = self._parameters[name].tensor
        around = _common(
            path
            for path, module in self._model.named_modules()
            if any(p is tensor for p in module._parameters.values())
        )
        options = [
            (path, entry)
            for path in around
            for entry in (SHARED, GENERIC)
            # A layer with a rule of its own adds nothing to its examples.
            if entry is GENERIC or entry_of(self._model.get_submodule(path)) is None
        ]
        tried = [
            (path, job.entry)
            for path, jobs in self.jobs.items()
            for job in jobs
            if name in job.names
        ]
        last = max((i for i, each in enumerate(options) if each in tried), default=-1)
        for path, entry in options[last + 1 :]:
            if path in recorded:
                self._raised[name] = path, entry
                self._assign()
                return
        then = "" if reason == first else f" At last: {reason}."
        then += advice(self._model.get_submodule(around[0]))
        raise LinearizationError(
            f"parameter '{name}': {first}. No module above that was called inside "
            "metric.record() explains it: use the parameter only inside the model's "
            "forward, keep the examples of the batch apart, and put weight decay in "
            f"the optimizer.{then}"
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class says, and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def above(path: str) -> Iterable[str]:
    """Return the paths of the modules that contain this one, the nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _common(paths: Iterable[str]) -> list[str]:
    """Return the paths of the modules that contain, or are, all of these."""
    chains = [[path, *above(path)] for path in paths]
    return [path for path in chains[0] if all(path in chain for chain in chains)]
