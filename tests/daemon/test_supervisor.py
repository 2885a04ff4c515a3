"""The supervisor with a daemon that does what it is told: restarts, what is kept, the end, upgrades."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.daemon import supervisor
from archipfs.daemon.supervisor import DEATHS_MAX, DEATHS_SECONDS, SOCKET_NAME, Deaths, ending_of, fields_of
from tests.lib.instance import process_lives
from tests.lib.waiting import wait_until

FAKE = Path(__file__).with_name("fake_daemon.py")
PAUSE_MS_MAX = 60_000
"""For a busy machine; in other units, or by another clock, a pause would be far longer."""
FIRST = ["store", "store lock", "ready", "serve"]
RESUMED = ["go", "show", "ready", "serve"]
NEXT = ["standby", "go", "show", "ready", "serve"]

Lives = Sequence[Sequence[str]]


class Supervised:
    """A supervisor and the fake daemons that it starts."""

    def __init__(self, directory: Path, lives: Lives, *, outer: str | None) -> None:
        self.directory = directory
        self.events_path = directory / "events"
        self.log = directory / "log"
        plan = {
            "command": [sys.executable, "-I", "-S", str(FAKE), str(self.events_path), json.dumps(lives)],
            "mountpoint": str(directory / "mnt"),
            "run_dir": str(directory),
            "log": str(self.log),
        }
        (directory / "mnt").mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        if outer is not None:
            environment["NOTIFY_SOCKET"] = outer
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(plan)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )

    def events(self, what: str) -> list[tuple[int, Any]]:
        """Process ids and details of what has happened so far."""
        lines = self.events_path.read_text().splitlines() if self.events_path.exists() else []
        return [(pid, detail) for pid, event, detail in map(json.loads, lines) if event == what]

    def wait_for(self, what: str, count: int = 1) -> int:
        """Until it has happened so often; the process to which it did last."""
        wait_until(lambda: len(self.events(what)) >= count, f"{what} happens {count} times: {self.log.read_text()}")
        return self.events(what)[count - 1][0]

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def ask_for_upgrade(self) -> Callable[[], dict[str, Any]]:
        """The answer can be waited for."""
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        asking.settimeout(120)
        wait_until((self.directory / SOCKET_NAME).exists, "upgrades can be asked for")
        asking.connect(str(self.directory / SOCKET_NAME))

        def answer() -> dict[str, Any]:
            with asking, asking.makefile() as lines:
                answered: dict[str, Any] = json.loads(lines.readline())
                return answered

        return answer

    def go_on(self) -> None:
        """Have the daemon that waits go on."""
        self.events_path.with_name(f"{self.events_path.name}.go-on").touch()

    def descriptors(self) -> list[str]:
        links = []
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                links.append(os.readlink(link))
        return sorted(links)

    def children(self) -> list[int]:
        """Zombies too."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def ended(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        """By force; nothing of it is left."""
        self.process.kill()
        self.process.wait()
        for pid, _ in self.events("started"):
            if process_lives(pid) and str(self.events_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


Supervise = Callable[..., Supervised]


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Supervise]:
    """Starts a supervisor whose daemon has these lives."""
    started: list[Supervised] = []

    def start(*lives: Sequence[str], outer: str | None = None) -> Supervised:
        started.append(Supervised(tmp_path, lives, outer=outer))
        return started[-1]

    yield start
    for each in started:
        each.end()


# Restarts


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_daemon_that_dies_is_started_again_with_what_it_stored(supervise: Supervise, number: int) -> None:
    supervised = supervise(FIRST, RESUMED)
    first = supervised.wait_for("ready")
    os.kill(first, number)
    second = supervised.wait_for("ready", 2)
    assert second != first
    assert supervised.events("inherited") == [
        (second, {"device": f"device of {first}", "lock": f"lock of {first}"}),
    ]
    assert supervised.events("open") == [(second, [0, 1, 2, 3, 4])], "it has the two, and nothing else of ours"
    assert 0 < supervised.events("go")[0][1] < PAUSE_MS_MAX
    assert supervised.children() == [second], "no zombie is left"


def test_an_exit_that_was_not_announced_is_a_death(supervise: Supervise) -> None:
    supervised = supervise(["store", "ready", "exit 3"], RESUMED)
    supervised.wait_for("ready", 2)
    assert [line["how"] for line in supervised.logged()] == ["exit code 3"]


def test_what_is_removed_or_stored_again_is_not_given_back(supervise: Supervise) -> None:
    supervised = supervise(["store", "store", "store lock", "remove", "ready", "die"], ["go", "show", "ready", "serve"])
    second = supervised.wait_for("ready", 2)
    first = supervised.events("ready")[0][0]
    assert supervised.events("inherited") == [(second, {"lock": f"lock of {first}"})]


def test_only_so_many_descriptors_are_kept(supervise: Supervise) -> None:
    supervised = supervise(["store many", "ready", "die"], RESUMED)
    supervised.wait_for("ready", 2)
    assert len(supervised.events("inherited")[0][1]) == supervisor.STORED_MAX
    assert [line["event"] for line in supervised.logged()].count("a descriptor is not kept") == 4


def test_fifty_restarts_leave_no_descriptor_and_no_zombie(supervise: Supervise) -> None:
    supervised = supervise(FIRST, NEXT)
    supervised.wait_for("ready")
    wait_until((supervised.directory / SOCKET_NAME).exists, "it has all that it needs")
    before = len(supervised.descriptors())
    for count in range(2, 52):
        answer = supervised.ask_for_upgrade()()
        assert answer["new"] == supervised.wait_for("ready", count)
    wait_until(lambda: len(supervised.children()) == 1, "the old ones are reaped")
    wait_until(lambda: len(supervised.descriptors()) == before, f"there are {before} descriptors again")


def test_a_supervisor_is_small(supervise: Supervise) -> None:
    supervised = supervise(FIRST, RESUMED)
    os.kill(supervised.wait_for("ready"), signal.SIGKILL)
    supervised.wait_for("ready", 2)
    rollup = Path(f"/proc/{supervised.process.pid}/smaps_rollup").read_text()
    kib = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    assert kib["Rss:"] < 16 << 10
    assert kib["Private_Dirty:"] < 8 << 10


def test_five_deaths_in_a_row_end_it_and_are_told(supervise: Supervise) -> None:
    supervised = supervise(["store", "ready", "die"], ["go", "die"], ["go", "exit 3"], ["go", "ready", "die"])
    assert supervised.ended() == 1
    assert len(supervised.events("started")) == DEATHS_MAX
    last = supervised.logged()[-1]
    assert (last["event"], last["level"]) == ("the mount is given up", "error")
    assert "SIGKILL, SIGKILL, exit code 3, SIGKILL, SIGKILL" in last["why"]
    assert str(supervised.log) in last["why"]
    assert not (supervised.directory / SOCKET_NAME).exists()


def test_a_death_before_the_first_ready_is_the_end(supervise: Supervise) -> None:
    supervised = supervise(["store", "exit 3"])
    assert supervised.ended() == 3
    assert len(supervised.events("started")) == 1
    assert supervised.logged() == []


def test_a_death_without_anything_stored_is_the_end(supervise: Supervise) -> None:
    supervised = supervise(["ready", "die"])
    assert supervised.ended() == 128 + signal.SIGKILL
    assert [line["how"] for line in supervised.logged()] == ["SIGKILL"]


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    plan = {"command": ["/nowhere/python"], "mountpoint": str(tmp_path), "run_dir": str(tmp_path), "log": "here"}
    command = [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert json.loads(done.stderr)["command"] == "/nowhere/python"


# Who is listened to


def test_only_the_daemon_itself_is_listened_to(supervise: Supervise) -> None:
    supervised = supervise(["store", "nonsense", "child says stopping", "ready", "die"], RESUMED)
    second = supervised.wait_for("ready", 2)
    address = dict(
        entry.partition("=")[::2] for entry in Path(f"/proc/{second}/environ").read_text().split("\0") if entry
    )["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect("\0" + address[1:])
        stranger.send(b"STOPPING=1")
        with open("/dev/null") as file:
            socket.send_fds(stranger, [b"FDSTORE=1\nFDNAME=device"], [file.fileno()])
    os.kill(second, signal.SIGKILL)
    third = supervised.wait_for("ready", 3)
    first = supervised.events("ready")[0][0]
    assert supervised.events("inherited")[-1] == (third, {"device": f"device of {first}"})


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_in_order(supervise: Supervise, number: int) -> None:
    supervised = supervise(FIRST)
    supervised.wait_for("ready")
    supervised.process.send_signal(number)
    assert supervised.ended() == 0
    assert len(supervised.events("SIGTERM")) == 1
    assert not (supervised.directory / SOCKET_NAME).exists()
    assert supervised.logged() == []


def test_what_is_stored_is_closed_when_the_daemon_stops(supervise: Supervise) -> None:
    supervised = supervise(["store", "store lock", "ready", "stopping", "serve", "exit 3"])
    supervised.wait_for("ready")
    wait_until(lambda: not any("(deleted)" in link for link in supervised.descriptors()), "the files are closed")
    assert not (supervised.directory / SOCKET_NAME).exists()
    supervised.process.terminate()
    assert supervised.ended() == 3, "its exit code is the daemon's"


def test_a_daemon_killed_while_it_stops_is_not_started_again(supervise: Supervise) -> None:
    supervised = supervise(["store", "ready", "stopping", "die"])
    assert supervised.ended() == 128 + signal.SIGKILL
    assert len(supervised.events("started")) == 1


def test_a_signal_during_a_restart_ends_the_daemon_when_it_is_ready(supervise: Supervise) -> None:
    supervised = supervise(["store", "ready", "serve"], ["sleep"], NEXT)
    os.kill(supervised.wait_for("ready"), signal.SIGKILL)
    second = supervised.wait_for("started", 2)
    supervised.process.terminate()
    time.sleep(0.1)
    assert process_lives(second), "it has to take up the mount first, to flush"
    supervised.process.terminate()
    assert supervised.process.poll() is None
    os.kill(second, signal.SIGKILL)
    assert supervised.ended() == 1


def test_a_signal_right_after_a_death_is_not_lost(supervise: Supervise) -> None:
    supervised = supervise(FIRST, RESUMED)
    os.kill(supervised.wait_for("ready"), signal.SIGKILL)
    supervised.process.terminate()
    assert supervised.ended() in (0, 1)
    assert not any(process_lives(pid) for pid, _ in supervised.events("started"))


def test_a_killed_supervisor_leaves_the_daemon_serving(supervise: Supervise) -> None:
    supervised = supervise(FIRST)
    pid = supervised.wait_for("ready")
    supervised.process.kill()
    supervised.ended()
    time.sleep(0.1)
    assert process_lives(pid)


def test_the_service_manager_above_is_told(supervise: Supervise) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outer:
        outer.bind("")
        outer.settimeout(60)
        supervised = supervise(FIRST, RESUMED, outer="@" + outer.getsockname()[1:].decode())
        assert outer.recv(1024) == b"READY=1\nSTATUS=serving"
        os.kill(supervised.wait_for("ready"), signal.SIGKILL)
        assert outer.recv(1024) == b"STATUS=the daemon died and is started again"
        assert outer.recv(1024) == b"READY=1\nSTATUS=serving"
        supervised.process.terminate()
        assert outer.recv(1024) == b"STOPPING=1"
        assert supervised.ended() == 0


# Upgrades


def test_an_upgrade_goes_on_with_a_new_daemon(supervise: Supervise) -> None:
    supervised = supervise(FIRST, NEXT)
    old = supervised.wait_for("ready")
    answer = supervised.ask_for_upgrade()()
    new = supervised.wait_for("ready", 2)
    assert (answer["old"], answer["new"]) == (old, new)
    assert 0 < answer["pause_ms"] < PAUSE_MS_MAX
    assert supervised.events("SIGHUP") == [(old, None)]
    assert supervised.events("inherited") == [(new, {"device": f"device of {old}", "lock": f"lock of {old}"})]
    assert not process_lives(old)
    supervised.process.terminate()
    assert supervised.ended() == 0


def test_an_upgrade_can_be_asked_for_by_a_signal(supervise: Supervise) -> None:
    supervised = supervise(FIRST, NEXT)
    supervised.wait_for("ready")
    supervised.process.send_signal(signal.SIGHUP)
    supervised.wait_for("ready", 2)


def test_everybody_who_asks_gets_the_answer_of_the_upgrade_under_way(supervise: Supervise) -> None:
    supervised = supervise(FIRST, ["wait", *NEXT])
    supervised.wait_for("ready")

    def connections() -> int:
        return sum(link.startswith("socket:") for link in supervised.descriptors())

    wait_until((supervised.directory / SOCKET_NAME).exists, "upgrades can be asked for")
    before = connections()
    answers = [supervised.ask_for_upgrade() for _ in range(3)]
    wait_until(lambda: connections() == before + 3, "all have asked")
    supervised.go_on()
    assert len({json.dumps(answer()) for answer in answers}) == 1
    assert len(supervised.events("started")) == 2


def test_upgrades_are_no_deaths(supervise: Supervise) -> None:
    supervised = supervise(FIRST, NEXT)
    for _ in range(DEATHS_MAX + 1):
        assert "error" not in supervised.ask_for_upgrade()()
    assert supervised.process.poll() is None


@pytest.mark.parametrize("life", [["exit 3"], ["standby", "exit 3"]], ids=["before", "when it stands by"])
def test_a_new_daemon_that_fails_leaves_the_mount_served(supervise: Supervise, life: list[str]) -> None:
    supervised = supervise(FIRST, life, RESUMED)
    old = supervised.wait_for("ready")
    answer = supervised.ask_for_upgrade()()
    if "standby" in life:
        # The old one may have handed over before anybody saw that the new one has ended: then it is an upgrade all the
        # same, to one more that is started.
        third = supervised.wait_for("ready", 2)
        assert answer.get("new") == third or "exit code 3" in answer["error"]
    else:
        assert "exit code 3" in answer["error"]
        assert process_lives(old)
    supervised.process.terminate()
    assert supervised.ended() == 0


def test_a_new_daemon_that_does_not_get_ready_is_abandoned(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "supervisor.py"
    text = Path(supervisor.__file__).read_text()
    short.write_text(text.replace("STANDBY_SECONDS = 20.0", "STANDBY_SECONDS = 3.0"))
    monkeypatch.setattr(supervisor, "__file__", str(short))
    supervised = supervise(FIRST, ["sleep"], NEXT)
    old = supervised.wait_for("ready")
    assert "not ready to take over" in supervised.ask_for_upgrade()()["error"]
    wait_until(lambda: supervised.children() == [old], "the new one is gone")
    assert supervised.ask_for_upgrade()()["old"] == old, "the next attempt is free to succeed"


def test_an_old_daemon_that_does_not_hand_over_is_killed(supervise: Supervise) -> None:
    supervised = supervise(["store", "ready", "serve deaf"], NEXT)
    old = supervised.wait_for("ready")
    answer = supervised.ask_for_upgrade()()
    assert supervised.events("SIGHUP") == [(old, None)]
    assert answer["new"] == supervised.wait_for("ready", 2)
    assert supervisor.HAND_OVER_SECONDS * 1000 <= answer["pause_ms"] < PAUSE_MS_MAX


def test_an_old_daemon_that_dies_meanwhile_is_replaced_by_the_new_one(supervise: Supervise) -> None:
    supervised = supervise(FIRST, ["go", "ready", "serve"])  # it never stands by, so nobody tells the old one
    old = supervised.wait_for("ready")
    answer = supervised.ask_for_upgrade()
    new = supervised.wait_for("started", 2)
    os.kill(old, signal.SIGKILL)
    assert answer()["new"] == new
    assert len(supervised.events("started")) == 2


def test_a_stop_during_an_upgrade_is_a_stop(supervise: Supervise) -> None:
    supervised = supervise(FIRST, ["sleep"])
    supervised.wait_for("ready")
    answer = supervised.ask_for_upgrade()
    supervised.wait_for("started", 2)
    supervised.process.terminate()
    assert "stopping" in answer()["error"]
    assert supervised.ended() == 0
    assert not any(process_lives(pid) for pid, _ in supervised.events("started"))


def test_without_anything_stored_there_is_no_upgrade(supervise: Supervise) -> None:
    supervised = supervise(["ready", "serve"])
    supervised.wait_for("ready")
    assert "nothing of this mount is kept" in supervised.ask_for_upgrade()()["error"]


# The pure parts


@given(st.binary())
def test_any_datagram_is_understood_or_ignored(datagram: bytes) -> None:
    for name, value in fields_of(datagram).items():
        assert name
        assert "\n" not in name + value


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n"))


@given(st.dictionaries(st.from_regex(r"[A-Z_]+\Z", fullmatch=True), TEXT))
def test_assignments_arrive_as_they_were_sent(fields: dict[str, str]) -> None:
    assert fields_of("\n".join(f"{name}={value}" for name, value in fields.items()).encode()) == fields


@given(st.lists(st.floats(0, 20), min_size=1, max_size=30))
def test_five_deaths_are_too_many_only_if_they_lie_close_together(pauses: list[float]) -> None:
    deaths = Deaths()
    times: list[float] = []
    for pause in pauses:
        times.append((times[-1] if times else 0.0) + pause)
        close = sum(times[-1] - each < DEATHS_SECONDS for each in times)
        assert deaths.add(times[-1], "SIGKILL") == (close >= DEATHS_MAX)


def test_how_a_process_ended_is_told_in_words() -> None:
    assert ending_of(3 << 8) == "exit code 3"
    assert ending_of(signal.SIGKILL) == "SIGKILL"
    assert ending_of(33) == "signal 33", "it has no name"
