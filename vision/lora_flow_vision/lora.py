"""LoRA on the linear layers of a model: the choice of layers, and attaching, merging and removing the adapters.

A layer's weight is W, of shape `(out, in)` as in the papers, the transpose of Flax's kernel. A layer's path is that of
its module: `head`, `blocks/0/attention/query`, `blocks/0/mlp/up`. A pattern is a regular expression that matches the
end of a path from a slash on: `head`, `attention/(query|value)`, `blocks/[01]/mlp/up`; `all` is every linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lora_flow import Adapter
from lora_flow.arrays import numbers
from lora_flow.checks import require
from lora_flow.problems.paths import matches, order

Scaling = float | Array


class Spec(NamedTuple):
    """LoRA of a rank and an output multiplier s (`scaling`) on the layers that match a pattern."""

    pattern: str
    rank: int
    scaling: float = 1.0


class LoRALinear(nnx.Module):
    """A linear layer with an adapter: `x -> W x + bias + s B A x`."""

    def __init__(self, base: nnx.Linear, adapter: Adapter, scaling: Scaling = 1.0):
        adapter = Adapter(*(jnp.asarray(numbers("adapter", factor), base.param_dtype) for factor in adapter))
        shapes = (base.in_features,), (base.out_features,)
        fits = (adapter.a.shape[1:], adapter.b.shape[:1]) == shapes and adapter.a.shape[0] == adapter.b.shape[1]
        expected = f"have shapes (rank, {base.in_features}) and ({base.out_features}, rank)"
        require(fits, "adapter", expected, f"{adapter.a.shape} and {adapter.b.shape}")
        self.base, self.scaling, self.merged = base, scaling, False
        self.a, self.b = map(nnx.LoRAParam, adapter)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = self.base(x)
        if self.merged:
            return y
        a, b = (factor[...].astype(y.dtype) for factor in (self.a, self.b))
        return y + jnp.asarray(self.scaling, y.dtype) * low_rank_product(x.astype(y.dtype), a, b)

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.a[...], self.b[...])

    def fold(self, sign: int) -> None:
        """Adds (1) the adapter to the kernel, or subtracts it (-1)."""
        kernel = self.base.kernel
        kernel[...] = kernel[...] + sign * self.scaling * (self.b[...] @ self.a[...]).T
        self.merged = sign > 0


@jax.custom_vjp
def low_rank_product(
    x: Float[Array, "*batch in"], a: Float[Array, "rank in"], b: Float[Array, "out rank"]
) -> Float[Array, "*batch out"]:
    """B A x. Its derivative takes products in the order that transposes no large matrix.

    Otherwise XLA on CPU transposes the cotangent for B's gradient, and computes everything behind it once more.
    """
    return (x @ a.T) @ b.T


def _forwards(x: Array, a: Array, b: Array) -> tuple[Array, Any]:
    inner = x @ a.T
    return inner @ b.T, (x, inner, a, b)


def _backwards(kept: Any, slope: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = kept
    back = slope @ b
    turned_b = jax.lax.optimization_barrier(_rows(inner).T @ _rows(slope))  # XLA would turn the factors instead
    return back @ a, _rows(back).T @ _rows(x), turned_b.T


def _rows(x: Float[Array, "*batch width"]) -> Float[Array, "count width"]:
    return x.reshape(-1, x.shape[-1])


low_rank_product.defvjp(_forwards, _backwards)


def linear_layers(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Every linear layer by its path, also below an adapter; in the order of the paths' components."""
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            found["/".join(str(part) for part in path if part != "base")] = module
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def choose(model: nnx.Module, specs: Iterable[Spec]) -> dict[str, Spec]:
    """The layers that carry LoRA, each with the first of the specs that it matches.

    **Returns:** path -> `Spec`, in the order of `linear_layers`.

    **Raises:** `InputError` for a spec that matches no layer, a bad pattern, or a rank above a layer's dimensions.
    """
    layers, specs = linear_layers(model), tuple(specs)
    chosen: dict[str, Spec] = {}
    for spec in specs:
        matched = [path for path in layers if matches(spec.pattern, path)]
        require(matched, "layers", f"match a layer, such as {', '.join(list(layers)[-3:])}", repr(spec.pattern))
        for path in matched:
            chosen.setdefault(path, spec)
    for path, spec in chosen.items():
        largest = min(layers[path].in_features, layers[path].out_features)
        require(1 <= spec.rank <= largest, "rank", f"lie between 1 and {largest} for {path}", spec.rank)
    return {path: chosen[path] for path in layers if path in chosen}


def attach(model: nnx.Module, adapters: Mapping[str, Adapter], scaling: Scaling | Mapping[str, Scaling] = 1.0) -> None:
    """Puts adapters on layers, in place; `scaling` is one s for all of them or one for each path.

    **Raises:** `InputError` for a path without a linear layer or with an adapter, or for shapes that do not match.
    """
    layers = linear_layers(model)
    for path, adapter in adapters.items():
        require(path in layers, "adapters", f"name layers of the model, {', '.join(layers)}", path)
        parent, name = _parent(model, path)
        require(isinstance(getattr(parent, name), nnx.Linear), path, "have no adapter yet", "one that has")
        given = not isinstance(scaling, Mapping) or path in scaling
        require(given, "scaling", "be given for every adapter", f"none for {path}")
        s = scaling[path] if isinstance(scaling, Mapping) else scaling
        setattr(parent, name, LoRALinear(layers[path], adapter, s))


def detach(model: nnx.Module) -> dict[str, Adapter]:
    """Removes all adapters, in place; kernels stay as they are, merged or not.

    **Returns:** path -> `Adapter`, A of shape `(rank, in)` and B of shape `(out, rank)`.
    """
    adapters = adapters_of(model)
    for path in adapters:
        parent, name = _parent(model, path)
        setattr(parent, name, getattr(parent, name).base)
    return adapters


def merge(model: nnx.Module) -> None:
    """Adds every adapter to its kernel, in place: the model computes the same, as fast as without adapters."""
    for layer in _carriers(model).values():
        require(not layer.merged, "model", "have adapters that are not merged", "merged ones")
        layer.fold(1)


def unmerge(model: nnx.Module) -> None:
    """Subtracts merged adapters from their kernels again, in place, up to rounding."""
    for layer in _carriers(model).values():
        require(layer.merged, "model", "have merged adapters", "ones that are not")
        layer.fold(-1)


def adapters_of(model: nnx.Module) -> dict[str, Adapter]:
    """The adapters by path."""
    return {path: layer.adapter for path, layer in _carriers(model).items()}


def scalings_of(model: nnx.Module) -> dict[str, float]:
    """The output multipliers s by path."""
    return {path: float(layer.scaling) for path, layer in _carriers(model).items()}


def _carriers(model: nnx.Module) -> dict[str, LoRALinear]:
    found = {
        "/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, LoRALinear)
    }
    return dict(sorted(found.items(), key=lambda item: order(item[0])))


def _parent(model: nnx.Module, path: str) -> tuple[nnx.Module, str]:
    *parts, name = path.split("/")
    for part in parts:
        model = model[int(part)] if part.isdigit() else getattr(model, part)  # type: ignore[index]
    return model, name
