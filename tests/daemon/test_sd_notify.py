"""What the service manager is told."""

import socket
from pathlib import Path

import pytest

from archipfs.daemon.sd_notify import notify


def test_the_state_arrives_as_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1\nSTATUS=mounted")
        assert manager.recv(1024) == b"READY=1\nSTATUS=mounted"


def test_an_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0archipfs-test-notify")
        monkeypatch.setenv("NOTIFY_SOCKET", "@archipfs-test-notify")
        notify("STOPPING=1")
        assert manager.recv(1024) == b"STOPPING=1"


def test_nothing_is_sent_where_there_is_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
