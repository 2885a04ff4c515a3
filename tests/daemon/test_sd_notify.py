"""What the service manager is told, and what it gives."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.daemon.sd_notify import forget, notify, store, take_inherited


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_the_state_arrives_as_one_datagram(manager: socket.socket) -> None:
    assert notify("READY=1\nSTATUS=mounted")
    assert manager.recv(1024) == b"READY=1\nSTATUS=mounted"


def test_an_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0archipfs-test-notify")
        monkeypatch.setenv("NOTIFY_SOCKET", "@archipfs-test-notify")
        notify("STOPPING=1")
        assert manager.recv(1024) == b"STOPPING=1"


def test_nothing_is_sent_where_there_is_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


def test_a_manager_that_is_gone_harms_nobody(manager: socket.socket) -> None:
    manager.close()
    assert not notify("READY=1")


def test_a_descriptor_is_stored_and_forgotten_by_name(manager: socket.socket) -> None:
    reading, writing = os.pipe()
    try:
        assert store("device", writing)
        message, received, _, _ = socket.recv_fds(manager, 1024, 4)
        assert message == b"FDSTORE=1\nFDNAME=device"
        assert [os.fstat(each).st_ino for each in received] == [os.fstat(writing).st_ino]
        os.close(received[0])
        forget("device")
        assert manager.recv(1024) == b"FDSTOREREMOVE=1\nFDNAME=device"
    finally:
        os.close(reading)
        os.close(writing)


PROGRAM = """
import fcntl, os, sys
from archipfs.daemon.sd_notify import take_inherited
if sys.argv[1:]:
    os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
taken = take_inherited()
for name, descriptor in taken.items():
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    print(name, os.readlink(f"/proc/self/fd/{descriptor}"))
print(take_inherited(), [name for name in os.environ if name.startswith("LISTEN_")])
"""


def inheriting(paths: list[Path], *arguments: str) -> list[str]:
    """What a process finds that gets these files as descriptors from 3 on."""
    files = [os.open(path, os.O_RDONLY | os.O_CREAT) for path in paths]
    # The shell puts them where they belong; what it is given may lie anywhere.
    redirections = " ".join(f"{3 + index}<&{descriptor}" for index, descriptor in enumerate(files))
    environment = {**os.environ, "LISTEN_FDS": str(len(files)), "LISTEN_FDNAMES": ":".join(path.name for path in paths)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        done = subprocess.run(
            ["bash", "-c", f'exec "$0" -c "$1" "${{@:2}}" {redirections}', sys.executable, PROGRAM, *arguments],
            env=environment,
            pass_fds=files,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for descriptor in files:
            os.close(descriptor)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("listen_pid", [(), ("0",)], ids=["without LISTEN_PID", "with it"])
def test_what_is_inherited_comes_by_name_and_only_once(tmp_path: Path, listen_pid: tuple[str, ...]) -> None:
    paths = [tmp_path / "device", tmp_path / "session"]
    assert inheriting(paths, *listen_pid) == [*(f"{path.name} {path}" for path in paths), "{} []"]


def test_what_was_meant_for_another_process_is_not_taken(tmp_path: Path) -> None:
    assert inheriting([tmp_path / "device"], "1") == ["{} []"]


def test_nothing_is_inherited_where_nothing_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert take_inherited() == {}
