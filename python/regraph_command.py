"""The command `regraph` of a wheel: hands over to the program inside the package, without importing
that (and numpy)."""

import importlib.util
import os
import sys
from pathlib import Path


def main():
    for folder in importlib.util.find_spec("regraph").submodule_search_locations:
        program = Path(folder) / "bin" / "regraph"
        if program.exists():
            os.execv(program, ["regraph", *sys.argv[1:]])
    sys.exit(f"regraph: the program is not in {folder}: this package was not installed from a "
             "wheel; build/regraph is it")
