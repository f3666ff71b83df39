"""Process of a training that several share: `python -m paretune.launch JOB`, which torchrun and accelerate launch start."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: its stack traces of closed connections hide what process 0 says

from paretune.runs.executors.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
