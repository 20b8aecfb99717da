import marimo

app = marimo.App(app_title="Reproduce Figure 1")


@app.cell
def _(mo):
    mo.md("""
    # Reproduce Figure 1

    LoRA's adapters align with the task while they are small, and the loss then falls to a level that alpha sets. This
    notebook makes the paper's Figure 1 from nothing but a problem and a sweep, and holds the end of its curves against
    the published ones.
    """)
    return


@app.cell
def _():
    import jax
    import marimo as mo

    jax.config.update("jax_enable_x64", True)  # losses fall by 26 decades

    from lora_flow import aligned_problem, sweep
    from lora_flow.figures import three_panels

    return aligned_problem, jax, mo, sweep, three_panels


@app.cell
def _(mo):
    mo.md("""
    ## The problem

    Two frozen layers of width 100, and a shift of rank one along the top singular pair of their product. `delta_w` is
    the ratio of the two layers' gains: below 1 the first layer's adapter does the work.
    """)
    return


@app.cell
def _(aligned_problem, jax):
    problem = aligned_problem(jax.random.key(0), delta_w=1 / 1.05**2, shift_scale=5.0, component="top")
    problem
    return (problem,)


@app.cell
def _(mo):
    mo.md("""
    ## The runs

    Two starts, three alphas and thirty seeds are 180 runs of one compiled program. `side="B"` draws B at random and
    leaves A zero. The paper's text has it the other way round, but only this reproduces its figures.
    """)
    return


@app.cell
def _(problem, sweep):
    dataset = sweep(
        problem,
        init=("gaussian", "spectral"),
        side="B",
        alpha=(1e-3, 1e-4, 1e-5),
        rank=4,
        seeds=30,
        t1=5.0,
        saves=201,
        progress=False,
    )
    return (dataset,)


@app.cell
def _(dataset, three_panels):
    figure = three_panels(dataset.isel(rank=0), alignment_until=1.1)
    figure
    return (figure,)


@app.cell
def _(mo):
    mo.md("""
    Solid lines are random starts, dashed ones spectral starts: medians over the seeds, with bands from quartile to
    quartile. After a random start the loss stops, four decades lower for each decade of alpha. After a spectral start
    it falls until double precision ends.

    ## Beside the paper

    Means of the logarithms over the seeds, at the ends of the paper's panels. The published values were read off its
    figure, and are right to about 0.05.
    """)
    return


@app.cell
def _(dataset):
    import numpy as np
    import pandas as pd

    gaussian = dataset.sel(init="gaussian").isel(rank=0)
    alignment = np.log10(gaussian["alignment_error"].sel(time=1.1, method="nearest")).mean("seed")
    loss = np.log10(gaussian["loss"].isel(time=-1)).mean("seed")
    beside = pd.DataFrame(
        {
            "log10(1 - cos) at t = 1.1": alignment.values,
            "published": [-4.75, -6.75, -8.74],
            "log10 loss at t = 5": loss.values,
            "published ": [-12.56, -16.39, -20.23],
        },
        index=pd.Index([f"{alpha:g}" for alpha in dataset["alpha"].values], name="alpha"),
    ).round(2)
    beside
    return (beside,)


@app.cell
def _(mo):
    mo.md("""
    The alignment agrees to 0.1 decades. The losses agree to half a decade: they depend on the middle of the weights'
    spectrum, of which the paper gives the range alone.
    """)
    return


if __name__ == "__main__":
    app.run()
