"""Triton's HTTP client against the service at a URL; prints its answers as JSON.

`python client.py URL`, with images (n, c, h, w) as JSON on standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import tritonclient.http as blocking
import tritonclient.http.aio as asynchronous
from tritonclient.utils import InferenceServerException

IMAGES = np.array(json.load(sys.stdin), np.float32)
CODINGS = (None, "gzip", "deflate")
OUTPUTS = ["log_var", "latents", "mean"]
OPTIONS = {"draws": 2, "seed": 7}


def tensor(http: Any, name: str, array: np.ndarray, *, binary: bool = True) -> Any:
    """An input of either of the two clients."""
    given = http.InferInput(name, list(array.shape), "FP32")
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def told(result: Any, *names: str) -> dict[str, Any]:
    """Outputs as lists, beside the parameters of the response."""
    found = {name: result.as_numpy(name).tolist() for name in names}
    return {**found, "parameters": result.get_response()["parameters"]}


def refused(work: Callable[[], Any]) -> list[str] | None:
    """Status and message of the error that a call raises."""
    try:
        work()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None


def run_blocking(address: str) -> dict[str, Any]:
    """Everything, through the blocking client."""
    answers: dict[str, Any] = {}
    with blocking.InferenceServerClient(address) as client:
        answers["up"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("mnist.encode", "3")]
        answers["server"] = client.get_server_metadata()
        answers["metadata"] = client.get_model_metadata("mnist.encode")
        answers["config"] = client.get_model_config("mnist.encode")
        given = [tensor(blocking, "images", IMAGES)]
        for sent, wanted, binary in product(CODINGS, CODINGS, (True, False)):
            result = client.infer(
                "mnist.encode",
                [tensor(blocking, "images", IMAGES, binary=binary)],
                outputs=[blocking.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS],
                request_id="mine",
                parameters=OPTIONS,
                request_compression_algorithm=sent,
                response_compression_algorithm=wanted,
                timeout=60_000_000,
                priority=1,
            )
            assert result.get_response()["id"] == "mine"
            assert [one["name"] for one in result.get_response()["outputs"]] == OUTPUTS
            answers[f"encode {sent} {wanted} {binary}"] = told(result, *OUTPUTS)
        answers["sample"] = told(client.infer("mnist.sample", [], parameters={"count": 2, "seed": 7}), "images")
        answers["photo"] = client.get_model_metadata("photo.denoise")
        result = client.infer("photo.denoise", given, parameters={"noise": "auto", "uncertainty": True, "seed": 3})
        found = {name: result.as_numpy(name).tolist() for name in ("images", "std", "level")}
        answers["denoise"] = {**found, "noise": [text.decode() for text in result.as_numpy("noise").tolist()]}
        answers["statistics"] = client.get_inference_statistics("mnist.encode")
        answers["all"] = sorted(one["name"] for one in client.get_inference_statistics()["model_stats"])
        answers["index"] = client.get_model_repository_index()
        client.unload_model("mnist-2d")
        answers["unloaded"] = [
            client.is_model_ready("mnist-2d"),
            client.is_model_ready("mnist-2d.decode"),
            [one for one in client.get_model_repository_index() if one["name"].startswith("mnist-2d")],
        ]
        client.load_model("mnist-2d")
        answers["loaded"] = client.is_model_ready("mnist-2d.decode")
        answers["refused"] = {
            "unknown": refused(lambda: client.get_model_metadata("mnist.nothing")),
            "version": refused(lambda: client.infer("mnist.encode", given, model_version="9")),
            "parameter": refused(lambda: client.infer("mnist.encode", given, parameters={"drawz": 1})),
            "output": refused(
                lambda: client.infer("mnist.encode", given, outputs=[blocking.InferRequestedOutput("std")])
            ),
            "shape": refused(lambda: client.infer("mnist.encode", [tensor(blocking, "images", IMAGES[:, :, 1:])])),
            "config": refused(lambda: client.load_model("mnist-2d", config="{}")),
            "files": refused(lambda: client.load_model("mnist-2d", files={"file:1/a.onnx": b"x"})),
            "deadline": refused(lambda: client.infer("mnist.encode", given, timeout=1)),
        }
    return answers


async def run_asynchronous(address: str) -> list[Any]:
    """Requests at once, through the asynchronous client."""
    async with asynchronous.InferenceServerClient(address) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("mnist.encode"))["name"] == "mnist.encode"
        given = [tensor(asynchronous, "images", IMAGES)]
        asked = [client.infer("mnist.encode", given, parameters=OPTIONS) for _ in range(4)]
        answers = [told(result, *OUTPUTS) for result in await asyncio.gather(*asked)]
        assert (await client.get_inference_statistics("mnist.encode"))["model_stats"]
        return answers


def main() -> None:
    """Ask both clients."""
    address = sys.argv[1].removeprefix("http://")
    answers = run_blocking(address)
    answers["asynchronous"] = asyncio.run(run_asynchronous(address))
    json.dump(answers, sys.stdout)


main()
