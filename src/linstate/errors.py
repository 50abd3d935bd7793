"""One small tree of errors. Each message names the thing, what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LinstateError(Exception):
    """Root of every error that Linstate raises on purpose."""


class ArgumentError(LinstateError, ValueError):
    """A shape, dtype, device or value of an argument is not what the call needs."""


class ConfigError(LinstateError, ValueError):
    """A model configuration asks for something that does not exist or does not fit together."""


class BackendError(LinstateError, RuntimeError):
    """No backend accepts the call, or the one that was asked for refuses it."""


class CheckpointError(LinstateError, RuntimeError):
    """A checkpoint's files are missing, broken, or do not fit the model."""


class StateError(LinstateError, RuntimeError):
    """Root of what can be wrong with a saved state."""


class StateFileError(StateError):
    """The file is cut short, altered, of an unknown format version, or no state at all."""


class StateMismatchError(StateError):
    """The state is whole, but belongs to another model."""


class CompositionError(StateError):
    """These states cannot be composed."""


class StateNotFoundError(StateError, LookupError):
    """The store has no such state, or none that this tenant may see."""


class QuotaError(StateError):
    """The tenant's quota does not allow it."""


class InputError(LinstateError, ValueError):
    """What a person gave (a file, a folder, an option) cannot be used."""


class ModelError(LinstateError, RuntimeError):
    """The model computes what is no number."""


class BusyError(LinstateError, RuntimeError):
    """There is more to do than can be taken on now; try again after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@contextmanager
def boundary(error: type[LinstateError], what: str) -> Iterator[None]:
    """The one border of data that others wrote: whatever fails inside on ``what`` is raised as ``error``, in one sentence.

    Errors of Linstate itself pass as they are; so does what has nothing to do with the data (an interrupt, a lack of memory).

    >>> with boundary(StateFileError, "notes.state"):
    ...     [][0]
    Traceback (most recent call last):
    linstate.errors.StateFileError: notes.state: it cannot be read (IndexError: list index out of range); it is damaged or altered
    """
    try:
        yield
    except (LinstateError, MemoryError):
        raise
    except Exception as failed:
        said = " ".join(str(failed).split())[:200]
        raise error(
            f"{what}: it cannot be read ({type(failed).__name__}: {said}); it is damaged or altered"
        ) from failed
