"""Fits ADVI to a model file and a CSV, and writes the posterior as a table, draws and plots."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.canvas import panels
from training.data.table import Table
from training.errors import ConfigError, DiskError
from training.inference import advi, hmc, model_file
from training.progress import tell, warn

QUANTILES = (0.05, 0.5, 0.95)
COLUMNS = ("mean", "sd", "5%", "50%", "95%")
HMC_COLUMNS = ("hmc mean", "hmc sd", "r_hat")
CHAINS, BURN_IN, CHAIN_DRAWS, LEAPFROG_STEPS = 32, 100, 150, 10
R_HAT = 1.05
"""Chains with a larger R-hat have not mixed; 1.05 is common for chains this short."""
SHIFT, NARROW, WIDE = 0.3, 0.8, 1.25
"""Beside HMC, differences of means (in HMC's sd) and ratios of sd that are reported."""
PANELS = 40

Draws = dict[str, Tensor]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Posterior:
    """Summaries of every scalar of the parameters."""

    names: list[str]
    """Such as `mean` or `weights[0]`."""
    columns: tuple[str, ...]
    values: Values
    """(scalars, columns)."""

    def text(self) -> str:
        """A table with aligned columns."""
        rows = [["", *self.columns]]
        rows += [[name, *(f"{value:.4g}" for value in row)] for name, row in zip(self.names, self.values, strict=True)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        )

    def write(self, path: Path) -> None:
        """Write the same as CSV."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["parameter", *self.columns])
            for name, row in zip(self.names, self.values, strict=True):
                writer.writerow([name, *(f"{value:.8g}" for value in row)])


def infer(
    model: Path,
    data: Path,
    out: Path,
    *,
    family: advi.Family = "meanfield",
    max_steps: int = 10_000,
    draws: int = 10_000,
    gradient_draws: int = 16,
    tolerance: float = 1e-5,
    learning_rate: float | None = None,
    seed: int = 0,
    check: bool = False,
    replace: bool = False,
) -> str:
    """Fit the model to the data and write posterior.csv, draws.npz, marginals.png and elbo.png.

    Args:
        model: the Python file, see model_file.load.
        data: the CSV, see Table.
        out: the folder to write into.
        family: see advi.fit.
        max_steps: see advi.fit.
        gradient_draws: `draws` of advi.fit.
        tolerance: see advi.fit.
        learning_rate: see advi.fit.
        draws: of the fitted posterior, for the table, the file and the plots.
        seed: of all noise.
        check: run HMC on the same log joint and set its means and standard deviations beside.
        replace: overwrite an earlier posterior in `out`.

    Returns:
        The ELBO and the posterior as text.

    Raises:
        ConfigError: `out` holds a posterior already.
        ModelFileError: the model cannot be used.
        DataError: the data cannot be used.
        DivergedError: the ELBO is not finite.
        DiskError: `out` cannot be written.
        KeyboardInterrupt: after Ctrl-C, once what there is has been written; the message says where.
    """
    if (out / "posterior.csv").exists() and not replace:
        raise ConfigError(f"{out} holds a posterior; overwrite it with --replace or name another folder with --out")
    statistical = model_file.load(model, Table(data))
    _make(out)
    generator = torch.Generator().manual_seed(seed)
    interrupted = False
    try:
        fitted = advi.fit(
            statistical.log_joint,
            statistical.parameters,
            generator,
            family=family,
            start=statistical.start,
            draws=gradient_draws,
            max_steps=max_steps,
            tolerance=tolerance,
            learning_rate=learning_rate,
            precondition=True,
            dtype=torch.float64,
        )
    except advi.InterruptedFit as interrupt:
        fitted, interrupted = interrupt.approximation, True
    found = fitted.draw(draws, generator)
    posterior = summary(found)
    _write(out, posterior, found, fitted)
    told = f"ELBO {fitted.elbo:.2f} +- {fitted.elbo_standard_error:.2f} nats after {fitted.steps} steps"
    if not fitted.converged:
        warn(f"the ELBO had not settled after {fitted.steps} steps; see {out / 'elbo.png'}, and raise --steps")
    if interrupted:
        tell(f"{told}\n\n{posterior.text()}\n")
        raise KeyboardInterrupt(f"the fit so far is in {out}; begin again with --replace")
    if check:
        try:
            chains = hmc_draws(advi.Density(statistical.log_joint, fitted.coordinates), fitted.q, generator)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the posterior is in {out}, without the check") from None
        posterior = beside(posterior, fitted.coordinates, chains)
        compared, _ = fitted.coordinates.constrain(chains.flatten(0, 1))
        _write(out, posterior, found, fitted, compared)
        _warn_of_differences(posterior, family)
    return f"{told}\n\n{posterior.text()}"


def summary(draws: Draws) -> Posterior:
    """Mean, standard deviation and quantiles of every scalar; draws (n, *shape) by name."""
    scalars = _scalars(draws)
    x = np.stack(list(scalars.values()), 1)
    values = np.vstack([x.mean(0), x.std(0, ddof=1), np.quantile(x, QUANTILES, axis=0)]).T
    return Posterior(list(scalars), COLUMNS, values)


def beside(posterior: Posterior, coordinates: advi.Coordinates, chains: Tensor) -> Posterior:
    """The same with columns for HMC's draws, unconstrained coordinates (draws, chains, dim)."""
    scalars = _scalars(coordinates.constrain(chains.flatten(0, 1))[0])
    columns = [
        (x.mean(), x.std(ddof=1), r_hat(torch.from_numpy(x).unflatten(0, chains.shape[:2]))) for x in scalars.values()
    ]
    return Posterior(posterior.names, posterior.columns + HMC_COLUMNS, np.hstack([posterior.values, columns]))


def hmc_draws(
    density: advi.Density,
    q: advi.Gaussian,
    generator: torch.Generator,
    draws: int = CHAIN_DRAWS,
    burn_in: int = BURN_IN,
) -> Tensor:
    """HMC's draws of the unconstrained coordinates, (draws, CHAINS, dim).

    The chains run in coordinates in which the Laplace approximation is N(0, I), and begin at draws of it; of q, if the
    mode is not found.
    """
    frame = advi.laplace(density, q.mean, "fullrank")
    frame = q if frame is None else frame
    framed = dataclasses.replace(density, frame=frame)
    with tqdm(total=1 + (burn_in + draws) * LEAPFROG_STEPS, desc="hmc", unit="step") as progress:

        def counted(v: Tensor) -> Tensor:
            progress.update()
            return framed.log_prob(v)

        start = torch.randn(CHAINS, len(q.mean), generator=generator, dtype=q.mean.dtype)
        chains = hmc.sample(counted, start, draws, generator, leapfrog_steps=LEAPFROG_STEPS, burn_in=burn_in)
    return frame.draw(chains.z)


def r_hat(x: Tensor) -> float:
    """Split R-hat of chains (draws, chains): 1 where they agree, larger where they have not mixed.

    Source: Gelman et al. (2013), Bayesian Data Analysis, section 11.4.
    """
    half = len(x) // 2
    chains = torch.cat([x[:half], x[half : 2 * half]], 1)
    within = chains.var(0).mean()
    return float(((half - 1) / half + chains.mean(0).var() / within).sqrt())


def _scalars(draws: Draws) -> dict[str, Values]:
    """Draws (n,) of each scalar by name and index."""
    scalars: dict[str, Values] = {}
    for name, values in draws.items():
        columns = values.reshape(len(values), -1).numpy().T
        for index, column in zip(itertools.product(*map(range, values.shape[1:])), columns, strict=True):
            scalars[f"{name}[{','.join(map(str, index))}]" if index else name] = column
    return scalars


def _warn_of_differences(posterior: Posterior, family: advi.Family) -> None:
    advice = "try --family fullrank" if family == "meanfield" else "the posterior is not close to a Gaussian"
    table = {
        name: dict(zip(posterior.columns, row, strict=True))
        for name, row in zip(posterior.names, posterior.values, strict=True)
    }
    if mixing := [name for name, row in table.items() if not row["r_hat"] < R_HAT]:
        warn(f"HMC's chains have not mixed for {', '.join(mixing)} (r_hat above {R_HAT}); its columns are unreliable")
    agree = {
        name: abs(row["mean"] - row["hmc mean"]) < SHIFT * row["hmc sd"] and NARROW < row["sd"] / row["hmc sd"] < WIDE
        for name, row in table.items()
    }
    apart = [name for name, same in agree.items() if not same and name not in mixing]
    if apart:
        warn(f"ADVI and HMC differ for {', '.join(apart)}; {advice}, or use HMC's columns")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> DiskError:
    return DiskError(f"cannot write {out} ({error.strerror}); make room, or name another folder with --out")


def _write(
    out: Path, posterior: Posterior, draws: Draws, fitted: advi.Approximation, compared: Draws | None = None
) -> None:
    try:
        arrays: dict[str, Any] = {name: values.numpy() for name, values in draws.items()}
        np.savez(out / "draws.npz", **arrays)
        _plot_marginals(out / "marginals.png", posterior, draws, compared)
        _plot_elbo(out / "elbo.png", fitted)
        posterior.write(out / "posterior.csv")
    except OSError as error:
        raise _unwritable(out, error) from error


def _plot_marginals(path: Path, posterior: Posterior, draws: Draws, compared: Draws | None) -> None:
    """Histograms of the first PANELS scalars, with the 5 %, 50 % and 95 % quantiles; HMC's draws as outlines."""
    scalars = dict(itertools.islice(_scalars(draws).items(), PANELS))
    others = {} if compared is None else _scalars(compared)
    with panels(len(scalars), path, columns=4, size=(2.6, 2.2)) as axes:
        for axis, (name, x), row in zip(axes, scalars.items(), posterior.values, strict=False):
            shown = np.concatenate([x, others[name]]) if name in others else x
            low, high = np.quantile(shown, [0.001, 0.999])
            bins = np.linspace(low, high, 41)
            axis.hist(x, bins, density=True, color="#9bb8d3")
            for quantile, style in zip(row[2:5], (":", "-", ":"), strict=True):
                axis.axvline(quantile, color="#1f4e79", linestyle=style, linewidth=1)
            if name in others:
                axis.hist(others[name], bins, density=True, histtype="step", color="#c0504d", label="HMC")
                axis.legend(frameon=False, fontsize="small")
            axis.set_title(name, fontsize="medium")
            axis.set_yticks([])


def _plot_elbo(path: Path, fitted: advi.Approximation) -> None:
    trace = fitted.trace.numpy()
    steps = fitted.steps - advi.CHECK_STEPS * np.arange(len(trace))[::-1]
    with panels(1, path, size=(5.0, 3.2)) as (axis,):
        axis.plot(steps, trace, color="#1f4e79")
        axis.set_xlabel("step")
        axis.set_ylabel("ELBO (nats)")
        axis.ticklabel_format(useOffset=False)
        settled = trace[len(trace) // 10 :]
        axis.set_ylim(min(settled.min(), settled.max() - 1.0), settled.max() + 0.1)
