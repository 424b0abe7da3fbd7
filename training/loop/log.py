"""The log of a run: one JSON object a line, and the same figures for TensorBoard where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.extras import needed
from training.loop.checkpoint import disk_error

PLACES = frozenset({"stage", "step"})
"""Keys of a record that are no figures."""


class Log:
    """Lines appended to a file, unbuffered, so that closing it cannot fail.

    Args:
        path: The file.
        board: Folder of this stage's TensorBoard events; None writes none.
        step: The step that the log goes on from; events of later steps, which an interrupted run left, are dropped.

    Raises:
        DiskError: The file cannot be opened.
        DependencyError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path, board: Path | None = None, step: int = 0) -> None:
        self.path = path
        self.board = None
        if board is not None:
            self.board = needed("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(board), purge_step=step)
        try:
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise disk_error(path, error) from error

    def close(self) -> None:
        """Close the file, and TensorBoard's."""
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line: `stage`, `step` and figures.

        Raises:
            DiskError: The disk is full.
        """
        try:
            self.file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise disk_error(self.path, error) from error
        if self.board is not None:
            for name, value in record.items():
                if name not in PLACES:
                    self.board.add_scalar(name, value, record["step"])

    def show(self, sheet: Image.Image, step: int) -> None:
        """Write a sheet of images for TensorBoard; the log itself holds no pictures."""
        if self.board is not None:
            self.board.add_image("sheet", np.atleast_3d(np.asarray(sheet)), step, dataformats="HWC")
