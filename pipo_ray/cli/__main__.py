"""`python -m pipo_ray.cli`, where the `pipo` script is not on the path."""

import sys

from pipo_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
