"""Encodes, denoises and samples through the generated client, and prints the answers as JSON.

`python client.py URL`, with images (n, c, h, w) as JSON on standard input.
"""

from __future__ import annotations

import json
import sys

from vae_service_client import Client
from vae_service_client.api.decode import decode
from vae_service_client.api.denoise import denoise_model
from vae_service_client.api.encode import encode
from vae_service_client.api.sample import sample_model
from vae_service_client.models import (
    DecodeRequest,
    DenoiseAnswer,
    DenoiseNoise,
    DenoiseRequest,
    EncodeAnswer,
    EncodeRequest,
    Problem,
    SampleAnswer,
)


def main() -> None:
    """Ask, check the types of the answers, and print them by operation."""
    images = json.load(sys.stdin)
    client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
    encoded = encode.sync(client=client, body=EncodeRequest(images=images, draws=2, seed=7))
    assert isinstance(encoded, EncodeAnswer)
    wanted = DenoiseRequest(images=images, noise=DenoiseNoise.GAUSSIAN, level=0.25, uncertainty=True)
    denoised = denoise_model.sync(model=encoded.model, client=client, body=wanted)
    assert isinstance(denoised, DenoiseAnswer)
    sampled = sample_model.sync(model=encoded.model, client=client, count=2, seed=7)
    assert isinstance(sampled, SampleAnswer)
    refused = decode.sync(client=client, body=DecodeRequest(latents=encoded.mean, fingerprint="another"))
    assert isinstance(refused, Problem)
    answers = {"encode": encoded, "denoise": denoised, "sample": sampled, "decode": refused}
    json.dump({name: answer.to_dict() for name, answer in answers.items()}, sys.stdout)


main()
