"""Who was started when: of every actor, however many loaders there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipo_ray.pipeline.roll import ACTORS, ActorRoll


@pytest.mark.parametrize(("num_loaders", "names"), [(1, ACTORS), (3, (*ACTORS, "NvmeLoader-2", "NvmeLoader-3"))])
def test_every_loader_has_a_row(num_loaders: int, names: tuple[str, ...], tmp_path: Path) -> None:
    driver = ActorRoll.create(tmp_path / "roll", num_loaders)
    assert driver.actors == names
    actor = ActorRoll(tmp_path / "roll")
    assert actor.actors == names
    for count, name in enumerate(names):
        assert driver.pid(name) == 0
        for start in range(count % 3 + 1):
            assert actor.sign_in(name) == start + 1
    assert [driver.starts(name) for name in names] == [count % 3 + 1 for count in range(len(names))]
    assert {driver.pid(name) for name in names} == {os.getpid()}
    assert driver.lost() is None
    for _ in range(3):
        actor.sign_in(names[-1])
    assert driver.lost() == names[-1]
