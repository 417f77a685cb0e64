"""What the recorder hears: every file that Python code reads, sockets and programs, and only while it listens."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import datafree.zoo
from datafree.export.float_weights import load_weights
from datafree.report.evidence import Record, recorder
from datafree.zoo.digits import digits, held_out


def heard(act: object) -> Record:
    assert callable(act)
    with recorder().listen() as record:
        act()
    return record


def test_there_is_one_recorder() -> None:
    assert recorder() is recorder()


def test_files_read_are_heard_once_and_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.txt"
    first.write_bytes(b"1")
    second.write_text("2")

    def read() -> None:
        second.read_text()
        first.read_bytes()
        os.close(os.open(second, os.O_RDONLY))

    assert heard(read).files_read == [str(second), str(first)]


def test_what_is_no_reading_is_not_heard(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "new").write_text("x")
        (tmp_path / "missing").exists()
        os.close(os.open(tmp_path, os.O_RDONLY))  # a folder
        open(os.open(tmp_path / "new", os.O_WRONLY), "w").close()  # a descriptor

    assert heard(write) == Record()


def test_a_failed_attempt_is_no_reading(tmp_path: Path) -> None:
    def read() -> None:
        try:
            (tmp_path / "missing").read_text()
        except FileNotFoundError:
            pass

    assert heard(read) == Record()


def test_threads_are_heard_and_silence_follows(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    with recorder().listen() as outer:
        with recorder().listen() as inner:
            thread = threading.Thread(target=file.read_text)
            thread.start()
            thread.join()
        (tmp_path / "b").write_text("y")
        (tmp_path / "b").read_text()
    file.read_text()
    assert inner.files_read == [str(file)] and outer.files_read == [str(file), str(tmp_path / "b")]


def test_devices_are_left_out_but_data_in_shared_memory_and_behind_a_descriptor_is_not(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no shared memory below /dev")
    file, other = shared / f"datafree-test-{os.getpid()}.npz", tmp_path / "data.bin"
    file.write_bytes(b"pictures")
    other.write_bytes(b"pictures")
    try:
        with other.open("rb") as opened:
            behind = f"/proc/self/fd/{opened.fileno()}"
            read = [Path("/dev/urandom"), Path("/dev/null"), Path("/proc/self/stat"), file, Path(behind)]
            record = heard(lambda: [each.open("rb").close() for each in read])
    finally:
        file.unlink()
    assert record.files_read == [str(file), behind]


def test_code_is_left_out_but_data_of_the_installation_is_not() -> None:
    folder = Path(datafree.zoo.__path__[0])
    record = heard(lambda: (Path(nn.__file__).read_bytes(), Path("/proc/self/stat").exists(), digits(), held_out()))
    assert record.files_read == [str(folder / "digits.safetensors"), str(folder / "digits_test.npz")]


def test_weights_of_each_kind_are_heard(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        assert heard(lambda name=name: load_weights(model, tmp_path / name)).files_read == [str(tmp_path / name)]


def test_sockets_and_programs_are_heard() -> None:
    with socket.socket() as line, recorder().listen() as record:
        sys.audit("socket.connect", line, ("192.0.2.1", 443))
        sys.audit("socket.getaddrinfo", "example.org", 443, 0, 0, 0)
        socket.socket().close()
        subprocess.run([sys.executable, "-c", ""], check=True)
        socket.gethostname()
    assert record.sockets_opened[:2] == ["connect ('192.0.2.1', 443)", "getaddrinfo example.org"]
    assert len(record.sockets_opened) == 3 and record.sockets_opened[2].startswith("socket of family")
    assert record.programs_started == [sys.executable] and not record.files_read
