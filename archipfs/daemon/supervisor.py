"""The supervisor: starts the daemon, keeps what must outlive it, and starts it again when it dies.

It is the service manager of one process and speaks systemd's protocol with it: the daemon says READY=1, STOPPING=1,
STATUS=, FDSTORE=1 and FDSTOREREMOVE=1 (sd_notify(3)), and gets what is stored back as LISTEN_FDS (sd_listen_fds(3)),
with no LISTEN_PID, which nobody knows before the process is there. Two words are our own. X_STANDBY=1 says that a new
daemon has its code loaded and waits for the old one's end. And a daemon that goes on for another one gets a descriptor
``go``: a pipe out of which comes, when it may begin, since when nobody serves (nanoseconds of the monotonic clock).

It is a program by itself, run by its path, made of this file and the standard library. All of that is imported when it
starts: the package on the disk may be another one by the time it is needed. Nothing here opens a file of the mount, for
it would wait for a daemon that waits for us. (No dataclasses either: what they import would be a fifth of its memory.)

One thread, one loop: notifications, ends of processes (pidfds), signals (a wakeup socket) and requests for an upgrade
are all descriptors in one selector. What a process sent is read before its end is looked at.
"""

import array
import contextlib
import errno
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

SOCKET_NAME = "upgrade.sock"
"""In the run directory. Whoever connects asks for an upgrade, and gets one line of JSON when it is done or has failed:
``{"old": pid, "new": pid, "pause_ms": number}`` or ``{"error": why}``."""
SUPERVISOR_PID = "ARCHIPFS_SUPERVISOR"
"""The variable that tells the daemon our process id."""
GO = "go"
DEVICE = "device"
"""The stored /dev/fuse: the mount lives as long as somebody has it open."""

FIRST_PASSED = 3
STORED_MAX = 16
STORED_FROM = 64
"""What is stored has numbers from here on, so that it is not in the way of what a child gets from 3 on."""

DEATHS_MAX = 5
DEATHS_SECONDS = 30.0
STANDBY_SECONDS = 20.0
"""How long a new daemon may take to load its code."""
HAND_OVER_SECONDS = 2.0
"""How long the old one may take to answer what is under way; then it is killed, as if it had crashed."""

DATAGRAM_BYTES_MAX = 4096
_CREDENTIALS = struct.Struct("3i")
_FAILED_EXIT_CODE = 1
_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Plan:
    """What to supervise; it arrives as JSON in the first argument."""

    def __init__(self, *, command: list[str], mountpoint: str, run_dir: str, log: str) -> None:
        """``log`` says where the daemon's log is, for people."""
        self.command = command
        self.mountpoint = mountpoint
        self.run_dir = run_dir
        self.log = log


def fields_of(datagram: bytes) -> Mapping[str, str]:
    """The assignments of a notification, one a line; what is none is left out."""
    lines = datagram.decode(errors="replace").split("\n")
    return {name: value for name, separator, value in (line.partition("=") for line in lines) if separator and name}


def ending_of(status: int) -> str:
    """How a process ended, by its wait status, for people."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Deaths:
    """How the daemon died lately."""

    def __init__(self) -> None:
        self._each: list[tuple[float, str]] = []

    def add(self, now: float, how: str) -> bool:
        """Whether that was one too many: ``DEATHS_MAX`` within ``DEATHS_SECONDS``."""
        self._each = [(then, before) for then, before in self._each if now - then < DEATHS_SECONDS]
        self._each.append((now, how))
        return len(self._each) >= DEATHS_MAX

    def __str__(self) -> str:
        return ", ".join(how for _, how in self._each)


class Store:
    """Descriptors by name. Each is ours alone: replaced, removed or forgotten, it is closed."""

    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {}

    def put(self, name: str, descriptor: int) -> bool:
        """Keep a copy of ``descriptor``; whether there was room for it."""
        if name not in self.descriptors and len(self.descriptors) >= STORED_MAX:
            return False
        copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, STORED_FROM)
        self.remove(name)
        self.descriptors[name] = copy
        return True

    def remove(self, name: str) -> None:
        descriptor = self.descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def clear(self) -> None:
        for name in list(self.descriptors):
            self.remove(name)


class Daemon:
    """One process that we started."""

    def __init__(self, pid: int, go: int | None) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.go = go
        """Our end of the pipe on which it waits; ``None`` if it does not have to, or was told already."""
        self.ready = False
        self.stopping = False
        self.handing_over = False
        """It was told to."""

    def send(self, number: signal.Signals) -> None:
        """It is not reaped yet, so that the number means this process and no other."""
        os.kill(self.pid, number)

    def tell_to_go(self, since_ns: int) -> None:
        assert self.go is not None, "it was told already"
        with contextlib.suppress(BrokenPipeError):  # it has just died, which is about to be seen
            os.write(self.go, b"%d" % since_ns)
        os.close(self.go)
        self.go = None

    def reap(self) -> int:
        """Its wait status. It has ended."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        if self.go is not None:
            os.close(self.go)
        return status


def start(plan: Plan, stored: Mapping[str, int], *, notify_address: str, waiting: bool) -> Daemon:
    """Start a daemon with the stored descriptors, and a pipe on which it waits if it is to. Raises ``OSError``."""
    passed = dict(stored)
    go = None
    if waiting:
        reading, go = os.pipe2(os.O_CLOEXEC)
        passed[GO] = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, STORED_FROM)
        os.close(reading)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    environment["NOTIFY_SOCKET"] = notify_address
    environment[SUPERVISOR_PID] = str(os.getpid())
    if passed:
        environment["LISTEN_FDS"] = str(len(passed))
        environment["LISTEN_FDNAMES"] = ":".join(passed)
    try:
        pid = os.posix_spawn(
            plan.command[0],
            plan.command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, descriptor, FIRST_PASSED + index)
                for index, descriptor in enumerate(passed.values())
            ],
            setpgroup=0,  # what is typed at a terminal is for us
            setsigdef=[signal.SIGPIPE],
        )
    except OSError:
        if go is not None:
            os.close(go)
        raise
    finally:
        if waiting:
            os.close(passed[GO])
    return Daemon(pid, go)


class Supervisor:
    """Runs until the daemon has ended for good."""

    def __init__(self, plan: Plan) -> None:
        """Raises ``OSError`` if the daemon cannot even be started."""
        self._plan = plan
        self._store = Store()
        self._deaths = Deaths()
        self._outer_address = os.environ.get("NOTIFY_SOCKET")
        self._selector = selectors.DefaultSelector()
        self._notifications = self._listen_for_notifications()
        self._signals = self._listen_for_signals()
        self._upgrades: socket.socket | None = None
        self._children: set[Daemon] = set()
        self._daemon = self._start(waiting=False)
        """The one that serves, or is about to."""
        self._next: Daemon | None = None
        """The one that is to go on after an upgrade, until it does."""
        self._replaced: Daemon | None = None
        """The one before an upgrade, from when the next one goes on until that one is ready."""
        self._asking: list[socket.socket] = []
        """Who waits for the end of the upgrade."""
        self._was_ready = False
        self._ending = False
        self._since_ns: int | None = None
        """Since when nobody serves."""
        self._deadline: float | None = None
        """When ``_next`` must be standing by, or ``_daemon`` must have handed over."""
        self._exit_code: int | None = None

    def run(self) -> int:
        """The exit code: the daemon's where it ended in order, or before it was ready for the first time."""
        while self._exit_code is None:
            timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            # One at a time: it may take away what the next one is about, which comes again if it is still there.
            for key, _ in self._selector.select(timeout)[:1]:
                key.data()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._too_late()
        self._kill_children()
        self._answer({"error": "the daemon has ended"})
        return self._exit_code

    def _start(self, *, waiting: bool) -> Daemon:
        address = "@" + self._notifications.getsockname()[1:].decode()
        daemon = start(self._plan, self._store.descriptors, notify_address=address, waiting=waiting)
        self._children.add(daemon)
        self._selector.register(daemon.pidfd, selectors.EVENT_READ, lambda: self._ended(daemon))
        return daemon

    # What a daemon says

    def _listen_for_notifications(self) -> socket.socket:
        notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        notifications.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        notifications.bind("")  # the kernel makes up an abstract address
        self._selector.register(notifications, selectors.EVENT_READ, self._read_notifications)
        return notifications

    def _read_notifications(self) -> None:
        for pid, said, descriptors in self._received():
            try:
                if pid == self._daemon.pid:
                    self._daemon_said(said, descriptors)
                elif self._next is not None and pid == self._next.pid:
                    self._next_said(said)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _received(self) -> Iterator[tuple[int, Mapping[str, str], Sequence[int]]]:
        """Everything that has arrived: who sent it, what it says, the descriptors with it, which are the caller's."""
        room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(STORED_MAX * array.array("i").itemsize)
        while True:
            try:
                datagram, ancillary, _, _ = self._notifications.recvmsg(
                    DATAGRAM_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            sender, descriptors = 0, array.array("i")
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    sender, _, _ = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])
                elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            yield sender, fields_of(datagram), descriptors

    def _daemon_said(self, said: Mapping[str, str], descriptors: Sequence[int]) -> None:
        name = said.get("FDNAME", "")
        if said.get("FDSTORE") == "1" and not self._daemon.stopping:
            if not name or len(descriptors) != 1 or not self._store.put(name, descriptors[0]):
                log("error", "a descriptor is not kept", name=name, count=len(descriptors))
        elif said.get("FDSTOREREMOVE") == "1":
            self._store.remove(name)
        if said.get("READY") == "1" and not self._daemon.ready:
            self._is_ready()
        if said.get("STOPPING") == "1" and not self._daemon.stopping:
            self._is_stopping()
        relayed = [f"{key}={said[key]}" for key in ("READY", "STOPPING", "STATUS") if key in said]
        if relayed:
            self._tell_outer("\n".join(relayed))

    def _is_ready(self) -> None:
        self._daemon.ready = True
        if not self._was_ready:
            self._was_ready = True
            self._upgrades = self._listen_for_upgrades()
        if self._replaced is not None and self._since_ns is not None:
            pause_ms = round((time.monotonic_ns() - self._since_ns) / 1e6, 1)
            log("info", "upgraded", old=self._replaced.pid, new=self._daemon.pid, pause_ms=pause_ms)
            self._answer({"old": self._replaced.pid, "new": self._daemon.pid, "pause_ms": pause_ms})
        self._replaced = self._since_ns = None
        if self._ending:
            self._daemon.send(signal.SIGTERM)

    def _is_stopping(self) -> None:
        """It has unmounted. When it is gone another mount may begin: the locks and our socket's name are free then."""
        self._daemon.stopping = True
        self._abandon_next("the daemon is stopping")
        self._withdraw()
        self._store.clear()

    def _tell_outer(self, state: str) -> None:
        """Say it to the service manager above us, if there is one."""
        if not self._outer_address:
            return
        address = "\0" + self._outer_address[1:] if self._outer_address.startswith("@") else self._outer_address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as outer:
            try:
                outer.sendto(state.encode(), address)
            except OSError as error:
                log("warning", "the service manager does not listen", error=str(error))

    # Its end

    def _ended(self, daemon: Daemon) -> None:
        self._read_notifications()
        status = self._reap(daemon)
        if daemon is self._daemon:
            self._after_daemon(status)
        elif daemon is self._next:
            self._next = None
            if not self._daemon.handing_over:
                self._deadline = None
            self._upgrade_failed(f"the new daemon ended by {ending_of(status)} before it could take over")

    def _reap(self, daemon: Daemon) -> int:
        self._selector.unregister(daemon.pidfd)
        self._children.remove(daemon)
        return daemon.reap()

    def _kill_children(self) -> None:
        for daemon in list(self._children):
            daemon.send(signal.SIGKILL)
            self._reap(daemon)

    def _after_daemon(self, status: int) -> None:
        """The daemon is gone: go on with the next, or start it again, or end."""
        how = ending_of(status)
        if self._daemon.handing_over:
            self._deadline = None
        if self._daemon.stopping or not self._was_ready or not self._store.descriptors:
            self._end_with(status)
            return
        self._since_ns = self._since_ns or time.monotonic_ns()
        handed_over = self._daemon.handing_over and self._next is not None
        if not handed_over:
            log("warning", "the daemon died", pid=self._daemon.pid, how=how)
        if self._ending and not handed_over:
            self._give_up(f"the daemon ended by {how} when it was to stop")
        elif not handed_over and self._deaths.add(time.monotonic(), how):
            self._give_up_restarting()
        elif self._next is not None:
            self._go_on(self._next)
        else:
            self._restart()

    def _end_with(self, status: int) -> None:
        """End as the daemon did: in order, or without anything that we could go on with."""
        code = os.waitstatus_to_exitcode(status)
        if code < 0 or (self._was_ready and not self._daemon.stopping):
            log("error", "the daemon died, and nothing is kept to go on with", how=ending_of(status))
        self._withdraw()
        self._exit_code = code if code >= 0 else 128 - code

    def _go_on(self, next_: Daemon) -> None:
        self._replaced, self._daemon, self._next = self._daemon, next_, None
        self._deadline = None
        assert self._since_ns is not None
        next_.tell_to_go(self._since_ns)

    def _restart(self) -> None:
        self._tell_outer("STATUS=the daemon died and is started again")
        assert self._since_ns is not None
        while True:
            try:
                self._daemon = self._start(waiting=True)
            except OSError as error:
                if self._deaths.add(time.monotonic(), f"not started: {error.strerror}"):
                    self._give_up_restarting()
                    return
            else:
                self._daemon.tell_to_go(self._since_ns)
                return

    def _give_up_restarting(self) -> None:
        self._give_up(
            f"the daemon died {DEATHS_MAX} times in {DEATHS_SECONDS:.0f} s ({self._deaths}); "
            f"see {self._plan.log}, then mount again"
        )

    def _give_up(self, why: str) -> None:
        """Take the mount away: who has files open on it gets ENOTCONN, which is better than to wait for ever."""
        log("error", "the mount is given up", mountpoint=self._plan.mountpoint, why=why)
        self._tell_outer(f"STATUS=gave up: {why}")
        self._answer({"error": why})
        self._kill_children()
        self._withdraw()
        # The locks go with the process, so that whoever mounts next finds the place free.
        self._store.remove(DEVICE)
        if is_dead(self._plan.mountpoint):
            unmount(self._plan.mountpoint)
        self._exit_code = _FAILED_EXIT_CODE

    # Signals

    def _listen_for_signals(self) -> socket.socket:
        """Their numbers arrive as bytes."""
        signals, wakeup = socket.socketpair()
        signals.setblocking(False)
        wakeup.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup.detach())
        self._selector.register(signals, selectors.EVENT_READ, self._read_signals)
        return signals

    def _read_signals(self) -> None:
        for number in self._signals.recv(64):
            if number == signal.SIGHUP:
                self._upgrade()
            else:
                self._stop()

    def _stop(self) -> None:
        """Have the daemon end in order.

        One that is just taking up the mount does that first, or nobody would flush; asked twice, it does not.
        """
        first, self._ending = not self._ending, True
        if not self._daemon.handing_over:
            self._abandon_next("the daemon is stopping")
        taking_up = self._daemon.handing_over or (self._was_ready and not self._daemon.ready)
        if not (first and taking_up):
            self._daemon.send(signal.SIGTERM)

    # Upgrades

    def _listen_for_upgrades(self) -> socket.socket | None:
        """Called when the first daemon is ready: it has the node's locks, so nobody else has a socket of this name."""
        path = os.path.join(self._plan.run_dir, SOCKET_NAME)
        upgrades = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # of a supervisor that was killed
            upgrades.bind(path)
            os.chmod(path, 0o600)
            upgrades.listen()
        except OSError as error:
            upgrades.close()
            log("error", "upgrades only by SIGHUP", socket=path, error=str(error))
            return None
        self._selector.register(upgrades, selectors.EVENT_READ, self._accept_upgrade)
        return upgrades

    def _withdraw(self) -> None:
        """Take no more requests for upgrades."""
        if self._upgrades is None:
            return
        self._selector.unregister(self._upgrades)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._plan.run_dir, SOCKET_NAME))
        self._upgrades.close()
        self._upgrades = None

    def _accept_upgrade(self) -> None:
        assert self._upgrades is not None
        try:
            asking, _ = self._upgrades.accept()
        except OSError as error:
            log("warning", "a request for an upgrade did not arrive", error=str(error))
            return
        self._asking.append(asking)
        self._upgrade()

    def _upgrade(self) -> None:
        """Begin one, unless one is under way."""
        if self._next is not None or self._replaced is not None:
            return
        if not self._daemon.ready or self._daemon.stopping or self._daemon.handing_over or self._ending:
            self._upgrade_failed("the daemon is just starting or stopping; try again")
        elif not self._store.descriptors:
            self._upgrade_failed("nothing of this mount is kept beside the daemon; unmount it and mount it again")
        else:
            try:
                self._next = self._start(waiting=True)
            except OSError as error:
                self._upgrade_failed(f"{self._plan.command[0]} could not be started: {error.strerror}")
            else:
                self._deadline = time.monotonic() + STANDBY_SECONDS

    def _next_said(self, said: Mapping[str, str]) -> None:
        if said.get("X_STANDBY") == "1" and not self._daemon.handing_over:
            self._daemon.handing_over = True
            self._since_ns = time.monotonic_ns()
            self._deadline = time.monotonic() + HAND_OVER_SECONDS
            self._daemon.send(signal.SIGHUP)

    def _too_late(self) -> None:
        self._deadline = None
        if self._daemon.handing_over:
            log("warning", "the old daemon does not hand over, it is killed", pid=self._daemon.pid)
            self._daemon.send(signal.SIGKILL)
        else:
            self._abandon_next(f"the new daemon was not ready to take over in {STANDBY_SECONDS:.0f} s")

    def _abandon_next(self, why: str) -> None:
        """Kill the daemon that was to go on, if there is one; the present one stays."""
        if self._next is not None:
            self._next.send(signal.SIGKILL)
            self._next = self._deadline = None
            self._upgrade_failed(why)

    def _upgrade_failed(self, why: str) -> None:
        log("error", "not upgraded", why=why)
        self._answer({"error": why})

    def _answer(self, answer: Mapping[str, object]) -> None:
        """To everybody who asked for the upgrade."""
        for asking in self._asking:
            with asking, contextlib.suppress(OSError):  # who does not wait for the answer does not get it
                asking.sendall(json.dumps(answer).encode() + b"\n")
        self._asking.clear()


def is_dead(mountpoint: str) -> bool:
    """Whether what is mounted there has nobody to serve it any more."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _GONE
    return False


def unmount(mountpoint: str) -> None:
    """Take a dead mount away, although files on it are open."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    try:
        _, status = os.waitpid(os.posix_spawnp(command[0], [*command, "--", mountpoint], os.environ), 0)
    except OSError as error:
        log("error", "the dead mount stays", mountpoint=mountpoint, error=f"{command[0]}: {error.strerror}")
    else:
        if status != 0:
            log("error", "the dead mount stays", mountpoint=mountpoint, error=f"{command[0]}: {ending_of(status)}")


def log(level: str, event: str, **details: object) -> None:
    """One line on standard error, as the daemon writes them."""
    now = time.time()
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06}Z"
    with contextlib.suppress(OSError):  # a full disk, a terminal that is gone: there is nobody left to tell
        if sys.stderr.isatty():
            shown = " ".join(f"{key}={value}" for key, value in details.items())
            print(f"{timestamp} [{level}] {event} {shown}", file=sys.stderr, flush=True)
        else:
            line = {**details, "level": level, "timestamp": timestamp, "event": event}
            print(json.dumps(line), file=sys.stderr, flush=True)


def main() -> int:
    plan = Plan(**json.loads(sys.argv[1]))
    os.chdir("/")
    try:
        supervisor = Supervisor(plan)
    except OSError as error:
        log("error", "the daemon could not be started", command=plan.command[0], error=str(error))
        return _FAILED_EXIT_CODE
    # The first daemon tells whoever mounts on our standard output that it is ready; the next ones have nobody to tell.
    os.dup2(2, 1)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
