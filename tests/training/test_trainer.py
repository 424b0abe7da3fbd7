"""The loop: resumed bit for bit wherever it is broken off, and stopped with a named cause."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from training.config import Run, load
from training.data import Folder
from training.errors import CheckpointError, DiskError, DivergedError
from training.loop import trainer
from training.loop.precision import computes_bfloat16
from training.loop.processes import ALONE
from training.loop.randomness import keyed_generator
from training.loop.stages import trained_vae, vae_stage
from training.loop.trainer import AVERAGED_STEPS, Stage, train
from training.loop.validation import HeldOut
from training.models.vae import Bound
from training.networks.mlp import Mlp

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "training" / "configs"
MLP_500 = Mlp(architecture="mlp", hidden=(500,))
SHAPE = (1, 4, 4)
STEPS = 210


def run(**train_settings: Any) -> Run:
    """A run of 210 steps of 20 images, 7 a epoch, in a fraction of a second."""
    return Run.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "data": {"dataset": "digits"},
            "model": {"latent_dim": 2, "network": {"architecture": "mlp", "hidden": [8]}},
            "train": {"epochs": 30, "batch_size": 20, "warmup_steps": 50, "kl_warmup_steps": 60, **train_settings},
        }
    )


def stage(**train_settings: Any) -> Stage:
    """The run's first stage, its weights fresh."""
    return vae_stage(run(**train_settings), SHAPE, CPU)


def failing(stage: Stage, call: int, what: Callable[[Bound], Bound]) -> Stage:
    """The same stage, but at its n-th minibatch something happens to the bound."""
    calls = iter(range(1, 10**6))

    def objective(module: Any, images: Tensor, generator: torch.Generator) -> Bound:
        bound = stage.objective(module, images, generator)
        return what(bound) if next(calls) >= call else bound

    return dataclasses.replace(stage, objective=objective)


def interrupt(_bound: Bound) -> Bound:
    """Ctrl-C."""
    raise KeyboardInterrupt


def become_nan(bound: Bound) -> Bound:
    """The bound is no longer a number, nor are its gradients."""
    return Bound(bound.log_likelihood * math.nan, bound.kl)


def state(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder."""
    content: dict[str, Any] = torch.load(folder / "vae.pt", weights_only=True)
    return content


def assert_same_bits(found: Any, expected: Any) -> None:
    """Equal all the way down, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"seconds"}:
            assert_same_bits(found[key], expected[key])
    elif isinstance(expected, list):
        for mine, theirs in zip(found, expected, strict=True):
            assert_same_bits(mine, theirs)
    else:
        assert found == expected


@pytest.fixture(scope="session")
def images() -> Tensor:
    """147 grey images: seven minibatches of 20 and a rest."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (147, *SHAPE), generator=generator).to(torch.uint8)


@pytest.fixture(scope="session")
def unbroken(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(stage(), images, folder)
    return folder


def test_training_raises_the_bound_and_logs_it(unbroken: Path) -> None:
    """Each line of log.jsonl is JSON with the bound, which is its likelihood less its KL; the last is of the end."""
    lines = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200, STEPS]
    for line in lines:
        assert line["stage"] == "vae"
        assert line["elbo"] == pytest.approx(line["log_likelihood"] - line["kl"], abs=1e-4)
        assert line["kl"] >= 0.0
        assert line["seconds"] > 0.0
    # 16 fair coins cost 16 log 2 = 11.09 nats: that is where it starts.
    assert lines[-1]["elbo"] > lines[0]["elbo"] > -16 * math.log(2.0) - 1.0
    assert lines[-1]["epoch"] == 30


def test_same_seed_gives_the_same_bits(unbroken: Path, images: Tensor, tmp_path: Path) -> None:
    """Two runs of the same settings end in the same weights, whatever was drawn before."""
    torch.rand(7)
    train(stage(), images, tmp_path)
    assert_same_bits(state(tmp_path), state(unbroken))


@pytest.mark.parametrize("steps", [[1], [8], [101], [STEPS], [57, 3, 90]], ids=str)
def test_interrupted_run_is_resumed_bit_for_bit(
    steps: list[int], unbroken: Path, images: Tensor, tmp_path: Path
) -> None:
    """Broken off in a minibatch, once or several times, it ends in the same weights, averages and moments."""
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            train(failing(stage(), step, interrupt), images, tmp_path)
    assert state(tmp_path)["step"] == sum(step - 1 for step in steps)
    train(stage(), images, tmp_path)
    assert_same_bits(state(tmp_path), state(unbroken))


@contextmanager
def signal_after_step(number: int) -> Iterator[None]:
    """Ctrl-C at the worst moment: the weights have moved, their average and the step's number have not."""
    steps = iter(range(1, 10**6))

    def hook(*_: Any) -> None:
        if next(steps) == number:
            signal.raise_signal(signal.SIGINT)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("step", [2, 77, STEPS])
def test_interrupt_within_a_step_is_resumed_bit_for_bit(
    step: int, unbroken: Path, images: Tensor, tmp_path: Path
) -> None:
    """A signal that arrives between the optimiser's step and the end of ours does not make one step count twice."""
    with pytest.raises(KeyboardInterrupt), signal_after_step(step):
        train(stage(), images, tmp_path)
    train(stage(), images, tmp_path)
    assert_same_bits(state(tmp_path), state(unbroken))


def test_killed_run_is_resumed_bit_for_bit(unbroken: Path, images: Tensor, tmp_path: Path) -> None:
    """A kill leaves an older checkpoint, a longer log and half a new checkpoint; it still ends in the same weights."""
    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 50, interrupt), images, tmp_path)
    older = (tmp_path / "vae.pt").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 80, interrupt), images, tmp_path)
    newer = (tmp_path / "vae.pt").read_bytes()
    (tmp_path / "vae.pt").write_bytes(older)
    (tmp_path / "vae.pt.part").write_bytes(newer[: len(newer) // 2])
    train(stage(), images, tmp_path)
    assert_same_bits(state(tmp_path), state(unbroken))
    assert not (tmp_path / "vae.pt.part").exists()


def test_run_on_crops_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Each epoch has its own crops, and a run that was broken off in one goes on with the rest of that epoch's."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        levels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(levels).save(tmp_path / "pictures" / f"{i}.png")
    table = {"dataset": "folder", "height": 4, "width": 4, "mode": "L", "crops": {"per_epoch": 60}}
    data = Folder.model_validate(table).load(tmp_path / "pictures")

    def fit(name: str, stage: Stage) -> list[Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        seen: list[Tensor] = []

        def objective(module: Any, images: Tensor, generator: torch.Generator) -> Bound:
            seen.append(images)
            return stage.objective(module, images, generator)

        train(dataclasses.replace(stage, objective=objective), data.train, tmp_path / name, crops=data.crops)
        return seen

    seen = fit("unbroken", stage(epochs=4))
    assert len(seen) == 12
    assert not torch.equal(torch.cat(seen[:3]).unique(dim=0), torch.cat(seen[3:6]).unique(dim=0))
    for call in (5, 4):
        with pytest.raises(KeyboardInterrupt):
            fit("broken", failing(stage(epochs=4), call, interrupt))
    rest = fit("broken", stage(epochs=4))
    assert all(map(torch.equal, rest, seen[7:]))
    assert_same_bits(state(tmp_path / "broken"), state(tmp_path / "unbroken"))


def test_finished_run_is_left_alone(images: Tensor, tmp_path: Path) -> None:
    """Training again what is trained computes nothing and changes nothing."""
    train(stage(), images, tmp_path)
    before = (tmp_path / "vae.pt").read_bytes()
    train(failing(stage(), 1, interrupt), images, tmp_path)
    assert (tmp_path / "vae.pt").read_bytes() == before


def test_noise_of_a_step_is_a_function_of_its_key() -> None:
    """The same key draws the same numbers; another seed, purpose or step draws others."""
    keys = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0), (0, 0, 0), (0, 1, 1), (1, 2), (2, 1)]
    draws = {tuple(torch.rand(4, generator=keyed_generator(CPU, *key)).tolist()) for key in keys * 2}
    assert len(draws) == len(keys)


def test_nan_bound_stops_the_run_and_the_last_good_checkpoint_stays(images: Tensor, tmp_path: Path) -> None:
    """A NaN is a DivergedError naming the settings to lower; the checkpoint from before it is untouched."""
    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 50, interrupt), images, tmp_path)
    before = (tmp_path / "vae.pt").read_bytes()
    with pytest.raises(DivergedError, match="learning_rate") as caught:
        train(failing(stage(), 30, become_nan), images, tmp_path)
    assert "vae.pt" in str(caught.value)
    assert (tmp_path / "vae.pt").read_bytes() == before


def test_a_bad_step_is_skipped_and_counted(images: Tensor, tmp_path: Path) -> None:
    """One minibatch whose bound is no number moves nothing, is counted, and the run goes on to the end."""
    moved: list[Tensor] = []
    calls = iter(range(1, 10**6))
    good = stage()

    def objective(module: Any, images: Tensor, generator: torch.Generator) -> Bound:
        call = next(calls)
        moved.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        bound = good.objective(module, images, generator)
        return become_nan(bound) if call == 57 else bound

    train(dataclasses.replace(good, objective=objective), images, tmp_path)
    assert torch.equal(moved[57], moved[56])
    assert not torch.equal(moved[58], moved[57])
    assert state(tmp_path)["skipped"] == 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 1, 1]
    assert all(math.isfinite(line["elbo"]) for line in lines)


def test_microbatches_add_up_to_the_minibatch(images: Tensor, tmp_path: Path) -> None:
    """Where nothing is random the gradient of the whole is that of the parts, also of unequal ones."""
    ends = {}
    for count in (1, 4, 3):
        begun = stage(microbatches=count)

        def objective(module: Any, images: Tensor, _: torch.Generator) -> Bound:
            return module.bound(images / 255.0, torch.zeros(1, len(images), 2))

        train(dataclasses.replace(begun, objective=objective), images, tmp_path / str(count))
        ends[count] = torch.cat([p.detach().flatten() for p in begun.module.parameters()])
    assert torch.allclose(ends[1], ends[4], atol=1e-4)
    assert torch.allclose(ends[1], ends[3], atol=1e-4)


def test_microbatches_have_noise_of_their_own(images: Tensor, tmp_path: Path) -> None:
    """No two parts of a minibatch, and no two steps, see the same draws."""
    seen = []
    begun = stage(microbatches=2, epochs=1)

    def objective(module: Any, images: Tensor, generator: torch.Generator) -> Bound:
        seen.append(float(torch.rand(1, generator=generator)))
        return module.bound(images / 255.0, torch.zeros(1, len(images), 2))

    train(dataclasses.replace(begun, objective=objective), images, tmp_path)
    assert len(seen) == len(set(seen)) == 14


@pytest.mark.skipif(not computes_bfloat16(CPU), reason="this CPU does not compute with bfloat16")
def test_bfloat16_is_used_and_trains_as_well(unbroken: Path, images: Tensor, tmp_path: Path) -> None:
    """The networks compute in bfloat16, weights and moments stay float32, and the bound comes out the same."""
    lower = stage(precision="bfloat16")
    kinds = set()
    lower.module.decoder.register_forward_hook(lambda *call: kinds.add(call[2].dtype))  # type: ignore[operator]
    train(lower, images, tmp_path)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in lower.module.parameters()} == {torch.float32}

    def last(folder: Path) -> float:
        return float(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["elbo"])

    assert last(tmp_path) == pytest.approx(last(unbroken), abs=0.1)
    assert last(tmp_path) != last(unbroken)


def test_absurd_learning_rate_diverges_by_name(images: Tensor, tmp_path: Path) -> None:
    """Weights that fly off to infinity are a DivergedError, and are not kept as a checkpoint."""
    settings = {"learning_rate": 1e30, "gradient_norm": 1e30, "warmup_steps": 0}
    with pytest.raises(DivergedError, match=r"lower learning_rate \(1e\+30\)"):
        train(stage(**settings), images, tmp_path)
    assert not (tmp_path / "vae.pt").exists()


def test_infinite_bound_does_not_replace_the_last_good_checkpoint(images: Tensor, tmp_path: Path) -> None:
    """A bound of minus infinity whose weights are still numbers is no good checkpoint either."""

    def become_infinite(bound: Bound) -> Bound:
        return Bound(bound.log_likelihood - math.inf, bound.kl)

    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 50, interrupt), images, tmp_path)
    before = (tmp_path / "vae.pt").read_bytes()
    with pytest.raises(DivergedError, match="-inf"):
        train(failing(stage(), 30, become_infinite), images, tmp_path)
    assert (tmp_path / "vae.pt").read_bytes() == before


def test_checkpoint_of_other_settings_is_refused(images: Tensor, tmp_path: Path) -> None:
    """The message names which settings changed, and what to do."""
    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 20, interrupt), images, tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings \(train\).*--fresh"):
        train(stage(batch_size=21), images, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut"])
def test_unreadable_checkpoint_is_named(content: bytes | None, unbroken: Path, images: Tensor, tmp_path: Path) -> None:
    """A file that is no checkpoint is a CheckpointError naming it, and is not overwritten."""
    path = tmp_path / "vae.pt"
    whole = (unbroken / "vae.pt").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"(?s)vae\.pt.*delete it") as caught:
        train(stage(), images, tmp_path)
    assert "\n" not in str(caught.value)  # the command line promises one line
    assert path.read_bytes() == before


def test_foreign_checkpoint_is_named(images: Tensor, tmp_path: Path) -> None:
    """A file that torch can read but that this trainer did not write is a CheckpointError too."""
    torch.save({"weights": torch.zeros(3)}, tmp_path / "vae.pt")
    with pytest.raises(CheckpointError, match=r"vae\.pt"):
        train(stage(), images, tmp_path)


def test_missing_and_unfinished_checkpoints_are_named(images: Tensor, tmp_path: Path) -> None:
    """Evaluating or exporting what is not trained is a CheckpointError that says what to run."""
    with pytest.raises(CheckpointError, match="python -m training fit"):
        trained_vae(run(), SHAPE, tmp_path, CPU)
    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 20, interrupt), images, tmp_path)
    with pytest.raises(CheckpointError, match="unfinished"):
        trained_vae(run(), SHAPE, tmp_path, CPU)


def test_trained_weights_are_the_moving_average(unbroken: Path) -> None:
    """What is evaluated and exported is the average, not the last weights; it needs no gradients."""
    model = trained_vae(run(), SHAPE, unbroken, CPU)
    averaged = state(unbroken)["averaged"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, averaged[f"module.{name}"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_the_moving_average_forgets_as_its_decay_says(images: Tensor, tmp_path: Path) -> None:
    """It looks at every eighth step's weights, and at the last's, each time as if at those of all the steps between."""
    seen: dict[int, Tensor] = {}

    def watch(module: torch.nn.Module) -> dict[str, float]:
        seen[len(seen) + 1] = torch.cat([p.detach().flatten() for p in module.parameters()]).double()
        return {}

    watched = dataclasses.replace(stage(ema_decay=0.9), watch=watch, watched_steps=frozenset(range(1, STEPS + 1)))
    train(watched, images, tmp_path)
    looks = [*range(AVERAGED_STEPS, STEPS + 1, AVERAGED_STEPS), STEPS]
    expected = seen[looks[0]]
    for before, step in itertools.pairwise(looks):
        expected = torch.lerp(seen[step], expected, 0.9 ** (step - before))
    found = trained_vae(run(ema_decay=0.9), SHAPE, tmp_path, CPU)
    torch.testing.assert_close(torch.cat([p.flatten() for p in found.parameters()]).double(), expected)


def test_full_disk_leaves_the_old_checkpoint_whole(unbroken: Path, images: Tensor, tmp_path: Path) -> None:
    """A checkpoint that finds no room is a DiskError naming it; the old one is whole and is resumed from later."""
    with pytest.raises(KeyboardInterrupt):
        train(failing(stage(), 50, interrupt), images, tmp_path)
    before = (tmp_path / "vae.pt").read_bytes()
    (tmp_path / "vae.pt.part").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"vae\.pt.*make room"):
        train(stage(), images, tmp_path)
    assert (tmp_path / "vae.pt").read_bytes() == before
    train(stage(), images, tmp_path)
    assert_same_bits(state(tmp_path), state(unbroken))


def test_log_that_finds_no_room_is_named(images: Tensor, tmp_path: Path) -> None:
    """A full disk under log.jsonl is a DiskError naming it."""
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"log\.jsonl"):
        train(stage(), images, tmp_path)


def test_folder_that_cannot_be_made_is_named(images: Tensor, tmp_path: Path) -> None:
    """A run's folder below a file, where none can be, is a DiskError naming it."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiskError, match="file"):
        train(stage(), images, tmp_path / "file" / "run")


def test_fewer_images_than_a_minibatch_still_train(tmp_path: Path) -> None:
    """Three images and a batch_size of 20: every epoch is one step of three."""
    few = torch.full((3, *SHAPE), 200, dtype=torch.uint8)
    train(stage(), few, tmp_path)
    assert state(tmp_path)["step"] == 30


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "monte_carlo_elbo"},
        {"objective": "importance_weighted", "draws": 5},
        {"objective": "wake_sleep"},
        {"optimiser": "adagrad", "learning_rate": 0.02, "schedule": "constant", "weight_prior": True},
    ],
    ids=["estimator A", "importance-weighted", "wake-sleep", "as the paper"],
)
def test_every_way_to_train_raises_the_bound(settings: dict[str, Any], images: Tensor, tmp_path: Path) -> None:
    """From 16 fair coins' 11.09 nats less the divergence, on noise, whose entropy is all there is to learn."""
    train(stage(**settings), images, tmp_path)
    values = [json.loads(line)["elbo"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert values[-1] > values[0]
    assert -12.5 < values[-1] < -10.0


class Parameters(torch.nn.Module):
    """A weight and a bias."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 1), value))
        self.bias = torch.nn.Parameter(torch.full((1,), value))


def settled(settings: dict[str, Any], bound: Callable[[Parameters], Bound], images: Tensor, folder: Path) -> Parameters:
    """Where a bound of two parameters, begun at 2, leads."""
    module = Parameters(2.0)
    optimisation = run(epochs=300, learning_rate=0.02, **settings).train
    train(Stage("two", module, lambda m, *_: bound(m), optimisation, 0, {}), images, folder)
    return module


def test_a_linear_schedule_is_constant_and_then_goes_down_along_a_line(images: Tensor, tmp_path: Path) -> None:
    """Under a constant gradient Adam moves by the rates: with decay 0.5 their sum is 3/4 of that of constant ones."""
    moved = {}
    for schedule in ("constant", "linear"):
        settings = {"schedule": schedule, "decay": 0.5, "warmup_steps": 0}
        found = settled(settings, lambda m: Bound(m.bias.expand(20), torch.zeros(20)), images, tmp_path / schedule)
        moved[schedule] = float(found.bias.detach()) - 2.0
    assert moved["linear"] / moved["constant"] == pytest.approx(0.75, rel=0.01)


def test_the_weight_prior_is_a_gaussian_s(images: Tensor, tmp_path: Path) -> None:
    """MAP of a bound -(w - 2)^2 / 2 a datum is 2 N / (N + 1); biases have no prior."""

    def bound(m: Parameters) -> Bound:
        miss = 0.5 * (m.weight.flatten() - 2.0).square() + 0.5 * (m.bias - 2.0).square()
        return Bound(-miss.expand(20), torch.zeros(20))

    few = images[:20]
    found = settled({"weight_prior": True}, bound, few, tmp_path)
    assert found.weight.item() == pytest.approx(2.0 * 20 / 21, abs=1e-3)
    assert found.bias.item() == pytest.approx(2.0, abs=1e-4)


def test_free_nats_stop_the_pull_of_the_kl(images: Tensor, tmp_path: Path) -> None:
    """A KL is pulled down to the free nats and left there; without them it goes to 0."""

    def bound(m: Parameters) -> Bound:
        return Bound(torch.zeros(20) + 0.0 * m.weight.sum(), m.bias.square().expand(20))

    free = settled({"free_nats": 1.0}, bound, images, tmp_path / "free")
    assert 0.4 < free.bias.item() ** 2 < 1.05  # Adam coasts a little below
    assert settled({}, bound, images, tmp_path / "pulled").bias.item() ** 2 < 0.01


def test_parameters_begin_as_told() -> None:
    """initial_std is that of every weight and bias of both networks."""
    begun = run()
    model = begun.model.model_copy(update={"initial_std": 0.01, "network": MLP_500})
    vae = vae_stage(begun.model_copy(update={"model": model}), SHAPE, CPU).module
    values = torch.cat([p.detach().flatten() for p in vae.parameters()])
    assert float(values.std()) == pytest.approx(0.01, rel=0.03)
    assert abs(float(values.mean())) < 0.001


def test_watched_steps_are_logged(images: Tensor, tmp_path: Path) -> None:
    """Whatever is watched is in the log, once a step."""
    watched = dataclasses.replace(
        stage(), watch=lambda vae: {"parameters": len(list(vae.parameters()))}, watched_steps=frozenset({7, 200})
    )
    train(watched, images, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "parameters" in line] == [7, 200]


def test_a_checkpoint_outlives_new_settings(images: Tensor, tmp_path: Path) -> None:
    """What a run is known by is what differs from the defaults, so one made before a setting existed goes on."""
    train(stage(), images, tmp_path)
    assert "free_nats" not in state(tmp_path)["identity"]["train"]
    train(stage(free_nats=0.0), images, tmp_path)
    with pytest.raises(CheckpointError, match="train"):
        train(stage(free_nats=1.0), images, tmp_path)


def test_the_average_forgets_the_first_weights_of_a_short_run(tmp_path: Path) -> None:
    """20 epochs of 20 steps: the kept weights have the bound of the last steps, whatever decay is asked for."""
    short = load(CONFIGS / "digits.toml", {"train": {"epochs": 20, "batch_size": 64, "ema_decay": 0.9999}})
    digits = short.data.load(tmp_path)
    learnt = vae_stage(short, digits.shape, CPU)
    train(learnt, digits.train, tmp_path)
    vae = trained_vae(short, digits.shape, tmp_path, CPU)
    with torch.no_grad():
        bound = float(learnt.objective(vae, digits.train, torch.Generator().manual_seed(0)).elbo.mean())
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20 * 20
    assert bound > last["elbo"] - 1.0


def test_warm_up_never_outlasts_its_share(images: Tensor, tmp_path: Path) -> None:
    """Of 210 steps the learning rate rises over 21 at most, the weight of the KL over 52."""
    train(stage(warmup_steps=10**6, kl_warmup_steps=10**6), images, tmp_path / "endless")
    train(stage(warmup_steps=21, kl_warmup_steps=52), images, tmp_path / "short")
    assert_same_bits(state(tmp_path / "endless")["module"], state(tmp_path / "short")["module"])


def test_few_images_get_more_epochs(images: Tensor, tmp_path: Path) -> None:
    """As many as make the least number of steps."""
    train(stage(epochs=1, least_steps=30), images, tmp_path)
    assert (state(tmp_path)["step"], state(tmp_path)["epochs"]) == (35, 5)


@pytest.mark.parametrize("spoilt", ["averaged", "module"])
def test_the_better_weights_are_kept(images: Tensor, tmp_path: Path, spoilt: str) -> None:
    """By the bound on held-out images; the worse ones may be as bad as they like."""
    one = stage()
    loop = trainer._Loop(one, images, tmp_path, ALONE, images[:40])
    loop.run(lambda: False)
    module = loop.averaged.module if spoilt == "averaged" else one.module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)
    assert loop.held_out is not None
    loop.kept = loop.held_out.choose(loop.averaged.module, one.module, loop.elbo)
    loop.save()
    assert state(tmp_path)["kept"] == ("last" if spoilt == "averaged" else "averaged")
    vae = trained_vae(run(), SHAPE, tmp_path, CPU)
    better = one.module if spoilt == "averaged" else loop.averaged.module
    assert_same_bits(dict(vae.state_dict()), dict(better.state_dict()))


def test_held_out_bounds_are_logged_and_their_end_is_told(
    images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every epoch; held-out images that are unlike those of the training are learnt from for a while only."""
    train(stage(epochs=60, learning_rate=3e-2), images, tmp_path, held_out=255 - images[:20])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    held_out = {line["epoch"]: line["held_out_elbo"] for line in lines if "held_out_elbo" in line}
    assert sorted(held_out) == list(range(1, 61))
    best = max(held_out, key=held_out.__getitem__)
    said = capsys.readouterr().err
    assert (
        f"vae: the bound on held-out images has not risen since epoch {best} ({held_out[best]:.2f} nats); "
        f"if it stays so, lower --epochs to {best} and add --fresh"
    ) in said
    assert "vae: bound on 20 held-out images" in said


@pytest.mark.parametrize(
    ("trained", "held_out", "seen", "kl", "says"),
    [
        (-10.0, -20.0, -20.0, 5.0, "worse than those of the last steps"),
        (-10.0, -20.0, -10.0, 5.0, "overfits"),
        (-10.0, -10.0, -10.0, 0.03, "next to nothing"),
        (-10.0, -10.2, -10.0, 5.0, None),
    ],
)
def test_what_is_wrong_with_the_weights_is_said(
    images: Tensor, capsys: pytest.CaptureFixture[str],
    trained: float, held_out: float, seen: float, kl: float, says: str | None,
) -> None:  # fmt: skip
    """Kept weights below those that were trained, overfitting, and latents that say nothing."""
    others = images[:40].clone()
    others[:, 0, 0, 0] = 7

    def objective(_: Any, batch: Tensor, __: torch.Generator) -> Bound:
        value = held_out if bool((batch[:, 0, 0, 0] == 7).all()) else seen
        return Bound(torch.full((len(batch),), value + kl), torch.full((len(batch),), kl))

    one = dataclasses.replace(stage(), objective=objective)
    images = images.clone()
    images[:, 0, 0, 0] = 8
    HeldOut(one, others, images, 20).choose(one.module, one.module, trained)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == (says is not None)
    assert says is None or says in warned[0]


def test_the_bound_is_shown_from_the_first_steps(images: Tensor, tmp_path: Path) -> None:
    """Also of a run that is over before the first line of the log is due."""
    shown: list[str] = []

    def slow(bound: Bound) -> Bound:
        time.sleep(0.3)
        return bound

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm, "set_postfix", lambda _, values, **__: shown.append(values["ELBO"]))
        train(failing(stage(epochs=1), 1, slow), images, tmp_path)
    assert len(shown) >= 2
