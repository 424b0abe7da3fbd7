"""A model: one version that is ready to serve, and its programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.golden import deviation
from service.contract.graphs import RANGED, Axis, at_size
from service.contract.manifest import Manifest
from service.errors import StartError
from service.runtime.program import FreeSize, Graph, Graphs, ModelProgram

MOST_PROGRAMS = 256
"""Bounds the program cache, because static choices such as `blur` come from the client."""

PRIOR, ONE_GROUP, NOISE = "a prior p(z)", "latents of one group", "noise"
"""Abilities that are not graphs; that of a family of noise is `gaussian noise`, say."""


@dataclass(eq=False)
class Model:
    """One variant of a version, ready to serve.

    Args:
        manifest: The manifest as the variant sees it.
        graphs: Its opened graphs, by name, with images in [0, 1].
        programs: Its programs, by operation and static choices.
        others: Further variants of the version by their channels. The first variant alone knows the others, because
            models in a cycle would not be freed when they are replaced.
        card: The files of the version's model card, by name; empty without a card.
        terms: What requests with the same options have in common; see `validation.terms_of`.
    """

    manifest: Manifest
    graphs: Graphs
    programs: dict[tuple[Any, ...], ModelProgram] = field(default_factory=dict)
    others: Mapping[int, Model] = field(default_factory=dict)
    card: Mapping[str, bytes] = field(default_factory=dict)
    terms: dict[tuple[int, int], Any] = field(default_factory=dict)

    @property
    def variants(self) -> dict[int, Model]:
        """This variant and the others by their channels."""
        return {self.manifest.channels: self, **self.others}

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
        """Its graphs, the noise that it removes, `PRIOR` and `ONE_GROUP` where they hold.

        The latter two are that latents have a prior, and that all latents are independent given x.
        """
        prior = set() if self.manifest.prior is None else {PRIOR}
        noise = {f"{family} {NOISE}" for family in self.manifest.noise_families}
        return frozenset(self.graphs) | noise | prior | (set() if self.manifest.groups else {ONE_GROUP})

    @cached_property
    def latent_axes(self) -> tuple[Axis, ...]:
        """Shape of a latent as the manifest has it."""
        return tuple(self.manifest.latent_shape)

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

    def padded(self, size: tuple[int, int] | None, scale: int = 1) -> tuple[int, int]:
        """Height and width that the graphs take for an image of this height and width.

        Args:
            size: Height and width of the image; None for a model of one size.
            scale: A number of which they must be multiples too.
        """
        free = self.manifest.size
        if free is None or size is None:
            _, height, width = self.input_shape
            return height, width
        return free.padded(size[0], scale), free.padded(size[1], scale)

    @cached_property
    def free(self) -> FreeSize | None:
        """What its programs know of sizes; None where the size of images is fixed."""
        manifest = self.manifest
        if manifest.size is None:
            return None
        return FreeSize(manifest.size, manifest.tiles, math.prod(manifest.golden_size()))

    def plan(
        self,
        operation: str,
        rows: Any,
        draws: int = 0,
        *choices: Any,
        rounds: int = 1,
        local: bool = True,
        images: tuple[int, ...] = (),
        block: int = 1,
        **further: Any,
    ) -> ModelProgram:
        """Return the program of an operation with these static choices; the same object while it is in the cache.

        A program that is not measured costs what the first of its operation with as many draws costs.

        Args:
            operation: Name of the operation.
            rows: Makes the program's `compute` from the graphs and the choices.
            draws: Posterior draws for each row.
            *choices: Positional choices for `rows`.
            rounds: Number of slices that the work is cut into; more than 1 marks iterative work.
            local: Whether the answer for an image can be put together from tiles; see `ModelProgram`.
            images: Places of the outputs that are images in [0, 1].
            block: Height and width in pixels of one place of its inputs; see `ModelProgram`.
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
            program = ModelProgram(
                self.manifest.name,
                operation,
                max(1, draws),
                compute,
                rounds,
                next(alike, None),
                free=self.free,
                block=block,
                local=local,
                images=images,
            )
            self.programs[key] = program
        return program


def unit_range(manifest: Manifest, graphs: Mapping[str, Graph]) -> Graphs:
    """The graphs, which take and give images in [0, 1] whatever range they were made for.

    Args:
        manifest: Says the range of the graphs' own images.
        graphs: Graphs by name, with their tensors in the order of their signatures.
    """
    if manifest.value_range == [0.0, 1.0]:
        return graphs
    low, high = (np.float32(end) for end in manifest.value_range)

    def ranged(graph: Graph, places: tuple[bool, ...], images: tuple[bool, ...]) -> Graph:
        def run(*arrays: Any) -> tuple[NDArray[np.float32], ...]:
            given = (
                low + (high - low) * array if image else array for array, image in zip(arrays, places, strict=True)
            )
            found = zip(graph(*given), images, strict=True)
            return tuple((array - low) / (high - low) if image else array for array, image in found)

        return run

    return {
        name: ranged(
            graph,
            tuple(key in RANGED.get(name, ()) for key in manifest.graphs[name].inputs),
            tuple(key in RANGED.get(name, ()) for key in manifest.graphs[name].outputs),
        )
        if name in RANGED
        else graph
        for name, graph in graphs.items()
    }


def replay(manifest: Manifest, graphs: Mapping[str, Graph], golden: Mapping[str, Any]) -> None:
    """Run every graph on its golden rows, singly and together.

    Args:
        manifest: The manifest.
        graphs: Its graphs, by name.
        golden: Golden vectors, by `graph/tensor`.

    Raises:
        StartError: A graph gives other answers on this machine; the message names it.
    """
    for name, described in manifest.graphs.items():
        rows = [golden[f"{name}/{key}"] for key in described.inputs]
        for size in (1, len(rows[0])):
            answers = graphs[name](*(row[:size] for row in rows))
            for key, answer in zip(described.outputs, answers, strict=True):
                _compare(manifest, name, key, answer, golden[f"{name}/{key}"][:size])


def _compare(manifest: Manifest, graph: str, key: str, answer: Any, known: Any) -> None:
    of = f"model {manifest.name} version {manifest.version}: {graph}"
    if answer.shape != known.shape or answer.dtype != known.dtype:
        raise StartError(
            f"{of} gives {key} as {answer.dtype} of shape {list(answer.shape)}, not as {known.dtype} of shape "
            f"{list(known.shape)} as its golden vectors; export the model again"
        )
    error = deviation(key, answer, known)
    if not error <= manifest.golden.tolerance:
        raise StartError(
            f"{of} is off its golden vectors by {error:.2g} (at most {manifest.golden.tolerance:g}) on this machine"
        )
