"""The daemon's log: it must never be what stops the daemon."""

import subprocess
import sys

PROGRAM = """
import structlog
from archipfs.daemon.logs import configure_logs

configure_logs()
for number in range(200):
    structlog.get_logger().warning("refused", number=number, error="x" * 200)
print("goes on")
"""


def test_a_log_on_a_full_disk_stops_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "goes on\n"
