import marimo

app = marimo.App(app_title="Sensitivities")


@app.cell
def _(mo):
    mo.md("""
    # Sensitivities

    What decides how long LoRA aligns, and when it begins to learn? `sensitivity` differentiates the run itself. An
    elasticity is the per cent by which a quantity changes for one per cent more of a parameter.
    """)
    return


@app.cell
def _():
    import jax
    import marimo as mo

    jax.config.update("jax_enable_x64", True)

    from lora_flow import aligned_problem, sensitivity

    return aligned_problem, jax, mo, sensitivity


@app.cell
def _(mo):
    mo.md("""
    A function that makes the problem from its parameters lets one ask for those too; here for `delta_w`, the ratio of
    the layers' gains. `alpha` and `shift_scale`, a factor on the whole shift, every problem has.
    """)
    return


@app.cell
def _(aligned_problem, jax):
    def family(delta_w):
        return aligned_problem(jax.random.key(0), m=4, n=4, h=6, delta_w=delta_w)

    return (family,)


@app.cell
def _(family, sensitivity):
    found = sensitivity(
        family,
        parameters={"delta_w": 0.9},
        with_respect_to=("alpha", "delta_w", "shift_scale"),
        observable=("t_align", "t1"),
        alpha=(1e-3, 1e-5),
        rank=1,
        seeds=3,
        t1=2.0,
        progress=False,
    )
    return (found,)


@app.cell
def _(found):
    from lora_flow.figures.elasticities import tornado

    figure = tornado(found)
    figure
    return (figure,)


@app.cell
def _(mo):
    mo.md("""
    Bars are medians over the runs, lines reach from quartile to quartile. One per cent more of the shift makes both
    phases about one per cent shorter: while the adapters are small, everything happens at the rate `sigma sigma_W2`,
    which holds the shift's singular value sigma. The end of alignment does not know alpha. The end of growth does, as
    the logarithm of alpha: by `-1/log(1/alpha)`.
    """)
    return


@app.cell
def _(found):
    import numpy as np

    by_alpha = found["elasticity"].sel(observable="t1", parameter="alpha").median("seed").squeeze()
    table = by_alpha.to_series().to_frame("measured")
    table["predicted"] = -1 / np.log(1 / table.index.values)
    table.round(3)
    return (table,)


if __name__ == "__main__":
    app.run()
