"""Servers that are compared, by name; a new one is a program and its requirements in peers/, and one entry here.

Nothing in peers/ may import this: those programs run in environments that have the peer and onnxruntime alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch

from benchmarks import bodies
from benchmarks.bodies import Form
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Peer:
    """One server: its title, whether it has its own environment, and its request formats.

    package: its distribution, for the version in the table; None is this project's own environment.
    lacks: for the forms it does not read, why.
    program: in peers/, where it is not called as the entry is.
    only: the pattern of the workloads it is for.
    """

    title: str
    package: str | None
    forms: dict[str, Form]
    lacks: dict[str, str] = field(default_factory=dict)
    python: str | None = None
    program: str | None = None
    workers: int = 1
    only: str = "*"

    def takes(self, workload: Workload) -> bool:
        """Whether the server supports the workload and takes part in it."""
        return workload.body in self.forms and fnmatch(workload.name, self.only)


def many(one: Form) -> dict[str, Form]:
    """Request format for a number of rows; a binary one accepts any."""
    return {"binary": one, "rows32": one, "rows256": one}


OIP, OUR_OIP = "/v2/models/vae/infer", "/v2/models/mlp.reconstruct/infer"
OURS = {
    "json": bodies.json("/v1/reconstruct"),
    **many(bodies.raw("/v1/reconstruct")),
    "npy1024": bodies.npy("/v1/reconstruct"),
    "png": bodies.png("/v1/denoise"),
}

PEERS = {
    "ours": Peer("this service", None, OURS),
    "ours2": Peer("this service, two workers", None, OURS, program="ours", workers=2, only="*-binary-64"),
    "oip": Peer(
        "this service, Open Inference Protocol",
        None,
        {"json": bodies.oip(OUR_OIP, "images"), **many(bodies.oip_binary(OUR_OIP, "images", "images"))},
        program="ours",
        only="mlp-*",
    ),
    "bare": Peer(
        "bare ASGI, no batching",
        None,
        {"json": bodies.json("/json"), **many(bodies.raw("/raw"))},
        {"png": "it is the least that serves tensors"},
    ),
    "triton": Peer(
        "Triton (pytriton, Python back end)",
        "nvidia-pytriton",
        {"json": bodies.oip(OIP), **many(bodies.oip_binary(OIP))},
        {"png": "no picture type"},
        python="/usr/bin/python3",  # its binary back end is linked with Debian's own Python
    ),
    "fastapi": Peer(
        "FastAPI, pydantic lists",
        "fastapi",
        {"json": bodies.json("/reconstruct", flat=True)},
        {"binary": "the tutorial's way is JSON", "png": "the tutorial's way is JSON"},
    ),
    "mlserver": Peer(
        "MLServer, adaptive batching",
        "mlserver",
        {"json": bodies.oip(OIP)},
        {"binary": "no binary tensors over REST", "png": "no picture type over REST"},
    ),
    "bentoml": Peer(
        "BentoML, adaptive batching",
        "bentoml",
        {"json": bodies.json_to_list("/images", "images"), "png": bodies.png_form("/picture", "image")},
        {"binary": "arrays travel as JSON, or pickled between its own services"},
    ),
    "litserve": Peer(
        "LitServe, batches within 1 ms",
        "litserve",
        {"json": bodies.json_one("/predict", "image")},
        {"binary": "reads JSON and forms only", "png": "reads JSON and forms only"},
    ),
    "ray": Peer(
        "Ray Serve, @serve.batch",
        "ray",
        {"json": bodies.json("/json"), **many(bodies.raw("/raw"))},
        {"png": "no picture type"},
    ),
}
