"""A bug that ends the daemon is a pause as well: it must not take the mount down on its way out."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, create, opened
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.mount

FAULT = """
import os, sys, threading, time

def wait(trigger):
    while "archipfs.daemon.process" not in sys.modules or not os.path.exists(trigger):
        time.sleep(0.01)
    operations = sys.modules["archipfs.endpoints.fuse.operations"].VolumeOperations

    async def statfs(self, ctx):
        os.unlink(trigger)
        raise RuntimeError("a fault of the test")

    operations.statfs = statfs
    open(trigger + ".set", "x").close()

if "archipfs.daemon" in " ".join(sys.orig_argv):
    threading.Thread(target=wait, args=(TRIGGER,), daemon=True).start()
"""
"""Imported by every Python process of the instance; in a daemon, the next statfs(2) fails as nothing should."""


def test_a_bug_that_ends_the_daemon_is_a_pause(
    make_instance: Callable[..., Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = tmp_path / "trigger"
    (tmp_path / "sitecustomize.py").write_text(FAULT.replace("TRIGGER", repr(str(trigger))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    mount = make_instance(supervised=True).mount()
    before = mount.daemon_pid()
    with opened(create(mount.path / "vm1", SECTOR_BYTES)) as descriptor:
        os.pwrite(descriptor, b"here", 0)
        trigger.touch()
        wait_until(trigger.with_name("trigger.set").exists, "the fault is in place")
        os.statvfs(mount.path)
        assert mount.daemon_pid() != before
        assert os.pread(descriptor, 4, 0) == b"here"
        os.fsync(descriptor)
    assert mount.logged("a fault of the test")
    mount.umount()
    # What the log has of it is a bug, as it should be: not one for the end of the test to find.
    (mount.root / "state" / "daemon.log").write_text("")
