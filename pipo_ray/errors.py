"""The exception hierarchy. A message names the thing, the value, the limit and the next step."""


class PipoError(Exception):
    """Base of every error a user can cause or must hear about. The CLI prints it as one line, without a traceback."""

    exit_status = 1


class InputError(PipoError, ValueError):
    """Something the user gave is wrong: a path, an option, a prompt. Exit status 2."""

    exit_status = 2


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or of a kind that is not supported."""


class StoreError(InputError):
    """A block store that is missing, damaged, or written in a newer format."""


class UnsupportedModelError(InputError):
    """An architecture that cannot be run, by name and with the reason."""


class BudgetError(InputError):
    """A memory or disk budget that is too low. Names the least that would do, and what takes it."""


class ResourceError(InputError):
    """Something the machine lacks: CUDA, /dev/shm, disk space, a free Ray port."""


class DriveError(PipoError):
    """A drive that does not give what is on it: an I/O error, a device that is gone, bytes that came out wrong. Unlike
    a damaged store this may pass; the next request tries again.
    """


class MisreadError(DriveError):
    """A block came out wrong once, and is sound on the drive: the sweep is to be done again."""


class ActorFailedError(PipoError):
    """An actor died too often, or reported an error that a restart does not cure."""


class WorkerLostError(Exception):
    """Between actors, never a user's error: the compute worker's process is gone and will come back empty, or its sweep
    has to be done again.
    """
