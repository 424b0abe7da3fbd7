"""A model: one version that is ready to serve, and its programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from service.contract.golden import deviation
from service.contract.graphs import at_size
from service.contract.manifest import Manifest
from service.errors import StartError
from service.runtime.program import Graphs, ModelProgram

MOST_PROGRAMS = 256
"""Bounds the program cache, because static choices such as `blur` come from the client."""

PRIOR, ONE_GROUP = "a prior p(z)", "latents of one group"
"""Abilities that are not graphs."""


@dataclass(eq=False)
class Model:
    """One variant of a version, ready to serve.

    Args:
        manifest: The manifest as the variant sees it.
        graphs: Its opened graphs, by name.
        programs: Its programs, by operation and static choices.
        variants: All variants of the version by their channels, this one included.
    """

    manifest: Manifest
    graphs: Graphs
    programs: dict[tuple[Any, ...], ModelProgram] = field(default_factory=dict)
    variants: dict[int, Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.variants.setdefault(self.manifest.channels, self)

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an image, (c, h, w); height and width are 0 where they are free."""
        return tuple(axis if isinstance(axis, int) else 0 for axis in self.manifest.input_shape)

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of a latent; axes are 0 where height and width of images are free."""
        return tuple(axis if isinstance(axis, int) else 0 for axis in self.manifest.latent_shape)

    @cached_property
    def abilities(self) -> frozenset[str]:
        """Its graphs, `PRIOR` where latents have one, and `ONE_GROUP` where all latents are independent given x."""
        prior = set() if self.manifest.prior is None else {PRIOR}
        return frozenset(self.graphs) | prior | (set() if self.manifest.groups else {ONE_GROUP})

    def latent_at(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latent of an image of the graphs' height and width.

        Raises:
            ValueError: Height or width is no multiple of the model's.
        """
        return at_size(self.manifest.latent_shape, height, width)

    def noise_at(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the standard normal noise of one draw from the prior, for an image of this height and width.

        Raises:
            ValueError: Height or width is no multiple of the model's.
        """
        prior = self.manifest.graphs.get("prior")
        return self.latent_at(height, width) if prior is None else at_size(prior.inputs["eps"], height, width)

    @cached_property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of that noise for images of a fixed size."""
        return self.noise_at(*self.input_shape[1:])

    def plan(
        self, operation: str, rows: Any, draws: int = 0, *choices: Any, rounds: int = 1, **further: Any
    ) -> ModelProgram:
        """Return the program of an operation with these static choices; the same object while it is in the cache.

        A program that is not measured costs what the first of its operation with as many draws costs.

        Args:
            operation: Name of the operation.
            rows: Makes the program's `compute` from the graphs and the choices.
            draws: Posterior draws for each row.
            *choices: Positional choices for `rows`.
            rounds: Number of slices that the work is cut into; more than 1 marks iterative work.
            **further: Keyword choices for `rows`.
        """
        key = (operation, draws, rounds, *choices, *further.items())
        program = self.programs.get(key)
        if program is None:
            if len(self.programs) >= MOST_PROGRAMS:  # remove an old one; the measured ones are the oldest, and stay
                del self.programs[next(islice(self.programs, MOST_PROGRAMS // 2, None))]
            compute = rows(self.graphs, *choices, **further)
            alike = (
                known.timing
                for (name, drawn, *_), known in self.programs.items()
                if (name, drawn) == (operation, draws)
            )
            program = ModelProgram(self.manifest.name, operation, max(1, draws), compute, rounds, next(alike, None))
            self.programs[key] = program
        return program

    def replay(self, golden: Mapping[str, Any]) -> None:
        """Run every graph on its golden rows, singly and together.

        Args:
            golden: Golden vectors, by `graph/tensor`.

        Raises:
            StartError: A graph gives other answers on this machine; the message names it.
        """
        for name, graph in self.manifest.graphs.items():
            rows = [golden[f"{name}/{key}"] for key in graph.inputs]
            for size in (1, len(rows[0])):
                answers = self.graphs[name](*(row[:size] for row in rows))
                for key, answer in zip(graph.outputs, answers, strict=True):
                    self._compare(name, key, answer, golden[f"{name}/{key}"][:size])

    def _compare(self, graph: str, key: str, answer: Any, known: Any) -> None:
        of = f"model {self.manifest.name} version {self.manifest.version}: {graph}"
        if answer.shape != known.shape or answer.dtype != known.dtype:
            raise StartError(
                f"{of} gives {key} as {answer.dtype} of shape {list(answer.shape)}, not as {known.dtype} of shape "
                f"{list(known.shape)} as its golden vectors; export the model again"
            )
        error = deviation(key, answer, known)
        if not error <= self.manifest.golden.tolerance:
            raise StartError(
                f"{of} is off its golden vectors by {error:.2g} (at most {self.manifest.golden.tolerance:g}) on this "
                "machine"
            )
