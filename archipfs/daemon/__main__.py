"""``python -m archipfs.daemon``: started by ``archip mount``, not by people."""

import sys

from archipfs.daemon.lifecycle import run_daemon

run_daemon(sys.argv[1:])
