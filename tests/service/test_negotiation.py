"""Accept, as RFC 9110 section 12.5.1 has it."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from service.api.request import fields
from service.codecs import CODECS, negotiation
from service.codecs.negotiation import READ, SHORT, WRITTEN
from service.errors import Malformed, NotAcceptable

JSON, NPY, RAW, PNG = "application/json", "application/x-npy", "application/octet-stream", "image/png"
TIFF, GIF, EVENTS, LINES = "image/tiff", "image/gif", "text/event-stream", "application/x-ndjson"
LIKE_NPY = (NPY, *(form for form in WRITTEN if form != NPY))
NO_JSON = tuple(form for form in LIKE_NPY if form != JSON)
PADDING = ", ".join(f"application/vnd.example.v{number}+json" for number in range(600))

CASES = {
    "nothing": ("", LIKE_NPY),
    "anything": ("*/*", LIKE_NPY),
    "commas": (" , ,", LIKE_NPY),
    "one form": (PNG, (PNG,)),
    "the order of the header": (f"{PNG}, {JSON}", (PNG, JSON)),
    "the order of qualities": (f"{JSON};q=0.2, {PNG};q=0.9, {RAW};q=0.5", (PNG, RAW, JSON)),
    "capitals": (f"{JSON.upper()};Q=0.2, {PNG.upper()}", (PNG, JSON)),
    "the most specific range, though it comes last": (
        f"*/*, application/*;q=0.5, {NPY};q=0.1", (PNG, TIFF, GIF, EVENTS, JSON, RAW, LINES, NPY),
    ),
    "the most specific range, though it is worse": (f"{JSON};q=0.1, */*;q=0.9", (*NO_JSON, JSON)),
    "all but one": (f"*/*, {JSON};q=0", NO_JSON),
    "all but one, which comes first": (f"{PNG};q=0.0, image/*, {RAW};q=0.1", (TIFF, GIF, RAW)),
    "all but a type": ("*/*, application/*;q=0", (PNG, TIFF, GIF, EVENTS)),
    "nothing at all": ("*/*;q=0", ()),
    "spaces": (f"  {PNG} ; q=0.5 ,\t{JSON}\t;\tq=0.9", (JSON, PNG)),
    "a charset": (f"{JSON}; charset=UTF-8", (JSON,)),
    "a quoted charset": (f'{JSON};charset="utf-8"', (JSON,)),
    "another charset": (f"{JSON}; charset=latin-1", ()),
    "a parameter that no form has": (f"{PNG};level=1, {JSON};q=0.1", (JSON,)),
    "two qualities of a form": (f"{JSON};charset=utf-8;q=0.9, {JSON};q=0.1, {PNG};q=0.5", (JSON, PNG)),
    "a quoted list": (f'text/x;a="{PNG}, {JSON}", {RAW}', (RAW,)),
    "Java's HttpURLConnection": ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", LIKE_NPY),
    "axios": ("application/json, text/plain, */*", (JSON, *NO_JSON)),
    "a browser": ("text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8", LIKE_NPY),
    "a quality that is none": (f"{PNG};q=high, {JSON}", (JSON,)),
    "no media range": ("everything", ()),
    "a wish behind many others": (f"{PADDING}, {PNG}", (PNG,)),
    "a refusal behind many others": (f"*/*, {PADDING}, {JSON};q=0", NO_JSON),
}  # fmt: skip


def acceptable(accept: str, form: str) -> tuple[str, ...]:
    """The forms that answer a request of this form; none where the header names none that is written."""
    try:
        return tuple(codec.media_type for codec in negotiation.acceptable(accept, READ[form]))
    except NotAcceptable as error:
        if "no answer is written as" not in str(error):
            raise
        return ()


@pytest.mark.parametrize(("accept", "forms"), CASES.values(), ids=CASES)
def test_accept_chooses_the_forms_and_their_order(accept: str, forms: tuple[str, ...]) -> None:
    """The forms that answer a request in npy, best first."""
    assert acceptable(accept, NPY) == forms


def test_every_name_of_a_format_belongs_to_one_codec() -> None:
    """Each media type and alias; else the later codec would take the place of the earlier one."""
    names = [name for codec in CODECS for name in (codec.media_type, *codec.aliases)]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize(
    "accept", ['"' * 9000, '"' + '\\"' * 9000, ";" * 30000, f'{JSON};a="' + ";" * 30000, "a/b," * 8000]
)
def test_nonsense_is_not_acceptable(accept: str) -> None:
    """And no error of the library."""
    assert acceptable(accept, NPY) == ()


def test_more_ranges_than_anybody_needs_are_refused() -> None:
    """Those that concern what is served; each costs a hundred times as much to read as one that does not."""
    with pytest.raises(NotAcceptable, match="name fewer"):
        acceptable(", ".join(f"{PNG};level={level}" for level in range(500)), NPY)


def test_lines_of_accept_are_one_list() -> None:
    """What may only be there once is refused."""
    assert (
        fields([(b"accept", b"image/png;q=0"), (b"a", b"b"), (b"accept", b"*/*")])[b"accept"] == b"image/png;q=0, */*"
    )
    with pytest.raises(Malformed, match="Content-Type"):
        fields([(b"content-type", b"image/png"), (b"content-type", b"application/json")])


def test_the_answer_is_in_the_form_that_was_wished_for(client: httpx.Client) -> None:
    """However long the header, and in however many lines."""
    body = {"content": np.zeros((1, 8, 8), "<f4").tobytes()}
    for accept in (f"{PADDING}, {PNG}", f"*/*;q=0.1, {PNG}"):
        answer = client.post("/v1/reconstruct", headers={"content-type": RAW, "accept": accept}, **body)
        assert answer.headers["content-type"] == PNG
    assert len(PADDING) > SHORT
    lines = [("content-type", RAW), ("accept", f"{PNG};q=0"), ("accept", "image/*, application/x-npy;q=0.5")]
    assert client.post("/v1/reconstruct", headers=lines, **body).headers["content-type"] == TIFF
    none = client.post("/v1/reconstruct", headers={"content-type": RAW, "accept": f"{PNG};q=0"}, **body)
    assert (none.status_code, none.json()["code"]) == (406, "not_acceptable")


def test_a_form_that_is_not_written_is_refused_as_such(client: httpx.Client) -> None:
    """Before the rows are: their memory would be that of an answer in JSON, which nobody has asked for."""
    rows = np.zeros((4096, 8, 8), "<f4").tobytes()
    head = {"content-type": RAW, "accept": "image/jpeg"}
    refused = client.post("/v1/reconstruct?draws=64", headers=head, content=rows)
    assert (refused.status_code, refused.json()["code"]) == (406, "not_acceptable")
    assert "image/jpeg" in refused.json()["detail"]
    assert all(form in refused.json()["detail"] for form in WRITTEN)
