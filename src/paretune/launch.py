"""Process of a training that several share: `python -m paretune.launch JOB`, which torchrun and accelerate launch start."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: its stack traces of closed connections hide what process 0 says

from paretune.runs.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    code = main()
    if os.environ.get("RANK", "0") == "0":
        sys.exit(code)
    # A thread of gloo may still be letting go of the last exchange's tensors. Where it waits for an interpreter that is ending, the process
    # aborts, and a launcher stops process 0 while it publishes. What others than process 0 leave is on the disk by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
