"""Settings: environment variables with the prefix VAE_, or flags of `python -m service`; a typo is an error."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import StartError

PREFIX = "VAE_"
NOT_OURS = {"VAE_DATA"}  # where the tests find real data; often set in the same shell


class Settings(BaseSettings):
    """Everything an operator may set. VAE_MAX_ROWS sets max_rows, and so on."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", cli_prog_name="vae-serve", cli_kebab_case=True,
        use_attribute_docstrings=True,
    )  # fmt: skip

    models: Path = Path("models")
    """The model repository: <name>/<version>/manifest.json."""
    default_model: str = ""
    """The model that /v1/<operation> means; empty is the first by name."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    execution_provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` is CUDA where this onnxruntime has it, else the CPU."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that serve; each has its own models and batches. One that dies is replaced."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads a model may use; 0 shares the CPUs of this machine, or of the container's quota, among the workers."""
    max_rows: Annotated[int, Field(ge=1)] = 64
    """Rows in one batch."""
    queue_rows: Annotated[int, Field(ge=1)] = 4096
    """Rows that may wait, a request of many batches counting as one; above it requests are answered 503."""
    linger_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long the first row waits for company; 0 is never, and usually best."""
    inline_us: Annotated[float, Field(ge=0)] = 2000.0
    """Batches that cost less than this many microseconds run in the event loop, the others in a thread."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a request may wait before it is answered 504; X-Timeout-Ms can only shorten it."""
    batch_limit_s: Annotated[float, Field(gt=0)] = 60.0
    """A batch that takes longer is stuck: its callers are answered 500, readiness turns false, and the process ends, to
    be started anew by VAE_WORKERS or by whatever keeps it running."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**20
    """Size of a request's body."""
    max_request_rows: Annotated[int, Field(ge=1)] = 16384
    """Rows in one request, sampled rows included; those above max_rows are run in several batches."""
    max_draws: Annotated[int, Field(ge=1)] = 64
    """Posterior draws a row may ask for."""
    max_pixels: Annotated[int, Field(ge=1, le=89_478_485)] = 16 * 2**20
    """Pixels in the PNG, JPEG and WebP files of one request, checked before they are decoded."""
    memory_bytes: Annotated[int, Field(ge=2**20)] = 512 * 2**20
    """What the requests under way may take together in each worker, by an estimate of bodies, rows and answers: one
    that alone needs more is answered 413, one that others leave no room for 503."""
    access_log: bool = False
    """Whether every request is logged."""

    def to_environment(self) -> dict[str, str]:
        """The same settings as environment variables, for worker processes."""
        return {PREFIX + name.upper(): str(value) for name, value in self.model_dump(mode="json").items()}


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the environment and, before it, from command-line flags (None reads no flags).

    Raises: StartError in one line for an unknown variable or a value that does not fit.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ.keys() - known - NOT_OURS):
        if name.startswith(PREFIX):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the settings are {', '.join(sorted(known))}"
            raise StartError(f"unknown setting {name}{hint}")
    try:
        return Settings(_cli_parse_args=False if arguments is None else arguments)
    except ValidationError as error:
        problems = [f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        raise StartError("; ".join(problems)) from error
