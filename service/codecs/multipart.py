"""multipart/form-data: a picture or .npy in the field `file`, a mask in `mask`, options in fields of their names."""

from __future__ import annotations

import logging
from typing import Any

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.codecs import image, npy
from service.codecs.payload import Body, Intake, Payload
from service.errors import Unreadable

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of what the caller is told


def read(body: Body, content_type: str, intake: Intake) -> Payload:
    """The form's file as an array."""
    fields, files = _parse(body, content_type)
    if "file" not in files:
        raise Unreadable("the form has no file in the field `file`; with curl: -F file=@digit.png")
    payload = _read(files["file"], intake)
    mask = _read(files["mask"], intake).array if "mask" in files else None
    return Payload(payload.array, payload.mask if mask is None else mask[:, :1], fields)


def _read(content: bytes, intake: Intake) -> Payload:
    return Payload(npy.parse(content)) if content.startswith(npy.MAGIC) else image.read(content, "", intake)


def _parse(body: Body, content_type: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    _, parameters = parse_options_header(content_type)
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}

    def on_field(field: Any) -> None:
        fields[field.field_name.decode()] = (field.value or b"").decode()

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files[file.field_name.decode()] = file.file_object.read()

    try:
        parser = FormParser(
            "multipart/form-data",
            on_field,
            on_file,
            boundary=parameters.get(b"boundary"),
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # never to disk: the body is in memory already
        )
        parser.write(bytes(body))
        parser.finalize()
    except (FormParserError, UnicodeDecodeError, ValueError) as error:
        raise Unreadable(f"the form cannot be read ({error})") from error
    return fields, files
