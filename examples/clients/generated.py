"""Encodes a picture through a client that openapi-python-client has generated, and prints its latents as JSON.

curl -sSf http://127.0.0.1:8000/openapi.json -o openapi.json
openapi-python-client generate --path openapi.json --output-path client
PYTHONPATH=client python examples/clients/generated.py http://127.0.0.1:8000 examples/digit.png
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

from vae_service_client import Client
from vae_service_client.api.encode import encode_model
from vae_service_client.models import EncodeAnswer, EncodeRequest

url, picture = sys.argv[1:]
client = Client(base_url=url, raise_on_unexpected_status=True)
images = [base64.b64encode(Path(picture).read_bytes()).decode()]
answer = encode_model.sync(model="mnist", client=client, body=EncodeRequest(images=images))
if not isinstance(answer, EncodeAnswer):
    sys.exit(answer.detail if answer else "the answer is empty")
json.dump(answer.mean, sys.stdout)
