"""examples/needles.py in small: trained, served, its blocks compared and its needles found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "needles.py"


def test_trained_and_served():
    out = subprocess.run([sys.executable, EXAMPLE, "--device", "cpu"], capture_output=True,
                         text=True, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    said = re.findall(r"(\d+) of (\d+) rows of blocks differ .*; ([\d.]+) % of \d+ needles found",
                      out.stdout)
    assert said and all(differ == "0" and int(rows) > 400 and float(share) >= 90
                        for differ, rows, share in said), out.stdout
