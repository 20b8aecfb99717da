"""The one way in for arrays of any library: real numbers only, and a copy that nobody else owns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lora_flow.checks import InputError, concrete, kind, listed, require

AnyArray = Any  # whatever `numbers` takes


def require_key(key: Any) -> None:
    """Raise unless it is one key of `jax.random`, of either kind."""
    new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    old = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32 and key.ndim == 1
    require(new or old, "key", "be one random key, as jax.random.key(0) makes it", kind(key))


def numbers(name: str, value: Any, what: str = "hold real numbers") -> np.ndarray | Array:
    """The value as an array of real numbers, of its own type: a copy, or one of JAX's, which do not change.

    Integers and floating-point numbers of any size, byte order and layout, bfloat16 among them; sequences of them; what
    JAX traces; and tensors of other libraries, off their graph and their device (which is asked of the object, by
    `detach` and `cpu`: nothing is imported). Refused are truth values, complex numbers, dates and times, text, objects,
    and masked arrays with anything masked: what stands there is no number.

    **Raises:** `InputError("<name> must <what>, got ...")`.
    """
    if isinstance(value, np.ma.MaskedArray):
        require(not np.ma.getmaskarray(value).any(), name, what, "an array with masked entries")
    array = value if isinstance(value, jax.Array) else _as_numpy(name, value, what)
    dtype = array.dtype
    require(not jnp.issubdtype(dtype, jnp.complexfloating), name, what, "complex ones")
    real = any(jnp.issubdtype(dtype, one) for one in (jnp.integer, jnp.floating)) and dtype.kind != "m"
    require(real, name, what, type(value).__name__ if array.ndim == 0 else f"entries of type {dtype}")
    return array


def real_array(name: str, value: Any, what: str = "hold real numbers") -> Array:
    """The same in JAX's default floating-point type.

    **Raises:** `InputError` as `numbers` does, and for finite entries that this type does not hold.
    """
    array, dtype = numbers(name, value, what), jnp.result_type(float)
    if isinstance(array, jax.Array):
        return array.astype(dtype)
    with np.errstate(over="ignore", under="ignore"):
        converted = array.astype(dtype)
    beyond = int(np.sum(np.isinf(converted)) - np.sum(np.isinf(array)))
    require(beyond == 0, name, f"be finite in {dtype}", f"{beyond} entries beyond {float(jnp.finfo(dtype).max):.2g}")
    return jax.device_put(converted)  # by jnp.asarray, a program would be compiled for each shape


def as_labels(labels: AnyArray, classes: int) -> Int[Array, " count"]:
    """Labels of classes, as losses take them; a fraction, or a class that is not there, would count as another one.

    **Raises:** `InputError` unless they are a vector of integers from 0 to below `classes`, none of them masked.
    """
    must = f"be integers from 0 to {classes - 1}"
    array = numbers("labels", labels, must)
    whole = array.ndim == 1 and (jnp.issubdtype(array.dtype, jnp.integer) or array.size == 0)
    require(whole, "labels", must, f"{array.dtype} of shape {array.shape}")
    known = concrete(array)
    inside = known is None or known.size == 0 or (known.min() >= 0 and known.max() < classes)
    require(inside, "labels", must, None if known is None or not known.size else f"{known.min()} to {known.max()}")
    return jnp.asarray(array, jnp.int32)


def _as_numpy(name: str, value: Any, what: str) -> np.ndarray | Array:
    """A copy of its own."""
    try:
        if any(isinstance(one, jax.core.Tracer) for one in listed(value)):
            return jnp.asarray(value)
        array = np.array(_detached(value), copy=True, subok=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    except Exception as error:  # whatever other libraries raise of what they cannot hand over, and ragged lists
        raise InputError(f"{name} must {what}, got {type(value).__name__}") from error


def _detached(value: Any) -> Any:
    """A tensor without its graph and in main memory; a type that NumPy does not know widened, as bfloat16 is."""
    if not (callable(getattr(value, "detach", None)) and callable(getattr(value, "cpu", None))):
        return value
    value = value.detach().cpu()
    try:
        return np.asarray(value)
    except TypeError:
        return np.asarray(value.float())
