import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from lora_flow import InputError, aligned_problem, digits_problem, load_problem, misaligned, noisy


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.sampled_from([(1, 6, 5), (4, 1, 1), (4, 6, 12), (9, 6, 5), (9, 9, 12)]),  # each compiles anew
    delta_w=st.floats(0.01, 100.0),
    bottom=st.booleans(),
)
def test_aligned_problem_meets_assumptions_2_1_and_2_2(seed, sizes, delta_w, bottom):
    m, n, h = sizes
    problem = aligned_problem(
        jax.random.key(seed), m=m, n=n, h=h, delta_w=delta_w, component="bottom" if bottom else "top", shift_scale=3.0
    )
    w1, w2, shift = (np.asarray(x) for x in (problem.w1, problem.w2, problem.shift))
    assert (w1.shape, w2.shape, shift.shape) == ((h, n), (m, h), (m, n))
    u, sigma, vt = np.linalg.svd(w2 @ w1)
    k = min(m, n, h)
    index = k - 1 if bottom else 0
    # the shift is 3 u v^T, with the chosen singular pair of Ypre = W2 W1
    overlap = u[:, index] @ shift @ vt[index]
    assert abs(overlap) == pytest.approx(3.0, rel=1e-6)
    assert np.linalg.norm(shift) == pytest.approx(3.0, rel=1e-12)
    # every component splits as sigma_W1 = delta_w sigma_W2, sigma_W1 sigma_W2 = sigma
    assert np.linalg.norm(w1 @ vt[index]) == pytest.approx(np.sqrt(sigma[index] * delta_w), rel=1e-6)
    assert np.linalg.norm(u[:, index] @ w2) == pytest.approx(np.sqrt(sigma[index] / delta_w), rel=1e-6)
    assert problem.spectrum()["aligned"]


def test_the_default_spectrum_is_the_range_of_the_papers_draw():
    sigma = aligned_problem(jax.random.key(5)).spectrum()["sigma_pretrained"]
    assert len(sigma) == 10
    np.testing.assert_allclose([sigma[0], sigma[-1]], [6.5, 0.099], rtol=1e-10)


def test_without_a_spectrum_the_draw_keeps_its_own():
    sigma = aligned_problem(jax.random.key(5), spectrum=None).spectrum()["sigma_pretrained"]
    draw = jax.random.normal(jax.random.split(jax.random.key(5))[0], (10, 10))
    np.testing.assert_allclose(sigma, np.linalg.svd(draw, compute_uv=False), rtol=1e-10)


def test_a_shift_of_higher_rank_has_the_scales_asked_for():
    problem = aligned_problem(jax.random.key(1), component=["top", 3, -1], shift_scale=[5.0, 4.0, 3.0])
    np.testing.assert_allclose(problem.spectrum()["sigma_shift"], [5.0, 4.0, 3.0])
    assert problem.spectrum()["aligned"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": 0}, "m must be at least 1, got 0"),
        ({"delta_w": -1.0}, "delta_w must be positive, got -1.0"),
        ({"delta_w": float("nan")}, "delta_w must be positive, got nan"),
        ({"shift_scale": 0.0}, "shift_scale must be positive, got 0.0"),
        ({"shift_scale": [1.0, 2.0]}, "shift_scale must be one number or 1 of them, got 2"),
        (
            {"component": "botom"},
            r"component must be 'top' or 'bottom' or an index, got 'botom' \(did you mean 'bottom'",
        ),
        ({"component": 10}, "component must be an index below 10, the number of components, got 10"),
        ({"component": ["top", 0]}, "component must name each component once"),
        ({"component": []}, "component must name at least one component"),
        ({"spectrum": (1.0, 2.0)}, "spectrum must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        aligned_problem(jax.random.key(0), **arguments)


def test_the_digits_loss_is_the_excess_mean_squared_error():
    """1/(2N) ||T - X Y^T||^2 = 1/(2N) ||T - X Yft^T||^2 + 1/2 ||Y - Yft||^2 for any map Y of whitened images."""
    problem = digits_problem()
    pixels, digit = load_digits(return_X_y=True)
    centred = pixels - pixels.mean(axis=0)
    covariance = centred.T @ centred / len(pixels)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-10 * values[-1]
    images = centred @ (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    classes = np.eye(10)[digit] - np.eye(10)[digit].mean(axis=0)
    pretrained = np.asarray(problem.w2 @ problem.w1)
    tuned = pretrained + np.asarray(problem.shift)

    def half_mse(y):
        return np.sum((classes - images @ y.T) ** 2) / (2 * len(images))

    best = np.linalg.lstsq(images, classes, rcond=1e-10)[0].T
    np.testing.assert_allclose(tuned, best, atol=1e-10)
    np.testing.assert_allclose(
        half_mse(pretrained) - half_mse(tuned), 0.5 * np.sum(np.asarray(problem.shift) ** 2), rtol=1e-10
    )
    # it does what its description says: pretrained knows the digits 0-4 and not 5-9
    right = (images @ pretrained.T).argmax(axis=1) == digit
    assert right[digit < 5].mean() > 0.9
    assert right[digit >= 5].mean() < 0.05
    assert ((images @ tuned.T).argmax(axis=1) == digit).mean() > 0.9


def test_the_digits_weights_are_balanced_and_the_task_is_not_aligned():
    problem = digits_problem(h=12)
    w1, w2 = np.asarray(problem.w1), np.asarray(problem.w2)
    np.testing.assert_allclose(w1 @ w1.T, w2.T @ w2, atol=1e-12)
    spectrum = problem.spectrum()
    assert len(spectrum["sigma_pretrained"]) == 4
    assert len(spectrum["sigma_shift"]) == 9
    assert not spectrum["aligned"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("goal", ["shift", "target"])
def test_a_problem_survives_its_file(tmp_path, suffix, goal):
    made = aligned_problem(jax.random.key(2), m=4, n=3, h=5)
    arrays = {"w1": made.w1, "w2": made.w2, "shift": made.shift}
    if goal == "target":
        arrays["target"] = arrays.pop("shift") + made.w2 @ made.w1
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    path = tmp_path / f"problem{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    loaded = load_problem(path)
    for name in ("w1", "w2", "shift"):
        np.testing.assert_allclose(getattr(loaded, name), getattr(made, name), atol=1e-14)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "text.safetensors").write_text("not tensors")
    np.savez(tmp_path / "missing.npz", w1=np.ones((2, 2)), shift=np.ones((2, 2)))
    np.savez(tmp_path / "extra.npz", w1=np.ones((2, 2)), w2=np.ones((2, 2)), shft=np.ones((2, 2)))
    np.savez(tmp_path / "object.npz", w1=np.array([{}]), w2=np.ones((2, 2)), shift=np.ones((2, 2)))
    for name, message in {
        "none.npz": "problem must be a file that exists",
        "weights.pt": "problem must be an .npz or .safetensors file",
        "text.npz": "problem must be a readable .npz file",
        "text.safetensors": "problem must be a readable .safetensors file",
        "missing.npz": "must hold an array w2, got only",
        "extra.npz": r"got 'shft' \(did you mean 'shift'\?\)",
        "object.npz": "problem must be a readable .npz file",
    }.items():
        with pytest.raises(InputError, match=message):
            load_problem(tmp_path / name)


@pytest.mark.parametrize("angle", [0.0, 10.0, 90.0])
def test_a_misaligned_shift_is_turned_by_that_angle_and_keeps_its_singular_values(angle):
    """Principal angles between old and new singular subspaces, on both sides."""
    from scipy.linalg import subspace_angles

    problem = aligned_problem(jax.random.key(0), m=7, n=9, h=12, component=[0, 2], shift_scale=(3.0, 2.0))
    turned = misaligned(problem, jax.random.key(1), angle=angle)
    old, new = np.linalg.svd(problem.shift), np.linalg.svd(turned.shift)
    np.testing.assert_allclose(new[1][:2], [3.0, 2.0], rtol=1e-12)
    np.testing.assert_allclose(new[1][2:], 0.0, atol=1e-12)
    for before, after in ((old[0][:, :2], new[0][:, :2]), (old[2][:2].T, new[2][:2].T)):
        np.testing.assert_allclose(np.rad2deg(subspace_angles(before, after)), angle, atol=1e-6)
    np.testing.assert_array_equal(turned.w1, problem.w1)
    assert turned.spectrum()["aligned"] is (angle == 0)


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_noise_has_its_size_and_leaves_the_target(noise):
    problem = aligned_problem(jax.random.key(0), m=5, n=6, h=8)
    disturbed = noisy(problem, jax.random.key(1), noise=noise)
    for before, after in ((problem.w1, disturbed.w1), (problem.w2, disturbed.w2)):
        assert np.linalg.norm(after - before) == pytest.approx(noise * np.linalg.norm(before), rel=1e-10)
    target = [p.shift + p.w2 @ p.w1 for p in (problem, disturbed)]
    np.testing.assert_allclose(target[0], target[1], atol=1e-12)


def test_bad_angles_and_noise_are_named():
    problem = aligned_problem(jax.random.key(0), m=4, n=5, h=6, component=[0, 1, 2])
    with pytest.raises(InputError, match=r"angle must lie between 0 and 90 degrees, got 91\.0"):
        misaligned(problem, jax.random.key(0), angle=91.0)
    with pytest.raises(
        InputError, match=r"angle must be 0 for a shift of rank above 2, which fills its space, got 5, rank 3"
    ):
        misaligned(problem, jax.random.key(0), angle=5.0)
    with pytest.raises(InputError, match=r"noise must be at least 0, got -1\.0"):
        noisy(problem, jax.random.key(0), noise=-1.0)
