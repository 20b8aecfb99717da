"""One layer from files: the sign and the scale of gradients, inputs that are not white, and arrays that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_flow import InputError, Regression, SingleLayer, linearised_task, load_problem
from lora_flow.adapter import Adapter
from lora_flow.cli import main

RNG = np.random.default_rng(0)
W, D, X = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 4)), RNG.standard_normal((9, 4)) * [3, 1, 1, 0.2]
S = 0.5


def gradient(inputs=None):
    """dL/dW at the weight, by differentiation of the loss that the shift D stands for."""
    features = np.eye(4) if inputs is None else inputs / np.sqrt(len(inputs))
    return np.asarray(jax.grad(lambda w: 0.5 * jnp.sum((features @ (W + D - w).T) ** 2))(jnp.asarray(W)))


def stored(path, **arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)
    return load_problem(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_gradient_of_white_inputs_is_minus_the_shift(tmp_path, suffix):
    by_gradient = stored(
        tmp_path / f"g{suffix}", weight=W, gradient=gradient(), scaling=np.asarray([S])[0:1].reshape(())
    )
    by_shift = stored(tmp_path / f"s{suffix}", weight=W, shift=D, scaling=np.asarray(S))
    for problem in (by_gradient, by_shift):
        assert isinstance(problem, SingleLayer)
        np.testing.assert_allclose(problem.shift, D, rtol=0, atol=1e-12)
        np.testing.assert_allclose(problem.weights[0], W)
        assert problem.scaling == S


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), samples=st.integers(2, 12))
def test_with_inputs_the_problem_has_the_gradient_that_the_file_has(tmp_path_factory, seed, samples):
    """Whether these are given or their covariance, and whether or not they span all directions."""
    folder = tmp_path_factory.mktemp("layer")
    inputs = np.random.default_rng(seed).standard_normal((samples, 4)) * [3, 1, 1, 0.2]
    told = {"inputs": inputs, "covariance": inputs.T @ inputs / samples}
    losses = []
    for name, array in told.items():
        problem = stored(folder / f"{name}.npz", weight=W, gradient=gradient(inputs), **{name: array})
        assert isinstance(problem, Regression)
        np.testing.assert_allclose(linearised_task(problem)[0], -gradient(inputs), rtol=0, atol=1e-7)
        adapter = Adapter(jnp.ones((1, 4)), jnp.ones((3, 1)))
        losses.append(float(problem.loss((adapter,))))
        exact = 0.5 * np.sum((inputs @ (D - np.ones((3, 4))).T) ** 2) / samples
        np.testing.assert_allclose(losses[-1], exact, rtol=1e-6)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_a_pair_of_npy_files_is_a_layer(tmp_path):
    for name, array in (("q_weight", W), ("q_gradient", gradient())):
        np.save(tmp_path / f"{name}.npy", array)
    problem = load_problem(f"{tmp_path / 'q_weight.npy'},{tmp_path / 'q_gradient.npy'}")
    np.testing.assert_allclose(problem.shift, D, atol=1e-12)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"weight": W, "gradient": D.T},
            r"gradient must have the weight's shape \(3, 4\), .*, got \(4, 3\); is",
        ),
        (
            {"weight": W, "gradient": D[:2]},
            r"gradient must have the weight's shape \(3, 4\), .*, got \(2, 4\)$",
        ),
        (
            {"weight": W, "shift": D, "inputs": X.T},
            r"inputs must have shape \(samples, 4\), .*, got \(4, 9\); is",
        ),
        ({"weight": W, "shift": D, "inputs": X[:, :2]}, r"inputs must have shape \(samples, 4\), .*, got \(9, 2\)$"),
        ({"weight": W, "shift": D, "covariance": np.eye(3)}, r"covariance must have shape \(4, 4\), .*, got \(3, 3\)"),
        ({"weight": W, "shift": D, "covariance": np.triu(np.ones((4, 4)))}, "covariance must be symmetric, got"),
        ({"weight": W, "shift": D, "covariance": -np.eye(4)}, "covariance must have no negative eigenvalue, got -1"),
        ({"weight": W, "gradient": D, "inputs": X[:2]}, "gradient must be one of these inputs: .*, got one with"),
        ({"weight": W}, r"must hold weight, and gradient or shift, got only \['weight'\]"),
        ({"gradient": D}, r"must hold weight, and gradient or shift, got only \['gradient'\]"),
        ({"weight": W, "gradient": D, "shift": D}, "must hold gradient or shift, got both"),
        ({"weight": W, "shift": D, "inputs": X, "covariance": X.T @ X}, "must hold inputs or covariance, got both"),
        ({"weight": W, "shift": D, "w1": W}, "must be of two layers, or of one with its weight, got weight beside w1"),
        ({"w1": W, "w2": W.T, "shift": D, "inputs": X}, "must be of two layers, or .*, got w1 beside inputs"),
        ({"weight": W, "gradient": np.full((3, 4), np.nan)}, "gradient must be finite, got 12 entries"),
        ({"weight": W, "gradient": np.zeros((3, 4))}, "shift must have a non-zero entry, got nothing to learn"),
        ({"weight": W, "shift": D, "scaling": np.asarray(-1.0)}, "scaling must be positive and finite, got -1.0"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        stored(tmp_path / "layer.npz", **arrays)


def test_a_sweep_over_a_layer_from_files(tmp_path, capsys):
    for name, array in (("weight", W), ("gradient", gradient())):
        np.save(tmp_path / f"{name}.npy", array)
    pair = f"{tmp_path / 'weight.npy'},{tmp_path / 'gradient.npy'}"
    words = ["sweep", "--init", "pissa", "lora-one", "--alpha", "0.1", "--rank", "2", "--t1", "1", "--saves", "3"]
    assert main([*words, "--problem", pair, "--out", str(tmp_path / "run")]) == 0
    assert main([*words, "--problem", pair, "--angle", "5", "--out", str(tmp_path / "other")]) == 2
    assert "angle must be left out with a file of one layer, got 5.0" in capsys.readouterr().err
    np.save(tmp_path / "other.npy", W)
    assert main([*words, "--problem", str(tmp_path / "other.npy"), "--out", str(tmp_path / "other")]) == 2
    assert "problem must have .npy files whose names end in weight, gradient or shift" in capsys.readouterr().err
