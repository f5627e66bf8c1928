#!/usr/bin/env python3
"""The command on a terminal: colour, widths, and the line that says what is waited for. What it is
elsewhere, the other tests of the command say: there, output is a pipe.

    tests/cli/terminal.py REGRAPH SOURCE_DIR
"""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import random
from pathlib import Path

from checks import check, leave

regraph, source = sys.argv[1], Path(sys.argv[2])
# What is begun in the background ignores Ctrl-C, and so would what is begun here.
signal.signal(signal.SIGINT, signal.default_int_handler)
nsa = source / "examples/nsa.json"
wrong = source / "tests/golden/run/many.json"
small = ["--set", "T=256", "--set", "H=4", "--set", "KH=2", "--set", "D=16", "--set", "DV=16"]


def shown(*arguments, columns=80, stdout=True, **environment):
    """What a terminal gets; of stderr alone unless stdout."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    keep = {key: value for key, value in os.environ.items()
            if key not in ("NO_COLOR", "CLICOLOR_FORCE")}
    process = subprocess.Popen(
        [regraph, *map(str, arguments)], stdin=subprocess.DEVNULL, stderr=side,
        stdout=side if stdout else subprocess.DEVNULL,
        env={**keep, "TERM": "xterm", **environment})
    os.close(side)
    text = b""
    while True:
        try:
            text += os.read(main, 65536)
        except OSError: # the terminal's other end is closed
            break
        if process.poll() is not None and not text:
            break
    os.close(main)
    process.wait()
    return text.decode().replace("\r\n", "\n")


def plain(text):
    """Without progress and colour."""
    return re.sub(r"\033\[[0-9;]*m", "", re.sub(r"[^\n]*\r\033\[K", "", text))


# ---- colour ----
text = shown("check", wrong)
check("\033[31;1mRG_E_VALUE\033[0m: 'bf61'" in text, f"no colour on a terminal: {text[:300]!r}")
check("many.json:4:46: /inputs/q/dtype: RG_E_VALUE: 'bf61' is no dtype" in plain(text),
      "colour changes the words")
for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}):
    check("\033[" not in shown("check", wrong, **environment), f"colour under {environment}")
check("\033[" in shown("check", wrong, TERM="dumb", CLICOLOR_FORCE="1"),
      "CLICOLOR_FORCE is not heard")
check("\033[31" in shown("check", wrong, NO_COLOR=""), "an empty NO_COLOR is one that is not set")
check("\033[1mnode" in shown("run", nsa, *small), "a table's head does not stand out")

# ---- widths ----
listed = plain(shown("help")).split("\n")
docs = {line.index(doc) for line in listed
        for doc in ("list the ops", "measure ops", "pack intervals") if doc in line}
check(len(docs) == 1, f"help: what commands do begins in columns {docs}")
for columns in (52, 80):
    commands = [["run", nsa, *small, "--backward"], ["plan", nsa, *small, "--timeline"],
                ["help", "run"]]
    if columns == 52:  # it measures the machine first
        commands += [["help"], ["bench", nsa, *small, "--repeat", "1"]]
    for command in commands:
        text = plain(shown(*command, columns=columns))
        body = text.split("\n\n", 1)[1]  # the first lines are sentences
        widest = max(body.split("\n"), key=len)
        # its numbers alone take 49 columns, and the mark of what came from a cache one more
        room = max(columns, 58 + widest.endswith("*")) if command[0] == "bench" else columns
        check(len(widest) <= room, f"{command[0]} {command[-1]} at {columns} columns: {widest!r}")
        check(len(text.split("\n")) > 5, f"{command[0]} at {columns} columns: {text!r}")
check(" swa_attn " in plain(shown("run", nsa, *small, columns=120)),
      "ops are left out though there is room")

# ---- what is waited for ----
with tempfile.TemporaryDirectory() as folder:
    draw = random.Random(1)
    csv = Path(folder) / "hard.csv"
    lives = [(lower, lower + draw.randrange(1, 90), draw.randrange(1, 10**6))
             for lower in (draw.randrange(300) for _ in range(1500))]
    rows = "".join(f"{i},{a},{b},{size}\n" for i, (a, b, size) in enumerate(lives))
    csv.write_text("id,lower,upper,size\n" + rows)
    text = shown("pack", csv, "--limit", "3", stdout=False)
    lines = text.split("\r\033[K")
    check("packing ..." in lines, f"pack is silent at first: {lines[:3]}")
    check(any(re.fullmatch(r"packing [23] s of at most 3 s", line) for line in lines),
          f"pack: {lines[-5:]}")
    check(re.match(r"\n*peak [0-9]+, ", lines[-1]), f"the line stays: {lines[-2:]}")
    check(max(map(len, lines[:-1])) < 80, "a line of progress is wider than the terminal")
    text = shown("pack", csv, "--limit", "0.01", columns=9, stdout=False)
    check(all(len(line) < 9 for line in text.split("\r\033[K")[:-1]),
          "progress on a narrow terminal")
    text = shown("pack", csv, "--limit", "2.5", stdout=False, TERM="dumb")
    check(re.fullmatch(r"peak [0-9]+, [^\r]*\n", text),
          f"progress on a terminal that can't draw it: {text!r}")
text = shown("bench", nsa, *small, "--repeat", "1", stdout=False)
check({"filling inputs ...", "warming up ...", "timing ..."} <= set(text.split("\r\033[K")),
      f"bench: {text!r}")


# ---- Ctrl-C: over by that signal, without the line and without half a file ----
def interrupted(until, *arguments):
    """What a terminal gets of a command that is stopped when that is on it, and how it ends."""
    main, side = pty.openpty()
    process = subprocess.Popen([regraph, *map(str, arguments)], stdin=subprocess.DEVNULL,
                               stderr=side, stdout=subprocess.DEVNULL,
                               env={**os.environ, "TERM": "xterm"})
    os.close(side)
    text, sent = b"", False
    while True:
        try:
            text += os.read(main, 65536)
        except OSError: # the terminal's other end is closed
            break
        if until in text and not sent:
            process.send_signal(signal.SIGINT)
            sent = True
    os.close(main)
    return text, process.wait()


with tempfile.TemporaryDirectory() as work:
    for repeat in ("--repeat", "100000"), ("--eager", "--repeat", "100000"):
        text, code = interrupted(b"\r\033[Ktiming ", "bench", nsa, *small, *repeat, "--html",
                                 Path(work) / "page.html")
        check(code == -signal.SIGINT, f"Ctrl-C in bench {repeat}: {code}")
        check(text.endswith(b"\r\033[K"), f"Ctrl-C in bench leaves {text[-80:]!r}")
    check(os.listdir(work) == [], f"Ctrl-C in bench leaves {os.listdir(work)}")

    # while a file is written: the signal may come after it, so more than once
    spec = Path(work) / "copy.json"
    spec.write_text(json.dumps({
        "regraph": 1, "name": "copy", "inputs": {"x": {"shape": ["T", 1024], "dtype": "f32"}},
        "nodes": [{"name": "copy", "op": "cast", "in": {"x": "x"}, "out": {"y": "y"}}],
        "outputs": {"y": "y"}}))
    for _ in range(20):
        text, code = interrupted(b"\r\033[Kwriting results", "run", spec, "--set", "T=32768",
                                 "--out", f"y={work}/y.npy")
        check(code in (0, -signal.SIGINT), f"Ctrl-C in run: {code} {text[-300:]!r}")
        check(text.endswith(b"\r\033[K"), f"Ctrl-C while a file is written leaves {text[-80:]!r}")
        if code:
            break
        (Path(work) / "y.npy").unlink()
    check(code == -signal.SIGINT, "Ctrl-C always came after the file was written")
    check(os.listdir(work) == ["copy.json"], f"Ctrl-C in run leaves {os.listdir(work)}")

leave()
