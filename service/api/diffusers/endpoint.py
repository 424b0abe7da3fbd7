"""`POST /diffusers/{model}/decode` and `/encode` as ASGI: what `remote_decode` and `remote_encode` send and read."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.types import Receive, Scope

from service.api.diffusers.options import DecodeOptions, EncodeOptions, TensorOptions, options_of
from service.api.face import Face
from service.api.invoke import LOOP_BINARY_BYTES, Caller, Context, Invocation, admitted, invoke, prepare, written_by
from service.api.memory import Share
from service.api.reply import Header, Reply, whole_reply
from service.api.request import (
    IDENTITY,
    body_limits,
    coding_of,
    deadline_of,
    disconnected,
    fields,
    inflated,
    read_body,
)
from service.api.validation import intake_of
from service.codecs import image, remote_vae
from service.codecs.payload import Answer, Body, Intake, Meter, Payload
from service.errors import InvalidOption, InvalidShape, UnsupportedMediaType
from service.operations.decode import decode
from service.operations.encode import encode
from service.operations.operation import Operation
from service.runtime.model import Model

BASE64 = "tensor/base64"
"""What clients of old sent."""


class Received(NamedTuple):
    """A request, received and not yet decoded.

    Attributes:
        model: The model that the path names.
        options: The query string.
        body: The body, as it was sent.
        coding: Its content coding.
        fingerprint: The header X-Fingerprint.
        caller: Who waits.
    """

    model: Model
    options: Any
    body: Body
    coding: bytes
    fingerprint: bytes | None
    caller: Caller


Written = tuple[str, Body, list[Header]]
"""(media type, body, headers)."""


class RemoteVAE(Face):
    """One of the two functions of the remote VAE, as an ASGI application.

    Attributes:
        operation: The operation that it runs.
        kind: The options that it takes.
    """

    operation: ClassVar[Operation]
    kind: ClassVar[type[TensorOptions]]

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._limit, _ = body_limits(context.settings)

    def chosen(self, _options: Any) -> Any:
        """Options of the operation."""
        return self.operation.defaults

    @abstractmethod
    def payload(self, model: Model, options: Any, body: Body, intake: Intake) -> Payload:
        """Read a body. Runs in the event loop or in a thread."""

    @abstractmethod
    def written(self, model: Model, options: Any, accept: str, answer: Answer) -> Written:
        """Write an answer. Runs in the event loop or in a thread."""

    async def reply(self, scope: Scope, receive: Receive, share: Share, served: dict[str, Any]) -> Reply | None:
        """As in `Face`."""
        path, context = scope["path_params"], self.context
        model = self.find(self.operation, path["model"], path.get("version"), served)
        headers, options = fields(scope["headers"]), options_of(scope["query_string"], self.kind)
        if headers.get(b"content-type", b"").startswith(BASE64.encode()):
            raise UnsupportedMediaType(
                f"{BASE64} is not read; send the bytes themselves, as newer versions of diffusers do"
            )
        coding = coding_of(headers)
        body = await read_body(receive, headers, self._limit, share)
        if body is None:
            return None
        caller = Caller(deadline_of(headers, context.settings.timeout_s), partial(disconnected, receive), share)
        received = Received(model, options, body, coding, headers.get(b"x-fingerprint"), caller)
        small = coding == IDENTITY and len(body) <= LOOP_BINARY_BYTES
        read = partial(self._invocation, received)
        invocation, _ = await prepare(context, read, caller, "a tensor or a picture", in_loop=small)
        answer = await invoke(context.submit, invocation)
        accept = headers.get(b"accept", b"").decode("latin-1")
        work = partial(self.written, model, options, accept, answer)
        media_type, content, further = await written_by(context, work, answer, caller)
        return whole_reply(media_type, answer, content, len(invocation.inputs.rows), further)

    def _invocation(self, received: Received, meter: Meter) -> tuple[Invocation, None]:
        """Decompress, decode and check a body.

        Raises:
            ServiceError: The codec or a check refuses it.
        """
        model, options, body, coding, fingerprint, caller = received
        if coding != IDENTITY:
            body = inflated(body, coding, self._limit, meter)
        chosen = self.chosen(options)
        intake = intake_of(self.operation, model, chosen, meter, self.context.settings.tile_pixels)
        payload = self.payload(model, options, body, intake)
        return admitted(self.context, self.operation, model, payload, chosen, caller, intake, fingerprint), None


class RemoteDecode(RemoteVAE):
    """`remote_decode`: latents to a picture or to a tensor."""

    operation, kind = decode, DecodeOptions

    def payload(self, model: Model, options: DecodeOptions, body: Body, intake: Intake) -> Payload:
        """The latents, of the model's own scale.

        Raises:
            ServiceError: They are not such a tensor.
        """
        if options.shape is None or options.dtype in (None, "uint8"):
            raise InvalidOption("latents are a tensor of floats; send its shape and dtype in the query string")
        latents = remote_vae.read(body, options.shape, options.dtype, intake.meter)
        if latents.ndim == 3 and options.height is not None and options.width is not None:
            latents = remote_vae.unpacked(latents, *_latent_size(model, options.height, options.width))
        scale, shift = options.factors
        if options.do_scaling and options.scaling_factor is None:
            scale, shift = model.manifest.scaling_factor, model.manifest.shift_factor
        found = latents.astype(np.float32)
        if (scale, shift) != (1.0, 0.0):
            with np.errstate(all="ignore"):  # what is not finite is refused with all else
                found /= np.float32(scale)
                found += np.float32(shift)
        return Payload(found, raw=True)

    def written(self, _model: Model, options: DecodeOptions, accept: str, answer: Answer) -> Written:
        """A picture where one is asked for; else a tensor: levels with the channels last, or numbers."""
        images = answer.outputs["images"]
        if options.output_type == "pil" and remote_vae.MEDIA_TYPE not in accept:
            form = options.image_format
            return remote_vae.PICTURES[form], remote_vae.write_picture(np.clip(images, 0.0, 1.0), form), []
        if options.output_type == "pil":  # for a processor of the client's, which wants [0, 1]
            return _tensor(np.clip(images, 0.0, 1.0), options.dtype or "float32")
        if options.partial_postprocess:
            levels = np.rint(np.clip(images, 0.0, 1.0) * np.float32(255.0))
            return _tensor(np.moveaxis(levels, 1, -1), "uint8")
        return _tensor(images * np.float32(2.0) - np.float32(1.0), options.dtype or "float32")


class RemoteEncode(RemoteVAE):
    """`remote_encode`: a picture or a tensor to the mean of its latents."""

    operation, kind = encode, EncodeOptions

    def chosen(self, options: EncodeOptions) -> Any:
        """As in `RemoteVAE`."""
        return encode.defaults.model_copy(update={"fit": options.fit})

    def payload(self, _model: Model, options: EncodeOptions, body: Body, intake: Intake) -> Payload:
        """The images: a tensor in [-1, 1], levels as uint8, or a picture file.

        Raises:
            ServiceError: They are none of these.
        """
        if options.shape is None or options.dtype is None:
            return image.read(body, "", intake)
        images = remote_vae.read(body, options.shape, options.dtype, intake.meter)
        if options.dtype == "uint8":
            return Payload(images)
        if images.ndim not in (3, 4):
            raise InvalidShape(f"images have shape (n, channels, height, width), not {[*options.shape]}")
        return Payload((images.astype(np.float32) + np.float32(1.0)) / np.float32(2.0), raw=True)

    def written(self, _model: Model, options: EncodeOptions, _accept: str, answer: Answer) -> Written:
        """The mean, scaled, of the type of the tensor that was sent.

        Raises:
            InvalidOption: The factors give numbers that this type cannot hold.
        """
        scale, shift = options.factors
        dtype = "float32" if options.dtype in (None, "uint8") else options.dtype
        with np.errstate(all="ignore"):
            mean = (answer.outputs["mean"] - np.float32(shift)) * np.float32(scale)
        largest = np.abs(mean).max()
        if not largest <= np.finfo(np.float16 if dtype == "float16" else np.float32).max:
            raise InvalidOption(
                f"the scaled latents are as large as {largest:.3g}, which {dtype} cannot hold; choose scaling_factor "
                "and shift_factor nearer to 1 and 0"
            )
        return _tensor(mean, dtype)


FUNCTIONS: dict[str, type[RemoteVAE]] = {"decode": RemoteDecode, "encode": RemoteEncode}


def _latent_size(model: Model, height: int, width: int) -> tuple[int, int]:
    """Height and width of the latents of an image.

    Raises:
        InvalidShape: Latents of the model have none, or not at this size.
    """
    try:
        _, *size = model.latent_at(*model.padded((height, width)))
        found, wide = size
    except ValueError as error:
        raise InvalidShape(f"latents of model {model.manifest.name} are no planes, so none are packed") from error
    return found, wide


def _tensor(array: NDArray[Any], dtype: str) -> Written:
    headers = [(b"shape", orjson.dumps(array.shape)), (b"dtype", dtype.encode())]
    return remote_vae.MEDIA_TYPE, remote_vae.write(array, dtype), headers
