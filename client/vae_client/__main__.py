"""`python -m vae_client`, also installed as `vae`."""

from __future__ import annotations

import sys

from vae_client.command import main

if __name__ == "__main__":
    sys.exit(main())
