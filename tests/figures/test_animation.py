"""Animations of one run: their numbers are the run's, and their files are short, small and in motion."""

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from lora_flow import (
    InputError,
    SingleLayer,
    aligned_problem,
    descend,
    gaussian_init,
    pissa_init,
    solve,
    spectral_both_init,
)
from lora_flow.figures import animate
from lora_flow.figures.motion import frames_of, motion_of
from lora_flow.problems.base import as_problem

PROBLEM = aligned_problem(jax.random.key(0), m=4, n=5, h=6)


def solved(init=gaussian_init, problem=PROBLEM, rank=2):
    start = init(jax.random.key(1), problem, rank=rank, alpha=1e-2)
    return solve(problem, start, t1=3.0, saves=21, save_adapters=True)


@pytest.fixture(scope="module")
def run():
    return solved()


def test_the_angles_and_sizes_are_those_of_the_observables(run):
    motion = motion_of(PROBLEM, run)
    for layer, (error, norm) in enumerate((("alignment_error", "norm_z1"), ("alignment_error_2", "norm_z2"))):
        np.testing.assert_allclose(motion.sigma[layer][:, 0], run.observables[norm], rtol=1e-9)
        angle = motion.angle[layer][:, 0]
        np.testing.assert_allclose(2 * np.sin(angle / 2) ** 2, run.observables[error], rtol=1e-6, atol=1e-14)
    np.testing.assert_array_equal(motion.loss, np.maximum(run.observables["loss"], run.rounding_floor))
    assert motion.clock.at == "t = "


def test_a_start_along_the_task_has_no_angle_and_a_task_without_direction_has_none():
    motion = motion_of(PROBLEM, solved(spectral_both_init, rank=1))
    assert all(np.all(angle[:, 0] < 1e-7) for angle in motion.angle)
    many = SingleLayer(np.eye(10))  # of whose singular values more tie than are looked at
    assert np.isnan(motion_of(many, solved(problem=many)).angle[0]).all()


def test_a_descent_moves_over_its_iterations_and_an_offset_start_too():
    start = pissa_init(jax.random.key(1), PROBLEM, rank=2, alpha=1.0)
    problem = as_problem(PROBLEM).offset(start)
    run = descend(problem, start, step=1e-3, steps=20, saves=5, save_adapters=True)
    motion = motion_of(problem, run)
    assert motion.clock.at == "iteration "
    assert motion.times.tolist() == [0, 5, 10, 15, 20]


def test_the_film_has_most_frames_where_most_moves(run):
    motion = motion_of(PROBLEM, run)
    places = frames_of(motion, 10)
    assert (places[0], places[-1]) == (0, 20)
    assert np.all(np.diff(places) > 0)
    fastest = np.argmax(-np.diff(np.log(motion.loss)))
    assert {fastest, fastest + 1} <= set(places.tolist())


def test_the_file_has_the_frames_it_was_asked_for_and_they_move(run, tmp_path):
    assert animate(PROBLEM, run, tmp_path / "run.gif", title="a run", frames=6, progress=False) == tmp_path / "run.gif"
    with Image.open(tmp_path / "run.gif") as image:
        assert 4 <= image.n_frames <= 6
        assert image.info["loop"] == 0
        frames = []
        for place in range(image.n_frames):
            image.seek(place)
            frames.append(np.asarray(image.convert("RGB")))
    assert all((one != other).any() for one, other in zip(frames[1:], frames[:-1], strict=True))
    assert (tmp_path / "run.gif").stat().st_size < 200_000


@pytest.fixture
def as_users_have_it(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "run.png"}, "path must end in .gif or .mp4, got .png"),
        ({"path": "run"}, "path must end in .gif or .mp4, got no ending"),
        ({"path": 5}, "path must be"),
        ({"frames": 1}, "frames must lie between 2 and 1000, got 1"),
        ({"seconds": 0.0}, "seconds must be positive and at most 600, got 0"),
        ({"title": None}, "title must be a text, got None"),
        ({"problem": 5}, "problem must"),
        ({"trajectory": 5}, "trajectory must be the result of solve"),
    ],
)
def test_what_is_no_run_is_refused(run, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"problem": PROBLEM, "trajectory": run, "path": "run.gif", "progress": False} | change
    with pytest.raises(InputError, match=message):
        animate(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_without_its_adapters_and_several_at_once_are_refused(tmp_path):
    start = gaussian_init(jax.random.key(1), PROBLEM, rank=2, alpha=1e-2)
    with pytest.raises(InputError, match=r"trajectory must have its adapters over time, as of solve\(..., save_ad"):
        animate(PROBLEM, solve(PROBLEM, start, t1=1.0, saves=3), tmp_path / "run.gif")
    lanes = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start)
    several = jax.vmap(lambda start: solve(PROBLEM, start, t1=1.0, saves=3, save_adapters=True))(lanes)
    with pytest.raises(InputError, match="trajectory must be of one lane, got 2 lanes"):
        animate(PROBLEM, several, tmp_path / "run.gif")


def test_a_film_needs_ffmpeg(run, tmp_path):
    from matplotlib.animation import writers

    if writers.is_available("ffmpeg"):
        animate(PROBLEM, run, tmp_path / "run.mp4", frames=4, progress=False)
        assert (tmp_path / "run.mp4").read_bytes()[4:8] == b"ftyp"
    else:
        with pytest.raises(InputError, match=r"path must end in \.gif where ffmpeg is not installed, got .mp4"):
            animate(PROBLEM, run, tmp_path / "run.mp4")
