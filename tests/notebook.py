#!/usr/bin/env python3
"""Runs notebooks cell by cell as Jupyter would, without it.

    tests/notebook.py BUILD FILE.ipynb…            each cell runs; what is shown is of the kinds
                                                   that the file shows
    tests/notebook.py BUILD --write FILE.ipynb…    and is written into the file

Exits with 77, and says so, where no python3 with numpy is found.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))


def shown(value):
    """A cell's last value, as notebooks keep it."""
    data = {"text/plain": repr(value).split(" object at ")[0]}
    if hasattr(value, "_repr_svg_"):
        data["image/svg+xml"] = value._repr_svg_()
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return {
        "output_type": "execute_result", "metadata": {},
        "data": {k: v.splitlines(keepends=True) for k, v in data.items()}
    }


def run(source, names, file):
    tree = ast.parse(source, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, outputs = io.StringIO(), []
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, file, "exec"), names)
        value = eval(compile(ast.Expression(last.value), file, "eval"), names) if last else None
    if printed.getvalue():
        outputs.append({
            "output_type": "stream", "name": "stdout",
            "text": printed.getvalue().splitlines(keepends=True)
        })
    return outputs + ([shown(value)] if value is not None else [])


def kinds(outputs):
    return [sorted(o["data"]) if "data" in o else o["name"] for o in outputs]


def main():
    build, *rest = sys.argv[1:]
    write = rest[:1] == ["--write"]
    os.environ["REGRAPH_LIBRARY"] = str(Path(build).resolve() / "libregraph.so")
    os.environ["REGRAPH_PROFILE"] = "shipped"
    passed = failed = 0
    for path in map(Path, rest[write:]):
        notebook, names, count = json.loads(path.read_text()), {"__name__": "__main__"}, 0
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            count += 1
            try:
                outputs = run("".join(cell["source"]), names, f"{path}, cell {count}")
            except Exception as error:
                print(f"{path}: cell {count}: {type(error).__name__}: {error}", file=sys.stderr)
                failed += 1
                break
            if write:
                for o in outputs:
                    if o["output_type"] == "execute_result":
                        o["execution_count"] = count
                cell["outputs"], cell["execution_count"] = outputs, count
            elif kinds(outputs) != kinds(cell["outputs"]):
                print(
                    f"{path}: cell {count} shows {kinds(outputs)}, the file "
                    f"{kinds(cell['outputs'])}",
                    file=sys.stderr)
                failed += 1
                continue
            passed += 1
        if write:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{passed} cells ran, {failed} failed")
    return failed or not passed


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        import numpy  # noqa: F401
    except ImportError:
        system = Path("/usr/bin/python3")
        if system.exists() and Path(sys.executable).resolve() != system.resolve():
            os.execv(system, [str(system), *sys.argv])
        print("skipped: no python3 here has numpy (Debian: python3-numpy)")
        sys.exit(77)
    sys.exit(bool(main()))
