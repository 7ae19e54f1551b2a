"""Run the cases in this interpreter and print one line of JSON per case; started by the command in `__main__.py`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import traceback
from dataclasses import asdict


def main() -> None:
    """Run cases, each after a line that says that it begins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not taken for results
    if args.library == "unsloth":
        importlib.import_module("unsloth")  # it must come before transformers
    from benchmarks.silent_failures.case import judge
    from benchmarks.silent_failures.cases import load_cases
    from benchmarks.silent_failures.libraries import LIBRARIES

    with tempfile.TemporaryDirectory(prefix="silent_failures_") as folder:
        os.chdir(folder)  # unsloth writes a cache into the working directory
        library = LIBRARIES[args.library]()
        print("ABOUT", json.dumps({"library": args.library, "versions": library.versions()}), file=out)
        for name, case in load_cases().items():
            if name in args.skip or (args.only and name not in args.only):
                continue
            print("BEGIN", name, file=out)
            result = judge(case, library, on_error=traceback.print_exc if args.show else None)
            if args.show:
                print(json.dumps(asdict(result), indent=1, ensure_ascii=False), file=sys.stderr)
            print("RESULT", json.dumps(asdict(result), ensure_ascii=False), file=out)
        os.chdir("/")


if __name__ == "__main__":
    main()
