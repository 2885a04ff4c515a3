"""How a cluster is reached: a rados backend's options, checked."""

from dataclasses import dataclass


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
