"""How a cluster is reached: a rados backend's options, checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from archipfs.errors import InvalidConfig

_NAMESPACE_CHARS_MAX = 64
_NAMESPACE = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_NAMESPACE_CHARS_MAX - 1}}}")
_SECONDS_MAX = 24 * 3600


@dataclass(frozen=True, slots=True)
class Settings:
    """Both clients of a cluster, python3-rados and the native one, are made from these."""

    pool: str
    conf: str = "/etc/ceph/ceph.conf"
    user: str = "admin"
    """The client's name, without ``client.``."""
    keyring: str | None = None
    """A path; ``None``: where the conf file says."""
    namespace: str = "archipfs"
    timeout_s: int = 30
    """Of connecting, and of commands to the monitors."""
    operation_timeout_s: int = 60
    """Of each operation on an object; 0: it waits for ever."""

    @property
    def patience_s(self) -> float:
        """How long an operation is not answered until the client asks for a new map of the cluster.

        The native client has the same rule, and why (``set_patience``).
        """
        return min(2.0, self.operation_timeout_s / 4) if self.operation_timeout_s else 2.0

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """From those of a backend, named as in its configuration. Raises ``InvalidConfig``."""
        fields: dict[str, Any] = dict(options)
        for name, at_least in (("timeout", 1), ("operation_timeout", 0)):
            if name in fields:
                fields[f"{name}_s"] = _seconds(name, fields.pop(name), at_least)
        settings = cls(**fields)
        if not _NAMESPACE.fullmatch(settings.namespace):
            raise InvalidConfig(
                f"driver rados: not a namespace: {settings.namespace!r}; it has up to {_NAMESPACE_CHARS_MAX} letters, "
                "digits, dots, - and _"
            )
        return settings


def _seconds(name: str, value: str, at_least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", value) or not at_least <= int(value) <= _SECONDS_MAX:
        raise InvalidConfig(
            f"driver rados: {name} is not a whole number of seconds from {at_least} to {_SECONDS_MAX}: {value!r}"
        )
    return int(value)
