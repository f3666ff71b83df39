"""python fake_driver.py ROOT SUITE-AS-JSON [WORKERS]: a run in a process of its own, to be killed. Prints its summary."""

import json
import sys
from pathlib import Path

from paretune.errors import ParetuneError
from paretune.registry import load_plugin
from paretune.suite import run_suite

if __name__ == "__main__":
    load_plugin(Path(__file__).with_name("fakes.py"))
    try:
        summary = run_suite(json.loads(sys.argv[2]), sys.argv[1], workers=int(sys.argv[3]) if len(sys.argv) > 3 else 2)
    except ParetuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    print(json.dumps(summary.to_json()))
