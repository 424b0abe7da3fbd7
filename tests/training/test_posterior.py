"""`python -m training advi`: posteriors of conjugate models, beside HMC, and in one line what is wrong."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from training.__main__ import main
from training.data.table import Table
from training.errors import DataError
from training.inference import advi, model_file
from training.inference.posterior import hmc_draws, infer, r_hat

pytestmark = pytest.mark.usefixtures("own_signals")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "regression.py", ROOT / "examples" / "regression.csv"
HEAD = """
import signal
import torch
from torch.distributions import *
from torch.distributions import constraints
"""
NORMAL = """
parameters = {"mu": constraints.real}
def log_joint(p, data):
    return Normal(0, 10).log_prob(p["mu"]) + Normal(p["mu"], 1.5).log_prob(data["x"]).sum()
"""
BINOMIAL = """
parameters = {"p": constraints.unit_interval}
def log_joint(p, data):
    return Beta(2, 3).log_prob(p["p"]) + Binomial(data["trials"], p["p"]).log_prob(data["successes"]).sum()
"""
KNOWN_NOISE = """
parameters = {"w": ((2,), constraints.real)}
def log_joint(p, data):
    design = torch.stack([data["a"], data["b"]], 1)
    return Normal(0, 2).log_prob(p["w"]).sum() + Normal(design @ p["w"], 0.8).log_prob(data["y"]).sum()
"""
LOGISTIC = """
parameters = {"intercept": constraints.real, "slope": constraints.real}
def log_joint(p, data):
    logits = p["intercept"] + p["slope"] * data["x"]
    prior = Normal(0, 2).log_prob(p["intercept"]) + Normal(0, 2).log_prob(p["slope"])
    return prior + Bernoulli(logits=logits).log_prob(data["y"]).sum()
"""
GROUPS = """
def parameters(data):
    groups = int(data["group"].max()) + 1
    return {"centre": constraints.real, "spread": constraints.positive, "offsets": ((groups,), constraints.real)}
def log_joint(p, data):
    means = p["centre"] + p["spread"] * p["offsets"]
    prior = Normal(0, 10).log_prob(p["centre"]) + HalfNormal(5).log_prob(p["spread"])
    prior = prior + Normal(0, 1).log_prob(p["offsets"]).sum()
    return prior + Normal(means[data["group"].long()], 1).log_prob(data["y"]).sum()
"""


def written(folder: Path, model: str, columns: dict[str, NDArray[np.float64]]) -> tuple[Path, Path]:
    """The model and the data as files."""
    paths = folder / "model.py", folder / "data.csv"
    paths[0].write_text(HEAD + model)
    rows = "\n".join(",".join(map(repr, map(float, row))) for row in zip(*columns.values(), strict=True))
    paths[1].write_text(",".join(columns) + "\n" + rows + "\n")
    return paths


def table(folder: Path) -> dict[str, dict[str, float]]:
    """What posterior.csv holds, by parameter and column."""
    with (folder / "posterior.csv").open(newline="") as file:
        return {
            row.pop("parameter"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
        }


def regression() -> dict[str, NDArray[np.float64]]:
    """60 rows; a and b correlate by 0.8."""
    random = np.random.default_rng(1)
    a = random.standard_normal(60)
    b = 0.8 * a + 0.6 * random.standard_normal(60)
    return {"a": a, "b": b, "y": a - 2.0 * b + 0.8 * random.standard_normal(60)}


def logistic() -> dict[str, NDArray[np.float64]]:
    """80 rows."""
    random = np.random.default_rng(2)
    x = random.standard_normal(80)
    return {"x": x, "y": (random.random(80) < 1.0 / (1.0 + np.exp(1.0 - 2.0 * x))).astype(float)}


def test_the_mean_of_a_normal(tmp_path: Path) -> None:
    """Known variance: mean, deviation and quantiles of the exact posterior."""
    x = 40.0 + 1.5 * np.random.default_rng(0).standard_normal(30)
    infer(*written(tmp_path, NORMAL, {"x": x}), tmp_path, max_steps=500)
    precision = 30 / 1.5**2 + 1 / 10.0**2
    exact = stats.norm(x.sum() / 1.5**2 / precision, precision**-0.5)
    row = table(tmp_path)["mu"]
    assert row["mean"] == pytest.approx(exact.mean(), abs=0.05 * exact.std())
    assert row["sd"] == pytest.approx(exact.std(), rel=0.05)
    for share, column in ((0.05, "5%"), (0.5, "50%"), (0.95, "95%")):
        assert row[column] == pytest.approx(exact.ppf(share), abs=0.1 * exact.std())


def test_a_binomial_s_probability(tmp_path: Path) -> None:
    """Beta prior: the exact Beta posterior of 66 in 200."""
    data = {"trials": np.array([120.0, 80.0]), "successes": np.array([40.0, 26.0])}
    infer(*written(tmp_path, BINOMIAL, data), tmp_path, max_steps=500)
    exact = stats.beta(2 + 66, 3 + 134)
    row = table(tmp_path)["p"]
    assert row["mean"] == pytest.approx(exact.mean(), abs=0.05 * exact.std())
    assert row["sd"] == pytest.approx(exact.std(), rel=0.05)
    assert row["95%"] == pytest.approx(exact.ppf(0.95), abs=0.1 * exact.std())


@pytest.mark.parametrize("family", ["meanfield", "fullrank"])
def test_a_regression_with_known_noise(tmp_path: Path, family: advi.Family) -> None:
    """Full rank has the exact deviations, mean field the smaller conditional ones. Source: Bishop, section 10.1.2."""
    data = regression()
    infer(*written(tmp_path, KNOWN_NOISE, data), tmp_path, family=family, max_steps=500)
    design = np.stack([data["a"], data["b"]], 1)
    precision = design.T @ design / 0.8**2 + np.eye(2) / 2.0**2
    covariance = np.linalg.inv(precision)
    mean, exact = covariance @ design.T @ data["y"] / 0.8**2, np.sqrt(covariance.diagonal())
    expected = exact if family == "fullrank" else precision.diagonal() ** -0.5
    rows = table(tmp_path)
    for i in range(2):
        assert rows[f"w[{i}]"]["mean"] == pytest.approx(mean[i], abs=0.1 * exact[i])
        assert rows[f"w[{i}]"]["sd"] == pytest.approx(expected[i], rel=0.05)
    assert (precision.diagonal() ** -0.5 < 0.7 * exact).all()
    with np.load(tmp_path / "draws.npz") as draws:
        assert draws["w"].shape == (10_000, 2)
        correlation = np.corrcoef(draws["w"].T)[0, 1]
    expected_correlation = covariance[0, 1] / exact.prod() if family == "fullrank" else 0.0
    assert correlation == pytest.approx(expected_correlation, abs=0.05)


def test_hmc_and_advi_agree_on_a_logistic_regression(tmp_path: Path) -> None:
    """Not conjugate: full rank's means and deviations are HMC's, which a numeric integral confirms."""
    paths = written(tmp_path, LOGISTIC, logistic())
    statistical = model_file.load(paths[0], Table(paths[1]))
    generator = torch.Generator().manual_seed(0)
    fitted = advi.fit(
        statistical.log_joint,
        statistical.parameters,
        generator,
        family="fullrank",
        max_steps=500,
        precondition=True,
        dtype=torch.float64,
    )
    density = advi.Density(statistical.log_joint, fitted.coordinates)
    chains = hmc_draws(density, fitted.q, generator, draws=120, burn_in=40).flatten(0, 1)

    axes = torch.linspace(-5.0, 1.0, 200), torch.linspace(-1.0, 6.0, 200)
    grid = torch.cartesian_prod(*axes).double()
    mass = torch.softmax(density.log_prob(grid), 0)
    mean = mass @ grid
    sd = (mass @ (grid - mean).square()).sqrt()
    draws = fitted.q.draw(torch.randn(20_000, 2, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(chains.mean(0), mean, rtol=0.0, atol=0.1 * float(sd.min()))
    torch.testing.assert_close(chains.std(0), sd, rtol=0.06, atol=0.0)
    assert bool(((draws.mean(0) - chains.mean(0)).abs() < 0.15 * sd).all())
    torch.testing.assert_close(draws.std(0), chains.std(0), rtol=0.1, atol=0.0)


def test_the_example_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slopes are those of least squares; mean field is told of by HMC beside it; the printed table is the file's."""
    out = tmp_path / "out"
    assert main(["advi", *map(str, EXAMPLE), "--out", str(out), "--check", "hmc", "--steps", "500"]) == 0
    told = capsys.readouterr()
    assert "warning: ADVI and HMC differ for slopes[0], slopes[1]; try --family fullrank" in told.err
    data = np.genfromtxt(EXAMPLE[1], delimiter=",", skip_header=1)[:, 1:]
    design = np.column_stack([np.ones(len(data)), data[:, :2] - data[:, :2].mean(0)])
    best, residuals, *_ = np.linalg.lstsq(design, data[:, 2], rcond=None)
    variance = residuals[0] / (len(data) - 3)
    sd = np.sqrt(variance * np.linalg.inv(design.T @ design).diagonal())
    rows = table(out)
    assert list(rows) == ["mean", "slopes[0]", "slopes[1]", "noise"]
    for i, name in enumerate(("mean", "slopes[0]", "slopes[1]")):
        assert rows[name]["mean"] == pytest.approx(best[i], abs=0.15 * sd[i])
        assert rows[name]["hmc mean"] == pytest.approx(best[i], abs=0.15 * sd[i])
        assert rows[name]["hmc sd"] == pytest.approx(sd[i], rel=0.1)
        assert rows[name]["r_hat"] < 1.05
    assert rows["slopes[0]"]["sd"] < 0.7 * sd[1]
    assert rows["noise"]["mean"] == pytest.approx(math.sqrt(variance), rel=0.1)
    printed = [line.split() for line in told.out.splitlines() if line.startswith(("mean", "slopes", "noise"))]
    assert {row[0]: [float(value) for value in row[1:]] for row in printed} == {
        name: [float(f"{value:.4g}") for value in row.values()] for name, row in rows.items()
    }
    lengths = {len(line) for line in told.out.splitlines() if line.startswith(("  ", "mean", "slopes", "noise"))}
    assert len(lengths) == 1, "the columns are aligned"
    for name in ("marginals.png", "elbo.png"):
        with Image.open(out / name) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_groups_are_counted_in_the_data(tmp_path: Path) -> None:
    """`parameters` may be a function of the data; each group's mean is drawn towards the others."""
    random = np.random.default_rng(3)
    group = np.repeat(np.arange(6.0), 5)
    y = 3.0 + random.standard_normal(6)[group.astype(int)] + random.standard_normal(30)
    infer(*written(tmp_path, GROUPS, {"group": group, "y": y}), tmp_path, family="fullrank", max_steps=500)
    rows = table(tmp_path)
    assert {name for name in rows if name.startswith("offsets")} == {f"offsets[{i}]" for i in range(6)}
    assert rows["centre"]["mean"] == pytest.approx(y.mean(), abs=0.3)
    assert rows["spread"]["5%"] > 0.0


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    """And another seed, family, learning rate or number of draws or steps gives others."""
    command = ["advi", *map(str, written(tmp_path, NORMAL, {"x": np.arange(5.0)})), "--steps", "60", "--draws", "100"]
    changes = "--seed 2", "--family fullrank", "--learning-rate 0.5", "--gradient-draws 4", "--steps 70", "--draws 101"
    contents = []
    for i, change in enumerate(("", "", *changes)):
        assert main([*command, *change.split(), "--out", str(tmp_path / str(i))]) == 0
        contents.append((tmp_path / str(i) / "posterior.csv").read_bytes())
    assert contents[0] == contents[1]
    assert len(set(contents)) == 1 + len(changes)


def test_ctrl_c_writes_the_fit_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGINT in the middle: status 130, the files of what there is, and where they are."""
    stopping = """
calls = iter(range(10**6))
parameters = {"mu": constraints.real}
def log_joint(p, data):
    if next(calls) == 700:
        signal.raise_signal(signal.SIGINT)
    return Normal(7, 2).log_prob(p["mu"])
"""
    model, data = written(tmp_path, stopping, {"x": np.zeros(2)})
    out = tmp_path / "out"
    assert main(["advi", str(model), str(data), "--out", str(out), "--tolerance", "1e-300"]) == 130
    told = capsys.readouterr().err
    assert f"interrupted; the fit so far is in {out}; begin again with --replace" in told
    assert "the ELBO had not settled" in told
    assert table(out)["mu"]["mean"] == pytest.approx(7.0, abs=0.2)
    assert table(out)["mu"]["sd"] == pytest.approx(2.0, rel=0.1)


def test_ctrl_c_before_there_is_a_fit_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says so."""
    model, data = written(tmp_path, NORMAL + "signal.raise_signal(signal.SIGINT)", {"x": np.zeros(2)})
    assert main(["advi", str(model), str(data), "--out", str(tmp_path / "out")]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fit_that_has_not_settled_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After few steps; one that has settled is not."""
    paths = [str(path) for path in written(tmp_path, NORMAL, {"x": np.arange(5.0)})]
    assert main(["advi", *paths, "--out", str(tmp_path / "few"), "--steps", "200"]) == 0
    assert "warning: the ELBO had not settled after 200 steps; see" in capsys.readouterr().err
    assert main(["advi", *paths, "--out", str(tmp_path / "many"), "--tolerance", "1e-3"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_an_earlier_posterior_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless --replace says otherwise."""
    (tmp_path / "posterior.csv").write_text("earlier")
    command = [
        "advi",
        *map(str, written(tmp_path, NORMAL, {"x": np.arange(5.0)})),
        "--out",
        str(tmp_path),
        "--steps",
        "50",
    ]
    assert main(command) == 1
    assert "--replace" in capsys.readouterr().err
    assert (tmp_path / "posterior.csv").read_text() == "earlier"
    assert main([*command, "--replace"]) == 0
    assert "mu" in table(tmp_path)


def test_a_model_that_cannot_be_vectorised_runs_draw_by_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a warning that says why; the posterior is the same."""
    branching = NORMAL.replace("    return", "    if p['mu'] > 1e6: return p['mu']\n    return")
    x = np.arange(5.0)
    for name, model in (("plain", NORMAL), ("branching", branching)):
        infer(*written(tmp_path, model, {"x": x}), tmp_path / name, max_steps=50)
        assert ("one draw at a time" in capsys.readouterr().err) == (name == "branching")
    plain, other = (table(tmp_path / name)["mu"]["mean"] for name in ("plain", "branching"))
    assert other == pytest.approx(plain)


WRONG_MODELS = {
    "x = (": "line 6",
    "import no_such_package": "line 6: ModuleNotFoundError: No module named 'no_such_package'",
    "parameters = {}": "does not define log_joint",
    NORMAL.replace("constraints.real", "3"): "parameter 'mu' must be a support or (shape, support)",
    NORMAL.replace("constraints.real", "constraints.interval"): "parameter 'mu' must be a support",
    NORMAL.replace("constraints.real", "constraints.simplex"): "parameter 'mu' needs a shape",
    NORMAL.replace("constraints.real", "constraints.boolean"): "mu: no bijection from the real numbers",
    NORMAL.replace('{"mu": constraints.real}', "{}"): "parameters must name at least one",
    NORMAL.replace(".sum()", ""): "log_joint must return one number as a torch tensor, not a tensor of shape (3,)",
    NORMAL + "log_joint = lambda p, data: 3.0": "not float",
    NORMAL + "log_joint = lambda p, data: torch.tensor(3.0)": "log_joint does not depend on mu",
    NORMAL.replace("constraints.real}", 'constraints.real, "nu": constraints.real}'): "log_joint does not depend on nu",
    NORMAL.replace('p["mu"], 1.5', 'p["mu"], -1.5'): "line 9: ValueError: Expected parameter scale",
    NORMAL.replace('p["mu"])', 'p["nu"])'): "line 9: KeyError: 'nu'",
    NORMAL.replace('data["x"]', 'data["y"]'): "data.csv has no column 'y'; it has x",
    NORMAL.replace("return", 'return p["mu"].log() +'): "log_joint is -inf at mu = 0.0; define `start`",
    NORMAL + 'start = {"mu": [1.0, 2.0]}': "mu: each value must have shape ()",
    NORMAL + 'start = {"nu": 1.0}': "values for ['nu'], but the parameters are ['mu']",
}


@pytest.mark.parametrize("model", WRONG_MODELS, ids=WRONG_MODELS.values())
def test_what_is_wrong_with_a_model_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the file, the line or the parameter, and what to do; status 1 and nothing is written."""
    paths = written(tmp_path, model, {"x": np.arange(3.0)})
    assert main(["advi", *map(str, paths), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vae-train: {tmp_path}")
    assert WRONG_MODELS[model] in line
    assert not (tmp_path / "out").exists()


WRONG_DATA = {
    "": "needs a line of column names",
    "x,y\n": "at least one line of values",
    "x;y\n1;2\n": "separates its columns by semicolons; save it with commas",
    "x,x\n1,2\n": "line 1: two columns are named 'x'",
    "x,y\n1,2\n3\n": "line 3: 1 values for 2 columns",
    'x,y\n1,2\n"1,5",2\n': "line 3, column 'x': '1,5' is not a finite number",
    "x,y\n1,2\n\n,4\nNA,3\n": "line 4, column 'x': the value is missing; fill it in or delete the line (1 more",
    "x,y\n1,2\ninf,4\n": "line 3, column 'x': 'inf' is not a finite number",
    "x,y\n1,2\nabc,4\n": "line 3, column 'x': 'abc' is not a finite number",
}


@pytest.mark.parametrize("content", WRONG_DATA, ids=WRONG_DATA.values())
def test_what_is_wrong_with_data_is_one_line(content: str, tmp_path: Path) -> None:
    """It names the file, the line and the column."""
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        Table(path)["x"]
    assert WRONG_DATA[content] in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No model, no data, data that are no text, a folder that cannot be made."""
    model, data = map(str, written(tmp_path, NORMAL, {"x": np.arange(3.0)}))
    (tmp_path / "binary.csv").write_bytes(b"x\n\xff\xfe\n")
    for words, message in (
        ([f"{tmp_path}/nowhere.py", data], "nowhere.py: there is no such file"),
        ([model, f"{tmp_path}/nowhere.csv"], "nowhere.csv: No such file"),
        ([model, f"{tmp_path}/binary.csv"], "not UTF-8"),
        ([model, data, "--out", f"{model}/out"], "--out"),
    ):
        assert main(["advi", "--out", str(tmp_path / "out"), *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_columns_that_are_not_used_may_hold_text(tmp_path: Path) -> None:
    """As may have no name; a byte order mark and spaces about names and numbers are no part of them."""
    path = tmp_path / "data.csv"
    path.write_bytes('\ufeff, x ,name\r\n1, 2.5 ,"a, b"\r\n2,-1e3,c\r\n'.encode())
    data = Table(path)
    assert list(data) == ["x", "name"]
    assert "y" not in data
    torch.testing.assert_close(data["x"], torch.tensor([2.5, -1000.0], dtype=torch.float64))


def test_r_hat_is_the_published_one() -> None:
    """Near 1 for draws of one normal; for chains of two means as far apart as they are wide, the closed form."""
    x = 2.0 * torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert r_hat(x) == pytest.approx(1.0, abs=1e-3)
    apart = x + torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert r_hat(apart) == pytest.approx(math.sqrt(1.0 + 0.25 * 8 / 7), rel=0.01)
    drifting = x + torch.linspace(0, 20, len(x))[:, None]
    assert r_hat(drifting) > 1.5


def test_the_page_shows_the_example() -> None:
    """The model in docs/training.md is examples/regression.py."""
    page = (ROOT / "docs" / "training.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert EXAMPLE[0].read_text() in shown
