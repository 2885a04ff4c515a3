"""Programs of other people, run to their end."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

PROGRAM_SECONDS = 120.0


def run(*arguments: str | int | Path, seconds: float = PROGRAM_SECONDS, fine: Sequence[int] = (0,)) -> str:
    """What the program wrote on standard output. Fails the test if it ends with a status not in ``fine``, or hangs."""
    words = [str(argument) for argument in arguments]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{' '.join(words)}: did not end in {seconds:.0f} s; it wrote {error.stdout!r}") from None
    assert done.returncode in fine, f"{' '.join(words)}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout
