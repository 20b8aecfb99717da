"""Ctrl-C and SIGTERM, sent to real processes."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.runtime import interrupts
from lora_flow.storage.folder import Folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

FLAGS = ["--alpha", "1e-2", "1e-4", "--rank", "2", "--seeds", "50", "--side", "B", "--batch-size", "2"]
FLAGS += ["--m", "5", "--n", "4", "--h", "6", "--t1", "3", "--saves", "11"]

WATCHED = """
import gc, os, sys, time
from lora_flow.runtime import interrupts
print("begun", flush=True)
with interrupts.watched():
    {body}
print("went on", file=sys.stderr)
"""


def signalled(body, *signals, apart=0.3):
    """What a process says and returns that does this while it is watched, and is sent the signals once it has begun."""
    script = WATCHED.format(body="\n    ".join(body.strip().splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    for number in signals:
        time.sleep(apart)
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "body",
    [
        "while True: sum(range(1000))",
        "time.sleep(60)",
        # an exception raised in a callback of the garbage collector would be printed and forgotten
        "gc.callbacks.append(lambda phase, info: time.sleep(0.2))\nfor _ in range(100): gc.collect()",
        "class Slow:\n    def __del__(self): time.sleep(30)\nSlow()\ntime.sleep(30)",
        "while True:\n    try: time.sleep(60)\n    except BaseException: pass",
    ],
    ids=["python", "system", "collector", "finaliser", "except"],
)
def test_a_signal_ends_the_process_with_one_line_wherever_it_is(body, number):
    assert signalled(body, number) == (1, "lora-flow: interrupted\n")


def test_a_step_that_must_be_whole_is_waited_for_and_told():
    body = "with interrupts.whole('all is stored'): time.sleep(1.5); os.write(2, b'whole;')\ntime.sleep(30)"
    assert signalled(body, signal.SIGINT) == (1, "whole;lora-flow: interrupted; all is stored\n")


def test_a_command_that_a_signal_ends_as_it_should_says_nothing():
    assert signalled("with interrupts.regular(): time.sleep(30)", signal.SIGINT) == (0, "")


def test_a_second_signal_does_not_wait():
    body = "with interrupts.whole('all is stored'): time.sleep(30)"
    began = time.monotonic()
    assert signalled(body, signal.SIGINT, signal.SIGINT) == (1, "lora-flow: interrupted\n")
    assert time.monotonic() - began < 20


def test_signals_that_are_ignored_stay_ignored():
    script = WATCHED.format(body="time.sleep(1)")
    shell = f"trap '' INT; exec {sys.executable} -c '{script}'"
    process = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "went on\n"
    assert process.returncode == 0


def test_importing_and_commands_of_a_program_of_ones_own_leave_signals_alone(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["--version"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["script"])  # without words, as the call
        patch.setattr(interrupts, "watched", lambda: pytest.fail("was watched"))
        assert main([]) == 2
    with interrupts.watched():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_command_runs_in_a_thread(capsys):
    found = []
    thread = threading.Thread(target=lambda: found.append(main(["--version"])))
    thread.start()
    thread.join()
    assert found == [0]


def test_it_says_that_boxes_are_stored_once_one_is(monkeypatch, capsys, tmp_path):
    out, write = tmp_path / "run", Folder.write

    def before(folder, number, values):
        raise KeyboardInterrupt

    def after(dataset, *how):
        raise KeyboardInterrupt

    go_on = f"continue with: lora-flow sweep --out {out} --resume"
    words = f"sweep --rank 1 --m 4 --n 4 --h 5 --t1 0.1 --saves 3 --out {out}".split()
    monkeypatch.setattr(Folder, "write", before)
    assert main(words) == 1
    assert capsys.readouterr().err == f"lora-flow: interrupted; nothing is stored yet, {go_on}\n"
    monkeypatch.setattr(Folder, "write", write)
    monkeypatch.setattr("lora_flow.cli.plot.draw", after)
    assert main(["sweep", "--out", str(out), "--resume"]) == 1
    assert capsys.readouterr().err == f"lora-flow: interrupted; solved boxes are stored, {go_on}\n"


def test_ctrl_c_in_a_program_of_ones_own_is_one_line_too(monkeypatch, capsys, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_flow.cli.sweep.start_jax", interrupt)
    assert main(["sweep", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "lora-flow: interrupted\n"


UP = "from lora_flow.cli import main; print('up', flush=True); raise SystemExit(main())"


def begun(out, *flags):
    """A sweep that has begun to watch for signals, or is about to."""
    command = [sys.executable, "-c", UP, "sweep", "--out", str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def ends_as_promised(process, out):
    """Whether the run was over, or was interrupted with one true line."""
    said = [line for line in process.communicate()[1].splitlines() if line.startswith("lora-flow")]
    if process.returncode == 0:
        load_run(out)
        return False
    assert process.returncode == 1, said
    assert len(said) == 1, said
    if not (out / "settings.toml").exists():
        assert said == ["lora-flow: interrupted"]
        return False
    assert said in (
        ["lora-flow: interrupted"],  # in the moment between
        *(
            [f"lora-flow: interrupted; {what} stored{yet}, continue with: lora-flow sweep --out {out} --resume"]
            for what, yet in (("nothing is", " yet"), ("solved boxes are", ""))
        ),
    )
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_it_imports(tmp_path, number):
    for delay in (0.02, 0.5):
        process = begun(tmp_path / "run", *FLAGS)
        time.sleep(delay)
        process.send_signal(number)
        assert process.communicate()[1] == "lora-flow: interrupted\n"
        assert process.returncode == 1


def test_little_is_imported_before_signals_are_watched_for():
    script = "import sys, lora_flow.cli; print([name for name in ('jax', 'numpy', 'tyro') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"[]\n"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_thirty_moments_of_a_run(tmp_path, number):
    began = time.monotonic()
    whole = begun(tmp_path / "whole", *FLAGS)
    whole.communicate()
    assert whole.returncode == 0
    length, moments = time.monotonic() - began, random.Random(16)
    for i in range(30):
        out = tmp_path / str(i)
        process = begun(out, *FLAGS)
        time.sleep(moments.uniform(0.02, length))
        process.send_signal(number)
        if ends_as_promised(process, out) and i % 5 == 0:
            assert main(["sweep", "--out", str(out), "--resume"]) == 0
            assert load_run(out)["loss"].equals(load_run(tmp_path / "whole")["loss"])
