"""Settings: environment variables with the prefix VAE_, or flags of `python -m service`. Unknown names are errors."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from limits import parse_many
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from service.errors import StartError

PREFIX = "VAE_"
OTHER_VARIABLES = {"VAE_DATA"}  # the tests' data folder, often set in the same shell
CLIENT_PREFIX = "VAE_CLIENT_"
"""Beginning of the variables of the client, which may be set in the same shell."""
_NUMBER = r"\d{1,5}"
_ADDRESS = r"[\d.]+|[\da-f:]+"
_URL = r"(?:tcp|udp|sctp)://(?:[\d.]+|\[[\da-f:]+\]):\d{1,5}"
KUBERNETES = tuple(
    (re.compile(rf"{PREFIX}(?:[A-Z0-9_]+_)?{name}"), re.compile(value))
    for name, value in (
        ("SERVICE_HOST", _ADDRESS),
        ("SERVICE_PORT(?:_[A-Z0-9_]+)?", _NUMBER),
        ("PORT", _URL),
        (rf"PORT_{_NUMBER}_(?:TCP|UDP|SCTP)", _URL),
        (rf"PORT_{_NUMBER}_(?:TCP|UDP|SCTP)_PROTO", "tcp|udp|sctp"),
        (rf"PORT_{_NUMBER}_(?:TCP|UDP|SCTP)_PORT", _NUMBER),
        (rf"PORT_{_NUMBER}_(?:TCP|UDP|SCTP)_ADDR", _ADDRESS),
    )
)
"""Names and values of the variables that Kubernetes sets in every pod for a service named `vae` or `vae-*`."""

PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9_.~-]*){1,8}", re.ASCII).fullmatch
HOST_PATTERN = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*", re.ASCII).fullmatch
OWN_PATHS = {"diffusers", "docs", "health", "metrics", "openapi.json", "page", "v1", "v2"}
"""First parts of the service's own paths."""


def _rate(value: str) -> str:
    if value:
        parse_many(value)
    return value


def _proxies(value: str) -> str:
    for name in split(value):
        if name != "*":
            ipaddress.ip_network(name)
    return value


def _root_path(value: str) -> str:
    path = value.rstrip("/")
    if path and not is_prefix(path):
        raise ValueError(
            "a root path is a slash and plain names, as in /vae or /apps/vae, and none of the service's own paths"
        )
    return path


def is_prefix(path: str) -> bool:
    """Return whether a proxy may serve the service under this path: plain, and not a path of the service itself."""
    return bool(PLAIN_PATH(path)) and path.split("/", 2)[1] not in OWN_PATHS


def _hosts(value: str) -> str:
    for pattern in split(value):
        if not HOST_PATTERN(pattern):
            raise ValueError(f"{pattern} is not a host name; write vae.example without a port, *.example or *")
    return value


def _versions(value: str) -> str:
    for entry in () if value in ("all", "latest") else value.split(","):
        if not all(entry.partition(":")):
            raise ValueError(f"{entry!r} is not `model:version`; say all, latest, or model:version,model:version")
    return value


def _located(value: Any) -> Any:
    """Convert to a path, unless it is a URL."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


OPTIONS_EXAMPLE = 'VAE_MODELS_OPTIONS={"endpoint_url": "https://store.example"}'
Rate = Annotated[str, AfterValidator(_rate)]
Proxies = Annotated[str, AfterValidator(_proxies)]
RootPath = Annotated[str, AfterValidator(_root_path)]
Hosts = Annotated[str, AfterValidator(_hosts)]
Versions = Annotated[str, AfterValidator(_versions)]
Location = Annotated[Path | str, BeforeValidator(_located)]


class Settings(BaseSettings):
    """All settings of the service. The variable VAE_MAX_ROWS sets `max_rows`, and so on."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", cli_prog_name="vae-serve", cli_kebab_case=True,
        use_attribute_docstrings=True,
    )  # fmt: skip

    models: Location = Path("models")
    """The model repository, with <name>/<version>/manifest.json: a folder, or a URL for fsspec such as
    s3://bucket/x."""
    models_options: dict[str, Any] = {}
    """Options of fsspec for a URL in VAE_MODELS, in JSON: {"endpoint_url": "..."} names an S3 store other than
    Amazon's."""
    cache: str = ""
    """Folder for models from a URL; empty is a folder of this user in the temporary folder."""
    default_model: str = ""
    """The models of /v1/<operation>: one for every operation, as in `mnist`, and others for some, as in
    `mnist,sample=mnist-2d`; empty is the only model, or what the file `default` beside the models says."""
    versions: Versions = "all"
    """Versions to serve: `all`, `latest`, or a list such as `mnist:2,mnist:3,mnist-2d:latest`. Models that a list does
    not name are not served. Requests that name no version use the latest served one."""
    model_control: bool | Literal["anonymous"] = False
    """Who may load and unload models over HTTP: with `true`, API keys with the right `control`; with `anonymous`, every
    caller if no keys are required."""
    poll_s: Annotated[float, Field(ge=0)] = 0.0
    """Interval at which the folder is searched for new versions; 0 is never."""
    load_limit_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Longest time to open and replay one version; a slower one is refused."""
    load_memory_bytes: Annotated[int, Field(ge=2**26)] = 4 * 2**30
    """Maximum memory to open one version, and never more than is free; a larger one is refused."""
    model_public_keys: str = ""
    """PEM files of Ed25519 public keys, separated by commas and read again at every load. Versions that none of these
    keys has signed are refused; if empty, no signature is checked."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    unix_socket: str = ""
    """Path of a unix socket to listen on, with mode 0660. An unused socket file is replaced, and the file is removed at
    the end. The port is then bound only if VAE_PORT is set too."""
    execution_provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` is CUDA if this onnxruntime has it, else the CPU."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Worker processes; each has its own models and batches. A worker that ends is replaced, even a single one."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of a model; 0 divides the CPUs of this machine, or of the container's quota, among the workers."""
    max_rows: Annotated[int, Field(ge=1)] = 64
    """Maximum rows in one batch."""
    queue_rows: Annotated[int, Field(ge=1)] = 4096
    """Maximum rows in the queue, where a request of several batches counts as one row; beyond it requests get 503."""
    linger_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """How long the first row of a batch waits for further rows; 0 is usually best."""
    inline_us: Annotated[float, Field(ge=0)] = 2000.0
    """Batches that take less than this many microseconds run in the event loop, others in a thread."""
    # On one CPU a photograph of 24 megapixels takes 45 to 100 s.
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time to answer a request, after which it gets 504; X-Timeout-Ms can only shorten it."""
    long_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """The same for a request whose answer streams its progress (text/event-stream, application/x-ndjson)."""
    batch_limit_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest time of a batch. After it the callers get 500, readiness turns false, and the worker is replaced."""
    loop_limit_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time that an event loop may be blocked. After it the worker's stacks are logged and it is replaced."""
    drain_s: Annotated[float, Field(ge=0)] = 2.0
    """How long requests are still accepted after SIGTERM, while readiness is false and load balancers stop sending."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**20
    """Maximum bytes in the body of a request."""
    max_json_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    """Maximum bytes in a JSON body. Parsing JSON blocks the other requests of a worker; binary formats do not."""
    max_request_rows: Annotated[int, Field(ge=1)] = 16384
    """Maximum rows in one request, including sampled rows; more than VAE_MAX_ROWS run in several batches."""
    max_draws: Annotated[int, Field(ge=1)] = 64
    """Maximum posterior draws a row."""
    max_pixels: Annotated[int, Field(ge=1, le=89_478_485)] = 32 * 2**20
    """Maximum pixels in the image files of one request, checked before they are decoded."""
    tile_pixels: Annotated[int, Field(ge=2**12)] = 2**20
    """Images of free size above this many pixels are worked off in overlapping tiles of at most this many, which bounds
    their memory."""
    memory_bytes: Annotated[int, Field(ge=2**20)] = 512 * 2**20
    """Maximum memory of all requests under way in a worker, estimated from bodies, rows and answers. A request that
    needs more on its own gets 413; one that must wait for others gets 503."""
    max_url_bytes: Annotated[int, Field(ge=256)] = 8192
    """Maximum bytes in the path and query of a request."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32768
    """Maximum bytes in the names and values of all headers of a request."""
    max_headers: Annotated[int, Field(ge=8)] = 100
    """Maximum headers in a request."""
    max_connections: Annotated[int, Field(ge=1)] = 4096
    """Maximum open connections of each worker; further ones are answered for health checks only, and with 503
    otherwise."""
    max_connections_per_address: Annotated[int, Field(ge=0, le=65535)] = 0
    """Maximum open connections of one client address, over all workers; 0 is any number. An IPv6 /64 network counts as
    one address, and trusted proxies are not counted."""
    head_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time to send the request line and headers, from the start of the connection or of a later request."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time to send a body."""
    answer_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a caller may read nothing of an answer before its connection is closed."""
    keep_alive_s: Annotated[float, Field(gt=0)] = 5.0
    """How long a connection may be idle between requests. Behind a proxy, set it above the proxy's own limit."""
    api_keys: str = ""
    """File of API keys, read again when it changes; if empty, no key is required."""
    allow_anonymous: bool = False
    """Whether to serve without API keys on an address that other machines can reach. Loading models stays forbidden."""
    anonymous_rate: Rate = ""
    """Without API keys, the rate limit of each client address, as in `100/minute` or `5/second,1000/hour`."""
    anonymous_concurrency: Annotated[int, Field(ge=0)] = 0
    """Without API keys, maximum concurrent calls of each client address; 0 is any number."""
    open_rate: Rate = "30/second"
    """Without a known API key, the rate limit of each client address for /, /docs, /openapi.json and /metrics, and
    for answers that refuse a key; empty is no limit."""
    allowed_hosts: Hosts = ""
    """Accepted names in the Host header, separated by commas, besides localhost, IP addresses and this machine's name:
    `vae.example`, `*.example`, or `*` for any. Requests with a known API key or from a trusted proxy may use any
    name."""
    docs: bool = True
    """Whether to serve /docs and /openapi.json, which need no key."""
    page: bool = True
    """Whether to serve the page for people at /, which needs no key; what it asks for does."""
    ops_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Separate port for /health and /metrics, which are then absent from the main port; 0 takes a free one."""
    trusted_proxies: Proxies = ""
    """Addresses or networks of proxies, separated by commas, whose X-Forwarded-For, -Proto and -Prefix are trusted."""
    root_path: RootPath = ""
    """Path under which a proxy serves this service, as in `/vae`, whether the proxy removes it or not."""
    cors_origins: str = ""
    """Origins, separated by commas, whose pages may call from a browser; `*` is every origin. Other pages cannot
    POST."""
    tls_certificate: str = ""
    """PEM file of the certificate and its chain; empty serves plain HTTP."""
    tls_key: str = ""
    """PEM file of the certificate's key; empty if the certificate's file contains it."""
    access_log: bool = False
    """Whether to log every request."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log; `json` is one object a line, on standard output."""
    tracing: bool = False
    """Whether to trace requests with OpenTelemetry; OTEL_EXPORTER_OTLP_ENDPOINT names the collector."""

    @property
    def binds_port(self) -> bool:
        """Whether the service listens on `port`."""
        return not self.unix_socket or "port" in self.model_fields_set


def split(value: str) -> list[str]:
    """Split a setting at its commas."""
    return [name.strip() for name in value.split(",") if name.strip()]


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Read the settings from command-line flags and the environment; a flag takes precedence.

    Args:
        arguments: The flags; None reads the environment alone.

    Raises:
        StartError: A variable is unknown or a value is invalid; in one line.
    """
    forget_kubernetes()
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ.keys() - known - OTHER_VARIABLES):
        if name.startswith(PREFIX) and not name.startswith(CLIENT_PREFIX):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the settings are {', '.join(sorted(known))}"
            raise StartError(f"unknown setting {name}{hint}")
    try:
        return Settings(_cli_parse_args=False if arguments is None else arguments)
    except ValidationError as error:
        problems = [f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        raise StartError("; ".join(" ".join(problem.split()) for problem in problems)) from error
    except (SettingsError, RecursionError) as error:  # RecursionError: deeply nested brackets
        cause = error.__cause__
        where = f" ({cause.msg} at character {cause.pos})" if isinstance(cause, json.JSONDecodeError) else ""
        raise StartError(f"{PREFIX}MODELS_OPTIONS is not JSON{where}; an example: {OPTIONS_EXAMPLE}") from error


def forget_kubernetes() -> list[str]:
    """Remove variables that Kubernetes sets for services from the environment.

    Name and value must both have Kubernetes' form, so that a misspelt setting is still an error: VAE_PORT=tcp://... is
    removed, VAE_PORT=8000 is a setting.

    Returns:
        The names of the removed variables.
    """
    found = [
        name
        for name, value in os.environ.items()
        if any(of_name.fullmatch(name) and of_value.fullmatch(value) for of_name, of_value in KUBERNETES)
    ]
    for name in found:
        del os.environ[name]
    return sorted(found)
