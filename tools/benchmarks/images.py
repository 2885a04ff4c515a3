"""Three Debian images built apart, to measure dedup on; made once, kept beside the guest of tools/guest-image.

Each is a debootstrap of its own into a file system of its own, so that the same files lie at other places, in other
order and with other times. Another list of packages makes other images.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import CannotRun, run

SUITE = "bookworm"
IMAGE_SIZE = "3G"
BUILD_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Image:
    name: str
    packages: tuple[str, ...] = ()
    """On top of debootstrap's minbase, with what they depend on."""


IMAGES = (
    Image("minbase"),
    Image(
        "many",
        (
            *(
                "build-essential",
                "git",
                "vim",
                "nginx",
                "postgresql",
                "python3-numpy",
                "python3-venv",
                "openssh-server",
            ),
            *("gdb", "strace", "rsync", "curl", "ruby", "mc", "imagemagick", "sqlite3", "tmux", "htop", "iproute2"),
        ),
    ),
    Image("few", ("nginx", "openssh-server", "python3", "iproute2", "vim", "linux-image-cloud-amd64")),
)


@dataclass(frozen=True)
class Built:
    path: Path
    packages: int
    """How many are installed."""


def cache_directory() -> Path:
    version = hashlib.sha256(repr((SUITE, IMAGE_SIZE, IMAGES)).encode()).hexdigest()[:16]
    return Path(os.environ.get("ARCHIP_TEST_CACHE", "/var/cache/archipfs-test")) / f"debian-images-{version}"


def debian_images() -> list[Built]:
    """The images, in the order of ``IMAGES``; built first where they are not kept yet. Raises ``CannotRun``."""
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    return [_built(image, directory) for image in IMAGES]


def _built(image: Image, directory: Path) -> Built:
    path = directory / f"{image.name}.raw"
    listed = path.with_suffix(".packages")
    if not path.exists():
        if os.geteuid() != 0:
            raise CannotRun("building the Debian images needs root (debootstrap)")
        print(f"bench: building the Debian image {image.name}", file=sys.stderr)
        _build(image, directory, path, listed)
    return Built(path, len(listed.read_text().split()))


def _build(image: Image, directory: Path, path: Path, listed: Path) -> None:
    root, packed = directory / f"{image.name}.root", directory / f"{image.name}.part"
    debs = directory / "debs"
    debs.mkdir(exist_ok=True)
    environment = {**os.environ, **_proxy(), "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    shutil.rmtree(root, ignore_errors=True)
    try:
        mirror = _mirror()
        place = [mirror] if mirror else []
        _call(environment, "debootstrap", "--variant=minbase", f"--cache-dir={debs}", SUITE, str(root), *place)
        if image.packages:
            _install(root, image.packages, environment)
        installed = run("chroot", root, "dpkg-query", "-W", "-f", "${Package}\n")
        packed.unlink(missing_ok=True)
        _call(environment, "mkfs.ext4", "-q", "-F", "-d", str(root), str(packed), IMAGE_SIZE)
        listed.write_text(installed + "\n")
        packed.rename(path)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        packed.unlink(missing_ok=True)


def _install(root: Path, packages: tuple[str, ...], environment: dict[str, str]) -> None:
    """As an administrator would, but without starting any service."""
    refuse = root / "usr/sbin/policy-rc.d"
    refuse.write_text("#!/bin/sh\nexit 101\n")
    refuse.chmod(0o755)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    apt = ("chroot", str(root), "apt-get", "-q", "-y", "--no-install-recommends")
    _call(environment, *apt, "update")
    _call(environment, *apt, "install", *packages)
    _call(environment, *apt, "clean")
    refuse.unlink()


def _mirror() -> str:
    """The first one in apt's configuration that has the suite; debootstrap's own if empty."""
    form = ("indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    return run("apt-get", *form, f"Release: {SUITE}", "Component: main").partition("\n")[0]


def _proxy() -> dict[str, str]:
    line = run("apt-config", "dump", "--format", "%v%n", "Acquire::http::Proxy")
    return {"http_proxy": line} if line and line != "DIRECT" and "http_proxy" not in os.environ else {}


def _call(environment: dict[str, str], *command: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=BUILD_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise CannotRun(f"{command[0]} is not installed") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotRun(f"{command[0]} ended with status {done.returncode}: {said[-1] if said else 'no message'}")
