"""Process of a training that several share: `python -m paretune.launch JOB`, which torchrun and accelerate launch start."""

from __future__ import annotations

import sys

from paretune.runs.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
