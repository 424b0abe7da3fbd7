"""Monte Carlo EM without an encoder: z is drawn from the posterior itself by Hybrid Monte Carlo.

Source: Kingma and Welling (2013), appendix E; Wei and Tanner (1990), for Monte Carlo EM.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.inference import hmc
from training.models.vae import VAE


class Step(NamedTuple):
    """One round: the chains' new state z (n, d), and log p(x, z) there in nats under the weights before it, (n,).

    `acceptance` is the last transition's mean probability; `step_size` that of the next one.
    """

    z: Tensor
    log_joint: Tensor
    acceptance: float
    step_size: float


class MonteCarloEm:
    """Trains p(z) p(x|z) of a VAE with Adagrad; the encoder is not used.

    The caller keeps the chains. They may persist: one for each training image, drawn at first by `start`,
    `chains[rows] = em.step(x[rows], chains[rows]).z`. Or they may be new every time, which takes about 20 `transitions`
    (on a linear model of two latents 5 left log p(x) 0.3 nats below its maximum, 20 left it 0.03 below).
    """

    def __init__(
        self,
        model: VAE,
        generator: torch.Generator,
        *,
        learning_rate: float = 0.02,
        weight_decay: float = 0.0,
        leapfrog_steps: int = 10,
        transitions: int = 1,
        weight_updates: int = 5,
        step_size: float = 0.1,
    ) -> None:
        """Prepare the updates; a `weight_decay` of 1/N is the source's prior N(0, I) on the weights of N images."""
        self.model, self.generator = model, generator
        self.leapfrog_steps, self.transitions, self.weight_updates = leapfrog_steps, transitions, weight_updates
        self.step_size = torch.tensor(step_size, device=generator.device)
        parameters = generative_parameters(model)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1]},
        ]
        self.optimiser = torch.optim.Adagrad(groups, lr=learning_rate, fused=True)

    def start(self, rows: int) -> Tensor:
        """Draws of N(0, I) at which chains may begin, (rows, *latent_shape)."""
        return self.model.noise(1, rows, self.generator)[0]

    def step(self, x: Tensor, z: Tensor) -> Step:
        """Run the E step, then the M step, of a minibatch x (n, c, h, w) with chains at z (n, d)."""
        moved = self._sample(x, z)
        for _ in range(self.weight_updates):
            loss = -self.model.log_joint(x, moved.state.z).mean()
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        return Step(moved.state.z, moved.state.log_density, float(moved.acceptance.mean()), float(self.step_size))

    def _sample(self, x: Tensor, z: Tensor) -> hmc.Transition:
        """Take transitions towards p(z|x); the step size is tuned to 90 % acceptance as the weights change."""
        density = partial(self.model.log_joint, x)
        state = hmc.state_at(density, z)
        for _ in range(self.transitions):
            state, acceptance = hmc.transition(density, state, self.step_size, self.leapfrog_steps, self.generator)
            self.step_size = hmc.tuned(self.step_size, acceptance)
        return hmc.Transition(state, acceptance)


def generative_parameters(model: VAE) -> list[nn.Parameter]:
    """The parameters of p(x|z) and p(z), and none of q(z|x)."""
    parts = (model.decoder, model.likelihood, model.prior)
    return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters() if p.requires_grad]
