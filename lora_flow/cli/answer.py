"""A command's ways to end, each a status and at most one line."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from lora_flow.checks import InputError
from lora_flow.cli.output import any_text, complain, hush, warnings_of_starts
from lora_flow.runtime import interrupts
from lora_flow.storage.remote import first_line, is_of_store
from lora_flow.sweeps.workers import WorkersLost

if TYPE_CHECKING:
    from lora_flow.cli.parse import Command

PIPE_CLOSED = 128 + 13  # as of a program that SIGPIPE has ended
_MUST = {errno.EACCES: "be accessible", errno.EPERM: "be accessible", errno.ENOENT: "exist"}
_MUST |= {
    errno.ENOTDIR: "be a folder",
    errno.EISDIR: "be a file",
    errno.EEXIST: "be a folder",
    errno.ELOOP: "be no link to itself",
}
_MUST |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG), "be writable")
_MUST |= {errno.ENAMETOOLONG: "have a shorter name", errno.EMFILE: "be opened", errno.ENFILE: "be opened"}


def answer(words: list[str]) -> int:
    """Runs what the words say, and tells how it ended."""
    interrupts.nothing_stored()
    with any_text(), warnings_of_starts():
        command: Command | None = None
        try:
            from lora_flow.cli.parse import parse

            command = parse(words)
            status = _run(command) if command is not None else 0
            sys.stdout.flush()
            return status
        except InputError as error:
            complain(str(error))
            return 2
        except WorkersLost as error:
            complain(f"{error}{_and_stored()}")
            return 1
        except OSError as error:
            of_output = error.filename is None and (command is None or _is_of_output(error))
            if of_output:
                hush(sys.stdout)
            if of_output and isinstance(error, BrokenPipeError):  # `| head` has read enough
                return PIPE_CLOSED
            complain(_of_system(error, "standard output" if of_output else getattr(command, "out", "a file")))
            return 2
        except MemoryError as error:
            complain(f"the run must fit into memory, got {str(error) or 'no more of it'}{_and_stored()}")
            return 1
        except KeyboardInterrupt:  # in a program that leaves signals to Python
            complain(interrupts.line())
            return 1
        except Exception as error:
            if is_of_store(error):
                complain(f"'{getattr(command, 'out', 'a store')}' must answer, got {first_line(error)}{_and_stored()}")
                return 1
            if not _out_of_memory(error):
                raise
            complain(f"the run must fit into memory, got {str(error).splitlines()[0]}{_and_stored()}")
            return 1


def _run(command: Command) -> int:
    """Runs a command, with its pictures written as it asks."""
    pictures = getattr(command, "pictures", None)
    if pictures is None:
        return command.run()
    from lora_flow.figures.written import drawn_as

    with drawn_as(pictures.format, pictures.width):
        return command.run()


def _is_of_output(error: OSError) -> bool:
    """Whether standard output could not be written."""
    if isinstance(error, BrokenPipeError):
        return True
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _of_system(error: OSError, out: str) -> str:
    """The line for a refusal of the operating system, with the path."""
    path = error.filename if isinstance(error.filename, str | bytes) else out
    must = _MUST.get(error.errno or 0, "be usable")
    return f"'{os.fsdecode(path)}' must {must}, got {error.strerror or error}{_and_stored()}"


def _and_stored() -> str:
    return f"; {interrupts.stored()}" if interrupts.stored() else ""


def _out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
