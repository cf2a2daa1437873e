"""benchmark/plot_metrics.py: what it draws of the metrics of runs, and what it refuses."""

import json

import pytest
from common import ROOT, error_line, run_inside

from benchmark import plot_metrics


def write_run(folder, kls, last="\n"):
    folder.mkdir(parents=True)
    rows = [{"episode": 8 * (i + 1), "lr": 1e-3, "objective/kl": kl, "val/eos_share": 1.0} for i, kl in enumerate(kls)]
    rows.append({"episode": 8 * len(kls), "eval/kl": 9.0})  # the evaluation, which is no update
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + last)
    return folder


def test_lines_means_and_bands(tmp_path):
    runs = [write_run(tmp_path / f"a-seed{seed}", kls) for seed, kls in ((1, [0, 1, 2]), (2, [0, 3, 6, 7]))]
    other = write_run(tmp_path / "other", [5, 5])
    done = run_inside(plot_metrics, *runs, other, "--mean_over_seeds", "-o", tmp_path / "x.png")
    assert done.code == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG"), done.err
    for line in ("a-seed*, last update: objective/kl 4,", "other, last update: objective/kl 5,"):
        assert line in done.out
    assert not list(tmp_path.glob("*.tmp"))
    tables = {"a": [plot_metrics.load(run, 1) for run in runs], "b": [plot_metrics.load(other, 1)]}
    kl, eos, *rest = plot_metrics.draw(tables, {}).axes
    first, second = [line.get_xydata().tolist() for line in kl.lines]
    assert first == [[8, 0], [16, 2], [24, 4]] and second == [[8, 5], [16, 5]]  # the updates that all seeds have
    band = kl.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(4 + 8**0.5) and len(kl.collections) == 1 and not rest
    assert plot_metrics.load(runs[0], 2)["objective/kl"].tolist() == [0, 0.5, 1.5]


def test_calibration_of_an_evaluated_reward_model(tmp_path):
    run = write_run(tmp_path / "reward", [1])
    rows = [
        {"group": "x", "n": 4, "accuracy": a, "low": a - 0.2, "high": a + 0.1, "margin": m}
        for a, m in ((0.6, 0.2), (0.8, 1.5))
    ]
    (run / "eval_test.json").write_text(json.dumps({"calibration": rows}))
    done = run_inside(plot_metrics, run, "-o", tmp_path / "x.png")
    assert done.code == 0 and (tmp_path / "x.png").exists(), done.err
    reports = {"run": plot_metrics.calibration(run)}
    *_, axis = [axis for axis in plot_metrics.draw({"run": [plot_metrics.load(run, 1)]}, reports).axes if axis.axison]
    points, line = axis.lines[0].get_xydata().tolist(), axis.lines[-1].get_xydata()
    assert points == [[0.2, 0.6], [1.5, 0.8]] and line[-1].tolist() == pytest.approx([1.5, 1 / (1 + 2.718281828**-1.5)])
    assert plot_metrics.calibration(tmp_path) == []


def test_what_is_no_run_is_named(tmp_path):
    write_run(tmp_path / "half", [1], last='\n{"epi\n')
    (tmp_path / "none").mkdir()
    (tmp_path / "none/metrics.jsonl").write_text('{"episode": 8, "other": 1}\n')
    for name in ("half", "none", "absent"):
        done = run_inside(plot_metrics, tmp_path / name, "-o", tmp_path / "x.png")
        assert f"{name}/metrics.jsonl" in error_line(done)
    run = write_run(tmp_path / "good", [1])
    for name in ("no/x.png", "x.txt"):
        assert name in error_line(run_inside(plot_metrics, run, "--output", tmp_path / name))
    runs = [write_run(tmp_path / f"seed{seed}", kls) for seed, kls in ((1, [1]), (2, [2, 3]))]
    table = plot_metrics.load(runs[1], 1)
    rows = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "metrics.jsonl").write_text("".join(rows[1:]))
    assert "seed*: these runs have no update in common" in error_line(
        run_inside(plot_metrics, *runs, "--mean_over_seeds", "-o", tmp_path / "x.png")
    )
    assert not (tmp_path / "x.png").exists()
    # A line that is half written is one of a run that goes on.
    (runs[1] / "metrics.jsonl").write_text("".join(rows) + '{"epi')
    assert plot_metrics.load(runs[1], 1).equals(table)


def test_every_run_can_be_told_from_the_others(tmp_path):
    runs = [write_run(tmp_path / str(i), [i] * (1 + i % 2)) for i in range(12)]
    done = run_inside(plot_metrics, *runs, runs[0], "-o", tmp_path / "x.pdf")  # one of them named twice
    assert done.code == 0 and (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF"), done.err
    axis = plot_metrics.draw({run.name: [plot_metrics.load(run, 1)] for run in runs}, {}).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 12
    for line, run in zip(axis.lines, runs):  # a single update is a point
        assert (line.get_marker() == ".") == (int(run.name) % 2 == 0)
