"""What a user gets: the wheel, installed in a fresh environment, away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def _files(folder: Path) -> set[Path]:
    """Everything below `folder` that belongs to the project, relative to it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)}


def _run(*command: str | Path, cwd: Path) -> str:
    """Run with the environment of a user: nothing of the tests' import path. Returns stdout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, because setuptools writes build/ and an egg-info beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipo_ray", "actors"):
        shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run(*pip, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("pipo_ray-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel; dependencies come from the environment of the tests."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    _run(*pip, wheel, cwd=home)
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # As a path, not as a site directory: the editable install of this tree, a .pth over there, stays switched off.
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return python.parent


def test_wheel_has_every_file_of_the_library(wheel: Path) -> None:
    expected = {f"pipo_ray/{path}" for path in _files(ROOT / "pipo_ray")}
    expected |= {f"pipo_ray/actors/{path}" for path in _files(ROOT / "actors")}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "pipo_ray/py.typed" in packed


def test_wheel_has_the_bundled_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        bundled = {name for name in archive.namelist() if name.startswith("pipo_ray/bundled/")}
    assert {"pipo_ray/bundled/config.json", "pipo_ray/bundled/tokenizer.json"} <= bundled
    assert any(name.endswith(".safetensors") for name in bundled)


def test_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    assert "pack" in _run(installed / "pipo", "--help", cwd=tmp_path)


def test_actors_are_installed_inside_the_package(installed: Path, tmp_path: Path) -> None:
    code = """if True:
        import importlib.util, pipo_ray, pipo_ray.actors
        assert importlib.util.find_spec("actors") is None, "a top-level module called actors"
        print(pipo_ray.__file__, pipo_ray.actors.__file__, sep="\\n")
    """
    for origin in _run(installed / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(origin).is_relative_to(installed.parent), f"imported from {origin}, not from the wheel"
