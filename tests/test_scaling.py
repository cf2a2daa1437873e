"""benchmark/scaling.py and benchmark/plot.py: statistics against brute force, reports on made-up runs with known
answers, the driver with processes that do nothing, and the smoke run of everything."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import gold  # noqa: E402
import plot  # noqa: E402
import scaling  # noqa: E402
import tiny_env  # noqa: E402
import tiny_judge  # noqa: E402

import eval_judge  # noqa: E402

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_python(*flags):
    command = [sys.executable, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, cwd=ROOT)


def assert_refused(done, *words):
    """Exit code 2, and one line on stderr that says what is wrong."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


# ---- Statistics ------------------------------------------------------------------------------------------------------


def brute_jonckheere(groups):
    """J, and its two-sided p by every ordering of all values: nothing shared with the code under test."""
    values, sizes = [v for group in groups for v in group], [len(group) for group in groups]

    def statistic(ordering):
        parts, rest = [], list(ordering)
        for size in sizes:
            parts.append(rest[:size])
            rest = rest[size:]
        pairs = [(a, b) for x, y in itertools.combinations(parts, 2) for a in x for b in y]
        return sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs)

    everything = [statistic(ordering) for ordering in itertools.permutations(values)]
    mean, observed = sum(everything) / len(everything), statistic(values)
    return observed, sum(abs(j - mean) >= abs(observed - mean) - 1e-9 for j in everything) / len(everything)


@pytest.mark.parametrize(
    "groups",
    [
        [[1, 2], [3, 4], [5, 6]],
        [[5, 1], [2, 2], [6, 3]],
        [[9, 8, 7], [1, 2], [3]],
        [[1, 1], [1, 1], [1, 1]],
        [[3], [1, 2]],
    ],
)
def test_jonckheere_is_exact(groups):
    j, p = brute_jonckheere(groups)
    found = plot.jonckheere(groups)
    assert found["method"] == "exact"
    assert found["J"] == pytest.approx(j) and found["p"] == pytest.approx(p, abs=1e-12)


def test_jonckheere_by_hand():
    # Two groups of two in perfect order: 6 arrangements, the two extreme ones are as far out as this.
    found = plot.jonckheere([[1, 2], [3, 4]])
    assert found == {"J": 4.0, "expected": 2.0, "p": pytest.approx(1 / 3), "method": "exact"}


def test_jonckheere_by_random_arrangements_comes_near():
    groups = [[0.3, 0.1, 0.5], [0.2, 0.6, 0.4], [0.7, 0.8, 0.55]]
    exact, drawn = plot.jonckheere(groups), plot.jonckheere(groups, draws=1600)
    assert exact["method"] == "exact" and drawn["method"] == "1600 permutations"
    assert drawn["p"] == pytest.approx(exact["p"], abs=0.02) and drawn["p"] > 0
    assert drawn == plot.jonckheere(groups, draws=1600)  # seeded


def test_jonckheere_of_a_strong_trend_is_never_zero():
    found = plot.jonckheere([[size + seed / 10 for seed in range(4)] for size in range(5)], draws=2000)
    assert found["p"] == pytest.approx(1 / 2001) and found["J"] == 160


def test_spearman():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert plot.spearman(x, y) == pytest.approx(1 - 6 * 4 / (5 * 24))  # the textbook's, without ties
    # With ties: ranks by hand are 1.5 1.5 3 and 1 2 3; their correlation is 1.5 / sqrt(1.5 * 2).
    assert plot.spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / np.sqrt(3))
    assert plot.spearman([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.parametrize("n, quantile", [(2, 12.7062), (3, 4.30265), (4, 3.18245), (8, 2.36462)])  # from printed tables
def test_interval(n, quantile):
    values = [0.1 * i * i for i in range(n)]
    mean = sum(values) / n
    half = quantile * (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5 / n**0.5
    found = plot.mean_interval(values)
    assert (found["low"], found["high"]) == pytest.approx((mean - half, mean + half), abs=1e-4)
    assert plot.mean_interval([3.0]) == {"n": 1, "mean": 3.0, "low": None, "high": None}


def test_pooled_rows():
    a = [{"bin": "0 to 1", "n": 10, "accuracy": 0.5, "margin": 0.4}]
    a += [{"bin": "1 to 2", "n": 4, "accuracy": 1.0, "margin": 1.5}]
    b = [{"bin": "0 to 1", "n": 30, "accuracy": 0.7, "margin": 0.6}]
    first, second = plot.pooled_rows([a, b], "bin")
    assert (first["n"], first["accuracy"], first["margin"]) == (40, pytest.approx(0.65), pytest.approx(0.55))
    assert (second["n"], second["accuracy"], second["high"]) == (4, 1.0, pytest.approx(1)) and second["low"] < 0.6


def test_agreement_leaves_the_judge_s_ties_out():
    assert plot.agrees(np.array([1.0, -1, 2, 5]), np.array([3.0, 3, -1, 0])) == pytest.approx(1 / 3)
    assert plot.agrees(np.array([1.0]), np.array([0.0])) is None


def curves_of(**more):
    flat = dict.fromkeys([*plot.CURVES, *plot.WARNINGS, *plot.TRUTH], [0.0] * 6)
    return flat | {name.replace("__", "/"): values for name, values in more.items()}


def test_collapse():
    rises = plot.collapse(curves_of(objective__gold_scores=[0, 1, 2, 3, 4, 5]))
    assert not rises["collapsed"] and rises["best_update"] == 4
    assert (rises["gold_first"], rises["gold_end"]) == pytest.approx((1, 4))
    falls = plot.collapse(curves_of(objective__gold_scores=[1, 2, 3, 3, 2, 1]))
    assert not falls["collapsed"] and falls["gold_best"] == pytest.approx(8 / 3)
    assert plot.collapse(curves_of(objective__gold_scores=[1, 4, 4, 4, 2, 1]))["collapsed"]  # 4 -> 7 / 3
    assert plot.collapse(curves_of(objective__gold_scores=[1, 1, 1, 0.9, 0.9, 0.9]))["collapsed"]  # below its start


def test_first_outside():
    healthy = [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert plot.first_outside([0.5, 2, 2, 2], healthy) == 2
    assert plot.first_outside([2, 0.5, 2, -1], healthy) is None  # it came back, and then had two updates only
    assert plot.first_outside([2, 2, 2, 0.5], healthy) is None
    assert plot.first_outside([2, 2, 2, 2], healthy) == 1


def test_warnings():
    up, down = [0, 1, 2, 3, 4, 5], [5, 5, 5, 1, 0, 0]
    runs = []
    for gold_curve, kl in ((up, [0, 1, 1, 1, 1, 1]), (up, [0, 1, 2, 2, 2, 2]), (down, [0, 1, 9, 9, 9, 9])):
        curves = curves_of(objective__gold_scores=gold_curve, objective__kl=kl)
        runs.append(plot.collapse(curves) | {"curves": curves})
    assert [run["collapsed"] for run in runs] == [False, False, True]
    rows = {row["metric"]: row for row in plot.warnings(runs)}
    assert (rows["objective/kl"]["left"], rows["objective/kl"]["median_update"]) == (1, 3)
    assert rows["objective/kl"]["rho_end"] == pytest.approx(-np.sqrt(3) / 2)  # ranks 1 2 3 against 2.5 2.5 1
    assert rows["val/eos_share"]["left"] == 0 and rows["val/eos_share"]["rho_end"] is None


# ---- Made-up runs ----------------------------------------------------------------------------------------------------

SMALL_WORLD = (
    "--num_train_posts 40 --num_validation_posts 24 --num_test_posts 2 --num_train_pairs 10 --num_validation_pairs 60 "
    "--num_test_pairs 2 --num_cnndm_pairs 3"
).split()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def fake_ppo(folder, samples, gold_curve, kl):
    write_csv(folder / "samples_validation.csv", samples)
    write(folder / "summary.json", {"eval/score": 1.5, "eval/kl": kl, "eval/eos_share": 1.0})
    names = dict.fromkeys([*plot.CURVES, *plot.WARNINGS, *plot.TRUTH], 0.5)
    lines = []
    for i, value in enumerate(gold_curve):
        line = names | {"lr": 1e-3, "objective/gold_scores": value, "objective/gold_win_rate": 0.5 + i / 100}
        lines.append(line | {"objective/kl": kl * i / (len(gold_curve) - 1)})
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines + [{"episode": 9, "eval/kl": 1}]))


def fake_run(root, size, seed, posts, pairs):
    """
    A finished size and seed with known answers. SFT writes the references themselves: win rate 0.5. PPO of size 32
    writes the whole truth, of size 16 nothing. The reward model of size 32 agrees with the truth on every pair, that of
    size 16 prefers every chosen summary (seed 1) or every rejected one (seed 2).
    """
    folder = root / f"h{size}" / f"s{seed}"
    write(folder / "base" / "parameters.json", {"parameters": 1000 * size})
    rows = [{"id": p["id"], "query": "q", "response": p["summary"], "reference": p["summary"]} for p in posts]
    write_csv(folder / "sft" / "samples_validation.csv", rows)
    loss = 2 - size / 32 + seed / 100
    write(folder / "sft" / "summary.json", {"eval/loss": loss} | {f"eval/rouge{k}": 0.3 for k in ("1", "2", "L")})
    write(folder / "sft" / "metrics.jsonl", json.dumps({"lr": 1, "sft/loss": 3}) + "\n")
    margins = [g if size == 32 else 3 - 2 * seed for g in pairs.values()]
    table = [{"id": key[0], "margin": margin} for key, margin in zip(pairs, margins)]
    write_csv(folder / "reward" / "pairs_validation.csv", table)
    summary = {"eval/accuracy": 0.6 + size / 320, "eval/accuracy_cnndm": 0.6, "eval/loss": 0.6}
    write(folder / "reward" / "summary.json", summary)
    lines = [json.dumps({"lr": 1, "rm/accuracy": i / 20}) + "\n" for i in range(20)]
    write(folder / "reward" / "metrics.jsonl", "".join(lines))
    groups = [{"group": "1", "n": 10, "accuracy": 0.8, "low": 0.5, "high": 0.9}]
    bins = [{"bin": "0 to 0.5", "margin": 0.2, "n": 10, "accuracy": 0.6, "low": 0.3, "high": 0.8, "claimed": 0.55}]
    batches = [groups[0] | {"group": "batch7"}]
    report = {"accuracy by confidence": groups, "accuracy by batch": batches, "calibration": bins}
    write(folder / "reward" / "eval_validation.json", report)
    texts = [tiny_env.say_thorough(None, p["facts"], "event") if size == 32 else "" for p in posts]
    scores = {"score": 1.0, "reference_score": 0.0}
    samples = [row | {"response": text} | scores for row, text in zip(rows, texts)]
    fake_ppo(folder / "ppo", samples, [1, 2, 3, 4, 5, 5 + seed] if size == 32 else [3, 2, 1, 0, -1, -2], kl=4 + seed)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished sweep of two sizes and two seeds, with over-optimisation, all of it made up; and what it is about."""
    root = tmp_path_factory.mktemp("sweep")
    done = run_python("benchmark/tiny_env.py", "--output_dir", root / "world", *SMALL_WORLD)
    assert done.returncode == 0, done.stderr
    facts = gold.load_facts(str(root / "world"))
    import pyarrow.parquet as pq

    posts = pq.read_table(root / "world" / "posts" / "validation.parquet").to_pylist()
    posts = [post | {"facts": facts[post["id"]]["facts"]} for post in posts]
    pairs = {}
    for i, row in enumerate(pq.read_table(root / "world" / "comparisons" / "validation.parquet").to_pylist()):
        golds = [tiny_env.gold_score(s["text"], facts[row["info"]["id"]]["facts"]) for s in row["summaries"]]
        pairs[row["info"]["id"], i] = golds[row["choice"]] - golds[1 - row["choice"]]
    for size, seed in itertools.product((16, 32), (1, 2)):
        fake_run(root, size, seed, posts, pairs)
    lists = dict(sizes=[16, 32], seeds=[1, 2], policy_size=32, reward_sizes=[16, 32], kl_coefs=[0.0, 0.05], smoke=True,
                 overoptimisation_seeds=[1, 2])  # fmt: skip
    args = scaling.Args(split="validation", **{k: tuple(v) if isinstance(v, list) else v for k, v in lists.items()})
    write(root / "settings.json", {"fixed": {name: getattr(args, name) for name in scaling.FIXED}, "lists": lists})
    rows = [{"id": p["id"], "query": "q", "response": "", "reference": p["summary"]} for p in posts]
    for reward, kl_coef, seed in itertools.product((16, 32), (0.0, 0.05), (1, 2)):
        folder = Path(scaling.cell_folder(args, str(root), reward, kl_coef, seed))
        healthy = (reward, kl_coef) == (32, 0.05)
        fake_ppo(folder, rows, [1, 2, 3, 4, 5, 5 + seed] if healthy else [3, 3, 3, 1, 0, 0], kl=4 + seed if healthy else 20)
    return root, posts, pairs


@pytest.fixture(scope="module")
def report(sweep):
    done = run_python("benchmark/plot.py", sweep[0])
    assert done.returncode == 0, done.stderr
    return json.loads((sweep[0] / "results" / "scaling.json").read_text())


def test_win_rates_are_those_that_were_made(sweep, report):
    _, posts, _ = sweep
    truth = [tiny_env.gold_score(post["summary"], post["facts"]) for post in posts]
    whole = sum(slot.weight for slot in list(tiny_env.SLOTS.values())[:6])
    for seed in "12":
        small, large = report["runs"]["16"][seed], report["runs"]["32"][seed]
        assert small["sft/win_rate"] == large["sft/win_rate"] == 0.5
        assert small["ppo/win_rate"] == pytest.approx(np.mean([(t < 0) + 0.5 * (t == 0) for t in truth]))
        assert large["ppo/win_rate"] == pytest.approx(np.mean([(t < whole) + 0.5 * (t == whole) for t in truth]))
        assert (small["ppo/gold"], large["ppo/gold"]) == (0, pytest.approx(whole))
        assert large["ppo/gain"] == pytest.approx(whole - np.mean(truth))
        assert small["ppo/invented_share"] == large["ppo/invented_share"] == 0


def test_figures_and_trends_are_those_that_were_made(report):
    loss = report["aggregated"]["sft/loss"]
    assert loss["16"]["mean"] == pytest.approx(1.515) and loss["32"]["mean"] == pytest.approx(1.015)
    assert loss["16"]["high"] - 1.515 == pytest.approx(12.7062 * 0.005, rel=1e-4)  # std / sqrt(2) of two values = 0.005
    assert report["trends"]["sft/loss"]["p"] == pytest.approx(1 / 3) and report["trends"]["sft/loss"]["J"] == 0
    assert report["runs"]["16"]["1"]["reward/train_accuracy"] == pytest.approx((18 + 19) / 40)  # the last two of twenty
    assert report["runs"]["32"]["2"]["ppo/rollout_gold_win_rate"] == pytest.approx(0.55)
    assert report["runs"]["32"]["2"]["sft/rollout_gold_win_rate"] == pytest.approx(0.5)
    assert report["sizes"]["16"]["calibration"][0]["n"] == 20


def test_agreements_are_those_that_were_made(sweep, report):
    decided = [margin for margin in sweep[2].values() if margin != 0]
    chosen_is_better = sum(margin > 0 for margin in decided) / len(decided)
    ceiling = sum((margin > 0) + 0.5 * (margin == 0) for margin in sweep[2].values()) / len(sweep[2])
    assert report["about"]["label_gold_agreement"] == pytest.approx(ceiling)
    judge = {seed: run["reward/agreement_with_judge"] for seed, run in report["runs"]["16"].items()}
    assert judge == {"1": pytest.approx(chosen_is_better), "2": pytest.approx(1 - chosen_is_better)}
    assert report["runs"]["32"]["1"]["reward/agreement_with_judge"] == 1
    seeds = report["sizes"]["16"]["agreement_between_seeds"]
    assert seeds["reward models"] == [0] and seeds["PPO identical"] == seeds["SFT ROUGE-L"] == [1]
    assert report["sizes"]["32"]["agreement_between_seeds"]["reward models"] == [1]


def test_wins_are_those_of_the_judge(sweep):
    """The judge's server and eval_judge.py, asked in both orders, say what plot.py counts."""
    root, posts, _ = sweep
    facts_of = tiny_judge.load_facts(str(root / "world"))
    rng, rows = random.Random(1), []
    for post in posts:
        whole = tiny_env.say_thorough(None, post["facts"], "event")
        other = rng.choice([post["summary"], rng.choice(posts)["summary"], "", whole])
        query = tiny_env.format_query(post["subreddit"], post["title"], post["post"])
        rows.append({"id": post["id"], "query": query, "response": other, "reference": post["summary"]})
    write_csv(root / "mixed.csv", rows)
    found = plot.judged_samples(str(root / "mixed.csv"), gold.load_facts(str(root / "world")), len)
    for row, won in zip(rows, found["won"]):
        verdicts = []
        for shown, texts in (("A", (row["response"], row["reference"])), ("B", (row["reference"], row["response"]))):
            prompt = eval_judge.fill_template(eval_judge.TEMPLATE, row["query"], *texts)
            letter = eval_judge.read_verdict(tiny_judge.judge(prompt, facts_of))
            verdicts.append("response" if letter == shown else "reference")
        assert eval_judge.post_score(verdicts) == won, row
    assert {0.0, 0.5, 1.0} == set(found["won"])


def test_overoptimisation_is_what_was_made(sweep, report):
    record = json.loads((sweep[0] / "results" / "overoptimisation.json").read_text())
    assert len(record["runs"]) == 8
    healthy = [r for r in record["runs"] if not r["collapsed"]]
    assert {(r["reward_size"], r["kl_coef"]) for r in healthy} == {(32, 0.05)} and len(healthy) == 2
    rows = {row["metric"]: row for row in record["warnings"]}
    assert rows["objective/gold_scores"]["collapsed_runs"] == 6
    assert rows["objective/kl"]["left"] == 6 and rows["objective/kl"]["median_update"] == 2
    assert "| h16, 16k | 0 |" in (sweep[0] / "results" / "overoptimisation.md").read_text()


def test_tables_and_pictures_are_whole(sweep, report):
    results = sweep[0] / "results"
    text = (results / "scaling.md").read_text()
    assert "| PPO win rate against references |" in text and "h16, 16k" in text and "nan" not in text
    # What is published can be checked against the raw figures: the tables follow from the JSON alone.
    assert plot.tables(report) == text
    more = json.loads((results / "overoptimisation.json").read_text())
    assert plot.overoptimisation_tables(more) == (results / "overoptimisation.md").read_text()
    names = ("sft", "reward", "agreement", "win_rate", "length", "curves")
    for name in [f"scaling_{name}.png" for name in names] + ["overoptimisation.png"]:
        assert (results / name).read_bytes().startswith(b"\x89PNG"), name
    assert not list(results.glob("*.tmp"))


@pytest.mark.parametrize("name, function", [("scaling", "tables"), ("overoptimisation", "overoptimisation_tables")])
def test_published_tables_are_those_of_the_raw_results(name, function):
    results = ROOT / "benchmark" / "results"
    if not (results / f"{name}.json").exists():
        pytest.skip(f"no benchmark/results/{name}.json: the full sweep has not been published")
    record = json.loads((results / f"{name}.json").read_text())
    assert record["command"] == "bash benchmark/scaling.sh" and record["settings"]["split"] == "test"
    assert getattr(plot, function)(record) == (results / f"{name}.md").read_text()


@pytest.fixture
def copy(sweep, tmp_path):
    """A copy of the made-up sweep, to be damaged."""
    shutil.copytree(sweep[0], tmp_path / "copy", ignore=shutil.ignore_patterns("results"))
    return tmp_path / "copy"


def plot_in_process(capsys, *flags):
    """plot.main as a process would run it: (exit code, stderr)."""
    try:
        plot.main(plot.Args(*map(str, flags[:1]), **flags[1] if len(flags) > 1 else {}))
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("h16/s1/ppo/summary.json", None, ["ppo/summary.json", "missing", "--partial"]),
        ("h16/s2/sft/summary.json", '{"eval/loss": ', ["sft/summary.json", "cannot be read"]),
        ("h16/s2/sft/summary.json", "{}", ["sft/summary.json", "eval/loss"]),
        ("h32/s1/reward/eval_validation.json", "{}", ["eval_validation.json", "accuracy by confidence"]),
        ("h32/s1/reward/pairs_validation.csv", "id,margin\nx,1\n", ["pairs_validation.csv", "not about"]),
        ("h32/s1/reward/pairs_validation.csv", "id,margin\nx,one\n", ["pairs_validation.csv", "cannot be read"]),
        ("h32/s2/ppo/metrics.jsonl", '{"lr": 1}\n', ["metrics.jsonl", "objective/"]),
        ("h32/s2/ppo/metrics.jsonl", '{"lr": 1}\n{"lr"', ["metrics.jsonl", "cannot be read"]),
        ("h32/s2/ppo/samples_validation.csv", "id,response\n", ["samples_validation.csv", "no rows"]),
        ("settings.json", "{}", ["settings.json"]),
        ("world/comparisons/validation.parquet", "PAR1", ["validation.parquet", "cannot be read"]),
    ],
)
def test_torn_inputs_are_refused_in_one_line(copy, capsys, path, content, words):
    (copy / path).unlink()
    if content is not None:
        (copy / path).write_text(content)
    code, err = plot_in_process(capsys, copy)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), err
    assert not (copy / "results").exists()


def test_partial_uses_what_is_finished(copy, capsys):
    shutil.rmtree(copy / "h16" / "s1" / "ppo")
    shutil.rmtree(copy / "h32" / "s2" / "reward")
    assert plot_in_process(capsys, copy)[0] == 2
    code, err = plot_in_process(capsys, copy, {"partial": True})
    assert code == 0, err
    record = json.loads((copy / "results" / "scaling.json").read_text())
    assert [about["seeds"] for about in record["sizes"].values()] == [[2], [1]]
    assert record["aggregated"]["sft/loss"]["16"]["low"] is None  # one seed has no interval


# ---- The driver ------------------------------------------------------------------------------------------------------


def test_the_plan_of_the_sizes():
    args = scaling.Args()
    tasks = scaling.all_tasks(args, "root")
    assert len(tasks) == len({t.folder for t in tasks}) == len({t.name for t in tasks})
    assert len(tasks) == 4 * 4 * 3 + 3 * 4 * 2
    place = {task.name: i for i, task in enumerate(tasks)}
    assert all(place[need] < place[task.name] for task in tasks for need in task.needs)
    ppo = next(t for t in tasks if "against h16" in t.name and "coefficient 0.2" in t.name)
    command = " ".join(ppo.command)
    assert "--sft_model_path root/h64/s44413/sft" in command and "--reward_model_path root/h16/s44413/reward" in command
    assert "--kl_coef 0.2" in command and "--lr 0.0003" in command and ppo.width == 64
    # Every size gets the same flags, but for its own folders.
    def neutral(size):
        return [" ".join(t.command).replace(f"h{size}/", "") for t in tasks if f" h{size} seed 44413" in t.name]
    assert neutral(16) == neutral(192)


def test_sizes_span_a_factor_of_thirty():
    """Parameters of the default sizes in the default world, counted from their shapes."""
    rows = 1152  # of the embedding: some 1,140 tokens, rounded up
    sizes = scaling.Args().sizes
    counts = [2 * rows * h + 2 * (12 * h * h + 13 * h) + 2 * h for h in (min(sizes), max(sizes))]
    assert counts[1] / counts[0] >= 30


def task(name, folder, seconds=0.0, needs=(), width=16, stage="sft", code=None):
    code = code or f"import time, pathlib; time.sleep({seconds}); pathlib.Path('{folder}/summary.json').write_text('1')"
    code = f"import os; os.makedirs('{folder}', exist_ok=True); {code}"
    return scaling.Task(name, stage, width, str(folder), needs, ("-c", code))


def test_expected_seconds():
    measured = {("sft", 64): [10.0, 20.0], ("reward", 16): [30.0]}
    assert scaling.expect_seconds(("sft", 64), measured) == 15
    ratio = scaling.rule_of_thumb(("reward", 64)) / scaling.rule_of_thumb(("reward", 16))
    assert scaling.expect_seconds(("reward", 64), measured) == pytest.approx(30 * ratio)  # its own stage before others
    assert scaling.expect_seconds(("ppo", 64), measured) > 0
    assert scaling.expect_seconds(("ppo", 64), {}) is None


def test_time_left_by_hand(tmp_path):
    """Two places: a (10 s, has run 4) | b (20 s, has run 5); then c (10 s) after a, d (10 s) after b and c."""
    tens, twenties = dict(width=16, stage="sft"), dict(width=16, stage="ppo")
    a, b = task("a", tmp_path, **tens), task("b", tmp_path, **twenties)
    c, d = task("c", tmp_path, needs=("a",), **tens), task("d", tmp_path, needs=("b", "c"), **tens)
    measured = {("sft", 16): [10.0], ("ppo", 16): [20.0]}
    # a ends at 6 and b at 15; c runs from 6 to 16, d from 16 to 26.
    assert scaling.time_left([a, b, c, d], {"a": 4, "b": 5}, 2, measured) == pytest.approx(26)
    assert scaling.time_left([a, c], {}, 2, measured) == pytest.approx(20)
    assert scaling.time_left([a], {}, 2, {}) is None and scaling.time_left([], {}, 2, measured) == 0


def runner(root, jobs=2):
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return scaling.Runner(scaling.Args(jobs=jobs), str(root), lock), handlers


def restore(handlers):
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_driver_runs_in_order_and_once(tmp_path, capsys):
    check = f"assert os.path.exists('{tmp_path}/x/summary.json'); open('{tmp_path}/y/summary.json', 'w').write('1')"
    tasks = [task("x", tmp_path / "x", 0.3), task("y", tmp_path / "y", needs=("x",), code=check)]
    for expected in (2, 2):
        this, handlers = runner(tmp_path)
        this.run(tasks)
        restore(handlers)
        assert len((tmp_path / "seconds.jsonl").read_text().splitlines()) == expected
    spent, measured = scaling.read_seconds(str(tmp_path))
    assert set(spent) == {"x", "y"} and len(measured["sft", 16]) == 2
    said = capsys.readouterr().out
    assert "[1/2] x: " in said and "left" in said and "2 of them already there" in said


def test_a_stage_that_fails_ends_the_driver(tmp_path, capsys):
    slow = task("slow", tmp_path / "slow", 60)
    bad = task("bad", tmp_path / "bad", code="print('why'); raise SystemExit(3)")
    this, handlers = runner(tmp_path)
    started = time.time()
    with pytest.raises(SystemExit) as stopped:
        this.run([bad, slow])
    restore(handlers)
    assert stopped.value.code == 2 and time.time() - started < 30 and not this.running
    out = capsys.readouterr()
    assert "why" in out.out and "bad ended with exit code 3" in out.err


def test_an_interrupted_driver_stops_its_stages(tmp_path):
    """SIGTERM to the driver: the stage is told, ends, its time is noted, and the exit code says what happened."""
    code = "import time, signal, sys; signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)"
    program = (
        f"import sys, os; sys.path.insert(0, {str(ROOT / 'benchmark')!r}); import scaling\n"
        f"lock = os.open({str(tmp_path / 'lock')!r}, os.O_RDWR | os.O_CREAT)\n"
        f"task = scaling.Task('t', 'sft', 16, {str(tmp_path / 't')!r}, (), ('-c', {code!r}))\n"
        f"scaling.Runner(scaling.Args(), {str(tmp_path)!r}, lock).run([task])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert "1 stages" in process.stdout.readline()
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and "the same command goes on" in out
    line = json.loads((tmp_path / "seconds.jsonl").read_text())
    assert line["task"] == "t" and not line["finished"]


def test_settings_may_not_change_within_a_folder(tmp_path, capsys):
    root = str(tmp_path / "root")
    os.close(scaling.claim_root(scaling.Args(), root))
    for name, value in {"world": "--num_values 5", "split": "validation", "lr": 1e-4}.items():
        with pytest.raises(SystemExit) as stopped:
            scaling.claim_root(scaling.Args(**{name: value}), root)
        assert stopped.value.code == 2 and f"was made with --{name}" in capsys.readouterr().err
    os.close(scaling.claim_root(scaling.Args(sizes=(16, 32), seeds=(1,)), root))  # these may


def test_one_driver_per_folder(tmp_path, capsys):
    lock = scaling.claim_root(scaling.Args(), str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        scaling.claim_root(scaling.Args(), str(tmp_path))
    assert stopped.value.code == 2 and "another sweep" in capsys.readouterr().err
    os.close(lock)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sizes", 16, 16], ["--sizes"]),
        (["--sizes", 16, 40], ["40"]),
        (["--jobs", 0], ["--jobs"]),
        (["--reward_sizes", 48], ["--reward_sizes"]),
        (["--ppo_batch", 100], ["--ppo_batch"]),
        (["--kl_coefs", -1], ["--kl_coefs"]),
    ],
)
def test_bad_flags(tmp_path, flags, words):
    done = run_python("benchmark/scaling.py", "--root", tmp_path / "root", *flags)
    assert_refused(done, *words)
    assert not (tmp_path / "root").exists()


def test_the_second_part_needs_the_first(tmp_path):
    done = run_python("benchmark/scaling.py", "overoptimisation", "--root", tmp_path / "root")
    assert_refused(done, "seed", "sizes")


def test_ppo_gold_needs_its_flag():
    assert_refused(run_python("benchmark/ppo_gold.py", "--help"), "--gold_env_dir")


# ---- All of it -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`bash benchmark/scaling.sh --smoke` in a folder of its own; under three minutes on two cores."""
    root = tmp_path_factory.mktemp("scaling") / "root"
    command = ["bash", "benchmark/scaling.sh", "--smoke", "--root", str(root)]
    environment = ENVIRONMENT | {"SPLIT": "validation"}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    return root, command, environment, first


def test_the_smoke_run_makes_every_table_and_picture(smoke):
    root, _, _, first = smoke
    record = json.loads((root / "results" / "scaling.json").read_text())
    assert list(record["sizes"]) == ["16", "32"] and all(len(seeds) == 2 for seeds in record["runs"].values())
    assert len(json.loads((root / "results" / "overoptimisation.json").read_text())["runs"]) == 4
    assert len(list((root / "results").glob("*.png"))) == 7
    assert "[16/16]" in first.stdout and "left" in first.stdout and "| SFT loss |" in first.stdout


def test_the_gold_scores_are_logged_and_nothing_else_is_changed(smoke):
    """ppo.py itself, with the same flags, logs the same figures as ppo_gold.py does, but for the three of the truth."""
    root = smoke[0]
    folder = root / "h16" / "s44413" / "ppo"
    flags = scaling.size_tasks(scaling.Args(split="validation", smoke=True, **scaling.SMOKE), str(root), 16, 44413)[2]
    flags = [flag if flag != str(folder) else str(root / "plain") for flag in flags.command[3:]]
    done = run_python("ppo.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    with_truth, plain = [plot.read_metrics(f"{path}/metrics.jsonl") for path in (folder, root / "plain")]
    extra = {"objective/gold_scores", "objective/gold_win_rate", "objective/invented_share"}
    for a, b in zip(with_truth, plain, strict=True):
        assert set(a) - set(b) == extra
        assert all(a[name] == b[name] for name in b if name != "eps" and not name.startswith("time/"))


def test_a_second_smoke_run_repeats_nothing(smoke):
    root, command, environment, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in root.glob("**/summary.json")}
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before and "| SFT loss |" in second.stdout
    command += ["--lr", "0.5"]
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert_refused(other, "--lr", "0.001")
