"""An adapter is the weight update that it stands for, attached, merged, taken out and off; layers have paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_flow_vision.config import CONFIGS
from lora_flow_vision.lora import (
    Spec,
    adapters_of,
    attach,
    choose,
    detach,
    linear_layers,
    low_rank_product,
    merge,
    scalings_of,
    unmerge,
)
from small import CONFIG, adapters, images, logits, network, shapes

from lora_flow import Adapter, InputError

LAYERS = ("attention/key", "attention/output", "attention/query", "attention/value", "mlp/down", "mlp/up")
PATHS = (*(f"blocks/{block}/{layer}" for block in (0, 1) for layer in LAYERS), "head")
SOME = ("blocks/0/attention/query", "blocks/1/mlp/up", "blocks/1/mlp/down", "head")
SCALINGS = dict(zip(SOME, (0.5, 1.0, 2.0, -3.0), strict=True))


def carrier():
    model = network()
    attach(model, adapters(model, SOME), SCALINGS)
    return model


def kernels(model):
    return {path: np.asarray(layer.kernel[...]) for path, layer in linear_layers(model).items()}


def test_linear_layers_go_by_their_paths_blocks_in_the_order_of_their_numbers():
    assert tuple(linear_layers(network())) == PATHS
    deep = linear_layers(shapes(CONFIGS["vit-base"]))
    assert list(dict.fromkeys(path.split("/")[1] for path in list(deep)[:-1])) == [str(block) for block in range(12)]
    assert len(deep) == 12 * 6 + 1
    assert list(deep)[-1] == "head"


def test_with_b_zero_an_adapter_changes_nothing():
    model, x = network(), images()
    before = logits(model, x)
    drawn = adapters(model, PATHS)
    attach(model, {path: Adapter(a, jnp.zeros_like(b)) for path, (a, b) in drawn.items()}, scaling=3.0)
    np.testing.assert_array_equal(logits(model, x), before)


def test_an_adapter_is_the_update_of_the_weight_by_s_b_a():
    x, updated = images(), network()
    before = logits(updated, x)
    for path, (a, b) in adapters(updated, SOME).items():
        kernel = linear_layers(updated)[path].kernel
        kernel[...] = jnp.asarray(np.asarray(kernel[...], float) + SCALINGS[path] * np.asarray(b @ a).T, jnp.float32)
    adapted = logits(carrier(), x)
    np.testing.assert_allclose(adapted, logits(updated, x), atol=2e-5)
    assert jnp.abs(adapted - before).max() > 1


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_the_product_with_low_rank_factors_has_the_derivatives_of_the_product(batch):
    """Also for lanes with factors of their own."""
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.standard_normal((3, *shape))) for shape in ((*batch, 6), (2, 6), (4, 2)))
    slope = jnp.asarray(rng.standard_normal((3, *batch, 4)))

    def derivatives(product):
        def lane(x, a, b, slope):
            value, pull = jax.vjp(product, x, a, b)
            return value, *pull(slope)

        return jax.jit(jax.vmap(lane))(x, a, b, slope)

    for found, expected in zip(
        derivatives(low_rank_product), derivatives(lambda x, a, b: (x @ a.T) @ b.T), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_merging_changes_no_logit_and_unmerging_gives_the_weights_back():
    model, x = carrier(), images()
    before, original = logits(model, x), kernels(model)
    merge(model)
    np.testing.assert_allclose(logits(model, x), before, atol=2e-5)
    for path, kernel in kernels(model).items():
        assert np.array_equal(kernel, original[path]) == (path not in SOME)
    unmerge(model)
    for path, kernel in kernels(model).items():
        np.testing.assert_allclose(kernel, original[path], atol=1e-6)
    np.testing.assert_allclose(logits(model, x), before, atol=2e-5)


def test_adapters_are_merged_once():
    model = carrier()
    with pytest.raises(InputError, match="model must have merged adapters, got ones that are not"):
        unmerge(model)
    merge(model)
    once = kernels(model)
    with pytest.raises(InputError, match="model must have adapters that are not merged, got merged ones"):
        merge(model)
    for path, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel, once[path])


def test_what_is_attached_can_be_read_and_taken_off_again():
    model, x = network(), images()
    before, drawn = logits(model, x), adapters(model, SOME)
    attach(model, drawn, SCALINGS)
    assert (tuple(adapters_of(model)), scalings_of(model)) == (SOME[:1] + SOME[2:0:-1] + SOME[3:], SCALINGS)
    assert tuple(linear_layers(model)) == PATHS
    taken = detach(model)
    for path, (a, b) in drawn.items():
        np.testing.assert_allclose(taken[path].a, a, rtol=1e-7)
        np.testing.assert_allclose(taken[path].b, b, rtol=1e-7)
    assert not adapters_of(model)
    np.testing.assert_array_equal(logits(model, x), before)


def test_taken_off_after_merging_the_update_stays():
    model, x = carrier(), images()
    before = logits(model, x)
    merge(model)
    detach(model)
    assert not adapters_of(model)
    np.testing.assert_allclose(logits(model, x), before, atol=2e-5)


def test_one_scaling_may_serve_all_layers():
    model = network()
    attach(model, adapters(model, SOME), 0.25)
    assert scalings_of(model) == dict.fromkeys(sorted(SOME, key=PATHS.index), 0.25)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head", ["head"]),
        ("all", list(PATHS)),
        ("attention/(query|value)", [f"blocks/{b}/attention/{name}" for b in (0, 1) for name in ("query", "value")]),
        ("blocks/1/mlp/up", ["blocks/1/mlp/up"]),
        ("blocks/[01]/mlp/.*", [f"blocks/{b}/mlp/{name}" for b in (0, 1) for name in ("down", "up")]),
        ("up|head", ["blocks/0/mlp/up", "blocks/1/mlp/up", "head"]),
        (".*", list(PATHS)),
    ],
)
def test_a_pattern_matches_the_end_of_a_path_from_a_slash_on(pattern, expected):
    assert choose(network(), [Spec(pattern, 2)]) == dict.fromkeys(expected, Spec(pattern, 2))


def test_the_first_spec_that_matches_wins():
    query, attention, rest = Spec("query", 1), Spec("attention/.*", 3, 2.0), Spec("blocks/.*", 16)
    chosen = choose(network(), [query, attention, rest])
    assert [chosen[f"blocks/1/{layer}"] for layer in LAYERS] == [attention, attention, query, attention, rest, rest]
    assert list(chosen) == list(PATHS[:-1])


def test_a_rank_is_held_against_the_layers_that_take_it():
    head, rest = Spec("head", 2), Spec("all", 16)
    assert choose(network(), [head, rest]) == dict.fromkeys(PATHS[:-1], rest) | {"head": head}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            [Spec("heads", 1)],
            "layers must match a layer, such as blocks/1/mlp/down, blocks/1/mlp/up, head, got 'heads'",
        ),
        ([Spec("ead", 1)], "layers must match a layer, such as .*, got 'ead'"),
        ([Spec("mlp", 1)], "layers must match a layer, such as .*, got 'mlp'"),
        ([Spec("norm", 1)], "layers must match a layer, such as .*, got 'norm'"),
        ([Spec("head", 1), Spec("conv", 1)], "layers must match a layer, such as .*, got 'conv'"),
        ([Spec("attention/(query", 1)], r"layers must be a regular expression, got 'attention/\(query': "),
        ([Spec("head", 11)], "rank must lie between 1 and 10 for head, got 11"),
        ([Spec("all", 11)], "rank must lie between 1 and 10 for head, got 11"),
        ([Spec("mlp/up", 17)], "rank must lie between 1 and 16 for blocks/0/mlp/up, got 17"),
        ([Spec("head", 0)], "rank must lie between 1 and 10 for head, got 0"),
    ],
)
def test_a_spec_that_cannot_be_is_named(specs, message):
    with pytest.raises(InputError, match=message) as caught:
        choose(network(), specs)
    assert "\n" not in str(caught.value)


def test_adapters_go_on_linear_layers_without_one_and_fit():
    model = network()
    drawn = adapters(model, SOME)
    with pytest.raises(
        InputError, match=r"adapters must name layers of the model, blocks/0/.*, head, got blocks/2/mlp/up"
    ):
        attach(model, {"blocks/2/mlp/up": drawn["head"]})
    with pytest.raises(InputError, match=r"shapes \(rank, 16\) and \(10, rank\), got \(2, 32\) and \(16, 2\)"):
        attach(model, {"head": drawn["blocks/1/mlp/down"]})
    with pytest.raises(InputError, match=r"shapes \(rank, 16\) and \(10, rank\), got \(2, 16\) and \(10, 1\)"):
        attach(model, {"head": Adapter(drawn["head"].a, drawn["head"].b[:, :1])})
    attach(model, {"head": drawn["head"]})
    with pytest.raises(InputError, match="head must have no adapter yet, got one that has"):
        attach(model, {"head": drawn["head"]})


def test_on_query_and_value_of_vit_base_lora_has_2_l_d_r_parameters():
    """Section 5.1 of Hu et al. (arXiv 2106.09685), with L = 24 adapted matrices of d = 768: 0.3 million at rank 8."""
    model = shapes(CONFIGS["vit-base"])
    chosen, layers = choose(model, [Spec("attention/(query|value)", 8)]), linear_layers(model)
    count = sum(spec.rank * (layers[path].in_features + layers[path].out_features) for path, spec in chosen.items())
    assert count == 2 * 24 * 768 * 8 == 294_912


def test_only_the_factors_are_trained_and_in_single_precision_where_products_are_rounded():
    config = dataclasses.replace(CONFIG, depth=0)
    model = network(config, dtype=jnp.bfloat16)
    attach(model, adapters(model, ["head"]))
    trained = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    assert {path for path, _ in trained} == {("head", "a"), ("head", "b")}
    assert {factor.dtype for factor in model.head.adapter} == {jnp.dtype(jnp.float32)}
    assert model.head(jnp.ones((1, 16), jnp.bfloat16)).dtype == jnp.bfloat16
