"""Objects as JSON on standard input, checked by the schemas of Kubernetes; prints what is wrong."""

from __future__ import annotations

import json
import sys

import kubernetes_validate

for each in json.load(sys.stdin):
    try:
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        sys.stdout.write(f"{each['kind']}: {'.'.join(map(str, error.path))}: {error.message}\n")
