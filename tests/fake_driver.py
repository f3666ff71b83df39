"""python fake_driver.py ROOT SUITE-AS-JSON [WORKERS [RAY-ADDRESS]]: a run in a process of its own, to be killed. Prints its summary."""

import json
import sys
from pathlib import Path

from paretune.errors import ParetuneError
from paretune.registry import load_plugin
from paretune.runs.executors.ray import Ray
from paretune.runs.suite import run_suite

if __name__ == "__main__":
    load_plugin(Path(__file__).with_name("fakes.py"))
    workers, executor = int(sys.argv[3]) if len(sys.argv) > 3 else 2, "local"
    if len(sys.argv) > 4:
        executor = Ray(address=sys.argv[4], env=("FAKE_LOG", "FAKE_LIGHT"))
    try:
        summary = run_suite(json.loads(sys.argv[2]), sys.argv[1], workers=workers, executor=executor)
    except ParetuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    print(json.dumps(summary.to_json()))
