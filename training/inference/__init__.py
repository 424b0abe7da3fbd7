"""Inference beside the recognition model: HMC, Monte Carlo EM, ADVI, marginal likelihood, refinement."""
