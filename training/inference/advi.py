"""Automatic differentiation variational inference (ADVI): fits a Gaussian to any differentiable log joint density.

Source: Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), JMLR 18(14).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform
from tqdm import tqdm

from training.distributions.gaussian import LOG_2_PI, DiagonalGaussian
from training.errors import DivergedError

ETAS = (0.01, 0.1, 1.0, 10.0, 100.0)
ALPHA, TAU, EPSILON = 0.1, 1.0, 1e-16
SEARCH_STEPS = 50
CHECK_STEPS = 100
CHECKS = 10
"""The fit has converged when the median of the last CHECKS changes of the ELBO is small; it is checked every
CHECK_STEPS steps."""
EVALUATION_DRAWS = 1000
MODE_STEPS = 1000
MODE_TOLERANCE = 0.1
"""Nats by which, to second order, the density where the search ends may lie below its mode."""
LARGEST_HESSIAN = 1000
"""Coordinates; the matrix takes as many passes."""
AVERAGE_POWER = 3

REMEDY = (
    "check that log_joint is finite wherever its parameters' constraints hold, or give a `start` nearer the posterior"
)

LogJoint = Callable[..., Tensor]
"""log p(x, parameters) in nats for n draws of the parameters, passed by name: each (n, *shape) -> (n,)."""
Parameters = Mapping[str, tuple[tuple[int, ...], Constraint]]
"""Shape and support by name, such as `{"rate": ((3,), constraints.positive)}`."""
Family = Literal["meanfield", "fullrank"]
"""Gaussians with a diagonal, or with any, covariance of the unconstrained coordinates."""


class FullRankGaussian(NamedTuple):
    """N(mean, L L^T): mean (d,); factor (d, d) is L with the logarithms of its diagonal."""

    mean: Tensor
    factor: Tensor

    @property
    def cholesky(self) -> Tensor:
        """L (d, d), lower triangular with a positive diagonal; entries of `factor` above the diagonal are ignored."""
        return self.factor.tril(-1) + self.factor.diagonal().exp().diag()

    def draw(self, eps: Tensor) -> Tensor:
        """z = mean + L eps for eps ~ N(0, I), differentiable in both parameters: (..., d) -> (..., d)."""
        return self.mean + eps @ self.cholesky.T

    def entropy(self) -> Tensor:
        """-E[log q(z)] in nats, closed form."""
        return 0.5 * len(self.mean) * (1.0 + LOG_2_PI) + self.factor.diagonal().sum()


Gaussian = DiagonalGaussian | FullRankGaussian


class Coordinates:
    """Maps named, constrained parameters to one vector of `dim` real numbers, and back.

    The bijections are torch's: exp for bounds on one side, the scaled logistic function for intervals, stick-breaking
    for the simplex (k shares have k - 1 coordinates).

    Raises:
        ValueError: a constraint has no bijection.

    Source: section 2.3; Stan's reference manual, "Constraint transforms".
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.transforms = {name: _bijection(name, constraint) for name, (_, constraint) in parameters.items()}
        self.shapes = [self.transforms[name].inverse_shape(shape) for name, (shape, _) in parameters.items()]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.dim = sum(self.sizes)

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The parameters at u (n, dim), each (n, *shape), and log |d parameters / d u| (n,)."""
        values, log_jacobian = {}, torch.zeros_like(u[:, 0])
        for (name, transform), shape, flat in zip(
            self.transforms.items(), self.shapes, u.split(self.sizes, 1), strict=True
        ):
            part = flat.reshape(len(u), *shape)
            values[name] = transform(part)
            change = transform.log_abs_det_jacobian(part, values[name])
            log_jacobian = log_jacobian + change.reshape(len(u), -1).sum(1)
        return values, log_jacobian

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `constrain`: values of each parameter (n, *shape) -> (n, dim).

        Raises:
            ValueError: names or shapes are not those of the parameters, or values violate their constraint.
        """
        if values.keys() != self.parameters.keys():
            raise ValueError(f"values for {sorted(values)}, but the parameters are {sorted(self.parameters)}")
        for name, (shape, constraint) in self.parameters.items():
            if values[name].shape[1:] != shape or not bool(constraint.check(values[name]).all()):
                raise ValueError(f"{name}: each value must have shape {shape} and satisfy {constraint}")
        parts = [transform.inv(values[name]) for name, transform in self.transforms.items()]
        return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _bijection(name: str, constraint: Constraint) -> Transform:
    try:
        return biject_to(constraint)
    except NotImplementedError:
        raise ValueError(
            f"{name}: no bijection from the real numbers to {constraint}; use real, positive, greater_than(a), "
            "less_than(b), interval(a, b) or simplex of torch.distributions.constraints"
        ) from None


@dataclass(frozen=True)
class Density:
    """The log joint density over unconstrained coordinates u, and the ELBO.

    With a `frame` the coordinates are v instead, u = frame.draw(v), in which a density like the frame is like N(0, I).
    """

    log_joint: LogJoint
    coordinates: Coordinates
    frame: Gaussian | None = None

    def log_prob(self, u: Tensor) -> Tensor:
        """log p(x, parameters(u)) + log |d parameters / d u| in nats: (n, dim) -> (n,).

        With a frame the argument is v, and the density is that of v.

        Raises:
            ValueError: `log_joint` does not return one number per draw.

        Source: equation 5.
        """
        scale = 0.0
        if self.frame is not None:
            u, scale = self.frame.draw(u), self.frame.entropy() - 0.5 * self.coordinates.dim * (1.0 + LOG_2_PI)
        values, log_jacobian = self.coordinates.constrain(u)
        log_joint = self.log_joint(**values)
        if log_joint.shape != log_jacobian.shape:
            shape, wanted = tuple(log_joint.shape), tuple(log_jacobian.shape)
            raise ValueError(
                f"log_joint gave shape {shape} for {wanted[0]} draws; sum all but the first axis: {wanted}"
            )
        return log_joint + log_jacobian + scale

    def elbo(self, q: Gaussian, eps: Tensor) -> Tensor:
        """The ELBO in nats, estimated at noise eps (n, dim), entropy in closed form; differentiable in q.

        Source: equation 7.
        """
        return self.log_prob(q.draw(eps)).mean() + q.entropy()

    @torch.no_grad()
    def log_weights(self, q: Gaussian, eps: Tensor) -> Tensor:
        """log p(x, u) - log q(u) at u = q.draw(eps), (n,). Their mean estimates the ELBO.

        log q(u) comes from eps, so it needs no inverse of L, which may be singular to rounding.
        """
        surprise = q.entropy() + 0.5 * (eps.square().sum(-1) - eps.shape[-1])
        return self.log_prob(q.draw(eps)) + surprise


def laplace(density: Density, start: Tensor, family: Family) -> Gaussian | None:
    """The Laplace approximation of a density in double precision, or None where its mode is not found.

    Args:
        density: without a frame.
        start: coordinates (dim,) where the search for the mode begins.
        family: a meanfield Gaussian has the conditional variances, 1 / diag(precision), which are the best ones for a
            Gaussian density.

    Source: Bishop (2006), section 4.4; for the conditional variances, section 10.1.2.
    """
    if len(start) > LARGEST_HESSIAN:
        return None
    bar = tqdm(desc="advi (searching the mode)", unit="evaluation", leave=False)

    def loss(u: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        point = torch.tensor(u, requires_grad=True)
        value = -density.log_prob(point[None])[0]
        (gradient,) = torch.autograd.grad(value, point)
        bar.set_postfix(log_joint=f"{-value.item():.2f}", refresh=False)
        bar.update()
        return value.item(), gradient.numpy()

    with bar:
        found = optimize.minimize(loss, start.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": MODE_STEPS})
    mode = torch.tensor(found.x)
    try:
        precision = torch.autograd.functional.hessian(lambda u: -density.log_prob(u[None])[0], mode)
    except RuntimeError:  # torch has no second derivatives of some functions
        return None
    cholesky, failed = torch.linalg.cholesky_ex(precision)
    if failed:
        return None
    gradient = torch.tensor(loss(found.x)[1])[:, None]
    step = torch.cholesky_solve(gradient, cholesky)
    if not float(0.5 * (gradient * step).sum()) < MODE_TOLERANCE:
        return None
    mean = mode - step[:, 0]
    if family == "meanfield":
        return DiagonalGaussian(mean, -precision.diagonal().log())
    return _full_rank(mean, torch.linalg.cholesky(torch.cholesky_inverse(cholesky)))


def _full_rank(mean: Tensor, cholesky: Tensor) -> FullRankGaussian:
    return FullRankGaussian(mean, cholesky.tril(-1) + cholesky.diagonal().log().diag())


def _unframed(q: Gaussian, frame: Gaussian | None) -> Gaussian:
    """q over v = (u - frame's mean) / frame's scale as a Gaussian over u."""
    if isinstance(q, DiagonalGaussian) and isinstance(frame, DiagonalGaussian):
        return DiagonalGaussian(frame.draw(q.mean), frame.log_var + q.log_var)
    if isinstance(q, FullRankGaussian) and isinstance(frame, FullRankGaussian):
        return _full_rank(frame.draw(q.mean), frame.cholesky @ q.cholesky)
    return q


@dataclass(frozen=True)
class Approximation:
    """The fitted q, and how well it fits."""

    q: Gaussian
    """Over the unconstrained coordinates."""
    coordinates: Coordinates
    elbo: float
    """Nats, at fresh draws of q; in expectation at most the log evidence."""
    elbo_standard_error: float
    trace: Tensor
    """The ELBO after the search for a step size and then every CHECK_STEPS steps, always at the same noise."""
    steps: int
    converged: bool
    """False if `max_steps` or an interrupt ended the fit."""

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """n draws of the parameters by name, each (n, *shape)."""
        return self.coordinates.constrain(self.q.draw(_noise(self.q, n, generator)))[0]

    def mean(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """E[parameter] under q by name, each (*shape), estimated from n draws."""
        return {name: values.mean(0) for name, values in self.draw(n, generator).items()}


class InterruptedFit(KeyboardInterrupt):  # as Python's own
    """Ctrl-C ended a fit; `approximation` is the average of the steps so far."""

    def __init__(self, approximation: Approximation) -> None:
        super().__init__()
        self.approximation = approximation


def fit(
    log_joint: LogJoint,
    parameters: Parameters,
    generator: torch.Generator,
    *,
    family: Family = "meanfield",
    start: Mapping[str, Tensor] | None = None,
    draws: int = 16,
    max_steps: int = 10_000,
    tolerance: float = 1e-5,
    learning_rate: float | None = None,
    precondition: bool = False,
    dtype: torch.dtype | None = None,
) -> Approximation:
    """Fit the Gaussian over unconstrained coordinates that maximises the ELBO.

    The result is the average of the steps, which is nearer the optimum than the last one. With the defaults, variances
    are accurate to about 5 %; with 64 draws and a tolerance of 1e-6, to 1 %.

    Args:
        log_joint: see LogJoint.
        parameters: see Parameters.
        generator: the source of all noise.
        family: see Family.
        start: values of the parameters, each (*shape), on which the first q is centred; the origin of the
            coordinates by default.
        draws: of q, for each step's gradient.
        max_steps: the fit ends here at the latest.
        tolerance: it ends when the ELBO's relative change between checks (below one nat: its change in nats) stays
            below this.
        learning_rate: eta of equation 10; by default the best of ETAS after SEARCH_STEPS steps.
        precondition: fit in coordinates in which the Laplace approximation is N(0, I), and begin there, if the
            mode is found. Takes far fewer steps where scales differ or the posterior is far from `start`. Needs
            `dtype` torch.float64.
        dtype: of the coordinates; torch's default without it.

    Raises:
        DivergedError: the ELBO is not finite.
        InterruptedFit: Ctrl-C after the search for a step size.
        ValueError: a constraint, `start` or `log_joint` cannot be used.

    Source: algorithm 1; the average: Shamir and Zhang (2013), section 4; its use here: Dhaka et al. (2020).
    """
    coordinates = Coordinates(parameters)
    q = _first(coordinates, family, start, torch.zeros((), dtype=dtype, device=generator.device))
    density = Density(log_joint, coordinates)
    if precondition and (frame := laplace(density, q.mean, family)) is not None:
        density = Density(log_joint, coordinates, frame)
        q = _first(coordinates, family, None, q.mean)
    fixed = _noise(q, EVALUATION_DRAWS, generator)
    ascent = _fastest(density, q, fixed, draws, generator, ETAS if learning_rate is None else (learning_rate,))
    trace = [_bound(density, ascent.average, fixed)]
    progress = tqdm(total=max_steps, initial=ascent.steps, desc=f"advi ({family})", unit="step")
    try:
        with progress:
            while ascent.steps < max_steps and not _converged(trace, tolerance):
                ascent.run(min(CHECK_STEPS, max_steps - ascent.steps), draws, generator, progress)
                trace.append(_bound(density, ascent.average, fixed))
    except KeyboardInterrupt as interrupt:
        raise InterruptedFit(_approximation(ascent, trace, tolerance, generator)) from interrupt
    return _approximation(ascent, trace, tolerance, generator)


class _Ascent:
    """Stochastic gradient ascent of the ELBO from q, with the step sizes of equations 10 and 11."""

    def __init__(self, density: Density, q: Gaussian, eta: float) -> None:
        self.density, self.q, self.average, self.eta = density, q, q, eta
        self.squares: list[Tensor] = []
        self.steps = 0
        self.shown = math.nan
        """A moving average of the ELBO's noisy estimates, for the progress bar."""

    def run(self, steps: int, draws: int, generator: torch.Generator, progress: Any = None) -> None:
        """Take steps; `progress` is a tqdm bar that counts them.

        Raises:
            DivergedError: the ELBO is not finite.
        """
        for _ in range(steps):
            self._step(_noise(self.q, draws, generator))
            if progress is not None:
                progress.set_postfix(elbo=f"{self.shown:.2f}", refresh=False)
                progress.update()

    def _step(self, eps: Tensor) -> None:
        q = _of(self.q, (part.detach().requires_grad_() for part in self.q))
        bound = self.density.elbo(q, eps)
        if not math.isfinite(value := float(bound.detach())):
            raise DivergedError(f"the ELBO is {value} after {self.steps} steps; {REMEDY}")
        self.shown = value if self.steps == 0 else ALPHA * value + (1.0 - ALPHA) * self.shown
        gradients = torch.autograd.grad(bound, list(q))
        self.steps += 1
        self.squares = [
            g.square() if self.steps == 1 else ALPHA * g.square() + (1.0 - ALPHA) * s
            for g, s in zip(gradients, self.squares or gradients, strict=True)
        ]
        rate = self.eta * self.steps ** (-0.5 + EPSILON)
        moved = (p + rate / (TAU + s.sqrt()) * g for p, g, s in zip(self.q, gradients, self.squares, strict=True))
        self.q = _of(q, moved)
        share = (AVERAGE_POWER + 1.0) / (AVERAGE_POWER + self.steps)
        self.average = _of(q, (a.lerp(p, share) for a, p in zip(self.average, self.q, strict=True)))


def _approximation(ascent: _Ascent, trace: list[float], tolerance: float, generator: torch.Generator) -> Approximation:
    q = ascent.average
    weights = ascent.density.log_weights(q, _noise(q, EVALUATION_DRAWS, generator))
    return Approximation(
        q=_unframed(q, ascent.density.frame),
        coordinates=ascent.density.coordinates,
        elbo=float(weights.mean()),
        elbo_standard_error=float(weights.std()) / math.sqrt(len(weights)),
        trace=torch.tensor(trace, dtype=torch.float64),
        steps=ascent.steps,
        converged=_converged(trace, tolerance),
    )


def _of(q: Gaussian, parts: Iterable[Tensor]) -> Gaussian:
    """Another of the same family."""
    return type(q)(*parts)


def _fastest(
    density: Density, q: Gaussian, fixed: Tensor, draws: int, generator: torch.Generator, etas: Sequence[float]
) -> _Ascent:
    """The ascent from q with the highest ELBO after SEARCH_STEPS steps, of one for each of `etas`.

    Source: section 2.6.
    """
    ascents: dict[float, _Ascent] = {}
    bar = tqdm(total=len(etas) * SEARCH_STEPS, desc="advi (searching a step size)", unit="step", leave=False)
    with bar:
        for eta in etas:
            ascent = _Ascent(density, q, eta)
            try:
                ascent.run(SEARCH_STEPS, draws, generator, bar)
                ascents[_bound(density, ascent.q, fixed)] = ascent
            except DivergedError as error:
                cause = error
    if not ascents:
        raise cause
    return ascents[max(ascents)]


def _first(coordinates: Coordinates, family: Family, start: Mapping[str, Tensor] | None, like: Tensor) -> Gaussian:
    """N(start, I). Source: algorithm 1."""
    mean = like.new_zeros(coordinates.dim)
    if start is not None:
        mean = coordinates.unconstrain({name: value.to(like).unsqueeze(0) for name, value in start.items()})[0]
    if family == "meanfield":
        return DiagonalGaussian(mean, torch.zeros_like(mean))
    return FullRankGaussian(mean, like.new_zeros(coordinates.dim, coordinates.dim))


def _noise(q: Gaussian, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, len(q.mean), generator=generator, dtype=q.mean.dtype, device=q.mean.device)


def _bound(density: Density, q: Gaussian, eps: Tensor) -> float:
    """The ELBO of q in nats at noise eps; may raise DivergedError."""
    bound = float(density.log_weights(q, eps).mean())
    if not math.isfinite(bound):
        raise DivergedError(f"the ELBO is {bound}; {REMEDY}")
    return bound


def _converged(trace: list[float], tolerance: float) -> bool:
    changes = [abs(new - old) / max(1.0, abs(new)) for old, new in itertools.pairwise(trace[-CHECKS - 1 :])]
    return len(changes) == CHECKS and statistics.median(changes) < tolerance
