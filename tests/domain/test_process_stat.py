"""Fields of `/proc/PID/stat`."""

import os

import pytest

from domain.process_stat import PARENT, read_stat


def test_the_parent_is_read_whatever_the_program_is_called() -> None:
    with open("/proc/self/comm", "r+") as file:
        name = file.read().strip()
        for comm in (") S 1 (", "a b c", "4 5 6)"):
            file.seek(0)
            file.write(comm)
            file.flush()
            assert read_stat("self", PARENT) == read_stat(os.getpid(), PARENT) == os.getppid()
        file.seek(0)
        file.write(name)


def test_a_process_that_is_not_there_has_no_fields() -> None:
    with pytest.raises(FileNotFoundError):
        read_stat(0, PARENT)
    with pytest.raises(ValueError, match="no field 99"):
        read_stat("self", 99)
