"""The command line. Every command is a few lines around the library; tables go to stdout, everything else to stderr.

Libraries are imported inside the commands, so that `paretune --help` answers at once. A module per group of commands; importing it adds
them to the application, in the order of the imports below.
"""

from __future__ import annotations

import os
import sys
import warnings

from paretune.cli.common import app, takes_any_text

__all__ = ["app", "main"]


def main() -> None:
    """The `paretune` command. What libraries print while they load a model is left out; their errors are not."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    errors = sys.stdout.errors if takes_any_text(sys.stdout) else "backslashreplace"  # a table is not lost for a minus sign
    sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=errors)  # noqa: SIM115 (held until the end)
    os.dup2(2, 1)  # what programs print that a reward starts
    app()


from paretune.cli import bench, catalog, chat, elicit, family, golden, log, objectives, recipes, serve  # noqa: E402, F401
