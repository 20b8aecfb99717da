"""`lora-flow peft`: initial adapters for other people's checkpoints, and what becomes of them."""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import TYPE_CHECKING, Annotated

import tyro

from lora_flow.checks import InputError
from lora_flow.cli.groups import Draws
from lora_flow.cli.values import number
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import below, run_path
from lora_flow.storage.swap import write_atomically

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass(frozen=True)
class Init:
    """Write initial LoRA adapters for a checkpoint, by any of the initialisations (lora-flow inits), as a PEFT folder.

    Layers are read one at a time: memory is that of the largest. Every singular pair comes with its residual, in
    start.json, beside sources, digests, sizes and predicted changes. The folder is loaded by

    PeftModel.from_pretrained(model, "start", is_trainable=True)

    A scheme that "changes the frozen weight" (pissa, milora, olora, loram, lora-ga) leaves the checkpoint as it is and
    writes start/offset, a second adapter to be loaded frozen beside the first (lora_flow.bridge.torch.apply_start does
    both); or see lora-flow peft apply, and lora-flow peft convert for the trained adapter.

    The weight's principal part, on queries and values:

    lora-flow peft init --checkpoint model.safetensors --targets 'q_proj|v_proj' --init pissa --rank 16 --out start

    Along the gradient, with the size at which the loss falls by 0.1 to first order:

    lora-flow peft init --checkpoint llama/ --targets '.*_proj' --init lora-one --gradients grads.safetensors
    --loss-change 0.1 --out start

    As many directions in each layer as hold 90 % of the gradient's squared norm, up to 64, but 8 on o_proj:

    lora-flow peft init --checkpoint llama/ --targets '.*_proj' --init spectral --gradients grads.safetensors
    --rank energy:0.9 o_proj=8 --max-rank 64 --out start
    """

    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """A .safetensors file, or a folder with model.safetensors or model.safetensors.index.json."""
    targets: Annotated[str, tyro.conf.arg(metavar="REGEX")]
    """The layers to adapt: matched with the whole name of a module, or with an end of it behind a dot. Linear layers
    and GPT-2's Conv1D are told apart by their biases. A fused layer (c_attn, qkv) is one matrix, as in PEFT."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The folder."""
    init: str = "gaussian"
    """The initialisation, by its name in lora-flow inits."""
    rank: tuple[str, ...] = ("16",)
    """A rank (16); ranks for some layers (q_proj=32); or energy:0.9, in each layer the least rank that holds 90 % of
    the squared norm of the gradient or weight that the start is made of."""
    max_rank: int = 64
    """The most that energy:SHARE may choose."""
    scaling: float = 1.0
    """LoRA's output multiplier s; lora_alpha is s times the rank."""
    size: Annotated[str, tyro.conf.arg(metavar="ALPHA")] = "auto"
    """alpha, which multiplies both factors. auto: 1 for schemes that change the frozen weight; LoRA's own size for
    those with B A = 0; else as --update or --loss-change say."""
    update: float = 1e-2
    """For auto: the largest s ||B A||/||W|| that a start may have which changes the model."""
    loss_change: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: by --update)")
    ] = None
    """For auto, instead of --update: the fall of the loss, to first order."""
    side: str = "A"
    """The random factor of gaussian, A or B; the other is 0."""
    gradients: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A .safetensors file with dL/dW (PyTorch's .grad) by the parameters' names; or thin factors NAME.u, NAME.s and
    NAME.vt of at least twice the rank, as lora_flow.bridge.torch.collect writes."""
    activations: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """For eva and invariant: a .safetensors file with MODULE.inputs (samples, in) or MODULE.covariance (in, in)."""
    names: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A JSON file from the checkpoint's names of modules to the model's, where they differ (those of a ViT in
    transformers 5): lora_flow.bridge.torch.names writes it."""
    base: str = ""
    """The model's name or folder, for PEFT's settings."""
    dtype: str = "float32"
    """The type of the factors: float32, float16 or bfloat16."""
    seed: int = 0
    """The seed of what is drawn; a layer's draws do not depend on which other layers there are."""
    overwrite: bool = False
    """Replace a start that there is."""

    def run(self) -> int:
        start_jax()
        from lora_flow.bridge.init import peft_init

        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        made = peft_init(**told | {"size": self.size if self.size == "auto" else number_of("size", self.size)})
        print(made)
        print(f"PeftModel.from_pretrained(model, {str(made.folder)!r}, is_trainable=True)")
        if made.manifest["offset"]:
            print(f"and frozen beside it: {made.folder / 'offset'} (lora_flow.bridge.torch.apply_start)")
        return 0


@dataclasses.dataclass(frozen=True)
class Apply:
    """Write a copy of a checkpoint from which a start's own update is subtracted, for schemes that change the frozen
    weight.

    On the copy the start's folder is all that PEFT needs, as after PEFT's own pissa. The checkpoint stays as it is. The
    new weights are rounded to the checkpoint's type: in 16 bits the model at the start is the base's only to that
    rounding. The frozen second adapter start/offset has no such error, and needs no copy.

    For example: lora-flow peft apply --start start --checkpoint model.safetensors --out residual
    """

    start: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """A folder of lora-flow peft init."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The checkpoint that the start was made for."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The new folder."""

    def run(self) -> int:
        from lora_flow.bridge.offset import peft_apply

        errors = peft_apply(self.start, self.checkpoint, self.out)
        print(f"{len(errors)} weights less their start's update, in {self.out}")
        print(f"relative rounding error of a new weight: {max(errors.values()):.1e} at the most")
        return 0


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn adapters that were trained from a start which changes the frozen weight into plain LoRA for the untouched
    checkpoint.

    Of twice the rank this is exact: B' = [B, -B_0] and A' = [A; A_0]. With --rank it is the nearest update of that
    rank, and the relative error is told. The folder is loaded as any of PEFT's, and needs neither the start nor the
    second adapter.

    For example: lora-flow peft convert --trained checkpoint-500 --start start --out plain
    """

    trained: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The folder of the trained adapters, as PEFT saved them."""
    start: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The folder of lora-flow peft init that the training started from."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The new folder."""
    rank: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: twice the rank)")] = None
    """The rank of the result."""

    def run(self) -> int:
        from lora_flow.bridge.offset import peft_convert

        errors = peft_convert(self.trained, self.start, self.out, rank=self.rank)
        print(f"plain LoRA for {len(errors)} layers of the untouched checkpoint, in {self.out}")
        if self.rank is not None:
            print(f"relative error of an update by the lower rank: {max(errors.values()):.2g} at the most")
        return 0


@dataclasses.dataclass(frozen=True)
class Observe(Draws):
    """Read a PEFT run back from its checkpoints: when each layer aligns and grows, and whether theory is about it.

    RUN is a folder of checkpoints, as Hugging Face's Trainer writes them: checkpoint-100/adapter_model.safetensors,
    checkpoint-200/..., or any folders whose names end with the step. The answer is a folder with report.md and
    report.html, figures/observed.png, and results.zarr (open it with xarray.open_zarr): alignment, norms, imbalance A
    A^T - B^T B and its drift, singular values, effective rank and phases, by layer and step.

    With nothing else, alignment is that with the last update. With the gradient at the start, it is that with the
    direction in which the loss falls fastest, and the fall of the loss is told to first order:

    lora-flow peft observe runs/llama --initial start --gradients grads.safetensors --out observed

    With the learning rate of plain gradient descent (SGD) the linearised flow B = U sinh(s S t) V^T A(0)^T, with t the
    rate times the steps, predicts when layers align. It holds for small starts and until the loss has fallen by a
    tenth, which --loss tells. What lies beyond, and runs whose A A^T - B^T B drifts as under AdamW, are "not
    predicted":

    lora-flow peft observe runs/llama --initial start --gradients grads.safetensors --lr 0.1 --loss 2.3 --out observed
    """

    run_folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of the checkpoints."""
    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The new folder."""
    initial: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: step 0 of RUN)")] = None
    """The folder that the training started from, of lora-flow peft init or PEFT. Schemes that change the frozen weight
    need it: their update is s (B A - B_0 A_0)."""
    gradients: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """A .safetensors file with dL/dW at the start by the parameters' names, or thin factors, as for lora-flow peft
    init."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: no prediction)")] = None
    """The learning rate of gradient descent."""
    loss: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: not known)")] = None
    """The loss at the start. Predictions end where it has fallen by a tenth, to first order."""
    names: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """A JSON file from the gradients' names of modules to the model's, as for lora-flow peft init."""
    overwrite: bool = False
    """Replace the folder if it holds an observed run."""

    def run(self) -> int:
        from lora_flow.bridge.observed_folder import OBSERVED, store

        OBSERVED.check_free(self.out, self.overwrite)
        own = {"run_folder", "out", "overwrite", "pictures"}
        asked = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in own}
        asked = {name: value for name, value in asked.items() if value is not None}
        with locked(self.out):
            OBSERVED.check_free(self.out, self.overwrite)
            start_jax()
            from lora_flow.bridge.observe import peft_observe

            dataset = peft_observe(self.run_folder, **asked)
            with whole():
                store(self.out, {"run": os.path.abspath(self.run_folder)} | asked, dataset)
            words = [f"--{name} {shlex.quote(str(value))}" for name, value in asked.items()]
            words = [shlex.quote(self.run_folder), *words, "--out", shlex.quote(self.out)]
            tell_observed(self.out, dataset, f"lora-flow peft observe {' '.join(words)}")
        return 0


def tell_observed(out: str, dataset: xr.Dataset, command: str) -> None:
    """Draws an observed run, writes its report and its page, and says what was found."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.bridge.observed_told import observed_told, report
    from lora_flow.figures.observed import observed_figure
    from lora_flow.figures.over_time import save_with_numbers
    from lora_flow.figures.written import picture_lines
    from lora_flow.pages.page import page

    folder, lines = run_path("out", out), observed_told(dataset)
    pictures = save_with_numbers({"observed": observed_figure(dataset)}, folder / "figures")
    text = report(dataset, [below(folder, picture) for picture in pictures])
    write_atomically(folder / "report.md", text)
    write_atomically(folder / "report.html", page(text, folder, settings=dataset.attrs, command=command))
    print(*lines, *picture_lines(pictures), sep="\n")
    print(f"report: {folder / 'report.md'}\npage: {folder / 'report.html'}")


def number_of(name: str, text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise InputError(f"{name} {error}") from None
