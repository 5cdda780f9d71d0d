"""Finds Ray clusters that others run on this machine."""

import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

from pipo_ray.errors import ResourceError
from pipo_ray.session import processes

_PRIVATE_NODE = re.compile(r"/pipo-[0-9a-f]{8}/ray(/|$)")
# The raylet first: its arguments name the address. (A name in /proc is cut to 15 characters; these are shorter.)
_ACCESS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_SERVERS = ("raylet", "gcs_server")


class Cluster(NamedTuple):
    """A running Ray cluster.

    Attributes:
        address: `host:port` of its control service; empty when it could not be read.
        found_by: how we know ("raylet with pid 4711", "RAY_ADDRESS", a file).
    """

    address: str
    found_by: str

    def __str__(self) -> str:
        return f"{self.found_by}, address {self.address}" if self.address else self.found_by


def find_cluster() -> Cluster | None:
    """A Ray cluster of any user on this machine, or one that RAY_ADDRESS names; None when there is none.

    The private nodes of other pipo_ray sessions do not count: nobody can join them, and they disturb nobody. Neither do
    addresses at which nothing listens any more.
    """
    names = {pid: _name(pid) for pid in processes.all_pids()}
    for server in _SERVERS:
        for pid in (pid for pid, name in names.items() if name == server):
            arguments = _arguments(pid)
            is_private = any(_PRIVATE_NODE.search(argument) for argument in arguments)
            if not is_private and processes.identify(pid) is not None and _shares_our_pids(pid):
                return Cluster(_address(arguments), f"{server} with pid {pid}")
    named = os.environ.get("RAY_ADDRESS", "")
    if named not in ("", "local", "auto") and is_listening(named):
        return Cluster(named, "RAY_ADDRESS")
    return _recorded_cluster()


def _recorded_cluster() -> Cluster | None:
    """The cluster that `ray start` on this machine wrote down last, if it still listens."""
    for folder in (os.environ.get("RAY_TMPDIR", "/tmp"), "/tmp"):
        path = Path(folder) / "ray" / "ray_current_cluster"
        try:
            recorded = path.read_text().strip()
        except OSError:
            continue
        if is_listening(recorded):
            return Cluster(recorded, str(path))
    return None


def address_to_join(address: str) -> str:
    """`host:port` of the cluster that "auto" or an explicit address means.

    Ray's own search for "auto" would also find the private nodes of pipo_ray.

    Raises:
        ResourceError: "auto", and no cluster is running; nothing listens there; or the address of a Ray Client server.
    """
    if address == "auto":
        named = os.environ.get("RAY_ADDRESS", "")
        if named not in ("", "local", "auto"):
            address = named
        else:
            cluster = _recorded_cluster() or find_cluster()
            if cluster is None or not cluster.address:
                raise ResourceError(
                    "--ray-address auto: no Ray cluster is running on this machine; start one with `ray start "
                    "--head`, or use --ray-address local for a private one"
                )
            address = cluster.address
    if "://" in address:
        raise ResourceError(
            f"--ray-address {address}: weights are shared through this machine's memory, which Ray Client cannot do; "
            "give host:port of a cluster with a node on this machine"
        )
    if not is_listening(address):  # Ray would try for minutes
        raise ResourceError(
            f"no Ray cluster can be joined at --ray-address {address}: nothing listens there; start one with `ray "
            "start --head`, or use --ray-address local for a private one"
        )
    return address


def access_environment(address: str) -> dict[str, str]:
    """Environment variables that make Ray use the access mode (token or none) of a cluster on this machine.

    Having a token is no sign that a cluster wants one, and with the wrong mode Ray joins and then loses its actors.

    Returns:
        What the cluster's own process has; empty when there is none on this machine, or it is another user's.
        Variables that our environment sets itself are left out.
    """
    found = {}
    for pid in processes.all_pids():
        if _name(pid) == "raylet" and _address(_arguments(pid)) == address:
            for entry in _entries(pid, "environ"):
                name, _, value = entry.partition("=")
                if name in _ACCESS and name not in os.environ:
                    found[name] = value
    return found


def is_listening(address: str) -> bool:
    """Whether something accepts TCP connections at `host:port`, with or without a scheme in front."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=0.5):
            return True
    except (OSError, ValueError):
        return False


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _arguments(pid: int) -> list[str]:
    return _entries(pid, "cmdline")


def _entries(pid: int, file: str) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/{file}").read_bytes()).split("\0")
    except OSError:
        return []


def _shares_our_pids(pid: int) -> bool:
    """False for a process in a container, whose cluster is not this machine's. True when we may not look."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return True


def _address(arguments: list[str]) -> str:
    options = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
    if options.get("gcs-address"):
        return options["gcs-address"]
    port = options.get("gcs_server_port", "0")
    return f"{options.get('node-ip-address', '127.0.0.1')}:{port}" if port not in ("", "0") else ""
