# shellcheck shell=bash disable=SC2034  # used where this is sourced
# What tools/up and tools/test share: Debian packages, the virtual environment, the project in it. To be sourced.
# Each step does only what is missing, and sets `changed` when it did something.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=$REPOSITORY/.venv
SYSTEM_PYTHON=/usr/bin/python3
PACKAGES=(build-essential pkg-config python3-venv python3-dev libfuse3-dev libxxhash-dev fuse3 attr acl util-linux procps)
changed=no

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

require_root() {
    [ "$(id -u)" = 0 ] || die "needs root: packages and the mount are the machine's (try: sudo $0)"
}

require_debian() {
    local id='' version=''
    if [ -r /etc/os-release ]; then
        # shellcheck disable=SC1091
        read -r id version < <(. /etc/os-release && printf '%s %s\n' "${ID:-}" "${VERSION_ID:-99}")
    fi
    [ "$id" = debian ] || die "this is not Debian but ${id:-unknown}: on other systems, install the project with pip"
    [ "${version%%.*}" -ge 12 ] || die "Debian $version is too old: 12 or later is needed"
}

missing_packages() { # PACKAGE...
    local installed
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p')
    printf '%s\n' "$@" | grep -vxF "$installed" || true
}

install_packages() { # PACKAGE...
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    say "Installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -q -o DPkg::Lock::Timeout=300 update || die "apt-get update failed: are apt's sources reachable?"
    apt-get -q -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install --yes --no-install-recommends \
        "${missing[@]}" >/dev/null || die "apt-get could not install ${missing[*]}"
    changed=yes
}

venv_is_ours() {
    local base
    base=$("$VENV/bin/python" -c 'import sys, pip; print(sys._base_executable)' 2>/dev/null) || return 1
    [ "$base" -ef "$SYSTEM_PYTHON" ]
}

make_venv() {
    if venv_is_ours; then return 0; fi
    say "Making $VENV"
    "$SYSTEM_PYTHON" -m venv --clear "$VENV"
    changed=yes
}

# One line for the content of files and folders, to see whether anything changed. What a build leaves behind is not counted.
fingerprint() { # PATH...
    find "$@" -type f ! -name '*.pyc' ! -name '*.so' ! -name '_engine.c' ! -name '_front.c' ! -name '_chunker.c' ! -path '*.egg-info/*' -print0 2>/dev/null |
        sort -z | xargs -0 -r sha256sum | sha256sum | cut -d ' ' -f 1
}

# Runs a command unless it has been run for the same inputs in this virtual environment.
once_for() { # STAMP FINGERPRINT COMMAND...
    local stamp=$VENV/$1.stamp inputs=$2
    shift 2
    [ "$(cat "$stamp" 2>/dev/null)" != "$inputs" ] || return 0
    "$@" || return
    printf '%s\n' "$inputs" >"$stamp"
    changed=yes
}

pip_install() { # ARGUMENT...
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
}

# build/ goes first: setuptools would install from it what is no longer in the sources.
build_project() {
    say "Building archipfs"
    rm -rf "$REPOSITORY/build"
    pip_install "$REPOSITORY" || die "pip could not build and install the project"
}

install_project() {
    once_for project "$(cd "$REPOSITORY" && fingerprint archipfs MANIFEST.in setup.cfg setup.py pyproject.toml)" build_project
}
