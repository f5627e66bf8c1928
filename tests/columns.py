#!/usr/bin/env python3
"""Lines past 100 columns in what git tracks: C, CUDA, shell, the page of --html, Python, CMake, and
the prose of Markdown, which is all but code, tables and lines that a link makes long. Prints them;
exit code 1 if there are any."""

import re
import subprocess
import sys

CODE = ["*.c", "*.h", "*.cu", "*.cuh", "*.sh", "*.js", "*.css", "*.html", "*.py", "*.cmake",
        "*CMakeLists.txt", ".clang-*"]


def tracked(*patterns):
    return subprocess.run(
        ["git", "ls-files", *patterns], check=True, capture_output=True, text=True
    ).stdout.split()


def lines(file):
    with open(file, encoding="utf-8") as text:
        yield from enumerate(text.read().split("\n"), 1)


def prose(file):
    fence = False
    for number, line in lines(file):
        if re.match(r"\s*```", line):
            fence = not fence
        elif not fence and not re.match(r"    |\t|\s*\||.*(\]\(|]: )\S{40}", line):
            yield number, line


def main():
    found = 0
    for file in tracked(*CODE, "*.md"):
        for number, line in (prose if file.endswith(".md") else lines)(file):
            if len(line) > 100:
                found += 1
                print(f"{file}:{number}: {len(line)} columns")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
