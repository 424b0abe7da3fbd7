"""`python -m service.bulk`, also installed as `vae-bulk`."""

from __future__ import annotations

import sys

from service.bulk.command import main

if __name__ == "__main__":
    sys.exit(main())
