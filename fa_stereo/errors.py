"""The exceptions that mean "the input is wrong, and here is the remedy"."""

from __future__ import annotations


class InputError(ValueError):
    """A file, folder, picture or configuration value that cannot be used as given.

    The message is one sentence that names the file or key and says what to do about it. The command line prints it
    without a traceback and leaves with exit code 2; in Python it is an ordinary ``ValueError``.
    """


class MissingFilesError(InputError):
    """Some files of a data set are there, and others that belong to them are not."""


class RangeError(InputError):
    """A value that the format asked for cannot hold; another format can."""
