"""Python imports this when it starts and the folder is on PYTHONPATH: in each process of `make test-memory-saver`."""

import small_staging

small_staging.install()
