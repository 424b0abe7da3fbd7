"""Settings: environment variables with the prefix VAE_, or flags of `python -m service`; a typo is an error."""

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
NOT_OURS = {"VAE_DATA"}  # where the tests find real data; often set in the same shell
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
OWN = {"docs", "health", "metrics", "openapi.json", "v1"}
"""Where paths of the service begin."""


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
    """Whether a proxy may serve the service under this path: plain, and not to be taken for one of its own paths."""
    return bool(PLAIN_PATH(path)) and path.split("/", 2)[1] not in OWN


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
    """A URL as it is, anything else as a path."""
    return Path(value) if isinstance(value, str) and "://" not in value else value


OPTIONS_EXAMPLE = 'VAE_MODELS_OPTIONS={"endpoint_url": "https://store.example"}'
Rate = Annotated[str, AfterValidator(_rate)]
Proxies = Annotated[str, AfterValidator(_proxies)]
RootPath = Annotated[str, AfterValidator(_root_path)]
Hosts = Annotated[str, AfterValidator(_hosts)]
Versions = Annotated[str, AfterValidator(_versions)]
Location = Annotated[Path | str, BeforeValidator(_located)]


class Settings(BaseSettings):
    """Everything an operator may set. VAE_MAX_ROWS sets max_rows, and so on."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", cli_prog_name="vae-serve", cli_kebab_case=True,
        use_attribute_docstrings=True,
    )  # fmt: skip

    models: Location = Path("models")
    """The model repository: <name>/<version>/manifest.json in a folder, or at a URL that fsspec opens (s3://bucket/x)."""
    models_options: dict[str, Any] = {}
    """Of the file system behind such a URL, in JSON: {"endpoint_url": "..."} names another store than Amazon's."""
    cache: str = ""
    """Where models from a URL are kept; empty is a folder of this user's in the temporary folder."""
    default_model: str = ""
    """The model that /v1/<operation> means; empty is the only one, or the one that the file `default` beside the models
    names."""
    versions: Versions = "all"
    """Versions that are served: `all`, `latest`, or a list such as `mnist:2,mnist:3,mnist-2d:latest`; models that a
    list does not name are not served. Requests that name no version get the latest that is served."""
    model_control: bool | Literal["anonymous"] = False
    """Whether models may be loaded and unloaded over HTTP: `true` by API keys with the right `control`, `anonymous` by
    whoever may call, where no keys are asked for."""
    poll_s: Annotated[float, Field(ge=0)] = 0.0
    """How often the folder is looked through for new versions; 0 is never."""
    load_limit_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """How long opening and replaying one version may take before it is refused."""
    load_memory_bytes: Annotated[int, Field(ge=2**26)] = 4 * 2**30
    """Memory that opening one version may take before it is refused; never more than is free."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    unix_socket: str = ""
    """Path of a unix socket to listen on, with mode 0660. A file that nobody listens on is replaced, and the file is
    removed at the end. The port is then bound only where VAE_PORT is set too."""
    execution_provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` is CUDA where this onnxruntime has it, else the CPU."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that serve; each has its own models and batches. One that dies is replaced, also where there is one."""
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
    """A batch that takes longer is stuck: its callers are answered 500, readiness turns false, and the worker ends and
    is replaced."""
    loop_limit_s: Annotated[float, Field(gt=0)] = 10.0
    """A worker whose event loop stands still for longer is killed and replaced; its stacks are logged."""
    drain_s: Annotated[float, Field(ge=0)] = 2.0
    """How long requests are still accepted after SIGTERM, while readiness is false and balancers turn away."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**20
    """Size of a request's body."""
    max_json_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    """Size of a JSON body, which holds up all other requests of its worker while it is parsed; binary forms do not."""
    max_request_rows: Annotated[int, Field(ge=1)] = 16384
    """Rows in one request, sampled rows included; those above max_rows are run in several batches."""
    max_draws: Annotated[int, Field(ge=1)] = 64
    """Posterior draws a row may ask for."""
    max_pixels: Annotated[int, Field(ge=1, le=89_478_485)] = 16 * 2**20
    """Pixels in the PNG, JPEG and WebP files of one request, checked before they are decoded."""
    memory_bytes: Annotated[int, Field(ge=2**20)] = 512 * 2**20
    """What the requests under way may take together in each worker, by an estimate of bodies, rows and answers: one
    that alone needs more is answered 413, one that others leave no room for 503."""
    max_url_bytes: Annotated[int, Field(ge=256)] = 8192
    """Path and query of a request."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 32768
    """Names and values of a request's headers, all together."""
    max_headers: Annotated[int, Field(ge=8)] = 100
    """Headers in one request."""
    max_connections: Annotated[int, Field(ge=1)] = 4096
    """Open connections of each worker; those above it are answered for health alone, anything else with 503."""
    max_connections_per_address: Annotated[int, Field(ge=0, le=65535)] = 0
    """Open connections of one client address, over all workers; 0 is any number. An IPv6 network of 64 bits counts as
    one address, and trusted proxies are not counted."""
    head_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """How long a connection may take to send its first request's line and headers, or those of one it has begun."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long a body may take to arrive."""
    answer_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a caller may read nothing of an answer before the connection is cut."""
    keep_alive_s: Annotated[float, Field(gt=0)] = 5.0
    """How long a connection may be idle between requests; behind a proxy, longer than the proxy keeps it."""
    api_keys: str = ""
    """File of API keys, read again when it changes; empty asks nobody for one."""
    allow_anonymous: bool = False
    """Whether an address that other machines can reach may be served without API keys; control stays closed."""
    anonymous_rate: Rate = ""
    """Without API keys, how often each client address may call, as in `100/minute` or `5/second,1000/hour`."""
    anonymous_concurrency: Annotated[int, Field(ge=0)] = 0
    """Without API keys, calls of a client address at the same time; 0 is any number."""
    open_rate: Rate = "30/second"
    """Without a known API key, how often each client address may ask for /docs, /openapi.json and /metrics, and how
    often it may be told that its key is not known; empty is any number."""
    allowed_hosts: Hosts = ""
    """Names in the Host header, with commas, that are answered besides localhost, IP addresses and this machine's own:
    `vae.example`, `*.example`, or `*` for any. Requests with a known API key or from a trusted proxy may have any."""
    docs: bool = True
    """Whether /docs and /openapi.json are served, to anybody."""
    ops_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port for /health and /metrics, which then leave the main one; 0 takes a free one."""
    trusted_proxies: Proxies = ""
    """Addresses or networks, with commas, whose X-Forwarded-For, -Proto and -Prefix are believed."""
    root_path: RootPath = ""
    """Path under which a proxy serves this service, as in `/vae`, whether the proxy removes it or not."""
    cors_origins: str = ""
    """Origins, with commas, whose pages may call from a browser; `*` is every one. Other pages cannot POST."""
    tls_certificate: str = ""
    """PEM file of the certificate and its chain; empty serves plain HTTP."""
    tls_key: str = ""
    """PEM file of the certificate's key; empty finds it in the certificate's file."""
    access_log: bool = False
    """Whether every request is logged."""
    log_format: Literal["text", "json"] = "text"
    """How the log is written; `json` is one object a line, on standard output."""
    tracing: bool = False
    """Whether requests are traced by OpenTelemetry; OTEL_EXPORTER_OTLP_ENDPOINT names the collector."""

    @property
    def binds_port(self) -> bool:
        """Whether `port` is listened on."""
        return not self.unix_socket or "port" in self.model_fields_set


def split(value: str) -> list[str]:
    """What a setting names with commas between."""
    return [name.strip() for name in value.split(",") if name.strip()]


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the environment and, before it, from command-line flags (None reads no flags).

    Raises: StartError in one line for an unknown variable or a value that does not fit.
    """
    forget_kubernetes()
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
        raise StartError("; ".join(" ".join(said.split()) for said in problems)) from error
    except (SettingsError, RecursionError) as error:  # RecursionError: brackets in brackets
        cause = error.__cause__
        where = f" ({cause.msg} at character {cause.pos})" if isinstance(cause, json.JSONDecodeError) else ""
        raise StartError(f"{PREFIX}MODELS_OPTIONS is not JSON{where}; an example: {OPTIONS_EXAMPLE}") from error


def forget_kubernetes() -> list[str]:
    """Remove from the environment what Kubernetes has set for services, which is no setting of ours; gives the names.

    Name and value must both have Kubernetes' form, so that a misspelt setting is still an error. VAE_PORT=tcp://... is
    such a variable, VAE_PORT=8000 is a setting.
    """
    found = [
        name
        for name, value in os.environ.items()
        if any(of_name.fullmatch(name) and of_value.fullmatch(value) for of_name, of_value in KUBERNETES)
    ]
    for name in found:
        del os.environ[name]
    return sorted(found)
