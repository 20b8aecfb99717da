"""A run in an object store is the run on a disk: the same bits, resumed, mended, replaced, drawn and read."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import xarray as xr
from s3_server import S3Server

from lora_flow import InputError, aligned_problem, load_run, sweep
from lora_flow.cli import main
from lora_flow.storage import leases, remote, staged
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import run_path

OUT = "s3://bucket/runs/x"
FLAGS = ["--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-1", "1e-2", "--rank", "1", "--seeds", "6"]
FLAGS += ["--t1", "0.5", "--saves", "3", "--batch-size", "2"]


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setattr(leases, "_PAUSE", 0.0)
        patch.setattr("lora_flow.cli.plot.draw", lambda out, partial=False: 0)  # but where a test is about it
        remote._store.cache_clear()
        yield server
        server.shutdown()
    remote._store.cache_clear()


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """The run on a disk, and the objects of the run in the store, which is solved by the parts that share it."""
    here = tmp_path_factory.mktemp("here")
    assert main(["sweep", "--out", str(here / "run"), *FLAGS]) == 0
    assert main(["sweep", "--out", OUT, *FLAGS, "--part", "1/2"]) == 0
    return load_run(here / "run"), dict(server.objects)


@pytest.fixture
def run(server, runs, tmp_path, monkeypatch):
    """The run on the disk; the store holds it again."""
    monkeypatch.chdir(tmp_path)
    server.objects.clear()
    server.objects.update(runs[1])
    server.refuse = lambda method, key: 0
    yield runs[0]
    assert not os.listdir(tmp_path)  # nothing of a URL lies on a disk


def content(server, name):
    return server.objects[f"runs/x/{name}"][0]


def test_the_run_has_the_same_bits(server, run):
    xr.testing.assert_identical(load_run(OUT), run)
    assert all(key.startswith(("runs/x/settings.toml", "runs/x/results.zarr/")) for key in server.objects)
    assert main(["sweep", "--out", OUT, *FLAGS]) == 2


def test_what_is_missing_or_damaged_is_named_and_solved_again(server, run, capsys):
    for name in ("status/0.0.0.0", "loss/0.1.0.1.0"):
        del server.objects[f"runs/x/results.zarr/{name}"]
    flipped = bytearray(content(server, "results.zarr/steps/0.1.0.2"))
    flipped[-9] ^= 1  # in the last value
    server.put("runs/x/results.zarr/steps/0.1.0.2", bytes(flipped))
    metadata = json.loads(content(server, "results.zarr/loss/.zarray")) | {"fill_value": 0.0}
    server.put("runs/x/results.zarr/loss/.zarray", json.dumps(metadata).encode())
    with pytest.raises(InputError, match=r"damaged or missing loss/.zarray; mend it with: lora-flow sweep --out s3:"):
        load_run(OUT)
    assert main(["sweep", "--out", OUT, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "damaged, and solved again: loss/.zarray, loss/0.1.0.1.0, steps/0.1.0.2" in told
    xr.testing.assert_identical(load_run(OUT), run)


def test_one_process_writes_at_a_time(run, capsys):
    with locked(run_path("out", OUT)):
        assert main(["sweep", "--out", OUT, "--resume"]) == 2
        assert main(["status", OUT]) == 0
    told = capsys.readouterr()
    assert f"'{OUT}' must be written by one process at a time, got one that process {os.getpid()} on " in told.err
    assert f"process {os.getpid()} on " in told.out
    assert "12 of 12 lanes done (6 of 6 boxes); ended: 12 success" in told.out


def test_a_run_is_replaced_whole(server, run, capsys, monkeypatch):
    server.put("runs/x/report.md", b"of the old run")
    other = ["sweep", "--out", OUT, *FLAGS, "--problem-seed", "1", "--overwrite"]
    server.refuse = lambda method, key: 403 * (method == "PUT" and "status/0" in key)
    assert main(other) == 2
    assert "must be accessible, got " in capsys.readouterr().err
    server.refuse = lambda method, key: 0
    xr.testing.assert_identical(load_run(OUT), run)
    monkeypatch.setattr(staged, "copy", lambda pairs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(other)
    monkeypatch.undo()
    assert load_run(OUT, partial=True).attrs["problem_seed"] == [1]
    assert "runs/x/report.md" not in server.objects


def test_a_run_grows(run):
    assert main(["sweep", "--out", OUT, "--extend", "--seeds", "8"]) == 0
    larger = load_run(OUT)
    xr.testing.assert_identical(larger["loss"].isel(seed=slice(6)), run["loss"])
    assert not np.isnan(larger["loss"]).any()


def test_pictures_and_report_lie_beside_the_results(server, run):
    from lora_flow.experiments.present import present

    done = present(OUT)
    assert {f"picture: {OUT}/figures/sweep.png", f"report: {OUT}/report.md"} <= set(done.lines)
    assert content(server, "figures/sweep.png").startswith(b"\x89PNG")
    assert b"(figures/sweep.png)" in content(server, "report.md")


def test_xarray_reads_the_results(run):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    store = ObjectStore(from_url(f"{OUT}/results.zarr", client_options={"allow_http": True}), read_only=True)
    np.testing.assert_array_equal(xr.open_zarr(store, chunks=None)["loss"], run["loss"])


def test_python_stores_there_too(run):
    problem, out = aligned_problem(jax.random.key(0), m=4, n=5, h=6), "s3://bucket/python"
    asked = {"alpha": (1e-1, 1e-2), "rank": 1, "seeds": 6, "t1": 0.5, "saves": 3, "batch_size": 2}
    with ThreadPoolExecutor(1) as workers:
        first = sweep(problem, **asked, out=out, executor=workers)
    xr.testing.assert_identical(sweep(problem, **asked, out=out), first)
    np.testing.assert_array_equal(first["loss"], run["loss"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["sweep", "--out", "ftp://a/b"],
            "out must be a path or a URL such as s3://bucket/x (s3, gs), got 'ftp://a/b'",
        ),
        (["plot", "s3:/bucket/x"], "the run folder must be a path or a URL such as s3://bucket/x (s3, gs), got"),
        (["status", "s3://bucket/none"], "the run folder must exist, got 's3://bucket/none'"),
        (["theory", "--out", OUT], f"out must be a folder on a disk for this command, got '{OUT}'"),
        (["vision", "--out", OUT], f"out must be a folder on a disk for this command, got '{OUT}'"),
        (["sweep", "--out", "s3://other/x"], "'s3://other/x' must be usable, got Generic S3 error"),
    ],
)
def test_what_cannot_be_is_one_line(run, words, line, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lora-flow: {line}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["loss/", "status/"])
def test_what_the_store_refuses_is_not_taken_for_damage(server, run, name, capsys):
    server.refuse = lambda method, key: 403 * (method == "GET" and f"{name}0" in key)
    assert main(["status", OUT]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"lora-flow: '{OUT}' must answer, got ")
    assert told.count("\n") == 1
