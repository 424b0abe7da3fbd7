"""Checks servers' answers against onnxruntime: a wrong answer does not count, however fast."""

from __future__ import annotations

import numpy as np

from benchmarks.bodies import LEVEL, Form, Images
from benchmarks.peers.model import Denoiser, Model
from benchmarks.servers import Server

TOLERANCE = 1e-3


class WrongAnswer(Exception):
    """A server's answer differs from the model's; the message has the difference."""


class Truth:
    """Reference answers of one model folder."""

    def __init__(self, folder: str) -> None:
        self._reconstruct, self._denoise = Model(folder), Denoiser(folder)

    def check(self, server: Server, body: str, form: Form, rows: Images) -> None:
        """Send one request and compare, to 1e-3 beyond the format's rounding.

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
