"""The `pipo` command. Imports nothing heavy: `pipo --help` is there at once, and the driver stays small."""

from pipo_ray.cli.main import main

__all__ = ["main"]
