"""The two questions of a report: when a run aligns, and where its loss stops."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from lora_flow import phases
from lora_flow.cli import main
from lora_flow.cli.plot import draw
from lora_flow.figures.over_time import save, three_panels
from lora_flow.results.answers import ENDINGS, OverSeeds, answers, best, endings
from lora_flow.results.predictions import predictions
from lora_flow.results.report import Table, about, final_values, report, unfinished
from lora_flow.results.summary import answered
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.storage.lanes import NOT_RUN
from lora_flow.sweeps.run import load_run, open_runs
from lora_flow.sweeps.schema import label

TIME = np.linspace(0.0, 10.0, 101)
FLOOR = 1e-26
ATTRS = {"t1": 10.0, "solver": "Tsit5", "rtol": 5e-4, "dtype": "float64", "side": "B"}
SHAPES = ("init", "alpha", "rank", "seed")


def made(losses, errors, seeds=1, factorisation=True, **attrs):
    """A result of one initialisation with a loss and an alignment error for every alpha, given as functions of time."""
    shape = (1, len(losses), 1, seeds, len(TIME))
    over_time = {"loss": np.empty(shape), "alignment_error": np.empty(shape)}
    for i, seed in itertools.product(range(len(losses)), range(seeds)):
        over_time["loss"][0, i, 0, seed] = losses[i](TIME) * 2.0**seed
        over_time["alignment_error"][0, i, 0, seed] = errors[i](TIME)
    ones = np.ones(shape)
    over_time |= {"norm_z1": ones, "drift": 0 * ones, "norm_along1": np.exp(TIME) * ones, "norm_across1": 10 * ones}
    lanes = {"rounding_floor": FLOOR, "loss_floor": np.nan, "initial_loss": 1.0, "status": 0, "steps": 7}
    lanes["dead_directions"] = 0
    dtypes = {"status": np.int8, "steps": np.int32, "dead_directions": np.int32}
    coords = {"init": ["gaussian"], "alpha": 10.0 ** -np.arange(len(losses)), "rank": [2], "seed": range(seeds)}
    layers = [4, 5]
    if factorisation:
        layers = [6, 5, 4, 6]
        coords |= {"sigma": 1.0, "sigma_w1": 0.5, "sigma_w2": 1.0, "shift_rank": 1, "aligned": 1}
        over_time |= {f"{name}2": over_time[f"{name}1"] for name in ("norm_along", "norm_across")}
        over_time |= {"alignment_error_2": 0.5 * ones, "overlap_1": 1e-3 * np.exp(2 * TIME) * ones}
        over_time |= {"overlap_2": over_time["overlap_1"], "norm_z2": ones}
    return label(
        xr.Dataset(
            {name: ((*SHAPES, "time"), values) for name, values in over_time.items()}
            | {name: (SHAPES, np.full(shape[:-1], v, dtypes.get(name, float))) for name, v in lanes.items()},
            coords=coords | {"time": TIME},
            attrs={"t1": 10.0, "solver": "Tsit5", "rtol": 5e-4, "dtype": "float64", "layers": layers, "side": "B"}
            | attrs,
        )
    )


def falling(rate):
    return lambda t: np.exp(-rate * t)


def flat(level):
    return lambda t: np.where(t > 1, level, 1.0)


def how_ends(saved, loss, lowest=0.0):
    floor = xr.DataArray(FLOOR)
    how, rate = endings(xr.DataArray(loss, dims="time", coords={"time": saved}), floor, xr.full_like(floor, lowest))
    return ENDINGS[int(how)], float(rate)


@pytest.mark.parametrize(
    ("loss", "lowest", "word", "rate"),
    [
        (np.exp(-2 * TIME), 0.0, "still falling", 2 / np.log(10)),
        (np.full(101, 1e-12), 0.0, "level", 0.0),
        (np.full(101, 1e-3), 1e-3, "lowest possible", 0.0),
        (np.exp(-7 * TIME), 0.0, "at rounding", np.nan),
        (1e-6 * np.exp(TIME), np.nan, "rising", -1 / np.log(10)),
        (1 / (1 + TIME), np.nan, "still falling", np.log10(11 / 10)),
    ],
)
def test_how_a_loss_ends(loss, lowest, word, rate):
    found, by = how_ends(TIME, loss, lowest)
    assert found == word
    assert by == pytest.approx(rate, abs=1e-12, nan_ok=True)


def test_a_rate_does_not_depend_on_which_times_were_saved():
    for saved in (np.array([0.0, 5.0, 10.0]), np.geomspace(1e-4, 10.0, 50), np.linspace(0.0, 10.0, 2000)):
        assert how_ends(saved, np.exp(-2 * saved)) == ("still falling", pytest.approx(2 / np.log(10)))
    assert how_ends([10.0], [1.0])[0] == "level"


def test_a_number_over_seeds():
    """Of what is known 1, 3, 5; a time that is before the first save is reached, and NaN counts as late."""
    found = OverSeeds.of(np.array([5.0, -np.inf, np.nan, 1.0, np.inf, 3.0]))
    assert found == (3.0, 1.0, 5.0, 4, 2.0, 4.0)
    none = OverSeeds.of(np.array([np.nan, np.inf]))
    assert np.isnan(none[:3]).all()
    assert (none.reached, none.middle) == (0, np.inf)
    assert OverSeeds.of(np.zeros(0)).middle == np.inf


def test_answers_are_those_of_the_curves():
    """1 - cos of |t - 4|/10 + 1e-3 is least at t = 4 and within a tenth of a decade of it there alone."""
    there_and_back = lambda t: np.abs(t - 4) / 10 + 1e-3  # noqa: E731
    (cell,) = answers(made([falling(2)], [there_and_back], seeds=3))
    for told, value in ((cell.best, 1e-3), (cell.best_at, 4.0), (cell.error, 0.601), (cell.t_align, np.log(10))):
        np.testing.assert_allclose((told.low, told.median, told.high), value)
    np.testing.assert_allclose((cell.loss.low, cell.loss.median, cell.loss.high), np.exp(-20) * np.array([1, 2, 4]))
    assert cell.ending == "still falling"


def test_the_layer_of_the_larger_gain_is_told_of():
    dataset = made([falling(2)], [flat(1e-8)])
    (first,) = answers(dataset)
    (second,) = answers(dataset.assign_coords(sigma_w1=2.0))
    assert (first.best.median, second.best.median) == (1e-8, 0.5)


def test_the_report_says_which_layer_it_tells_of():
    """The error of layer 1 is 1e-8 in the end, that of layer 2 is 0.5, or log10 -0.30."""
    first = made([falling(2)], [flat(1e-8)])
    second = first.assign_coords(sigma_w1=2.0)
    told = [[*answered(one)[0], answered(one)[1][0].about, final_values(one).about] for one in (first, second)]
    assert "layer" not in told[0][0]
    assert "layer 2 does not align (1 - cos is at least 0.5)" in told[1][0]
    for one, layer in zip(told, (1, 2), strict=True):
        of = f"Z{layer} = [B{layer}; A{layer}^T], of the layer that aligns first"
        assert f"top left singular vector of {of}" in one[-2]
        assert one[-1] == f"The alignment error is that of {of}."
    assert [final_values(one).rows[0][5] for one in (first, second)] == ["-8.00", "-0.30"]
    neither = final_values(first.assign_coords(sigma_w1=first["sigma_w2"])).about
    assert (
        neither
        == "The alignment error is that of Z1 = [B1; A1^T], of the first layer (delta_w = 1: neither is selected)."
    )
    both = xr.concat([first, second], "delta_w", coords="different", compat="equals").transpose("delta_w", ...)
    alignment = answered(both.assign_coords(delta_w=[0.5, 2.0]))[1][0]
    assert alignment.header[:3] == ["delta_w", "layer", "least 1 - cos"]
    assert [row[1:3] for row in alignment.rows] == [["1", "1e-08"], ["2", "0.5"]]


def test_a_drift_is_told_where_something_is_conserved():
    dataset = made([falling(2)], [flat(1e-8)])
    nothing = dataset.assign(drift=np.nan * dataset["drift"])
    unfinished_one = nothing.assign(loss=np.nan * dataset["loss"])
    assert "Integration error (drift of the conserved quantities" in about(dataset)
    assert about(nothing).endswith("The run conserves nothing whose drift would tell an integration error.")
    assert about(unfinished_one).endswith("one seed.")
    failed_one = dataset.assign(loss=dataset["loss"].where(dataset["time"] < 1.0), drift=0 * dataset["drift"])
    assert about(failed_one).endswith("one seed."), "nor where no lane has finished"
    lost = failed_one.assign(alignment_error=np.nan * dataset["alignment_error"])
    assert answered(lost)[1][0] == "## When it aligns\n\nNo lane has finished."


def test_t1_is_defined_in_one_way():
    words = "g^T B1 A1 v first reaches (1 - delta_w) sigma / (4 sigma_W2)"
    dataset = made([falling(2)], [flat(1e-8)])
    docs = Path(__file__).parents[2] / "docs"
    assert words in (docs / "figures.md").read_text()
    assert words in answered(dataset)[1][0].about
    assert words in phases(dataset)["t1"].attrs["comment"]
    formula = words.removeprefix("g^T B1 A1 v first reaches ")
    for text in ((docs / "theory.md").read_text(), phases.__doc__):
        assert f"the first time with g^T B1 A1 v >= {formula}" in text


def test_lanes_that_failed_or_wait_do_not_count():
    dataset = made([falling(2), falling(3)], [flat(1e-8), flat(1e-9)], seeds=3)
    dataset["loss"][0, 0, 0, 1, 50:] = np.nan
    dataset["loss"][0, 1] = np.nan
    dataset["status"][0, 1] = NOT_RUN
    first, second = answers(dataset)
    assert (sum(first.endings.values()), first.seeds) == (2, 3)
    assert not second.endings
    assert "no lane has finished" in "\n".join(answered(dataset)[0])
    assert unfinished([dataset]) == "unfinished: 3 of 6 lanes"
    assert unfinished([made([falling(2)], [flat(1.0)])]) == ""


def test_the_best_cells():
    """The second falls fastest at first and is level at 1e-9; of those at rounding the third is there first."""
    losses = [falling(6.1), lambda t: np.maximum(np.exp(-20 * t), 1e-9), falling(7)]
    dataset = made(losses, [flat(1e-3), flat(1e-5), flat(1e-4)])
    (found,) = best(dataset, answers(dataset))
    alphas = [cell.where["alpha"] for cell in (found.lowest, found.fastest, found.aligned)]
    assert alphas == [0.01, 0.1, 0.1]
    assert found.at_rounding == 2
    assert (found.level, found.time) == (1e-3, pytest.approx(np.log(1e3) / 20))
    np.testing.assert_allclose(found.lowest.reached.when, np.log(1 / FLOOR) / 7)


def test_a_line_for_each_of_few_cells():
    told = answered(made([falling(2), falling(7)], [flat(1e-8), flat(0.5)]))[0]
    assert told == [
        "alpha 1: aligns to 1 - cos = 1e-08 by t = 1.1 (T1 = 2.41); loss 2.1e-09 at t = 10, still falling by 0.87 "
        "decades per unit of time.",
        "alpha 0.1: does not align (1 - cos is at least 0.5); loss at rounding at t = 10, since t = 8.55.",
        "Lowest loss: at rounding with alpha 0.1, at t = 8.55; fastest: alpha 0.1, at 0.001 of the first loss (0.001) "
        "at t = 0.987; best aligned: alpha 1, 1e-08.",
    ]


def test_what_was_over_before_a_late_first_save_is_told_so():
    """Of exp(-7 t), at rounding from t = 8.55; the phases end at 2.30 and 2.41."""
    late = made([falling(7), falling(6.9)], [flat(1e-8)] * 2).sel(time=slice(9.0, None))
    first, second = answers(late)
    assert (first.t_align.when, first.t1.when, first.reached.when) == (-np.inf,) * 3
    assert second.reached.when == -np.inf
    told, (alignment, _) = answered(late)
    assert told[0] == (
        "alpha 1: aligns to 1 - cos = 1e-08 by t = 9 (T1 before the first save, t = 9); loss at rounding at t = 10, "
        "since before the first save, t = 9."
    )
    assert told[2] == (
        "Lowest loss: at rounding in 2 cells, first with alpha 1, before the first save, t = 9; fastest: alpha 1, at "
        "0.001 of the first loss (0.001) before the first save, t = 9; best aligned: alpha 1, 1e-08."
    )
    assert [row[4:] for row in alignment.rows] == [["< 9", "< 9"]] * 2
    assert not np.isfinite(answers(made([falling(2)], [flat(1e-8)]).assign_coords(init=["pissa"]))[0].t1.median)
    ranges, _ = answered(made([falling(7)] * 10, [flat(1e-8)] * 10).sel(time=slice(9.0, None)))
    assert "T1 comes before the first save, t = 9." in ranges


def test_ranges_for_many_cells():
    told, _ = answered(made([falling(k) for k in range(1, 11)], [flat(10.0**-k) for k in range(10)]))
    assert len(told) == 4
    told = "\n".join(told)
    assert "1 - cos comes down to between 1e-09 (alpha 1e-09, by t = 1.1) and 1 (alpha 1, by t = 0)" in told
    assert "of 10 cells 5 still falling, 5 at rounding" in told


def parts(dataset):
    lines, tables = answered(dataset)
    return [*lines, *tables]


def test_long_tables_go_to_files_with_all_their_rows():
    dataset = made([falling(1)] * 40, [flat(1e-3)] * 40)
    text, files = report({"": [*parts(dataset), final_values(dataset)]}, ["figures/a.png"])
    assert sorted(files) == ["report-alignment.csv", "report-final.csv", "report-loss.csv"]
    for name, content in files.items():
        assert len(content.splitlines()) == 41
        assert f"The first 10 of 40 rows; all of them are in [{name}]({name})." in text
    assert max(map(len, text.split("\n\n"))) < 3000
    _, files = report({"run": parts(dataset)}, [])
    assert sorted(files) == ["report-run-alignment.csv", "report-run-loss.csv"]


@pytest.mark.parametrize(("init", "side"), [("gaussian", "B"), ("mine", "B"), ("tied", "-"), ("spectral-both:2", "-")])
def test_a_side_is_told_of_starts_that_draw_one_factor_alone(init, side):
    dataset = made([falling(2)], [flat(1e-8)]).assign_coords(init=[init])
    final = final_values(dataset)
    assert final.rows[0][list(final.header).index("side")] == side
    assert ("side B" in about(dataset)) == (side == "B")


def test_the_final_values_have_the_norms_of_all_layers():
    dataset = made([falling(1)], [flat(1e-3)]).assign_attrs(layers=[6, 5, 4, 6, 3, 4])
    final = final_values(dataset.assign(norm_z3=3 * dataset["norm_z1"]))
    assert [final.rows[0][final.header.index(f"norm Z{i}")] for i in (1, 2, 3)] == ["1.000", "1.000", "3.000"]


def test_one_seed_has_no_spread():
    for seeds, has in ((1, False), (3, True)):
        dataset = made([falling(2)], [flat(1e-8)], seeds=seeds)
        text, _ = report({"": [*parts(dataset), predictions(dataset), final_values(dataset)]}, [])
        assert ("±" in text) == has
        assert "| 7 |" in text, "steps that are the same for all seeds are one number"
        assert "by Tsit5 and RKC (auto) at rtol" in about(dataset.assign_attrs(solver="Automatic"))
        assert ("(2.1e-09 to " in text) == has


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"factorisation": False}, "this is one adapted layer"),
        ({"flow": "scaled"}, "the predictions are for the plain gradient flow, and this is scaled"),
        ({"shift_rank": 3}, "the predictions are for shifts of rank one, not for rank 3"),
        ({"aligned": 0}, "the predictions are for shifts that are aligned with the weights"),
        (
            {"init": ["pissa"]},
            "the predictions are for starts that alpha makes small, gaussian and spectral, not for pissa",
        ),
    ],
)
def test_where_theory_does_not_apply_a_sentence_says_why(change, reason):
    arguments = {name: value for name, value in change.items() if name in ("factorisation", "flow")}
    dataset = made([falling(2)], [flat(1e-8)], **arguments)
    dataset = dataset.assign_coords({name: value for name, value in change.items() if name not in arguments})
    told = predictions(dataset)
    assert isinstance(told, str)
    assert reason in told
    assert "n/a" not in told


def test_theory_has_rows_only_where_it_applies():
    told = predictions(made([falling(2)], [flat(1e-8)]))
    assert isinstance(told, Table)
    assert len(told.rows) == 1
    with_another = xr.concat(
        [made([falling(2)], [flat(1e-8)]), made([falling(2)], [flat(1e-8)]).assign_coords(init=["pissa"])],
        "init",
        data_vars="minimal",
        coords="minimal",
        compat="override",
        join="outer",
    )
    told = predictions(with_another)
    assert [row[0] for row in told.rows] == ["gaussian"]
    assert "not for pissa" in told.about


def test_nothing_to_align_with_is_said():
    dataset = made([falling(2)], [lambda t: np.full_like(t, np.nan)], factorisation=False)
    text, _ = report({"": parts(dataset)}, [])
    assert "There is nothing to align with" in text
    assert "loss 2.1e-09 at t = 10" in text


def test_pictures_of_unfinished_runs_have_a_title(tmp_path):
    figure = plt.figure()
    save({"one": figure}, tmp_path, "unfinished: 4 of 8 lanes")
    assert figure.get_suptitle() == "unfinished: 4 of 8 lanes"


ASKED = Settings(
    m=4, n=5, h=6, alpha=(1e-1, 1e-2), rank=(1,), seeds=4, t1=0.5, saves=3, solver="Tsit5", batch_size=2, devices=1
)


def store(out, boxes):
    """A run folder with these boxes, or all."""
    plan = build_plan(ASKED)
    with open_runs(out, {"": (to_table(ASKED), plan)}) as folders:
        for number, values in plan.solve(boxes):
            folders[""].write(number, values)


def test_plot_draws_a_run_that_is_not_finished_and_says_so(tmp_path, capsys, monkeypatch):
    store(tmp_path / "run", [0])
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text: titles.append(text))
    assert main(["plot", str(tmp_path / "run")]) == 0
    assert titles == ["unfinished: 2 of 8 lanes"]
    assert (tmp_path / "run/figures/sweep.png").is_file()
    report = (tmp_path / "run/report.md").read_text()
    assert report.splitlines()[2] == "**unfinished: 2 of 8 lanes**"
    assert "never move" not in report
    assert capsys.readouterr().out.startswith("unfinished: 2 of 8 lanes\n")
    assert int((load_run(tmp_path / "run", partial=True)["status"] == NOT_RUN).sum()) == 6


def test_a_run_is_answered_once_to_be_drawn(tmp_path, monkeypatch, capsys):
    """What is printed are the lines of its report."""
    store(tmp_path / "run", None)
    found = []
    monkeypatch.setattr(
        "lora_flow.experiments.present.answers", lambda dataset: found.append(answers(dataset)) or found[-1]
    )
    assert draw(str(tmp_path / "run")) == 0
    assert len(found) == 1
    printed, told = capsys.readouterr().out.splitlines(), (tmp_path / "run/report.md").read_text()
    assert f"- {printed[0]}\n" in told
    assert printed[0].startswith("Too few saves: ")
    assert "at t = 0.5" in printed[1]


def test_a_lane_whose_status_means_nothing_has_not_run():
    status = xr.DataArray([0, 1, 9, -1], dims="seed", attrs={"flag_values": [-1, 0, 1, 2]})
    assert (
        unfinished([xr.Dataset({"status": status}), xr.Dataset({"status": status[:2]})]) == "unfinished: 4 of 6 lanes"
    )
    assert unfinished([xr.Dataset({"status": status[:2]})]) == unfinished([]) == ""


def test_what_too_few_saves_leave_open_is_told_as_bounds():
    """The same run, T1 = 2.4 and t_align = 2.3, saved every 0.1 and every 1."""
    fine = made([lambda t: 10.0 ** (-1.2 * t)] * 2, [lambda t: 10.0 ** (-2 - t / 3)] * 2)
    coarse = fine.isel(time=slice(None, None, 10))
    lines, tables = answered(fine)
    assert not [line for line in lines if "saves" in line or "before" in line]
    assert "T1 = 2.41" in lines[0]
    lines, tables = answered(coarse)
    assert lines[0].startswith("Too few saves: T1 and the fall of the loss come among the first saves")
    assert lines[0].endswith("--spacing log, more --saves than 11 or a shorter --t1 would tell.")
    assert "T1 before t = 3" in lines[1]
    coarser = fine.isel(time=slice(None, None, 25))
    assert answered(coarser)[0][0].startswith("Too few saves: alignment, T1 and the fall of the loss come among")
    row = dict(zip(tables[0].header, tables[0].rows[0], strict=True))
    assert (row["t_align"], row["T1"]) == ("< 3", "< 3")
    assert ["mark bounds" in answered(one)[1][0].about for one in (fine, coarse)] == [False, True]
    told = predictions(fine), predictions(coarse)
    where = told[0].header.index("T1 measured")
    measured = [(one.rows[1][where], one.rows[1][where + 1]) for one in told]
    assert measured == [("2.41", "holds"), ("< 3", "too few saves")]


def test_a_needle_of_alignment_between_two_saves_is_told_as_a_bound():
    def needle(t):
        return 1.0 - (1 - 1e-4) * np.exp(-(((t - 5.0) / 0.06) ** 2))

    one = made([lambda t: 10.0**-t] * 2, [needle, lambda t: 0.05 + 0 * t])
    lines, tables = answered(one)
    assert lines[0] == (
        "Too few saves: 1 - cos may be much less between two saves than at any; "
        "--spacing log, more --saves than 101 or a shorter --t1 would tell."
    )
    assert "aligns to 1 - cos of at most 0.0001 by t = 5" in lines[1]
    assert "aligns to 1 - cos = 0.05" in lines[2]
    assert "best aligned at the saved times: alpha 1," in lines[-1]
    assert [row[1] for row in tables[0].rows] == ["<= 0.0001", "0.05"]


def test_a_loss_that_has_not_stopped_is_not_said_to():
    falling, level = [lambda t: 10.0 ** (-0.5 * t)], [lambda t: 1e-3 + 10.0 ** -(2 + t)]
    for losses, said in (
        (falling * 9, "The loss at t = 10: from 1e-05 (alpha 1) to 1e-05 (alpha 1e-08); of 9 cells 9 still falling; a"),
        (level * 9, "Where the loss stops, at t = 10: from 0.001"),
    ):
        lines, _ = answered(made(losses, [lambda t: 10.0 ** (-2 - t / 3)] * 9))
        assert [line for line in lines if line.startswith(said)], lines


def test_the_guide_to_t1_says_what_it_is():
    spans = phases(made([lambda t: 10.0**-t], [lambda t: 0.1 + 0 * t]))
    assert spans["t1_predicted"].attrs["comment"] == "for aligned shifts of rank one, and a guide elsewhere"


def test_alignment_is_drawn_as_long_as_the_phases_are():
    one = made([lambda t: 1e-3 + np.exp(-5 * np.maximum(t - 1, 0))], [lambda t: 10.0 ** (-2 - t / 3)]).isel(rank=0)
    one["overlap_1"] = one["overlap_1"] * np.exp(2 * one["time"])  # T1 = 1.2
    middle, right = three_panels(one).axes[1:3]
    assert middle.get_xlim()[1] == pytest.approx(right.get_xlim()[1], rel=0.05)
    assert middle.get_xlim()[1] < 6.0
    plt.close("all")
