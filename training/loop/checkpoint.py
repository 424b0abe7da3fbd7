"""Checkpoints: written whole or not at all, read with the settings they were made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from training.errors import CheckpointError, DiskError

Module = TypeVar("Module", bound=nn.Module)


def read_checkpoint(path: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint that was made with these settings.

    Raises:
        CheckpointError: It is missing, unreadable or of other settings.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}; run `python -m training fit` first")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its readers raise
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); delete it to start again") from error
    if not isinstance(state, dict) or "identity" not in state:
        raise CheckpointError(f"{path} is no checkpoint of this trainer; delete it to start again")
    known = _without_epochs(state["identity"], identity)
    if known != identity:
        changed = [key for key in identity if known.get(key) != identity[key]]
        raise CheckpointError(
            f"{path} was made with other settings ({', '.join(changed)}); use --fresh or another --run"
        )
    return state


def _without_epochs(saved: Any, wanted: Any) -> Any:
    """An identity without the numbers of epochs that the wanted one lacks: a finished stage may be trained longer."""
    if not (isinstance(saved, dict) and isinstance(wanted, dict)):
        return saved
    return {
        key: _without_epochs(value, wanted.get(key)) for key, value in saved.items() if key != "epochs" or key in wanted
    }


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a file beside the old one, then replace it.

    Raises:
        DiskError: The old file is then still whole.
    """
    partial = path.with_name(path.name + ".part")
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def stage_seconds(folder: Path) -> dict[str, float]:
    """Training time of each finished stage in `folder`, in seconds."""
    states = {
        path.stem: torch.load(path, map_location="cpu", weights_only=True) for path in sorted(folder.glob("*.pt"))
    }
    return {name: round(state["seconds"], 1) for name, state in states.items() if state.get("finished")}


def trained_epochs(path: Path) -> int | None:
    """The number of epochs that a checkpoint has begun; None without a readable checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(state["epochs"])
    except Exception:  # noqa: BLE001  # `read_checkpoint` reports what is wrong
        return None


def read_trained(path: Path, identity: dict[str, Any], module: Module) -> Module:
    """Load into `module` the weights that a finished stage kept in `path`: their moving average, or the last.

    Raises:
        CheckpointError: As `read_checkpoint`, and where the stage is unfinished.
    """
    state = read_checkpoint(path, identity, next(module.parameters()).device)
    if not state["finished"]:
        raise CheckpointError(f"{path} is of an unfinished run; run `python -m training fit` again to resume it")
    weights = state["module"]
    if state.get("kept", "averaged") == "averaged":
        prefix = "module."
        weights = {name.removeprefix(prefix): one for name, one in state["averaged"].items() if name.startswith(prefix)}
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


def write_trained(path: Path, identity: dict[str, Any], module: nn.Module, *, epochs: int, seconds: float) -> None:
    """Write a module as `read_trained` reads it.

    Args:
        path: The file.
        identity: The settings that it belongs to.
        module: With its last weights.
        epochs: Passes over the images.
        seconds: How long it was trained.

    Raises:
        DiskError: The file cannot be written.
    """
    told = {"identity": identity, "finished": True, "kept": "last", "epochs": epochs, "seconds": seconds}
    write_checkpoint(path, {**told, "module": module.state_dict()})


def disk_error(path: Path, error: Exception) -> DiskError:
    """The error for a file of a run that cannot be written."""
    return DiskError(f"cannot write {path} ({error}); make room and run the same command again to resume")
