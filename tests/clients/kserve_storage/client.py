"""KServe's storage initialiser: copies `python client.py URI FOLDER`, with the store's address in AWS_ENDPOINT_URL."""

from __future__ import annotations

import sys

from kserve_storage import Storage

if __name__ == "__main__":
    Storage.download(*sys.argv[1:])
