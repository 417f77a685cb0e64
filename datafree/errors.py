"""Every error that datafree raises on purpose.

::

    DatafreeError
    ├── NetworkError        the network cannot be read, or a method cannot work on it
    │   └── FlowError       its forward pass cannot be followed
    ├── WeightsError        a weights file is corrupt, unsafe, or does not fit the network
    ├── TargetError         bits, protocol, budget or layer names that make no sense
    ├── MethodError         no such method, or a field of a method out of range
    ├── DataError           labelled data for measuring cannot be read
    ├── ExportError         the student cannot be written for a runtime, or a runtime cannot load the file
    │   └── VerifyError     the file does not do in the runtime what the student does, or not as fast as it should
    ├── OutputError         an output folder exists or cannot be written
    └── MissingExtraError   an optional dependency is not installed

Errors about a value are ``ValueError`` as well, so that callers may catch either.
"""


class DatafreeError(Exception):
    """Base of all errors of this package: the message says what was found and what to do."""


class NetworkError(DatafreeError, ValueError):
    """The network cannot be read, or the chosen method cannot work on it."""


class FlowError(NetworkError):
    """The forward pass cannot be followed from input to output."""


class WeightsError(DatafreeError, ValueError):
    """A weights file is corrupt, unsafe, or does not fit the network."""


class TargetError(DatafreeError, ValueError):
    """Bit widths, protocol, budget or layer names that make no sense."""


class MethodError(DatafreeError, ValueError):
    """No such method, or a field of a method is out of range."""


class DataError(DatafreeError, ValueError):
    """Labelled data for measuring cannot be read or does not fit the task."""


class ExportError(DatafreeError, ValueError):
    """The student cannot be written for a runtime, or a runtime cannot load the file."""


class VerifyError(ExportError):
    """An exported file runs otherwise than the student, falls back to float, or is slower than the float network."""


class OutputError(DatafreeError, OSError):
    """An output folder exists already or cannot be written."""


class MissingExtraError(DatafreeError, ImportError):
    """An optional dependency is not installed; the message names the install command."""
