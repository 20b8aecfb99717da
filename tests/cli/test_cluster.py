"""`lora-flow sweep --cluster`: one folder, whatever becomes of the cluster."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest
import xarray as xr

from lora_flow import InputError, load_run
from lora_flow.cli import cluster, main
from lora_flow.cli.cluster import cluster_of, executor_of

pytest.importorskip("distributed")

FLAGS = ["--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-1", "1e-2", "--rank", "1", "--seeds", "7"]
FLAGS += ["--t1", "0.5", "--saves", "3", "--batch-size", "2"]
THREADS = """class = "distributed.LocalCluster"
{jobs}

[arguments]
n_workers = 0
processes = false
threads_per_worker = 1
memory_limit = 0
dashboard_address = ":0"
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["sweep", "--out", str(out), *FLAGS]) == 0
    return load_run(out)


@pytest.mark.parametrize("jobs", ["jobs = 2", "minimum = 1\nmaximum = 2"])
def test_a_cluster_of_any_class_solves_to_the_same_bits(jobs, whole, tmp_path, capsys):
    (tmp_path / "cluster.toml").write_text(THREADS.format(jobs=jobs))
    flags = [*FLAGS, "--cluster", str(tmp_path / "cluster.toml")]
    assert main(["sweep", "--out", str(tmp_path / "run"), *flags]) == 0
    xr.testing.assert_equal(load_run(tmp_path / "run"), whole)
    assert "report: " in capsys.readouterr().out
    assert main(["sweep", "--out", str(tmp_path / "run"), "--extend", "--seeds", "8", *flags[-2:]]) == 0
    larger = load_run(tmp_path / "run")
    assert larger.sizes["seed"] == 8
    xr.testing.assert_equal(larger.isel(seed=slice(7)), whole)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("jobs = 1", r"class in '.*' must be MODULE\.CLASS, got None"),
        ('class = "LocalCluster"\njobs = 1', r"class in '.*' must be MODULE\.CLASS, got 'LocalCluster'"),
        ('class = "no_such_thing.A"\njobs = 1', r"class in '.*' must .* \(pip install no-such-thing\), got no_such"),
        ('class = "distributed.No"\njobs = 1', r"class in '.*' must be installed and have that class"),
        ('class = "distributed.LocalCluster"', r"'.*' must say jobs, or minimum and maximum, got none of them"),
        (
            'class = "distributed.LocalCluster"\njobs = 1\nminimum = 1',
            "must say jobs, or minimum and maximum, got jobs, m",
        ),
        ('class = "distributed.LocalCluster"\njobs = -1', r"jobs in '.*' must be at least 0, got -1"),
        ('class = "distributed.LocalCluster"\njobs = 1\narguments = 1', r"arguments in '.*' must be a table, got 1"),
        ('klass = "distributed.LocalCluster"', r"a setting in '.*' must be 'class', .*, got 'klass'"),
    ],
)
def test_a_table_that_is_no_clusters(table, line, tmp_path):
    (tmp_path / "cluster.toml").write_text(table)
    with pytest.raises(InputError, match=line):
        cluster_of(str(tmp_path / "cluster.toml"))


def test_arguments_that_the_class_does_not_take(tmp_path):
    (tmp_path / "cluster.toml").write_text('class = "distributed.Worker"\njobs = 1\narguments = { nothing = 1 }')
    with (
        pytest.raises(InputError, match=r"^arguments in '.*' must be what distributed\.Worker takes, got [A-Z]"),
        executor_of(cluster_of(str(tmp_path / "cluster.toml"))),
    ):
        pass


@pytest.mark.parametrize("asked", ["local", "local:0", "local:-1", "local:99999", "slurm", ""])
def test_what_is_no_cluster(asked):
    with pytest.raises(InputError, match=r"^cluster must "):
        cluster_of(asked)


def test_nothing_is_made_where_the_cluster_cannot_be_had(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "_WITHIN", 0.5)
    out = tmp_path / "run"
    assert main(["sweep", "--out", str(out), *FLAGS, "--cluster", "tcp://127.0.0.1:9"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("lora-flow: cluster must answer, got tcp://127.0.0.1:9: ")
    assert line.count("\n") == 1
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["sweep", "--out", str(out), *FLAGS, "--cluster", "local:2"]) == 2
    assert "cluster must have Dask (pip install 'lora-flow[cluster]'), got " in capsys.readouterr().err
    assert main(["sweep", "--out", str(out), *FLAGS, "--cluster", "local:2", "--part", "0/2"]) == 2
    assert capsys.readouterr().err == "lora-flow: part and cluster must not be given together, got both\n"
    assert not out.exists()


def test_pages_of_local_clusters_are_this_machines_alone_on_any_free_port():
    with contextlib.ExitStack() as held:
        servers = [cluster._local(held, 0).scheduler.http_server for _ in range(2)]
        assert [server.address for server in servers] == ["127.0.0.1"] * 2
        assert 8787 not in {server.port for server in servers}


LONGER = ["--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-1", "1e-2", "--rank", "2", "--seeds", "300"]
LONGER += ["--t1", "5", "--saves", "3", "--batch-size", "2"]


def started(out, address):
    words = ["sweep", "--out", str(out), *LONGER, "--cluster", address]
    return subprocess.Popen([sys.executable, "-m", "lora_flow", *words], stderr=subprocess.PIPE, text=True)


def wait_for_a_box(out, process):
    """Until a box is stored; the run is not over then."""
    stored = 0
    while stored == 0:
        assert process.poll() is None
        time.sleep(0.05)
        with contextlib.suppress(InputError, OSError):  # nothing there yet
            stored = int((load_run(out, partial=True)["status"] >= 0).sum())
    assert stored < 600


@pytest.mark.long
def test_a_killed_client_leaves_a_folder_that_is_finished_without_a_cluster(tmp_path, capsys):
    out = tmp_path / "run"
    with started(out, "local:2") as client:
        wait_for_a_box(out, client)
        client.send_signal(signal.SIGKILL)
    assert main(["sweep", "--out", str(out), "--resume"]) == 0
    assert main(["sweep", "--out", str(tmp_path / "whole"), *LONGER]) == 0
    xr.testing.assert_equal(load_run(out), load_run(tmp_path / "whole"))


@pytest.mark.long
def test_a_lost_scheduler_leaves_a_folder_that_is_finished_on_another_cluster(tmp_path, capsys):
    out, dask = tmp_path / "run", [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    file = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen([*dask, "--port", "0", "--host", "127.0.0.1", "--scheduler-file", str(file)], **quiet)
    while not file.exists():
        time.sleep(0.05)
    address = json.loads(file.read_text())["address"]
    words = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    with subprocess.Popen([*words, "--local-directory", str(tmp_path)], **quiet), started(out, address) as client:
        wait_for_a_box(out, client)
        scheduler.kill()
        scheduler.wait()
        said = client.communicate()[1].splitlines()
    assert client.returncode == 1
    lost = rf"lora-flow: the Dask scheduler at {address} must stay until the sweep is done, got a lost connection; "
    assert said[-1] == f"{lost}solved boxes are stored, continue with: lora-flow sweep --out {out} --resume"
    assert main(["sweep", "--out", str(out), "--resume", "--cluster", "local:1"]) == 0
    assert main(["sweep", "--out", str(tmp_path / "whole"), *LONGER]) == 0
    xr.testing.assert_equal(load_run(out), load_run(tmp_path / "whole"))
