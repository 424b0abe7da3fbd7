"""What onnxruntime itself answers: a server that answers something else, however quickly, does not count."""

from __future__ import annotations

import numpy as np

from benchmarks.bodies import LEVEL, Form, Images
from benchmarks.peers.model import Denoiser, Model
from benchmarks.servers import Server

TOLERANCE = 1e-3


class WrongAnswer(Exception):
    """A server's answer is not the model's; the message says by how much."""


class Truth:
    """The answers of one model folder."""

    def __init__(self, folder: str) -> None:
        self._reconstruct, self._denoise = Model(folder), Denoiser(folder)

    def check(self, server: Server, body: str, form: Form, rows: Images) -> None:
        """Ask once and compare, to 1e-3 beyond the rounding of the form.

        Raises: WrongAnswer.
        """
        status, content = server.ask(form.ask(rows))
        if status != 200:
            raise WrongAnswer(f"status {status}: {content[:100].decode(errors='replace')}")
        wanted = self._denoise(rows, LEVEL) if body == "png" else self._reconstruct(rows)
        try:
            found = form.read(content).reshape(wanted.shape)
        except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
            raise WrongAnswer(f"an answer that cannot be read: {error!r:.100}") from error
        difference = float(np.abs(found - wanted).max())
        if not difference <= TOLERANCE + form.step / 2.0:
            raise WrongAnswer(f"it differs from onnxruntime's answer by {difference:.2g}")
