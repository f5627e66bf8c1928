"""What the tests of the command that are written in Python share: checks are counted, and each that
fails says why."""

import sys

count = {"checks": 0, "failed": 0}


def check(good, message):
    count["checks"] += 1
    if not good:
        count["failed"] += 1
        print(f"FAIL: {message}", file=sys.stderr)


def leave():
    print(f"{count['checks']} checks, {count['failed']} failed")
    sys.exit(count["failed"] != 0)
