"""LoRA+ under an optimiser against PEFT's own: torch's optimisers with PEFT's two learning rates, step by step."""

import jax
import numpy as np
import optax
import pytest

from lora_flow import SingleLayer, descend, gaussian_init

RANK, RATIO, STEPS = 2, 16.0, 12
OPTIMISERS = {
    "adam": ("Adam", optax.adam, 1e-2),
    "sgd": ("SGD", optax.sgd, 1e-3),
    "adamw": ("AdamW", lambda rate: optax.adamw(rate, weight_decay=0.0), 1e-2),
}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Here and not above, where every worker would wait for them though one runs this file."""
    global torch, peft, optimizers
    torch, peft, optimizers = map(pytest.importorskip, ("torch", "peft", "peft.optimizers"))


def theirs(shift, start, optimiser, rate):
    """Losses 1/2 ||W + B A - Y||^2 before each step, and the factors after the last, in double precision."""
    n_out, n_in = shift.shape
    model = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    model = peft.get_peft_model(model, config).double()
    layer = model.base_model.model[0]
    target = layer.base_layer.weight.detach() + torch.from_numpy(shift)
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    with torch.no_grad():
        for factor, drawn in zip((a, b), start, strict=True):
            factor.copy_(torch.from_numpy(np.array(drawn)))
    kind = getattr(torch.optim, optimiser)
    training = optimizers.create_loraplus_optimizer(model, kind, lr=rate, loraplus_lr_ratio=RATIO)
    losses = []
    for _ in range(STEPS):
        training.zero_grad()
        loss = 0.5 * torch.sum((model(torch.eye(n_in, dtype=torch.float64)).T - target) ** 2)
        loss.backward()
        training.step()
        losses.append(float(loss.detach()))
    return np.array(losses), a.detach().numpy(), b.detach().numpy()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_lora_plus_is_pefts(name):
    """And not the optimiser with one rate, which is elsewhere by then."""
    their_kind, our_kind, rate = OPTIMISERS[name]
    shift = np.random.default_rng(0).standard_normal((4, 5))
    problem = SingleLayer(shift)
    start = gaussian_init(jax.random.key(1), problem, rank=RANK, alpha=0.5)
    losses, a, b = theirs(shift, start[0], their_kind, rate)
    how = {"steps": STEPS, "step": our_kind(rate), "saves": STEPS + 1}
    run = descend(problem, start, flow=f"lora-plus:{RATIO:g}", **how)
    np.testing.assert_allclose(run.observables["loss"][:-1], losses, rtol=1e-7)
    np.testing.assert_allclose(run.adapters[0].a, a, rtol=0, atol=1e-7)
    np.testing.assert_allclose(run.adapters[0].b, b, rtol=0, atol=1e-7)
    plain = descend(problem, start, **how)
    assert abs(plain.observables["loss"][-2] / losses[-1] - 1) > 1e-3
