"""Calls between actors that must outlive the other side's restart."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from pipo_ray.messages import StageSetup

_PATIENCE_S = 600.0  # the driver touches every page of the buffers first: about a second per GiB


def find(name: str) -> Any:
    """The handle of the stage's actor `name`.

    Looked up by name and not handed to constructors: Ray keeps a constructor's references in the object store, where a
    restart may not find them any more.
    """
    return ray.get_actor(name)


def obtain_lease(actor: str) -> StageSetup:
    """The staging pool's lease for `actor`; asks again while the pool is being started or restarted, and
    while the driver makes the buffers."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            setup: StageSetup = ray.get(find("StagingPool").lease.remote(actor, _PATIENCE_S))
            return setup
        except (RayActorError, ValueError):  # ValueError: no actor of this name yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
