"""Lanes trained at once are each trained alone, step by step; an interrupted training ends with the same bits."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lora_flow_vision import training
from lora_flow_vision.task import HeadTask
from lora_flow_vision.training import train

from lora_flow import Adapter, InputError

LANES, COUNT, WIDTH, CLASSES = 3, 24, 5, 4
SAVES = np.array([0, 2, 3, 7])
SGD, ADAM = optax.sgd(0.5), optax.adam(0.05)


def look(task, adapters, shared):
    ((a, _),) = adapters
    return {"loss": task.loss(adapters), "shared": shared * jnp.sum(a)}


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    features, weight = rng.standard_normal((COUNT, WIDTH)), rng.standard_normal((CLASSES, WIDTH))
    return HeadTask(features, rng.integers(0, CLASSES, COUNT), weight, np.zeros(CLASSES))


@pytest.fixture(scope="module")
def starts():
    rng = np.random.default_rng(1)
    return (Adapter(*(jnp.asarray(rng.standard_normal((LANES, *s))) for s in ((2, WIDTH), (CLASSES, 2)))),)


@pytest.fixture(scope="module")
def batches():
    return np.random.default_rng(2).integers(0, COUNT, (LANES, SAVES[-1], 6))


def trained(task, starts, optimizer=SGD, saves=SAVES, batches=None, **how):
    return train(task, starts, optimizer=optimizer, saves=saves, look=look, shared=2.0, batches=batches, **how)


def lane(starts, index):
    return jax.tree.map(lambda leaf: leaf[index], starts)


@eqx.filter_jit
def loss(task, adapters, chosen=None):
    return task.loss(adapters) if chosen is None else task.batch_loss(adapters, chosen)


@eqx.filter_jit
def slope(task, adapters, chosen=None):
    return jax.grad(lambda adapters: loss(task, adapters, chosen))(adapters)


def one_by_one(task, adapters, optimizer, chosen=None):
    """A plain loop over the steps of one lane: its losses, and twice the sums of its A."""
    state, seen = optimizer.init(adapters), {}
    for step in range(SAVES[-1] + 1):
        if step in SAVES:
            seen[step] = float(loss(task, adapters)), 2 * float(adapters[0].a.sum())
        if step < SAVES[-1]:
            gradient = slope(task, adapters, None if chosen is None else chosen[step])
            updates, state = optimizer.update(gradient, state, adapters)
            adapters = optax.apply_updates(adapters, updates)
    return np.array(list(seen.values())).T


def assert_same_bits(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("by_batches", [False, True])
def test_each_lane_takes_the_steps_of_a_plain_loop(task, starts, batches, optimizer, by_batches):
    """Over all data, or over its own batches in their order; and is seen after the numbers of steps in `saves`."""
    given = batches if by_batches else None
    (final,), seen = trained(task, starts, optimizer, batches=given)
    for index in range(LANES):
        chosen = batches[index] if by_batches else None
        losses, sums = one_by_one(task, lane(starts, index), optimizer, chosen)
        np.testing.assert_allclose(seen["loss"][index], losses, rtol=1e-12)
        np.testing.assert_allclose(seen["shared"][index], sums, rtol=1e-11)
        np.testing.assert_allclose(2 * final.a[index].sum(), sums[-1], rtol=1e-11)
    assert np.all(seen["loss"][:, -1] != seen["loss"][:, 0])


def test_a_step_of_sgd_is_the_rate_times_the_gradient(task, starts):
    (final,), _ = trained(task, starts, saves=np.array([1]))
    for index in range(LANES):
        ((a, b),) = slope(task, lane(starts, index))
        np.testing.assert_allclose(final.a[index], starts[0].a[index] - 0.5 * a, atol=1e-14)
        np.testing.assert_allclose(final.b[index], starts[0].b[index] - 0.5 * b, atol=1e-14)


def test_lanes_trained_together_are_lanes_trained_alone(task, starts, batches):
    (together,), seen = trained(task, starts, ADAM, batches=batches)
    for index in range(LANES):
        one = slice(index, index + 1)
        (alone,), saw = trained(task, lane(starts, one), ADAM, batches=batches[one])
        np.testing.assert_allclose(alone.a[0], together.a[index], rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(saw["loss"][0], seen["loss"][index], rtol=1e-12)


def test_with_batches_of_all_the_data_in_any_order_it_is_full_descent(task, starts):
    rng = np.random.default_rng(3)
    orders = np.stack([[rng.permutation(COUNT) for _ in range(SAVES[-1])] for _ in range(LANES)])
    _, seen = trained(task, starts, batches=orders)
    np.testing.assert_allclose(seen["loss"], trained(task, starts)[1]["loss"], rtol=1e-11)


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_two_trainings_are_identical_bit_by_bit(task, starts, batches, optimizer):
    assert_same_bits(
        trained(task, starts, optimizer, batches=batches), trained(task, starts, optimizer, batches=batches)
    )


def test_how_often_one_looks_changes_no_bit(task, starts):
    (often,), _ = trained(task, starts, ADAM, saves=np.arange(8))
    (once,), _ = trained(task, starts, ADAM, saves=np.array([7]))
    assert_same_bits(often, once)


class Died(Exception):
    pass


def dying(after):
    """Hears of steps, and raises once so many are done and stored."""
    heard = []

    def stepped(count):
        if sum(heard) >= after:
            raise Died
        heard.append(count)

    return heard, stepped


@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_training_that_died_goes_on_and_ends_with_the_same_bits(task, starts, batches, tmp_path, monkeypatch, after):
    """Adam's moments and count are part of where it stands, and so is what was seen."""
    monkeypatch.setattr(training, "SECONDS_BETWEEN", 0)
    whole = trained(task, starts, ADAM, batches=batches)
    heard, stepped = dying(after)
    with pytest.raises(Died):
        trained(task, starts, ADAM, batches=batches, folder=tmp_path, stepped=stepped)
    resumed = []
    again = trained(task, starts, ADAM, batches=batches, folder=tmp_path, stepped=resumed.append)
    assert_same_bits(again, whole)
    assert resumed[0] == sum(heard) == after
    assert sum(resumed) == SAVES[-1]


def test_a_training_may_die_again_and_again(task, starts, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN", 0)
    saves = np.arange(2, 8)
    for after in (1, 4, 5):
        with pytest.raises(Died):
            trained(task, starts, ADAM, saves, folder=tmp_path, stepped=dying(after)[1])
    assert_same_bits(trained(task, starts, ADAM, saves, folder=tmp_path), trained(task, starts, ADAM, saves))
    kept = [path for path in tmp_path.iterdir() if path.name.isdigit()]
    assert [path.name for path in kept] == ["6"]  # of the looks, and no older ones


@pytest.fixture(scope="module")
def interrupted(task, starts, batches, tmp_path_factory):
    """A checkpoint after three of seven steps, and what the whole training ends with."""
    folder = tmp_path_factory.mktemp("interrupted") / "unit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SECONDS_BETWEEN", 0)
        with pytest.raises(Died):
            trained(task, starts, ADAM, batches=batches, folder=folder, stepped=dying(3)[1])
    return folder, trained(task, starts, ADAM, batches=batches)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def cut(path, _):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path, _):
    path.write_bytes(b"")


def lose(path, _):
    path.unlink()


def garble(path, place):
    content = bytearray(path.read_bytes() or b"x")
    content[place % len(content)] ^= 0x20
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, lose, garble])
def test_whatever_is_damaged_of_a_checkpoint_the_end_has_the_same_bits(
    task, starts, batches, interrupted, tmp_path, capfd, damage
):
    """Every file in turn, also in the list of their digests: from the start where something is lost, which is said."""
    folder, whole = interrupted
    names = [path.relative_to(folder) for path in files_of(folder)]
    assert len(names) > 5
    told = 0
    for number, name in enumerate(names):
        copy = shutil.copytree(folder, tmp_path / str(number))
        damage(copy / name, 7 * number + 3)
        heard = []
        capfd.readouterr()
        again = trained(task, starts, ADAM, batches=batches, folder=copy, stepped=heard.append)
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lora-flow")]
        assert_same_bits(again, whole)
        assert (heard[0] == 0) == (len(said) == 1 and said[0].endswith("; it is trained from its start"))
        told += len(said)
    assert told == len(names) - (damage is lose)  # without the digests there is nothing to hold the values against


def test_what_is_no_checkpoint_is_removed_and_the_training_begins(task, starts, batches, interrupted, tmp_path, capfd):
    folder, whole = interrupted
    (tmp_path / "file").write_text("x")
    shutil.copytree(folder, tmp_path / "later")
    (tmp_path / "later" / "3").rename(tmp_path / "later" / "4")
    shutil.copytree(folder, tmp_path / "far")
    (tmp_path / "far" / "3").rename(tmp_path / "far" / "400")
    for name in ("file", "later", "far"):
        heard = []
        again = trained(task, starts, ADAM, batches=batches, folder=tmp_path / name, stepped=heard.append)
        assert_same_bits(again, whole)
        assert heard[0] == 0
        assert f"lora-flow: '{tmp_path / name}' is damaged (" in capfd.readouterr().err


def test_checkpoints_are_kept_seconds_apart(task, starts, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN", 3600)
    trained(task, starts, folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.isdigit()]


def test_every_stretch_of_steps_is_the_same_program(task, starts):
    """What one looks at is traced as often for twelve looks as for two."""
    traced = []
    for saves in (np.array([0, 1]), np.arange(12)):
        calls = []

        def counted(task, adapters, shared, calls=calls):
            calls.append(1)
            return {"loss": task.loss(adapters)}

        train(task, starts, optimizer=SGD, saves=saves, look=counted)
        traced.append(len(calls))
    assert traced[0] == traced[1]


@pytest.mark.parametrize("saves", [[], [-1, 2], [0, 2, 2], [3, 1]])
def test_saves_that_do_not_increase_are_refused(task, starts, saves):
    with pytest.raises(InputError, match="saves must be increasing numbers of steps from 0, got"):
        trained(task, starts, saves=np.array(saves, int))
