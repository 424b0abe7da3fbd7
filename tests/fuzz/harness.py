"""Coverage-guided fuzzing of everything that reads a stranger's bytes.

`python -m tests.fuzz.harness TARGET CORPUS [flags of libFuzzer]`, where TARGET is one of TARGETS, or `all` of them in
turn by the first byte, and CORPUS a folder, to which the first inputs are added (of `all` only the short ones).

Whatever is raised but the error that a reader promises is a crash, and so is reading that costs too much
(tests/fuzz/cost.py): it ends the process with its input written down.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import atheris
import imagecodecs
import numpy as np
import tifffile
from PIL import Image

with atheris.instrument_imports(include=["service", "python_multipart"]):
    from service.api.invoke import Context
    from service.api.memory import Memory
    from service.api.offload import Offload
    from service.api.v1.endpoint import OperationApp
    from service.api.validation import in_range
    from service.codecs import open_inference
    from service.codecs.negotiation import READ, acceptable
    from service.codecs.payload import Answer, Intake, Payload, as_images, as_rows, channels_of
    from service.contract import manifest
    from service.errors import ServiceError
    from service.observability.metrics import Telemetry
    from service.operations.registry import OPERATIONS
    from service.repository.repository import Repository
    from service.runtime.scheduler import Engine
    from service.settings import Settings

from tests.fuzz.cost import Ledger, check_memory, check_result, check_time
from tests.fuzz.growing import GROWING, grown

Target = Callable[[bytes, Ledger], None]
INTAKES: tuple[dict[str, Any], ...] = (
    {"name": "images", "shape": (1, 8, 8)},
    {"name": "images", "shape": (3, 8, 8), "masked": True},
    {"name": "images", "shape": (1, 8, 8), "or_latents": True},
    {"name": "images", "shape": (3, 0, 0), "masked": True, "variants": (3, 1), "float_pixels": 64},
    {"name": "latents", "shape": (8,)},
    {"name": "latents", "shape": (4, 0, 0)},
    {"name": "", "shape": ()},
)
INFERENCES = (
    b'{"id":"a","inputs":[{"name":"latents","shape":[1,2],"datatype":"FP64","data":[0,1]}],"parameters":{"draws":2}}',
    b'{"inputs":[{"name":"mask","shape":[2],"datatype":"BOOL","data":[true,0]}],"outputs":[{"name":"mean"}]}',
    b'{"inputs":[{"name":"images","shape":[1,1,1,2],"datatype":"UINT8","data":[[[[0,255]]]]}]}',
)
CONTENT_TYPES = {"multipart/form-data": "multipart/form-data; boundary=x"}
MANIFEST = Path(__file__).parents[2] / "models" / "mnist-2d" / "1" / manifest.FILE_NAME
SETTINGS = Settings()
ENGINE = Engine(max_rows=SETTINGS.max_rows, queue_rows=SETTINGS.queue_rows)
CONTEXT = Context(
    SETTINGS, Repository({}, ""), ENGINE.submit, Telemetry(lambda: (0, 0)), Memory(SETTINGS.memory_bytes), Offload()
)
NO_HEAD = 2**16 - 1
"""In place of the length of a JSON object: the whole body is one."""
ANSWER = Answer({"mean": np.zeros((1, 2), np.float32)}, {"version": "1"})
APPS = [OperationApp(operation, CONTEXT) for operation in OPERATIONS]


def body(form: str) -> Target:
    """The reader of that media type, and what becomes of its array; the first byte says what is wanted."""
    reader = READ[form].read
    assert reader is not None
    intakes = INTAKES if READ[form].options else INTAKES[:-1]

    def read(data: bytes, ledger: Ledger) -> None:
        intake = Intake(meter=ledger, **intakes[data[0] % len(intakes) if data else 0])
        payload = reader(data[1:], CONTENT_TYPES.get(form, form), intake)
        check_result(payload, ledger, len(data))
        for app in APPS[:1] if payload.options else ():
            app._options({key: value for key, value in payload.options.items() if isinstance(key, str)})
        if payload.array is None:
            return
        name = "latents" if payload.latents else intake.name
        shape = (8,) if payload.latents else intake.shape
        if name == "images" and (data[0] & 128 or not all(shape)):
            count = channels_of(payload.array, intake.variants) if intake.variants else shape[0]
            as_images(payload.array, (count, *shape[1:]), name, intake.float_pixels)
        else:
            in_range(as_rows(payload.array, shape, name), 0.0, 1.0, name)

    return read


def inference(data: bytes, ledger: Ledger) -> None:
    """A request of the Open Inference Protocol: what is wanted, the length of its JSON object, and the body."""
    intake = Intake(meter=ledger, **INTAKES[data[0] % len(INTAKES) if data else 0])
    head = int.from_bytes(data[1:3], "big")
    request = open_inference.read(data[3:], None if head == NO_HEAD else head, intake)
    for array in request.arrays.values():
        check_result(Payload(array), ledger, len(data))
    json.loads(open_inference.write(ANSWER, "m.encode", "", open_inference.Head())[0])


def query(data: bytes, _: Ledger) -> None:
    """Options in a query string, of the operation that the first byte says, and an Accept header of the same bytes."""
    if data:
        acceptable(data[1:].decode("latin-1"), None)
        APPS[data[0] % len(APPS)].options_of_query(data[1:])


def read_manifest(data: bytes, _: Ledger) -> None:
    """A manifest that can be read can be written and read again."""
    found = manifest.parse(data)
    assert manifest.parse(found.to_json().encode()) == found


TARGETS: dict[str, Target] = {
    "json": body("application/json"),
    "npy": body("application/x-npy"),
    "raw": body("application/octet-stream"),
    "image": body("image/png"),
    "multipart": body("multipart/form-data"),
    "urlencoded": body("application/x-www-form-urlencoded"),
    "inference": inference,
    "query": query,
    "manifest": read_manifest,
}


NOT_BODIES = {"query", "manifest"}
"""Targets whose input is short: VAE_MAX_URL_BYTES, or written by who owns the models."""
GROW = 96
"""These bits of a body's first byte say that the rest is to be grown; one bit would make every second body large."""


def run(name: str, data: bytes) -> None:
    """What a reader may do: give its result, or the errors that it promises, at a cost in proportion to the body.

    Raises: whatever else the target raises; Costly.
    """
    large = name not in NOT_BODIES and data[:1] > b"" and data[0] & GROW == GROW
    if large:
        data = data[:1] + grown(data[1:])
    for check in (check_time, check_memory) if large else (check_time,):
        with suppress(ServiceError, manifest.ManifestError):
            check(partial(TARGETS[name], data), len(data))


def all_in_turn(data: bytes) -> None:
    """The target that the first byte says."""
    if data:
        run(list(TARGETS)[data[0] % len(TARGETS)], data[1:])


def seeds(name: str) -> list[bytes]:
    """Inputs that a target reads well, and a start for those that it does not."""
    if name == "all":
        return [bytes([k]) + seed for k, one in enumerate(TARGETS) for seed in seeds(one)]
    rows = np.linspace(0.0, 1.0, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    npy, png = saved(rows), picture("L", "PNG")
    part = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n%s\r\n'
    field = b'--x\r\nContent-Disposition: form-data; name="draws"\r\n\r\n2\r\n'
    numbers = json.dumps({"images": rows.tolist(), "mask": [[1] * 8] * 8, "draws": 2})
    pictures = json.dumps({"images": [base64.b64encode(png).decode()] * 2})
    bodies = {
        "json": [numbers.encode(), pictures.encode(), b'{"latents": [[0, 1, 2, 3, 4, 5, 6, 7]]}'],
        "npy": [
            npy,
            saved(rows > 0.5),
            saved((rows * 255).astype(np.uint8)),
            saved(np.asfortranarray(rows[0, 0].astype(np.float64))),
            saved(np.zeros((3, 8), np.float16)),
        ],
        "raw": [rows.tobytes(), np.zeros((2, 8), np.float32).tobytes()],
        "image": [
            png,
            picture("RGBA", "PNG"),
            picture("L", "JPEG"),
            picture("P", "PNG"),
            picture("RGB", "WEBP"),
            *pictures_too(),
            *tiffs(),
        ],
        "multipart": [
            part % (b"file", npy) + field + b"--x--\r\n",
            part % (b"file", png) + part % (b"mask", png) + b"--x--\r\n",
            part % (b"file", png) * 2 + part % (b"mask", picture("RGBA", "PNG")) * 2 + b"--x--\r\n",
        ],
        "urlencoded": [b"count=3&seed=7", b"draws=%32&level="],
        "inference": [
            *(framed(text, b"") for text in INFERENCES),
            framed(
                b'{"inputs":[{"name":"images","shape":[1,1,8,8],"datatype":"FP32","parameters":{"binary_data_size":256}}]}',
                rows.tobytes(),
            ),
            bytes(2) + rows.tobytes(),
        ],
        "query": [
            b"draws=2&seed=7&fit=pad",
            b"noise=gaussian&level=0.2&quality=refined",
            b"axes=0,1&size=3",
            b"count=4",
        ],
    }
    if name == "manifest":
        return [MANIFEST.read_bytes()]
    return [bytes([k]) + one for one in bodies[name] for k in (0, 1, 2, 3, 4, 128)]


def framed(text: bytes, tail: bytes) -> bytes:
    """A request of the Open Inference Protocol with the length of its JSON object before it."""
    return (len(text) if tail else NO_HEAD).to_bytes(2, "big") + text + tail


def large_seeds(name: str) -> list[bytes]:
    """Inputs that are grown."""
    return [bytes([GROW | k]) + one for one in GROWING.get(name, []) for k in (0, 1)]


def saved(array: np.ndarray) -> bytes:
    """As .npy."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pictures_too() -> list[bytes]:
    """Files of other kinds: with EXIF, of several scans, of several frames, without compression."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for form, options in (
        ("BMP", {}),
        ("JPEG", {"progressive": True, "exif": exif.tobytes()}),
        ("WEBP", {"lossless": True, "exif": exif.tobytes()}),
        ("AVIF", {"exif": exif.tobytes()}),
        ("GIF", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (9, 9, 9))]}),
        ("PNG", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), (9, 9, 9))]}),
    ):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 100, 50)).save(file, form, **options)
        found.append(file.getvalue())
    return found


def tiffs() -> list[bytes]:
    """TIFF of several compressions and types, and PNG of 16 bits."""
    levels, found = np.arange(64, dtype=np.uint16).reshape(8, 8), []
    for array, options in (
        (levels, {}),
        (levels, {"compression": "lzw", "predictor": True}),
        (levels, {"compression": "zlib", "tile": (16, 16)}),
        (levels, {"compression": "zstd", "byteorder": ">"}),
        (np.stack([levels] * 3), {"imagej": True}),
        (np.stack([levels] * 4, -1), {"photometric": "rgb"}),
        (levels.astype(np.float32), {"bigtiff": True}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, array, **options)
        found.append(file.getvalue())
    return [*found, imagecodecs.png_encode(np.stack([levels] * 4, -1))]


def picture(mode: str, form: str) -> bytes:
    """A file of 8 x 8 pixels."""
    file = io.BytesIO()
    Image.new(mode, (8, 8), 100 if len(mode) == 1 else None).save(file, form)
    return file.getvalue()


def main() -> None:
    """Fuzz until libFuzzer's flags say that it is enough."""
    name, corpus, *flags = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    for k, seed in enumerate(seeds(name) + large_seeds(name)):
        (Path(corpus) / f"seed-{k}").write_bytes(seed)
    atheris.Setup([sys.argv[0], corpus, *flags], all_in_turn if name == "all" else partial(run, name))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
