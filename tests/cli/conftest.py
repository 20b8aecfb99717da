"""What the tests of refusals share: one machine, one drawing of each problem, and the shape of a refusal."""

import shutil

import jax
import pytest

from lora_flow import aligned_problem
from lora_flow.cli import main
from lora_flow.recipes import aligned
from lora_flow.runtime import memory


@pytest.fixture
def one_machine(monkeypatch):
    """With 16 GB of memory, and 1 TB on its disks: which of them a request asks too much of is the machine's word."""
    room = shutil.disk_usage

    def usage(path):
        return room(path) if str(path).startswith("/proc") else room(path)._replace(free=10**12)

    monkeypatch.setattr(memory, "free", lambda: 16e9)
    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.fixture
def drawn_once(monkeypatch, kept={}):  # noqa: B006
    """The same problem is not compiled anew for each of the lines."""

    def draw(key, **settings):
        asked = f"{jax.random.key_data(key)} {settings}"
        if asked not in kept:
            kept[asked] = aligned_problem(key, **settings)
        return kept[asked]

    monkeypatch.setattr(aligned, "aligned_problem", draw)


@pytest.fixture
def refused(capsys):
    """Runs a command that is refused, and gives the one line that says why."""

    def run(words):
        assert main(words) == 2
        told, said = capsys.readouterr()
        assert told == ""
        assert said.startswith("lora-flow: ")
        assert said.count("\n") == 1
        assert len(said) < 1000
        return said

    return run
