"""Arrays in other clothes, in memory and in files: the right numbers, or one line; and nobody else owns them."""

import io
import json
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest

from lora_flow import (
    Adapter,
    DeepLinear,
    Diagonal,
    Factorization,
    InputError,
    LinearNetwork,
    Offset,
    Regression,
    SingleLayer,
    SoftmaxRegression,
    aligned_problem,
    canonical,
    load_problem,
)
from lora_flow.adapter import as_start

M = np.asarray([[1.0, -2.0, 3.0], [0.0, 4.0, 5.0], [6.0, 1.0, -7.0]])  # exact in every type here
EYE = np.eye(3)

CONSTRUCTORS = {
    "Factorization w1": lambda x: Factorization(x, EYE, EYE).w1,
    "Factorization w2": lambda x: Factorization(EYE, x, EYE).w2,
    "Factorization shift": lambda x: Factorization(EYE, EYE, x).shift,
    "Factorization target": lambda x: Factorization(EYE, EYE, target=x).shift + EYE,
    "SingleLayer shift": lambda x: SingleLayer(x).shift,
    "SingleLayer weight": lambda x: SingleLayer(EYE, weight=x).weight,
    "Regression inputs": lambda x: Regression(x, EYE).features * np.sqrt(3),
    "Regression shift": lambda x: Regression(EYE, x).shift,
    "Regression weight": lambda x: Regression(EYE, EYE, x).weight,
    "SoftmaxRegression inputs": lambda x: SoftmaxRegression(x, [0, 1, 2], EYE).inputs,
    "SoftmaxRegression weight": lambda x: SoftmaxRegression(EYE, [0, 1, 2], x).weight,
    "DeepLinear weights[0]": lambda x: DeepLinear([x, EYE], EYE).weights[0],
    "DeepLinear shift": lambda x: DeepLinear([EYE, EYE], x).shift,
    "LinearNetwork targets": lambda x: LinearNetwork(x).solution,
    "LinearNetwork inputs": lambda x: LinearNetwork(EYE, x).features,
    "Diagonal values": lambda x: Diagonal(x[0], (3, 3)).values,
    "adapters[0].a": lambda x: as_start("adapters", (Adapter(x, EYE),), ((3, 3),))[0].a,
    "adapters[0].b": lambda x: as_start("adapters", (Adapter(EYE, x),), ((3, 3),))[0].b,
    "Offset start[0].a": lambda x: Offset(SingleLayer(EYE), (Adapter(x, EYE),)).start[0].a,
}


class Tensor:
    """What a PyTorch parameter does: refuses NumPy until it is off its graph and its device."""

    def __init__(self, values, kind="float64", graph=True, device="cuda"):
        self.values, self.kind, self.graph, self.device = np.asarray(values), kind, graph, device

    def detach(self):
        return Tensor(self.values, self.kind, False, self.device)

    def cpu(self):
        return Tensor(self.values, self.kind, self.graph, "cpu")

    def float(self):
        return Tensor(self.values.astype(np.float32), "float32", self.graph, self.device)

    def __getitem__(self, index):
        return Tensor(self.values[index], self.kind, self.graph, self.device)

    def __array__(self, dtype=None, copy=None):
        if self.graph:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.device != "cpu" or self.kind == "bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


GOOD = {
    "list": np.ndarray.tolist,
    "int8": lambda x: x.astype(np.int8),
    "uint64": lambda x: np.abs(x).astype(np.uint64),
    "float16": lambda x: x.astype(np.float16),
    "big-endian": lambda x: x.astype(">f4"),
    "longdouble": lambda x: x.astype(np.longdouble),
    "bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "Fortran order": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "read-only": read_only,
    "matrix": lambda x: np.asmatrix(x),
    "nothing masked": lambda x: np.ma.masked_array(x, mask=False),
    "jax": jnp.asarray,
    "jax bfloat16": lambda x: jnp.asarray(x, jnp.bfloat16),
    "parameter": Tensor,
    "bfloat16 parameter": lambda x: Tensor(x, "bfloat16"),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("clothes", GOOD)
@pytest.mark.parametrize("where", ["Factorization w1", "adapters[0].a", "Diagonal values"])
def test_numbers_are_taken_in_whatever_clothes(where, clothes):
    given = np.abs(M) if clothes == "uint64" else M
    if where == "Diagonal values" and clothes in ("list", "matrix"):
        pytest.skip("the row of a matrix or a list is another thing")
    taken = CONSTRUCTORS[where](GOOD[clothes](given))
    np.testing.assert_array_equal(taken, given[0] if where == "Diagonal values" else given)
    if where != "Diagonal values":
        assert taken.dtype == jnp.float64


BAD = {
    "masked": (np.ma.masked_array(M, mask=M == 3), "an array with masked entries"),
    "bool": (M > 0, "entries of type bool"),
    "complex": (M + 0j, "complex ones"),
    "timedelta": (M.astype("m8[s]"), r"entries of type timedelta64\[s\]"),
    "datetime": (M.astype("M8[s]"), r"entries of type datetime64\[s\]"),
    "text": (M.astype(str), "entries of type <U32"),
    "bytes": (M.astype(bytes), r"entries of type \|S32"),
    "object": (M.astype(object), "entries of type object"),
    "record": (np.zeros((3, 3), [("x", float)]), r"entries of type \[\('x'"),
}


@pytest.mark.parametrize("where", CONSTRUCTORS)
@pytest.mark.parametrize("clothes", BAD)
def test_what_is_no_real_number_is_refused_by_name_everywhere(where, clothes):
    value, got = BAD[clothes]
    with pytest.raises(InputError, match=rf"^{where.split()[-1].replace('[', '.')[:4]}.* must .*numbers, got {got}"):
        CONSTRUCTORS[where](value)


@pytest.mark.parametrize("value", [None, "text", {1: 2}, [[1.0], [2.0, 3.0]], [[True, False]], 1j, object()])
def test_things_that_are_no_arrays_are_refused(value):
    with pytest.raises(InputError, match=r"^w1 must be a matrix"):
        Factorization(value, EYE, EYE)


def test_labels_and_scalings_are_numbers_too():
    with pytest.raises(InputError, match="labels must be integers from 0 to 2, got entries of type timedelta64"):
        SoftmaxRegression(EYE, np.asarray([0, 1, 2], "m8[s]"), EYE)
    with pytest.raises(InputError, match="labels must be integers from 0 to 2, got entries of type bool"):
        SoftmaxRegression(EYE, np.asarray([True, False, True]), EYE)
    with pytest.raises(InputError, match="scaling must be one number, got bool"):
        SingleLayer(EYE, scaling=True)
    with pytest.raises(InputError, match="scaling must be one number, got str"):
        SingleLayer(EYE, scaling="2")
    assert SoftmaxRegression(EYE, np.asarray([2, 1, 0], ">i2"), EYE).labels.tolist() == [2, 1, 0]


def aligned_copy(x):
    """An array that JAX would use where it lies: at a multiple of 64 bytes."""
    room = np.empty(x.size + 16)
    first = -(room.ctypes.data // 8) % 8
    out = room[first : first + x.size].reshape(x.shape)
    out[...] = x
    return out


@pytest.mark.parametrize("where", CONSTRUCTORS)
def test_nobody_else_owns_a_problem_s_arrays(where):
    mine = aligned_copy(M)
    taken = CONSTRUCTORS[where](mine)
    before = np.array(taken)
    mine[...] = 9.0
    np.testing.assert_array_equal(taken, before)


def test_labels_are_a_copy():
    labels = np.arange(3)
    problem = SoftmaxRegression(EYE, labels, EYE)
    labels[:] = 0
    assert problem.labels.tolist() == [0, 1, 2]


def test_numbers_beyond_the_type_in_use_are_told():
    with jax.enable_x64(False), pytest.raises(InputError, match=r"shift must be finite in float32, got 1 entries"):
        Factorization(EYE, EYE, np.diag([1e300, 1.0, 1.0]))
    with pytest.raises(InputError, match=r"shift must be finite in float64, got 1 entries beyond 1.8e\+308"):
        Factorization(EYE, EYE, np.diag(np.asarray(["1e400", "1", "1"]).astype(np.longdouble)))


def test_traced_arrays_and_lists_of_them_pass():
    def loss(x):
        rows = [[x, 0.0, 1.0], [0.0, x, 0.0], [0.0, 0.0, 1.0]]
        return jnp.sum(Factorization(rows, EYE, EYE).w1 ** 2) + jnp.sum(SingleLayer(x * EYE, scaling=x).shift ** 2)

    assert jax.jit(jax.grad(loss))(3.0) == pytest.approx(2 * 2 * 3 + 2 * 3 * 3)


def npz(path, **members):
    """An archive written by hand: members are bytes of a `.npy` file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array, **how):
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def declared(shape, content=b"", dtype="<f8"):
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


GOOD_FILE = {name: npy(EYE) for name in ("w1", "w2", "shift")}


@pytest.mark.parametrize("kind", ["<i1", "<f2", ">f8", "<f8"])
def test_files_of_any_real_type_are_read(tmp_path, kind):
    path = npz(tmp_path / "a.npz", **GOOD_FILE | {"w1": npy(np.asfortranarray(M.astype(kind)))})
    np.testing.assert_array_equal(load_problem(path).w1, M)


@pytest.mark.parametrize(
    ("member", "got"),
    [
        (npy(EYE.astype("m8[s]")), r"w1 must be a matrix of real numbers, got entries of type timedelta64\[s\]"),
        (npy(EYE > 0), "w1 must be a matrix of real numbers, got entries of type bool"),
        (npy(EYE + 0j), "w1 must be a matrix of real numbers, got complex ones"),
        (npy(EYE.astype("U3")), "w1 must be a matrix of real numbers, got entries of type <U3"),
        (npy(np.asarray([[Bomb()]], object), allow_pickle=True), "w1 in '.*' must hold real numbers, got .* object"),
        (pickle.dumps(Bomb()), "problem must be a readable .npz file"),
        (b"", "problem must be a readable .npz file"),
        (npy(EYE)[:-1], "w1 in '.*' must hold 72 bytes, as its shape .* say, got 71"),
        (npy(EYE) + b"more", "w1 in '.*' must hold 72 bytes, .* got 76"),
        (declared((10**6, 10**6)), "w1 in '.*' must hold 8000000000000 bytes, .* got 0"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1), "w1 in '.*' must have a header of at most 65536 bytes"),
    ],
)
def test_damaged_members_are_refused_in_one_line(tmp_path, member, got, capsys):
    path = npz(tmp_path / "a.npz", **GOOD_FILE | {"w1": member})
    with pytest.raises(InputError, match=got) as error:
        load_problem(path)
    assert "\n" not in str(error.value)
    assert "unpickled" not in capsys.readouterr().out


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    npz(path, **GOOD_FILE)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("shift.npy", npy(M))
    with pytest.raises(InputError, match="must hold shift once, got 2 of that name"):
        load_problem(path)
    entry = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    header = ", ".join(f'"{name}": {json.dumps(entry)}' for name in ("w1", "w2", "shift", "w1")).join("{}").encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0))
    with pytest.raises(InputError, match="must hold w1 once, got 2 of that name"):
        load_problem(path)


def test_files_that_do_not_fit_are_refused_before_they_are_read(tmp_path):
    """An archive of 100 kB that stands for 100 MB, with that memory not there; a header of 40 GB."""
    bomb = declared((3500, 3500), bytes(3500 * 3500 * 8))
    path = npz(tmp_path / "a.npz", **GOOD_FILE | {"w1": bomb})
    assert path.stat().st_size < 200_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_flow.runtime.memory.free", lambda: 1e8)
        patch.setattr("numpy.lib.format.read_array", lambda *_, **__: pytest.fail("was read"))
        must = "must be small enough for the 100 MB of memory that are free, got arrays of 98 MB, which takes 294 MB"
        with pytest.raises(InputError, match=must):
            load_problem(path)
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 40_000_000_000) + b"{")
        file.truncate(41_000_000_000)  # of nothing: it takes no room
    with pytest.raises(InputError, match="must have a header of at most 65536 bytes, got 40000000000"):
        load_problem(path)


@pytest.mark.parametrize("clothes", ["parameter", "bfloat16", "integers"])
def test_tensors_of_pytorch(clothes):
    torch = pytest.importorskip("torch")
    made = {
        "parameter": lambda: torch.nn.Parameter(torch.tensor(M)),
        "bfloat16": lambda: torch.nn.Parameter(torch.tensor(M, dtype=torch.bfloat16)),
        "integers": lambda: torch.tensor(M.astype(int)),
    }[clothes]()
    for where in ("Factorization shift", "adapters[0].b", "DeepLinear shift"):
        np.testing.assert_array_equal(CONSTRUCTORS[where](made), M)
    with torch.no_grad():
        problem = SingleLayer(made)
        made.zero_()
    np.testing.assert_array_equal(problem.shift, M)
    tensor = torch.tensor(M)
    for wrong in (tensor > 0, tensor + 0j, tensor.to_sparse(), tensor.to("meta")):
        with pytest.raises(InputError, match=r"^shift must be a matrix of real numbers, got "):
            SingleLayer(wrong)


SIZES = [1e-300, 1e-200, 1e-100, 1e100, 1e200, 1e300]


@pytest.mark.parametrize("size", SIZES)
def test_scales_whose_squares_cannot_be_held_are_refused_in_one_line(size):
    """A loss is a sum of squares, its rates are products: 1e-200 had been a LinAlgError, 1e200 "nothing to learn"."""
    told = "have no entry above 1.2e\\+77 in size" if size > 1 else "have an entry of at least 1.2e-77 in size"
    for make in (
        lambda: aligned_problem(jax.random.key(0), m=3, n=3, h=3, shift_scale=size),
        lambda: Factorization(EYE, EYE, size * EYE),
        lambda: Factorization(EYE, EYE, Diagonal(np.asarray([size]), (3, 3))),
        lambda: SingleLayer(size * EYE),
        lambda: DeepLinear([EYE], size * EYE),
        lambda: LinearNetwork(size * EYE),
    ):
        with pytest.raises(InputError, match=rf"^(shift|targets) must {told}, .* in float64"):
            make()
    for name in ("w1", "w2"):
        weights = {"w1": EYE, "w2": EYE} | {name: size * EYE}
        if size > 1:
            with pytest.raises(InputError, match=f"^{name} must {told}"):
                Factorization(**weights, shift=EYE)
        else:  # a weight may be as small as it likes, or zero
            problem = Factorization(**weights, shift=EYE)
            assert str(problem)
            assert np.isfinite(np.asarray(canonical(problem, rank=1).problem.w1)).all()


@pytest.mark.parametrize("exponent", [-70, 70])
def test_canonical_coordinates_know_no_scale(exponent):
    """The same frames and ranks whatever the shift's unit."""
    rng = np.random.default_rng(0)
    w1, w2, shift = rng.normal(size=(4, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 3))
    unit = canonical(Factorization(w1, w2, shift), rank=1).problem
    scaled = canonical(Factorization(w1, w2, 2.0**exponent * shift), rank=1).problem
    np.testing.assert_allclose(np.asarray(scaled.shift) / 2.0**exponent, unit.shift, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(scaled.w1, unit.w1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        *[("delta_w", one) for one in ("a", None, 1j, True, [1.0, 2.0], -1.0, float("nan"))],
        *[("shift_scale", one) for one in ("5", None, 1j, [True], -1.0, [1.0, 2.0])],
        *[("m", 2.5), ("h", "3"), ("n", True), ("m", 0)],
        *[("spectrum", one) for one in ((1.0,), "ab", 3.0, (1.0, 2.0))],
    ],
)
def test_numbers_of_a_draw_are_checked_by_name(number, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    with pytest.raises(InputError, match=rf"^{number} must "):
        aligned_problem(jax.random.key(0), **{"m": 3, "n": 3, "h": 3} | {number: value})


def test_numbers_of_a_draw_may_be_numpy_s(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    problem = aligned_problem(
        jax.random.key(0), m=np.int64(3), n=3, h=np.int32(3), delta_w=np.float32(0.25), shift_scale=jnp.asarray(2.0)
    )
    assert problem.spectrum()["delta_w"] == pytest.approx(0.25, rel=1e-12)
    assert problem.spectrum()["sigma_shift"] == pytest.approx([2.0])


@pytest.mark.parametrize("gap", [1e-9, 1e-14])
def test_the_tolerance_decides_what_dependent_inputs_are(gap):
    """Two columns that differ by `gap`: of rank 2, with W* of size 1/gap, or of rank 1, with the mean of both."""
    x = np.asarray([[1.0, 1.0], [1.0, 1.0], [0.0, gap]])
    y = np.asarray([[1.0], [1.0], [1.0]])
    coarse, fine = LinearNetwork(y, x, tolerance=1e-6), LinearNetwork(y, x, tolerance=1e-15)
    assert (coarse.basis.shape[1], fine.basis) == (1, None)
    np.testing.assert_allclose(coarse.solution, [[0.5], [0.5]], rtol=1e-6)
    assert float(coarse.least_loss) == pytest.approx(0.5, rel=1e-6)  # what the third sample asks for
    assert float(fine.least_loss) < 1e-2 * float(coarse.least_loss)
    assert "rank 1" in str(coarse)
    assert "rank 2" in str(fine)
    same = LinearNetwork(y, x)  # by default, above 10 max(shape) eps = 6.7e-15 of the largest
    assert (same.basis is None) == (gap > 1e-13)
    for wrong in (0.0, 1.0, np.nan):
        with pytest.raises(InputError, match="tolerance must lie between 0 and 1"):
            LinearNetwork(y, x, tolerance=wrong)
