#!/usr/bin/env python3
"""What the documentation says works: its commands run as they are printed and print what it says,
its links lead somewhere, and one version stands everywhere.

    tests/docs.py links
    tests/docs.py commands BUILD [FILE.md …]

Commands are those in ```sh of README.md and docs/for-*.md. Those of a page run one after the other
in one shell, in a copy of the tree whose build/ is BUILD. A ```json behind "Save it as `PATH`" is
saved there. What needs a GPU, installs, or is a test of its own, is not run, and said so. Elsewhere
commands stand behind "    $ ", and lines of what they print, some of them, below.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    r"^\./examples/run\.sh|^\./tests/run\.sh": "CI runs it as a stage of its own",
    r"\b(run|bench)\b.*--device cuda": "needs a GPU",
    r"^eval ": "for a shell that someone types into",
}


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("for-*.md"))]


def tracked():
    """What git knows or would take; without git, what is in no build and no hidden folder."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return [ROOT / name for name in listed.stdout.split()]
    except (OSError, subprocess.CalledProcessError):
        found = (page.relative_to(ROOT) for page in sorted(ROOT.rglob("*.md")))
        return [ROOT / page for page in found
                if not any(part.startswith((".", "build")) for part in page.parts[:-1])]


# ---- links ----
def slug(title):
    title = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", lambda m: m.group(1) or "", title).strip().lower()
    return re.sub(r"[^\w\- ]", "", title).replace(" ", "-")


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def links():
    bad = seen = 0
    for page in tracked():
        text = prose(page.read_text())
        targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
            r"(?:src|srcset|href)=\"([^\"]+)\"", text)
        for target in targets:
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            path, _, anchor = unquote(target).partition("#")
            file = (page.parent / path).resolve() if path else page
            good = file.exists() and ROOT in [file, *file.parents]
            if good and anchor and file.suffix == ".md":
                good = anchor in {
                    slug(t) for t in re.findall(r"^#+ (.*)", prose(file.read_text()), re.MULTILINE)
                }
            if not good:
                bad += 1
                print(f"{page.relative_to(ROOT)}: nothing is at '{target}'", file=sys.stderr)
    print(f"{seen} links, {bad} lead nowhere")
    return bad or not seen


def versions():
    """What the build, the header and the citation say."""
    header = (ROOT / "include/regraph/regraph.h").read_text()
    said = {
        "CMakeLists.txt": re.search(r"project\(regraph VERSION ([0-9.]+)",
                                    (ROOT / "CMakeLists.txt").read_text())[1],
        "regraph.h": ".".join(
            re.search(rf"RG_VERSION_{part} ([0-9]+)", header)[1]
            for part in ("MAJOR", "MINOR", "PATCH")),
        "CITATION.cff": re.search(r"^version: ([0-9.]+)", (ROOT / "CITATION.cff").read_text(),
                                  re.MULTILINE)[1],
    }
    if len(set(said.values())) > 1:
        print(f"versions differ: {said}", file=sys.stderr)
    return len(set(said.values())) > 1


# ---- commands ----
def fences(text):
    """(language, what stands in it, the paragraph before) of each block of code, in order."""
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        before = text[:match.start()].rstrip().rpartition("\n\n")[2]
        yield match.group(1), match.group(2), before


def script(page):
    """Lines for bash, and what is left out with its reason."""
    lines, left = [], []
    for language, code, before in fences(page.read_text()):
        place = re.search(r"[Ss]ave\s+it\s+as\s+`([^`]+)`", before)
        if language == "json" and place:
            lines.append(f"cat >\"$top/{place.group(1)}\" <<'SAVED'\n{code}SAVED")
        if language != "sh":
            continue
        for line in re.sub(r"\\\n", " ", code).splitlines():
            why = next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, line)),
                       None)
            if why:
                left.append((line, why))
            elif line.strip():
                lines.append(f"at={lines_quote(line)}\n{line}")
    return lines, left


def lines_quote(line):
    return "'" + line.replace("'", "'\\''") + "'"


def transcripts(page):
    """[[command, lines below it]] of what stands behind "    $ "."""
    found = []
    for line in page.read_text().splitlines():
        if line.startswith("    $ "):
            found.append([line[6:], []])
        elif found and line.startswith("    ") and found[-1] is not None:
            if found[-1][0].count("'") % 2:  # it goes on
                found[-1][0] += "\n" + line[6:]
            else:
                found[-1][1].append(line[4:])
        elif found:
            found.append(None)
    return [entry for entry in found if entry]


def printed(build):
    """Do the commands of all pages print what stands below them?"""
    ran = bad = 0
    env = {**os.environ, "REGRAPH_PROFILE": "shipped",
           "PATH": f"{Path(build).resolve()}:{os.environ['PATH']}"}
    for page in tracked():
        said, shell = transcripts(page), ["set -eu"]
        with tempfile.TemporaryDirectory() as top:
            (Path(top) / "examples").symlink_to(ROOT / "examples")
            for command, lines in said:
                shell.append(command)
                done = subprocess.run(["bash", "-c", "\n".join(shell)], cwd=top, env=env,
                                      capture_output=True, text=True)
                if lines:  # what prints need not run again
                    shell.pop()
                missing = [line for line in lines if line not in done.stdout.splitlines()]
                ran, bad = ran + 1, bad + bool(done.returncode or missing)
                if done.returncode or missing:
                    print(f"{page.relative_to(ROOT)}: {command}: {done.stderr[-2000:]}"
                          f"does not print {missing}", file=sys.stderr)
    print(f"{ran} commands and what they print, {bad} otherwise")
    return bad or not ran


def commands(build, chosen):
    ran = failed = 0
    for page in chosen or pages():
        lines, left = script(page)
        with tempfile.TemporaryDirectory() as top:
            for name in ("examples", "docs", "include", "cmake", "CMakeLists.txt"):
                (Path(top) / name).symlink_to(ROOT / name)
            here = Path(top) / "build"
            here.mkdir()
            for entry in Path(build).resolve().iterdir():
                # what pages write there stays out of the build
                (here / entry.name).symlink_to(entry)
            text = "\n".join([
                "set -eu", "top=$PWD", "at=",
                "trap '[ $? -eq 0 ] || echo \"failed: $at\" >&2' EXIT", *lines
            ])
            done = subprocess.run(["bash", "-c", text], cwd=top, capture_output=True, text=True,
                                  env={**os.environ, "REGRAPH_PROFILE": "shipped"})
        ran += sum(line.startswith("at=") for line in lines)
        name = page.relative_to(ROOT)
        for line, why in left:
            print(f"{name}: not run ({why}): {line.strip()[:80]}")
        if done.returncode:
            failed += 1
            print(f"{name}: {done.stderr[-2000:]}", file=sys.stderr)
    print(f"{ran} commands of {len(chosen or pages())} pages, {failed} pages failed")
    return failed or not ran


if __name__ == "__main__":
    if sys.argv[1:] == ["links"]:
        sys.exit(bool(links() or versions()))
    if len(sys.argv) < 3 or sys.argv[1] != "commands" or not shutil.which("bash"):
        sys.exit(__doc__)
    other = not sys.argv[3:] and printed(sys.argv[2])
    sys.exit(bool(commands(sys.argv[2], [Path(p).resolve() for p in sys.argv[3:]]) or other))
