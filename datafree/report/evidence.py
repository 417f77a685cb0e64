"""Evidence that no data was read: what the interpreter's audit events say of files, sockets and other programs.

The interpreter announces every file that Python code opens, every socket and every program it starts (PEP 578). Code outside Python, as in
an extension module, may open a file unannounced. A hook cannot be taken out again, so a process gets one, which listens only inside
a ``with``; it is found again by an event of its own, so that no state stands at module level.
"""

import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

_FIND = "datafree.recorder"  # the event that asks for the hook of this process
_PROGRAMS = frozenset(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"))
_SYSTEM = tuple(os.sep + name + os.sep for name in ("proc", "sys"))
_DEVICES = re.compile(  # what holds no data; beside them lie shared memory, disks and standard input
    r"/dev/(null|zero|full|random|urandom|tty|ptmx|kfd|nvidia\d+|nvidiactl|nvidia-uvm|nvidia-uvm-tools|dri/\w+|accel/\w+)"
)
_CODE = (".py", ".pyc", ".pyi", ".so", ".dll", ".dylib", ".pyd", ".pth", ".h")
_METADATA = (".dist-info", ".egg-info")


@dataclass
class Record:
    """What happened while a recorder listened, each thing once, in order.

    Args:
        files_read: opened for reading, but for the code of the installation; data files in it are listed.
        sockets_opened: each socket with its family, each address or host name that was asked for.
        programs_started: other programs, whose own files and sockets are not seen.
    """

    files_read: list[str] = field(default_factory=list)
    sockets_opened: list[str] = field(default_factory=list)
    programs_started: list[str] = field(default_factory=list)


@final
class Recorder:
    """Hears the audit events of this process; make one with :func:`recorder`."""

    def __init__(self) -> None:
        self._records: tuple[Record, ...] = ()
        self._installation = _installation()

    @contextmanager
    def listen(self) -> Iterator[Record]:
        """Record what happens inside the ``with``, in whichever thread."""
        record, before = Record(), self._records
        self._records = (*before, record)
        try:
            yield record
        finally:
            self._records = before

    def hear(self, event: str, args: tuple[object, ...]) -> None:
        """Take one audit event: what ``sys.addaudithook`` is given."""
        if event == _FIND:
            found = args[0]
            assert isinstance(found, list)
            found.append(self)
        elif self._records:
            self._take(event, args)

    def _take(self, event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            path = _read_path(*args)
            if path is not None and not self._is_code(path):
                self._add("files_read", path)
        elif event == "socket.__new__":
            self._add("sockets_opened", f"socket of family {args[1]!s}")
        elif event.startswith("socket.") and event not in ("socket.gethostname", "socket.sethostname"):
            self._add("sockets_opened", f"{event.removeprefix('socket.')} {args[-1] if event == 'socket.connect' else args[0]!s}")
        elif event in _PROGRAMS:
            self._add("programs_started", str(args[0]) if args else event)

    def _add(self, kind: str, what: str) -> None:
        for record in self._records:
            known: list[str] = getattr(record, kind)
            if what not in known:
                known.append(what)

    def _is_code(self, path: str) -> bool:
        """Whether the file is part of the system or code of the installation; pictures or arrays that lie there are neither."""
        if os.path.realpath(path).startswith(_SYSTEM) or _DEVICES.fullmatch(path):
            return True
        inside = path.startswith(self._installation)
        file = Path(path)
        return inside and (file.suffix in _CODE or file.parent.suffix in _METADATA)


def recorder() -> Recorder:
    """The recorder of this process, installed when it is first asked for."""
    found: list[Recorder] = []
    sys.audit(_FIND, found)
    if not found:
        found.append(Recorder())
        sys.addaudithook(found[0].hear)
    return found[0]


def _installation() -> tuple[str, ...]:
    """Folders of the standard library, of installed packages and of this one."""
    paths = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    folders = (*paths, *site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1]))
    return tuple(sorted({os.path.join(each, "") for folder in folders for each in (folder, os.path.realpath(folder))}))


def _read_path(path: object = None, mode: object = None, flags: object = None) -> str | None:
    """The absolute path of a file that is opened for reading; None where nothing is there, and for folders, descriptors, files to write."""
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    if isinstance(flags, int) and flags & os.O_ACCMODE == os.O_WRONLY:
        return None
    name = os.path.abspath(os.fsdecode(path))
    return name if os.path.exists(name) and not os.path.isdir(name) else None
