"""The command line's words -> a command: which one, its flags from defaults, a settings file and the words."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lora_flow.checks import InputError, require, require_choice

COMMANDS = {  # name -> what it does, in a line
    "sweep": "solve the gradient flow for every combination of settings, into a run folder",
    "plot": "draw a run or figure again, and write its report",
    "report": "make a run's page for the browser again",
    "explore": "show a run of any size in the browser, served from this machine",
    "compare": "show several runs on one page and in one figure",
    "animate": "draw one lane of a run as it moves",
    "sensitivity": "say what the loss and the times of a run depend on most, by derivatives",
    "fit": "find alpha, delta_w or the learning rate from a loss curve, with intervals",
    "status": "say how far a run or figure is, and how to continue",
    "figure": "run and draw a named experiment, with a table of its values",
    "theory": "test every claim of the theory against runs",
    "inits": "list the initialisations: formulas, and the needs of each",
    "optimise": "learn where to start, by gradient descent through the whole run",
    "vision": "check the theory on images, with a Vision Transformer",
    "advise": "say which start, which alpha and which rank a layer needs, from its gradient",
    "peft": "initial adapters for a checkpoint, as a PEFT folder, and what becomes of them",
}
GROUPS = {  # commands that are several, each a class of the group's module
    "peft": {
        "init": "write initial adapters for a checkpoint, by any initialisation",
        "apply": "subtract a start's own update in a copy of the checkpoint",
        "convert": "turn what was trained from such a start into plain LoRA",
        "observe": "read a run back from its checkpoints, beside what theory predicts",
    },
}
ABOUT = "The gradient flow of LoRA adapters, accurate over 26 decades of loss."


@runtime_checkable
class Command(Protocol):
    """A command: a frozen dataclass whose fields are flags, in the module of its name."""

    def run(self) -> int:
        """Does it, and returns the exit status."""


def parse(words: Sequence[str]) -> Command | None:
    """The command; None where help or the version was asked for and has been printed."""
    require(len(words) > 0, "the command", f"be one of {', '.join(COMMANDS)} (see lora-flow --help)", "none")
    name, *rest = words
    if name in ("-h", "--help", "--version"):
        print(f"lora-flow {_version()}" if name == "--version" else overview())
        return None
    require_choice("the command", name, COMMANDS)
    module = importlib.import_module(f"lora_flow.cli.{name}")
    if name in GROUPS:
        member, *rest = rest or [""]
        if member in ("-h", "--help"):
            print(overview(f"{name} ", COMMANDS[name], GROUPS[name]))
            return None
        require_choice(f"the command after {name}", member, GROUPS[name], f"(see lora-flow {name} --help)")
        kind: Any = getattr(module, member.capitalize())
        name = f"{name} {member}"
    else:
        kind = getattr(module, name.capitalize())
    command: Any = _expanded(_read(name, kind, rest, None))
    from_file = getattr(command, "from_file", lambda: None)()  # settings that the flags override
    return command if from_file is None else _expanded(_read(name, kind, rest, from_file))


def overview(group: str = "", about: str = ABOUT, commands: Mapping[str, str] = COMMANDS) -> str:
    """`lora-flow --help`, or that of a group of commands."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:{width}}{told}" for name, told in commands.items()]
    head = [f"usage: lora-flow {group}COMMAND [FLAGS]", "", about, "", "commands:", *lines]
    tail = [f"  -h, --help  this help; lora-flow {group}COMMAND --help has every flag, with examples"]
    version = [] if group else ["  --version   the version"]
    return "\n".join([*head, "", "flags:", *tail, *version])


def _version() -> str:
    from lora_flow.version import __version__

    return str(__version__)


def _read(name: str, kind: Any, words: list[str], default: Any) -> Command | None:
    """Parses the flags; `default` replaces what a command starts from."""
    import tyro

    from lora_flow.cli.values import registry

    _check_once(words)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=f"lora-flow {name}",
                args=words,
                **({} if default is None else {"default": default}),
                config=(tyro.conf.OmitArgPrefixes,),
                registry=registry(),
            )
    except SystemExit as stop:
        if stop.code:
            raise InputError(_one_line(said.getvalue())) from None
        return None


def _expanded(command: Any) -> Any:
    """The command with its folder as the system takes it: a shell leaves the ~ of `--out=~/runs` as it is."""
    out = getattr(command, "out", None)
    if out is None:
        return command
    require(out != "" and "\0" not in out, "out", "be a folder's name", repr(out))
    return dataclasses.replace(command, out=os.path.expanduser(out))


def _check_once(words: Sequence[str]) -> None:
    """Raises where a flag is given twice: one of the two would go unheard."""
    given = [word.split("=")[0].replace("_", "-") for word in words if re.match("--[a-zA-Z]", word)]
    flags = [flag.replace("--no-", "--", 1) for flag in given]
    for flag in flags:
        require(flags.count(flag) == 1, flag, "be given once", f"it {flags.count(flag)} times")


def _one_line(box: str) -> str:
    """The first part of a boxed error message as one line, with the flag that was probably meant."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]  # the first is a title
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("[─╰╯-]+", line):
            parts.append([])
        else:
            parts[-1].append(line)
    first = next((part for part in parts if "".join(part)), [])
    message = " ".join(first).strip()
    if message.startswith("Error parsing "):
        message = message.removeprefix("Error parsing ").replace(": must ", " must ", 1)
    missing = re.match(r"Missing from .*?: +(--[\w-]+|[A-Z]+) ", message)
    if missing:
        message = f"{missing[1]} must be given"
    offered = re.findall(r"^. {5}(--[\w-]+)", box.partition("Perhaps you meant:")[2], flags=re.MULTILINE)
    given = re.findall(r"--[\w-]+", message)[:1]
    meant = difflib.get_close_matches(given[0], offered, n=1, cutoff=0) if given else []
    return f"{message} (did you mean {meant[0]}?)" if meant else message
