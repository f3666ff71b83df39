"""Write requirements.lock and requirements-test.lock: exact versions of what is installed and needed, found by walking the metadata.

    python tools/lock.py            write both
    python tools/lock.py --check    exit 1 where they differ from what is installed

The local part of a version (`2.13.0+cpu`) is left out, so that one lock serves every build of a package. No hashes, for the same reason.
What only other platforms need (CUDA libraries, colorama) is not pinned; pip adds it there.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Made by `python tools/lock.py` from an environment that passed the tests; do not edit.\n"


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Distribution name -> installed public version of everything that `requirements` need on this platform."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        wanted, outer = queue.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": outer}):
            continue
        name = canonicalize_name(wanted.name)
        installed = distribution(name)
        found[name] = installed.version.split("+")[0]
        for extra in ("", *wanted.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += [(Requirement(text), extra) for text in installed.requires or ()]
    return found


def locks() -> dict[str, str]:
    """File name -> the text that belongs in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = closure(project["dependencies"])
    extra = {name: version for name, version in closure(project["optional-dependencies"]["test"]).items() if name not in runtime}
    return {"requirements.lock": _text(runtime), "requirements-test.lock": _text(extra)}


def _text(pins: dict[str, str]) -> str:
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


if __name__ == "__main__":
    stale = [name for name, text in locks().items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    if "--check" in sys.argv[1:]:
        print(f"stale: {', '.join(stale)}" if stale else "the locks are what is installed")
        sys.exit(1 if stale else 0)
    for name, text in locks().items():
        (ROOT / name).write_text(text)
        print(f"{name}: {text.count('==')} packages")
