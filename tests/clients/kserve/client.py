"""KServe's inference client against the service at a URL; prints its answers as JSON.

`python client.py URL`, with images (n, c, h, w) as JSON on standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

IMAGES = np.array(json.load(sys.stdin), np.float32)


def tensor(images: np.ndarray, kind: str = "FP32", *, binary: bool) -> InferInput:
    """The input `images`."""
    given = InferInput("images", list(images.shape), kind)
    given.set_data_from_numpy(images, binary_data=binary)
    return given


async def run(url: str) -> dict[str, Any]:
    """Ask for health, encodings and a refusal."""
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60))
    answers: dict[str, Any] = {}
    answers["up"] = [
        await client.is_server_live(url),
        await client.is_server_ready(url),
        await client.is_model_ready(url, "mnist.encode"),
        await client.is_model_ready(url, "mnist.nothing"),
    ]
    for binary in (True, False):
        parameters = {"draws": 2, "seed": 7, **({"binary_data_output": True} if binary else {})}
        request = InferRequest(
            "mnist.encode", [tensor(IMAGES, binary=binary)], request_id="mine", parameters=parameters
        )
        response = await client.infer(url, request, model_name="mnist.encode")
        found = {output.name: output.as_numpy().tolist() for output in response.outputs}
        answers[f"encode {binary}"] = {**found, "seed": response.parameters["seed"], "id": response.id}
    request = InferRequest(
        "mnist.encode", [tensor(IMAGES.astype(np.float16), "FP16", binary=True)],
        request_outputs=[RequestedOutput("mean", {"binary_data": True})],
    )  # fmt: skip
    response = await client.infer(url, request, model_name="mnist.encode")
    answers["half"] = {output.name: output.as_numpy().tolist() for output in response.outputs}
    request = InferRequest("mnist.encode", [tensor(IMAGES[:, :, 1:], binary=False)])
    try:
        await client.infer(url, request, model_name="mnist.encode")
    except httpx.HTTPStatusError as error:
        answers["refused"] = str(error)
    await client.close()
    return answers


json.dump(asyncio.run(run(sys.argv[1])), sys.stdout)
