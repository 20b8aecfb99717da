"""A page that is served: its answers are those of the whole run, and only this machine is answered, and only GET."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from runs_of_pages import SETTINGS, presented

from lora_flow import InputError, load_run
from lora_flow.experiments.explore import explored_by_server
from lora_flow.pages import served as serving
from lora_flow.pages.data import of_cells, of_curves
from lora_flow.pages.served import Served, asked_by_pages
from lora_flow.pages.server import server_of
from lora_flow.results.answers import answers
from lora_flow.settings import build_plan, to_table
from lora_flow.sweeps.run import look_at, open_runs


@contextlib.contextmanager
def running(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def port(folder):
    with running(explored_by_server(folder)) as found:
        yield found


def asked(port, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.getheader("Content-Type"), answer.read()
    connection.close()
    return found


def test_the_page_holds_no_curves_and_one_cell(port):
    status, kind, content = asked(port, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    data = json.loads(content.decode().partition('id="data">')[2].partition("</script>")[0])
    (run,) = data["runs"]
    assert "curves" not in run
    assert [len(axis["values"]) for axis in run["axes"]] == [2, 3, 2]
    assert len(run["first"]["endings"]) == 1


def test_what_it_tells_of_cells_is_what_the_whole_run_says(folder, port):
    dataset = load_run(folder)
    whole = of_cells(dataset, answers(dataset))
    status, kind, content = asked(port, "/cells?run=0&at=1;0,2;0,1")
    assert (status, kind) == (200, "application/json")
    told, places = json.loads(content), [6, 7, 10, 11]  # of 2 x 3 x 2 cells in C order
    assert told["seeds"] == 3
    for one, other in zip(told["measures"], whole["measures"], strict=True):
        assert one["label"] == other["label"]
        assert one["values"] == [other["values"][i] for i in places], one["label"]
    assert told["endings"] == [whole["endings"][i] for i in places]


def test_its_curves_are_those_of_the_whole_run(folder, port):
    dataset = load_run(folder)
    status, _, content = asked(port, "/curves?run=0&at=0;1;1&quantity=norm_z1")
    assert status == 200
    curves = np.frombuffer(content, "<f4").reshape(3, 21)
    np.testing.assert_array_equal(curves, of_curves(dataset, ["norm_z1"])[3, 0])


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/settings.toml", 404, "the path must be one of /, /cells, /curves"),
        ("/../../etc/passwd", 404, "the path must be"),
        ("/%2e%2e/settings.toml", 404, "the path must be"),
        ("//etc/passwd", 404, "the path must be"),
        ("/cells", 400, "run must be a number, got ''"),
        ("/cells?run=1&at=0;0;0", 400, "run must lie between 0 and 0, got 1"),
        ("/cells?run=0&at=0;0", 400, "at must have places along 3 axes, got 2"),
        ("/cells?run=0&at=0;3;0", 400, "at must lie between 0 and 2 of alpha"),
        ("/cells?run=0&at=0;-1;0", 400, "at must be whole numbers, such as 0,1,2;3;0, got '0;-1;0'"),
        ("/cells?run=0&at=" + "0," * 9000, 414, "the query must have at most"),
        ("/curves?run=0&at=0;0;0&quantity=../settings.toml", 400, "quantity must be one that the run has over time"),
    ],
)
def test_what_it_does_not_know_is_refused_in_a_line(port, path, status, says):
    got, _, content = asked(port, path)
    assert got == status
    assert content.decode().startswith(says)
    assert "\n" not in content.decode()


def test_only_get_from_this_machine_by_its_own_name_is_answered(port):
    assert asked(port, "/", host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        assert asked(port, "/cells?run=0&at=0;0;0", host=host)[0] == 403, host
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert asked(port, "/", method)[0] == 501, method


def test_a_port_that_is_taken_is_named(folder, port):
    with pytest.raises(InputError, match=f"port must be free, got {port}"), explored_by_server(folder, port):
        pass
    with pytest.raises(InputError, match="port must lie between 0"), explored_by_server(folder, 65536):
        pass


def test_of_many_seeds_an_answer_is_on_the_first(folder, monkeypatch):
    monkeypatch.setattr(serving, "LANES", 8)
    served, dataset = Served(look_at(folder)), load_run(folder).isel(seed=slice(0, 2))
    told = served.cells(0, [[0], [0, 1], [0, 1]])
    assert told["seeds"] == 2
    assert told["endings"] == of_cells(dataset, answers(dataset))["endings"][:4]
    with pytest.raises(InputError, match="at must be at most 8 cells, got 12"):
        served.cells(0, [[0, 1], [0, 1, 2], [0, 1]])


def test_an_unfinished_run_shows_what_is_stored_and_a_replaced_one_says_so(tmp_path):
    plan = build_plan(SETTINGS)
    with open_runs(tmp_path / "run", {"": (to_table(SETTINGS), plan)}):
        pass
    served = Served(look_at(tmp_path / "run"))
    assert served.cells(0, [[0], [0], [0]])["endings"] == ["failed"]
    assert np.isnan(np.frombuffer(served.curves(0, [[0], [0], [0]], "loss"), "<f4")).all()
    with open_runs(tmp_path / "run", {"": (to_table(SETTINGS), plan)}, overwrite=True):
        pass
    with pytest.raises(InputError, match="must stay in place while it is read, got another run's"):
        served.cells(0, [[0], [0], [0]])


def test_a_damaged_chunk_is_told_and_not_shown(tmp_path):
    presented(tmp_path / "run")
    (chunk,) = (tmp_path / "run/results.zarr/loss").glob("0*")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with running(server_of(asked_by_pages(Served(look_at(tmp_path / "run"))))) as port:
        status, _, content = asked(port, "/curves?run=0&at=0;0;0&quantity=loss")
    assert status == 500
    assert "crc" in content.decode().lower()


def test_the_command_prints_the_address_and_ctrl_c_ends_it(folder):
    command = [sys.executable, "-m", "lora_flow", "explore", str(folder), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("page: http://127.0.0.1:"), process.stderr.read()
            assert asked(int(line.partition("127.0.0.1:")[2].partition("/")[0]), "/")[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()
