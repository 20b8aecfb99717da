"""The second process: another one, with a thread for linear algebra and 64 bits, which ends with the first."""

import os
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np

from lora_flow.runtime.beside import second_process


def test_it_is_another_process_as_workers_are():
    with second_process() as other:
        assert other.submit(os.getpid).result() != os.getpid()
        assert other.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "1"
        assert other.submit(jnp.zeros, ()).result().dtype == np.float64


SCRIPT = """
import os, time
from lora_flow.runtime.beside import second_process

if __name__ == "__main__":
    other = second_process()
    print(other.submit(os.getpid).result(), flush=True)
    other.submit(time.sleep, 600)
    os._exit(1)
"""


def test_it_ends_where_the_first_one_is_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=False)
    other, until = int(ended.stdout), time.monotonic() + 60
    while is_running(other) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(other)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
