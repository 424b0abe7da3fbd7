"""Linear regression of an exam's score on hours of study and of sleep, with a noise of unknown size."""

import torch
from torch.distributions import HalfNormal, Normal, constraints

parameters = {
    "mean": constraints.real,
    "slopes": ((2,), constraints.real),
    "noise": constraints.positive,
}


def log_joint(p, data):
    """log p(score, parameters), for one value of the parameters."""
    predictors = torch.stack([data["hours"], data["sleep"]], 1)
    expected = p["mean"] + (predictors - predictors.mean(0)) @ p["slopes"]
    return (
        Normal(expected, p["noise"]).log_prob(data["score"]).sum()
        + Normal(50, 50).log_prob(p["mean"])
        + Normal(0, 10).log_prob(p["slopes"]).sum()
        + HalfNormal(10).log_prob(p["noise"])
    )
