import marimo

app = marimo.App(app_title="A target of your own")


@app.cell
def _(mo):
    mo.md("""
    # A target of your own

    Any two weights and a change that fine-tuning must learn make a problem. Here the matrices are random, and nothing
    is aligned with anything; put your own in their place. The question: which rank and which start reach a tenth and a
    hundredth of the loss first?
    """)
    return


@app.cell
def _():
    import jax
    import marimo as mo
    import numpy as np

    jax.config.update("jax_enable_x64", True)

    from lora_flow import Factorization, save_times, sweep, time_to

    return Factorization, mo, np, save_times, sweep, time_to


@app.cell
def _(Factorization, np):
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(30, 20)) / np.sqrt(20), rng.normal(size=(15, 30)) / np.sqrt(30)
    shift = rng.normal(size=(15, 3)) @ rng.normal(size=(3, 20)) / np.sqrt(60)
    problem = Factorization(w1=w1, w2=w2, shift=shift)
    problem
    return (problem,)


@app.cell
def _(mo):
    mo.md("""
    The shift has rank 3. Whatever the rank of the adapters, the directions in which the frozen weights are weak come
    last, so the sweep is saved at equal ratios of time.
    """)
    return


@app.cell
def _(problem, save_times, sweep):
    dataset = sweep(
        problem,
        init=("gaussian", "lora-one"),
        alpha=(1e-3, 1e-1),
        rank=(1, 3, 6),
        seeds=4,
        t1=30.0,
        saves=save_times(30.0, 101, "log"),
        solver="Tsit5",  # compiles sooner than "auto", which is faster on long stiff runs
        progress=False,
    )
    return (dataset,)


@app.cell
def _(mo):
    alpha = mo.ui.dropdown({"0.001": 1e-3, "0.1": 1e-1}, value="0.1", label="alpha")
    alpha
    return (alpha,)


@app.cell
def _(alpha, dataset):
    from lora_flow.figures.maps import families

    members = {rank: dataset.sel(rank=rank, alpha=alpha.value) for rank in dataset["rank"].values}
    figure = families([(f"alpha = {alpha.value:g}", "rank", members)])
    figure.axes[1].set_ylim(1e-6, 2)
    figure
    return (figure,)


@app.cell
def _(mo):
    mo.md("""
    Medians over the seeds, with bands from quartile to quartile. With rank 1 two adapters of rank one learn at most two
    of the three directions, and the loss stops. On the right, how far the first adapter is from the direction that it
    aligns with while it is small. LoRA-One starts along it, and leaves it as the task changes. A random start of this
    size does not come near it.

    ## Times

    The time at which the median seed reaches a tenth and a hundredth of the first loss, at the larger alpha.
    """)
    return


@app.cell
def _(dataset):
    import pandas as pd

    large = dataset.sel(alpha=1e-1)
    return large, pd


@app.cell
def _(large, pd, problem, time_to):
    from lora_flow import zero_adapters

    first = float(problem.loss(zero_adapters(problem.layers, 1)))
    times = {
        f"to L(0)/{factor}": time_to(large["loss"], first / factor).median("seed").squeeze().to_series()
        for factor in (10, 100)
    }
    table = pd.DataFrame(times).round(1)
    table
    return (table,)


@app.cell
def _(mo):
    mo.md("""
    `inf` says that the level is not reached by t = 30. The same from the shell, with the arrays saved by
    `np.savez("target.npz", w1=w1, w2=w2, shift=shift)`:

    ```sh
    lora-flow sweep --problem target.npz --init gaussian lora-one --alpha 1e-3 1e-1 --rank 1 3 6 --seeds 4 \\
        --t1 30 --spacing log --solver Tsit5 --out runs/mine
    ```
    """)
    return


if __name__ == "__main__":
    app.run()
