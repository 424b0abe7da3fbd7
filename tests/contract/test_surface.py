"""Every private or undocumented part of another package that the project uses, with the form it is used in.

When an upgrade breaks this file, read what the package changed, adapt the file of ours that the entry names, and only
then the entry and the bounds in pyproject.toml.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client.metrics
import prometheus_client.values
import pytest
import uvicorn
from fastapi import FastAPI
from httptools import HttpParserCallbackError, HttpRequestParser
from packaging.requirements import Requirement
from packaging.version import Version
from starlette.middleware import Middleware
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.server.application import Application, DirectRoutes
from service.server.protocol import Cycle, Protocol
from service.server.worker import Server

ROOT = Path(__file__).parents[2]
BOUNDED = {"fastapi", "httptools", "limits", "prometheus-client", "starlette", "uvicorn"}
"""Packages whose next minor version may break what is listed here."""

SIGNATURES = {
    # service/server/protocol.py
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol": {
        "__init__": "self, config, server_state, app_state, _loop=None",
        "_unset_keepalive_if_required": "self",
        "connection_lost": "self, exc",
        "connection_made": "self, transport",
        "data_received": "self, data",
        "on_body": "self, body",
        "on_headers_complete": "self",
        "on_message_complete": "self",
        "on_response_complete": "self",
        "pause_writing": "self",
        "resume_writing": "self",
        "timeout_keep_alive_handler": "self",
    },
    "uvicorn.protocols.http.httptools_impl:RequestResponseCycle": {"receive": "self", "send": "self, message"},
    "uvicorn.protocols.http.flow_control:FlowControl": {"resume_reading": "self"},
    # service/server/worker.py
    "uvicorn.server:Server": {
        "__init__": "self, config",
        "capture_signals": "self",
        "on_tick": "self, counter",
        "serve": "self, sockets=None",
        "shutdown": "self, sockets=None",
    },
    "uvicorn.config:Config": {"get_loop_factory": "self", "load": "self"},
    # service/server/application.py
    "fastapi.applications:FastAPI": {"build_middleware_stack": "self"},
    "starlette.routing:Route": {"matches": "self, scope"},
    # service/observability/shared_values.py
    "prometheus_client.values:MutexValue": {
        "__init__": "self, typ, metric_name, name, labelnames, labelvalues, help_text, **kwargs",
        "get": "self",
        "get_exemplar": "self",
        "inc": "self, amount",
        "set": "self, value, timestamp=None",
        "set_exemplar": "self, exemplar",
    },
    # training/export/onnx_library.py, which holds torch's `from_torchlib`: an export in this process replaces it
    "torch.onnx._internal.exporter._registration:ONNXRegistry": {"__init__": "self"},
    "training.export.onnx_library:_compile": {"": "opset_version=18"},
    # training/distributions/poisson_gaussian.py
    "torch._higher_order_ops:scan": {"": "combine_fn, init, xs, *, dim=0, reverse=False"},
    # training/inference/refinement.py
    "torch.fx.experimental.proxy_tensor:make_fx": {
        "": "f, decomposition_table=None, tracing_mode='real', _allow_non_fake_inputs=False, *, "
        "pre_dispatch=False, record_module_stack=False, _allow_fake_constant=False, _error_on_data_dependent_ops=True, "
        "record_stack_traces=False, proxy_module_inputs=False, _disable_torch_fn_metadata_mode=False"
    },
}
"""Parameters of the functions and methods that are called or overridden, by class or function."""

BODIES = {
    # Overridden by copies with changes: what the original does must be looked at again when it changes.
    "fastapi.applications:FastAPI.build_middleware_stack": "4d76b65957b20f90",
    "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol.data_received": "010a7ae59a5d3b1a",
    "uvicorn.protocols.http.httptools_impl:RequestResponseCycle.send": "abdd8601b326a8da",
    "uvicorn.server:Server.capture_signals": "e1bbcd4770d1c887",
    "uvicorn.server:Server.shutdown": "9b33c50562992b1e",
}
"""Digests of the source of methods that ours replace."""

PRIVATE = {
    "service/process.py": {"logging._srcfile"},
    "training/distributions/poisson_gaussian.py": {"torch._higher_order_ops"},
    "training/export/onnx_library.py": {"torch.onnx._internal.exporter._registration"},
    "training/loop/optimisers.py": {"torch._foreach_lerp", "torch._foreach_lerp_"},
    "training/loop/trainer.py": {"torch._foreach_lerp_"},
}
"""Attributes and modules with a leading underscore, by the file that uses them."""

INHERITED = {
    Protocol: {
        "_unset_keepalive_if_required", "app_state", "client", "connections", "cycle", "expect_100_continue", "flow",
        "headers", "loop", "on_body", "on_message_complete", "on_response_complete", "parser", "pipeline", "scope",
        "server", "server_state", "timeout_keep_alive", "transport", "url",
    },
    Cycle: {
        "default_headers", "disconnected", "flow", "keep_alive", "message_event", "on_response", "response_complete",
        "response_started", "transport", "waiting_for_100_continue",
    },
    Server: {"config", "server_state", "servers", "should_exit"},
    Application: {"middleware_stack", "openapi_schema", "router", "user_middleware"},
}  # fmt: skip
"""Attributes that a class of ours uses and does not define, so that its foreign base must."""


def found(path: str) -> Any:
    """What a path such as `package.module:Class.method` names."""
    module, _, names = path.partition(":")
    value: Any = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        value = getattr(value, name)
    return value


def parameters(function: Any) -> str:
    """A function's parameters without annotations."""
    signature = inspect.signature(function)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))[1:-1]


@pytest.mark.parametrize("path", SIGNATURES)
def test_functions_take_the_same_parameters(path: str) -> None:
    """What is called or overridden has the signature that our calls and overrides have."""
    for name, expected in SIGNATURES[path].items():
        function = found(f"{path}.{name}".rstrip("."))
        assert parameters(function) == expected, f"{path}.{name}"


@pytest.mark.parametrize("path", BODIES)
def test_methods_that_ours_replace_are_unchanged(path: str) -> None:
    """A method of which ours holds a changed copy does what it did when the copy was made."""
    digest = hashlib.sha256(inspect.getsource(found(path)).encode()).hexdigest()[:16]
    assert digest == BODIES[path], f"{path} has changed: compare it with ours, then note {digest}"


def made() -> dict[type, Any]:
    """An object of each foreign class of which a class of ours inherits."""
    config = uvicorn.Config(FastAPI(), log_config=None)
    state = ServerState()

    async def protocol() -> HttpToolsProtocol:
        protocol = HttpToolsProtocol(config, state, {}, asyncio.get_running_loop())
        protocol.on_message_begin()
        return protocol

    one = asyncio.run(protocol())
    cycle = RequestResponseCycle(
        one.scope, one.transport, one.flow, one.logger, one.access_logger, access_log=False, default_headers=[],
        message_event=asyncio.Event(), expect_100_continue=False, keep_alive=True, on_response=print,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.servers = []  # set when it starts
    return {Protocol: one, Cycle: cycle, Server: server, Application: FastAPI()}


def used_of_self(kind: type) -> set[str]:
    """Attributes of `self` and `super()` that the source of a class names and does not define."""
    tree = ast.parse(inspect.getsource(kind))
    names, own = set(), {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            names.add(node.attr)
    return names - own


@pytest.mark.parametrize("kind", INHERITED, ids=lambda kind: kind.__name__)
def test_inherited_attributes_are_there_and_named(kind: type) -> None:
    """A class of ours uses of its foreign base what is listed, and the base still has it."""
    base = made()[kind]
    theirs = set(dir(base))
    assert INHERITED[kind] <= theirs, "the base has lost these"
    assert used_of_self(kind) & theirs == INHERITED[kind], "list what is used, and nothing else"


def test_no_attribute_of_ours_hides_one_of_theirs() -> None:
    """What our classes set for themselves has names that their foreign bases do not use."""
    counted = 0
    for kind, base in made().items():
        source = inspect.getsource(kind)
        own = set(re.findall(r"self\.(_\w+)(?:: [^=]+)? = ", source)) | set(re.findall(r"def (_[a-z]\w+)", source))
        counted += len(own)
        assert not own & set(dir(base)), kind
    assert counted > 20


def test_objects_have_the_form_that_is_relied_on() -> None:
    """Fields of foreign objects that our files read or set are there, with the types that they rely on."""
    objects = made()
    cycle, protocol = objects[Cycle], objects[Protocol]
    assert {"body", "more_body", "keep_alive", "transport", "on_response", "receive"} <= set(dir(cycle))
    assert isinstance(protocol.connections, set)
    assert protocol.connections is protocol.server_state.connections
    assert isinstance(protocol.server_state.default_headers, list)
    assert isinstance(objects[Server].config.encoded_headers, list)
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    assert {"read_paused", "write_paused"} <= vars(FlowControl(None)).keys()  # type: ignore[arg-type]
    parser = HttpRequestParser(object())
    assert all(callable(getattr(parser, name)) for name in ("feed_data", "get_http_version", "get_method"))
    assert issubclass(HttpParserCallbackError, Exception)
    layer = Middleware(DirectRoutes, routes=[])  # type: ignore[arg-type]
    assert (layer.cls, layer.args, layer.kwargs) == (DirectRoutes, (), {"routes": []})
    assert vars(prometheus_client.metrics)["values"] is prometheus_client.values
    assert prometheus_client.values.MutexValue._multiprocess is False
    assert prometheus_client.values.ValueClass is prometheus_client.values.MutexValue


def test_torch_has_the_functions_that_it_does_not_document() -> None:
    """The fused moving average, and a registry of ONNX functions that can be copied."""
    torch = importlib.import_module("torch")
    registry = found("torch.onnx._internal.exporter._registration:ONNXRegistry")()
    values, targets = [torch.zeros(2)], [torch.ones(2)]
    assert torch._foreach_lerp(values, targets, 0.5)[0].tolist() == [0.5, 0.5]
    torch._foreach_lerp_(values, targets, 0.5)
    assert values[0].tolist() == [0.5, 0.5]
    assert isinstance(registry.functions, dict)


def private_names(source: str) -> Iterator[str]:
    """Attributes and modules with a leading underscore that a source takes of other packages."""
    tree, modules = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module not in (None, "__future__"):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules |= names
            yield from (node.module for _ in [0] if is_private(node.module))
            yield from (name for name in names.values() if is_private(name) and not is_private(node.module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            base = ast.unparse(node.value)
            if base.split(".")[0] in modules:
                yield f"{modules[base.split('.')[0]]}{base[len(base.split('.')[0]) :]}.{node.attr}"


def is_private(name: str | None) -> bool:
    """Whether a part of a dotted name begins with an underscore, and the name is not ours."""
    parts = (name or "").split(".")
    return parts[0] not in ("service", "training") and any(part.startswith("_") for part in parts)


def test_private_names_are_used_where_they_are_listed() -> None:
    """No other file of the service or the trainer uses a private name of another package."""
    used: dict[str, set[str]] = {}
    for path in sorted([*(ROOT / "service").rglob("*.py"), *(ROOT / "training").rglob("*.py")]):
        names = {name for name in private_names(path.read_text()) if name != "os._exit"}  # which is documented
        used |= {str(path.relative_to(ROOT)): names} if names else {}
    assert used == PRIVATE


def test_a_private_name_is_found() -> None:
    """By import, by attribute of a module or of an imported class; not one of an object of ours."""
    source = (
        "import torch._decomp as d\nimport logging\nfrom uvicorn._types import Scope\nfrom uvicorn import Server\n"
        "logging._srcfile = None\nServer._serve()\nself._mine\n"
    )
    assert {"uvicorn._types", "logging._srcfile", "uvicorn.Server._serve"} <= set(private_names(source))
    assert not any("_mine" in name for name in private_names(source))


def test_only_the_server_touches_uvicorn() -> None:
    """No file outside service/server imports uvicorn or httptools, or overrides parts of FastAPI and Starlette."""
    for path in sorted((ROOT / "service").rglob("*.py")):
        if path.parent.name == "server":
            continue
        tree = ast.parse(path.read_text())
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not {name.split(".")[0] for name in names} & {"uvicorn", "httptools"}, path
        bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
        assert not bases & {"FastAPI", "APIRoute", "APIRouter", "Starlette", "Route"}, path


def test_process_wide_switches_stand_in_one_file() -> None:
    """Only service/process.py imports what changes a whole process, and sets signal masks and the switch interval."""
    modules, names = {"ctypes", "faulthandler", "gc", "resource"}, {"pthread_sigmask", "setswitchinterval", "_srcfile"}
    users = set()
    for path in sorted((ROOT / "service").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = isinstance(node, ast.Import) and {alias.name for alias in node.names} & modules
            if imported or (isinstance(node, ast.Attribute) and node.attr in names):
                users.add(path.relative_to(ROOT))
    assert users == {Path("service/process.py")}


def test_the_bounds_admit_the_pinned_versions_and_not_the_next() -> None:
    """Each package that is listed here has an upper bound, above the version in constraints.txt."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {one.name: one.specifier for one in map(Requirement, lines) if one.name in BOUNDED}
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower().replace("_", "-")))
    assert wanted.keys() == BOUNDED
    for name, bounds in wanted.items():
        version = Version(pins[name])
        assert version in bounds, name
        assert Version(f"{version.major + 1}") not in bounds, name


def test_the_standard_library_has_what_the_log_switches_off() -> None:
    """The names that Python's Logging HOWTO gives."""
    logging = sys.modules["logging"]
    assert {"_srcfile", "logThreads", "logProcesses", "logMultiprocessing"} <= vars(logging).keys()
