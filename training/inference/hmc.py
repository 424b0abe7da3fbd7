"""Hybrid (Hamiltonian) Monte Carlo: draws of an unnormalised density, many chains at a time.

Source: Duane et al. (1987); Neal (2011), "MCMC using Hamiltonian dynamics", section 3; Kingma and Welling (2013),
appendix E, for the target of 90 % acceptance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ACCEPTANCE = 0.9
JITTER = 0.2
GAIN = 2.0

LogDensity = Callable[[Tensor], Tensor]
"""The log of an unnormalised density in nats, differentiable: z (n, d) -> (n,), each row independently."""


class State(NamedTuple):
    """The state of n chains: z (n, d), the log density there (n,) and its gradient (n, d), without autograd graphs."""

    z: Tensor
    log_density: Tensor
    gradient: Tensor


class Transition(NamedTuple):
    """The chains' new state, and the acceptance probability of each chain's proposal, (n,)."""

    state: State
    acceptance: Tensor


class Draws(NamedTuple):
    """L draws of n chains: z (L, n, d), log density (L, n); mean acceptance and step size of each chain, (n,)."""

    z: Tensor
    log_density: Tensor
    acceptance: Tensor
    step_size: Tensor


def state_at(density: LogDensity, z: Tensor) -> State:
    """Evaluate the density at z (n, d); call it again after the density has changed."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_density = density(z)
        (gradient,) = torch.autograd.grad(log_density.sum(), z)
    return State(z.detach(), log_density.detach(), gradient)


def leapfrog(
    density: LogDensity, state: State, velocity: Tensor, step_size: Tensor, steps: int
) -> tuple[State, Tensor]:
    """Integrate Hamilton's equations for unit masses by `steps` of `step_size` (n, 1); reversible, volume-preserving.

    Source: Neal (2011), section 2.3, equations 2.28 to 2.30.
    """
    velocity = velocity + 0.5 * step_size * state.gradient
    for left in reversed(range(steps)):
        state = state_at(density, state.z + step_size * velocity)
        velocity = velocity + (1.0 if left else 0.5) * step_size * state.gradient
    return state, velocity


def transition(
    density: LogDensity, state: State, step_size: Tensor, leapfrog_steps: int, generator: torch.Generator
) -> Transition:
    """Take one step of every chain, which leaves the density invariant; proposals without finite density are rejected.

    Each chain's step size varies by up to a fifth, at random: a trajectory of fixed length can return to its start,
    every time.

    Args:
        density: The target.
        state: Where the chains are.
        step_size: () or (n,).
        leapfrog_steps: Of the trajectory.
        generator: Of velocities, step sizes and acceptance.

    Source: Neal (2011), section 3.2, and 4.2 for the variation.
    """
    noise = {"generator": generator, "device": state.z.device, "dtype": state.z.dtype}
    velocity = torch.randn(state.z.shape, **noise)  # type: ignore[call-overload]  # mypy reads no ** of a dict
    spread, threshold = torch.rand(2, len(state.z), **noise)  # type: ignore[call-overload]
    jittered = step_size * (1.0 + JITTER * (2.0 * spread - 1.0))
    proposal, final = leapfrog(density, state, velocity, jittered.unsqueeze(-1), leapfrog_steps)
    gain = proposal.log_density - state.log_density - 0.5 * (final.square() - velocity.square()).sum(-1)
    acceptance = gain.exp().clamp(max=1.0).nan_to_num(nan=0.0) * proposal.log_density.isfinite()
    accepted = threshold < acceptance
    z, log_density, gradient = (
        torch.where(accepted if new.ndim == 1 else accepted.unsqueeze(-1), new, old)
        for new, old in zip(proposal, state, strict=True)
    )
    return Transition(State(z, log_density, gradient), acceptance)


def tuned(step_size: Tensor, acceptance: Tensor, gain: float = GAIN) -> Tensor:
    """Move the step size towards 90 % acceptance: multiply it by exp(gain (acceptance - 0.9)).

    A step size (n,) uses each chain's own acceptance, a common one () the mean. It uses probabilities, not whether a
    proposal was accepted, so it converges; the author's code multiplies or divides by up to 1.25 for ever.

    Source: Kingma and Welling (2013), appendix E; Andrieu and Thoms (2008), "A tutorial on adaptive MCMC".
    """
    found = acceptance.mean() if step_size.ndim == 0 else acceptance
    return step_size * torch.exp(gain * (found - ACCEPTANCE))


def sample(
    density: LogDensity,
    start: Tensor,
    draws: int,
    generator: torch.Generator,
    *,
    leapfrog_steps: int = 10,
    step_size: float = 0.1,
    burn_in: int = 100,
) -> Draws:
    """Run chains from `start` (n, d) and return `draws` of their states, one after each transition.

    Each chain has its own step size, tuned over `burn_in` transitions with a gain that falls in their second half. Then
    it is constant, because a step size that depends on the chain's past would bias the draws.
    """
    state, steps = state_at(density, start), torch.full_like(start[:, 0], step_size)
    for t in range(burn_in):
        state, acceptance = transition(density, state, steps, leapfrog_steps, generator)
        steps = tuned(steps, acceptance, GAIN / max(1, t - burn_in // 2) ** 0.5)
    kept: list[Transition] = []
    for _ in range(draws):
        kept.append(transition(density, state, steps, leapfrog_steps, generator))
        state = kept[-1].state
    return Draws(
        torch.stack([each.state.z for each in kept]),
        torch.stack([each.state.log_density for each in kept]),
        torch.stack([each.acceptance for each in kept]).mean(0),
        steps,
    )
