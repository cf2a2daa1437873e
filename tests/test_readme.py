"""The README against the code: every flag, tag, file, metric and figure that it names is really there."""

import json
import pathlib
import re
import statistics
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmark" / "README.md").read_text()
SCRIPTS = {name: (ROOT / name).read_text() for name in ("sft.py", "reward.py", "ppo.py", "eval_judge.py")}
DETAILS = [str(number) for number in range(1, 26)] + list("TRVLSEKWP")


def section(title: str) -> str:
    """The text under a `## title`, up to the next one."""
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("|---")][1:]


def test_every_detail_has_one_row_and_its_tag_where_the_row_says():
    table = rows(section("The details, and where they are"))
    assert [row[0] for row in table] == DETAILS
    for number, _, where, evidence in table:
        named = re.findall(r"`(\w+\.py)`", where) or ["sft.py", "reward.py", "ppo.py"]
        tagged = [name for name in named if re.search(rf"# Detail {number} \(", SCRIPTS[name])]
        assert tagged, f"no tag '# Detail {number} (' in {named}"
        for test in re.findall(r"`(test_\w+\.py)`", evidence):
            assert (ROOT / "tests" / test).exists(), test


def test_files_that_are_named_exist():
    for path in set(re.findall(r"(?:benchmark|tests)/[\w./-]+\.(?:sh|py|yaml|md|png|json|csv)", README)):
        assert (ROOT / path).exists(), path


def test_flags_that_are_named_exist():
    benchmarks = [*(ROOT / "benchmark").glob("*.py"), ROOT / "benchmark" / "peers" / "compare.py"]
    sources = "\n".join(SCRIPTS.values()) + "\n".join(path.read_text() for path in benchmarks)
    of_others = {"mixed_precision", "config_file", "quiet", "num_processes", "index-url", "nodes"}
    of_others |= {"num_machines", "machine_rank", "main_process_ip", "main_process_port"}  # the launcher's
    for flag in set(re.findall(r"--([a-z][\w-]+)", README)) - of_others:
        assert re.search(rf'^    {flag}: |"--{flag}"', sources, re.M), f"--{flag} is no flag of any script"


def test_the_table_of_flags_tells_the_truth():
    ours = {name: set(re.findall(r"^    (\w+): ", text, re.M)) for name, text in SCRIPTS.items()}
    everything = set.union(*ours.values())
    for published, here, _ in rows(section("What differs from the published code, and why").split("Flags of")[1]):
        names = [name.removeprefix("ppo.") for cell in re.findall(r"`([^`]+)`", published) for name in cell.split()]
        for name in names:
            if here == "the same":
                assert name in everything, f"{name} is said to be kept"
            if here == "(dropped)":
                assert name not in everything, f"{name} is said to be dropped"


def test_every_metric_is_in_the_glossary():
    glossary = set(re.findall(r"`([\w/]+)`", section("What a run writes")))
    for name in ("sft.py", "reward.py", "ppo.py"):
        keys = re.findall(r'"((?:objective|policy|loss|val|eval|rm|sft|time)/\w+)"', SCRIPTS[name])
        assert keys
        for key in set(keys) - {"time/eval"}:  # in summary.json only
            assert key in glossary, f"{key} of {name} has no line in the glossary"


def test_the_figures_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import quickstart_seeds
    import real_table

    records = json.loads((ROOT / "benchmark" / "results" / "quickstart.json").read_text())["runs"]
    assert len(records) >= 3
    assert quickstart_seeds.markdown(records) in README
    assert real_table.markdown(json.loads((ROOT / "benchmark" / "results" / "real_short.json").read_text())) in README


def result(name):
    return json.loads((ROOT / "benchmark" / "results" / f"{name}.json").read_text())


def table_after(text):
    """The rows of the first table after some text, as lists of cells."""
    lines = README[README.index(text) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    last = next(i for i, line in enumerate(lines) if i > first and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[first + 2 : last]]


def test_the_figures_of_the_engines_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import engines

    record = result("engines")
    assert engines.table(record["results"]) in README and len(record["results"]) == 12
    for row in record["results"]:
        expected = next(other["value"] for other in record["results"] if other["script"] == row["script"])
        assert row["value"] == pytest.approx(expected, rel=1e-5)
        assert row["script"] != "ppo" or row["largest parameter difference"] < 2e-5


def test_the_figures_of_the_kills_are_those_of_the_results():
    kills = result("kill")["results"]
    found = table_after("`python benchmark/kill.py`, 2026")
    assert [(row[0], *map(int, row[2:])) for row in found] == [
        (f"`{k['script']}`", k["kills"], k["kills_inside_a_save"], k["kills_inside_an_update"],
         k["kills_before_the_first_checkpoint"], k["differences"], k["lost_metrics_lines"]) for k in kills
    ]  # fmt: skip
    assert f"{sum(k['kills'] for k in kills)} kills, no difference, no lost line" in README
    assert all(k["differences"] == k["lost_metrics_lines"] == 0 for k in kills)


def test_the_figures_of_the_memory_are_those_of_the_results():
    record = result("memory")
    for row, expected in zip(table_after("`python benchmark/memory.py` computes"), record["paper"], strict=True):
        assert row[0].startswith(expected["size"].upper()) and row[1] == str(expected["gpus"])
        assert row[3] == f"{expected['peak']:.1f} GiB" and row[6] == f"{expected['host'][0]:.0f} GiB"
        assert all(expected[card].startswith(cell) for card, cell in (("80 GB", row[4]), ("141 GB", row[5])))
    ratios = [check["ratio"] for check in record["check"]]
    assert f"is between {min(ratios):.2f} and {max(ratios):.2f}" in README
    as_run = record["as the scripts run"]["ratios"]
    assert f"predicted / measured was {min(as_run):.2f} to {max(as_run):.2f}" in README


def test_the_figures_of_the_quickstart_under_zero2_are_those_of_the_results():
    record, one = result("quickstart_zero2"), result("quickstart")["runs"][0]
    for stage in ("sft", "ppo"):
        low, high = record[f"{stage}/win_rate_ci95"]
        rate = record[f"{stage}/win_rate"]
        assert f"{stage.upper()} {rate:.3f} [{low:.3f}, {high:.3f}]" in README
        assert low <= one[f"{stage}/win_rate"] <= high  # as one process has it
    low, high = record["reward/eval/accuracy_low"], record["reward/eval/accuracy_high"]
    assert f"RM accuracy {record['reward/eval/accuracy']:.3f}\n  [{low:.3f}, {high:.3f}]" in README
    assert low <= one["reward/eval/accuracy"] <= high


def test_the_figures_of_the_comparison_with_trl_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmark"))
    import speed

    entries, other_processor = result("peers"), result("peers_xeon")
    for table in (entries, other_processor):
        assert speed.table(table) in README and all(len(entry["pairs"]) == 5 for entry in table)
        assert [entry["shape"] for entry in table] == ["14m", "14m", "70m", "160m"]
    for entry in entries + other_processor:
        ratios = sorted(pair["ours"] / pair["trl"] for pair in entry["pairs"])
        assert entry["median"]["ratio"] == pytest.approx(ratios[2])
        assert ("--warm_up 0" in entry["command"]) == (entry["shape"] != "14m")
        # Nothing else kept the machine busy while ppo.py was timed.
        assert max(cores for pair in entry["pairs"] for cores in pair["ours_other_cores"]) < 0.3
    assert f"{entries[1]['mean_response']:.0f} is what `--mean_response 35` made" in README
    at_14m = [other_processor[0]["median"][name] / entries[0]["median"][name] for name in ("trl", "ours")]
    assert f"TRL at 14m becomes {at_14m[0]:.1f} times" in " ".join(README.split()) and at_14m[1] < 1.05
    assert all(table[0]["memory_ratio"] == pytest.approx(0.48, abs=0.02) for table in (entries, other_processor))


def test_the_figures_of_the_other_processor_are_those_of_the_results():
    fp32, bf16, *micro = result("throughput_xeon")
    text = " ".join(README.split())
    runs = [[run for run in result(name) if run["precision"] == "fp32"] for name in ("throughput_xeon", "throughput")]
    peaks = [statistics.median(run["matrix_peak_gflops"] for run in group) for group in runs]
    said = f"{peaks[0] / peaks[1]:.1f} times as fast there as on the EPYC ({peaks[0]:.0f} against {peaks[1]:.0f} GFLOP/s"
    assert said in text
    seconds = [run["seconds_per_update"] for run in (fp32, bf16)]
    assert f"{seconds[0]:.0f} s and a utilisation of {fp32['utilisation']:.0%} in fp32; {seconds[1]:.0f} s in bf16" in text
    assert f"{seconds[0] / seconds[1]:.1f} times as fast, which is {bf16['utilisation']:.0%} of the best bf16" in text
    assert f"({bf16['matrix_peak_gflops'] / 1000:.1f} TFLOP/s)" in text
    cells = [f"{run['peak_memory_gib']:.2f} GiB and {run['seconds_per_update']:.1f} s" for run in micro]
    assert f"{cells[0]} per update with 4 rows, {cells[1]} with 2, {cells[2]} with 1" in text
    assert [run["micro_batch"] for run in micro] == [4, 2, 1]


def test_the_figures_of_the_growth_are_those_of_the_results():
    growth = result("growth")
    episodes, query = growth["episodes_line"], growth["query_line"]
    assert f"{episodes['slope']:.3f} s per episode" in README and f"more than {episodes['largest_deviation']:.1%}" in README
    line = f"{query['intercept']:.1f} s + {1000 * query['slope']:.1f} ms per query token"
    assert line in README and f"off by {query['largest_deviation']:.1%} at most" in README


def test_the_figures_of_the_throughput_are_those_of_the_results():
    runs, text = result("throughput"), " ".join(README.split())
    bf16, first, before, now = runs[:5], runs[5:10], runs[10:16], runs[16:]
    assert [run["precision"] for run in runs] == ["bf16"] * 5 + ["fp32"] * 16 and len(now) == 5
    assert {(run["shape"], run["batch"]) for run in runs} == {("160m", 16)}
    assert [run for run in runs if "--warm_up 0" in run["command"]] == first

    def median(name, group):
        return statistics.median(run[name] for run in group)

    seconds, fp32 = [median("seconds_per_update", group) for group in (bf16, now)]
    assert f"takes {seconds:.1f} s instead of {fp32:.1f} ({fp32 / seconds:.1f} times as fast; medians of five" in text
    assert f"{median('utilisation', bf16):.0%} of the best bf16 matrix product" in text
    assert f"peak memory {median('peak_memory_gib', bf16):.1f} GiB" in text
    for group, wanted in (
        (now, "At the 160m shape it is {share:.0%} ({low:.0%} to {high:.0%} in five runs, {seconds:.0f} s in the median"),
        (before, "it was {share:.0%} ({low:.0%} to {high:.0%} in six runs, {seconds:.0f} s)"),
        (first, "{share:.0%} in the first update of a run ({low:.0%} to {high:.0%} in five runs, {seconds:.0f} s)"),
    ):
        shares = [run["utilisation"] for run in group]
        figures = dict(share=median("utilisation", group), low=min(shares), high=max(shares))
        assert wanted.format(**figures, seconds=median("seconds_per_update", group)) in text


def test_the_figures_of_the_worlds_for_scaling_are_those_of_the_results():
    rows = {line.split("`")[1]: line for line in BENCHMARKS.splitlines() if line.startswith("| `--num_")}
    for run in result("scaling_worlds")["runs"]:
        figure = run["eval/loss"] if run["stage"] == "sft" else run["eval/accuracy"]
        assert f"{figure:.3f}"[1 if figure < 1 else 0 :][:4] in rows[run["world"]], run


def test_the_figures_behind_the_learning_rate_for_scaling_are_those_of_the_results():
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in BENCHMARKS.splitlines() if line.startswith("| ")}
    for run in result("scaling_worlds")["ppo"]["runs"]:
        if run["hidden_size"] == 16:
            continue
        cell = rows[f"| {run['ppo_lr']:.0e}".replace("e-0", "e-")][run["hidden_size"] == 64]
        gold, kl = run["objective/gold_scores"], run["objective/kl"][-1]
        said = f"{gold[0]:.2f} to {gold[-1]:.2f} in {run['updates']} updates (KL {kl:.1f})"
        assert said in cell and ("stopped" in cell) == (run["updates"] < run["updates_planned"])
        assert f"h{run['hidden_size']}, reward model {run['rm_accuracy_validation']:.3f}" in BENCHMARKS


def test_the_tables_by_size_are_those_of_the_results():
    published = (ROOT / "benchmark" / "results" / "scaling.md").read_text().splitlines()
    lines = section("Results").split("### What grows with size")[1].split("\n### ")[0].splitlines()
    lines = [line for line in lines if line.startswith("|")]
    assert len(lines) > 5 and all(line in published for line in lines)
    # What the text below the table says.
    record, text = result("scaling"), section("Results").split("### What grows with size")[1]
    large, middle = ([run["ppo/gain"] for run in record["runs"][size].values()] for size in ("192", "64"))
    assert min(large) > 0.5 and [sum(sign * gain > 0.5 for gain in middle) for sign in (1, -1)] == [1, 2]
    text, by_length = " ".join(text.split()), record["sizes"]["192"]["by_length"]
    bins = [next(b for b in by_length[stage]["bins"] if b["from"] == -0.15) for stage in ("ppo", "sft")]
    said = ["{:.2f} [{:.2f}, {:.2f}]".format(b["win_rate"], *b["win_rate_ci95"]) for b in bins]
    fits = [by_length[stage]["fit"]["win_rate_at_equal_length"] for stage in ("ppo", "sft")]
    assert "PPO wins {} and SFT {} (the logistic fits say {:.2f} and {:.2f} there".format(*said, *fits) in text
    accuracy = {run["ppo/gain"]: run["reward/accuracy"] for run in record["runs"]["192"].values()}
    assert f"as accurate as the others ({accuracy[min(accuracy)]:.2f})" in text
    invented = [record["aggregated"]["ppo/invented_share"][size]["mean"] for size in ("192", "64")]
    assert "({:.2f} against {:.2f} of its values after PPO)".format(*invented) in text
    left_out = [figure["mean"] for figure in record["aggregated"]["reward/batch9"].values()]
    assert f"({left_out[0]:.2f} to {left_out[-1]:.2f})" in text and record["trends"]["reward/batch9"]["p"] < 0.01
    for name in ("ppo/tokens", "ppo/kl_end"):
        assert record["trends"][name]["p"] > 0.1, name
    wrong = [record["aggregated"]["reward/batch7"][size]["mean"] for size in ("16", "32")]
    assert [round(share, 2) for share in wrong] == [0.5, 0.5]


def test_what_is_said_of_the_ablations_is_in_the_results():
    record, text = result("ablations"), section("Results").split("### What each detail is worth")[1]
    found = record["ablations"]["no_kl"]["difference"]["win_rate"]
    said = f"costs {-found['mean']:.2f} of the win rate [{-found['high']:.2f}, {-found['low']:.2f}], in every seed"
    assert said in text and max(found["differences"]) < 0
    for name in ("eos_as_pad", "sft_loss_on_query"):
        assert record["ablations"][name]["verdict"] == "fails outright"
    assert all(run["eos_share"] == 0 for run in record["ablations"]["eos_as_pad"]["runs"].values())
    ends = [run["eos_share"] for run in record["ablations"]["no_eos_penalty"]["runs"].values()]
    scores = [run["score"] for run in record["ablations"]["no_eos_penalty"]["runs"].values()]
    hacked = sorted((share, score) for share, score in zip(ends, scores) if share < 0.99)
    assert len(hacked) == 2 and [f"{100 * share:.0f}%" for share, _ in hacked] == ["0%", "9%"]
    assert "9% and 0%" in BENCHMARKS and "gives {1:.1f} and {0:.1f}".format(*[s for _, s in hacked]) in BENCHMARKS
    assert sum(run["length"] <= 10 for run in record["ablations"]["no_clipping"]["runs"].values()) == 3
    assert len(record["ablations"]["no_clipping"]["collapsed"]) == 1
    short = [run["win_rate"] for run in record["ablations"]["no_clipping"]["runs"].values() if run["length"] <= 10]
    assert "(win rates {:.2f}, {:.2f} and {:.2f})".format(*short) in " ".join(text.split())
    seeds = [run["win_rate"] for run in record["baselines"]["baseline"].values()]
    both = f"between win rates of {min(seeds):.2f} and {max(seeds):.2f}"
    assert both in " ".join(text.split()) and both in " ".join(BENCHMARKS.split())


def test_what_is_said_of_over_optimisation_is_in_the_results():
    record, text = result("overoptimisation"), " ".join(BENCHMARKS.split())
    runs, fell = record["runs"], {}
    assert len(runs) == 24 and all(run["collapsed"] for run in runs)
    for run in runs:
        score = run["curves"]["objective/rm_scores"]
        assert sum(score[-3:]) > sum(score[:3]) and run["gold_end"] < run["gold_first"]
        fell.setdefault(run["kl_coef"], []).append(run["gold_first"] - run["gold_end"])
    said = "at {0:g} the gold score ends {1:.1f} to {2:.1f} lower, at {3:g} it ends {4:.1f} to {5:.1f} lower"
    assert said.format(0.2, min(fell[0.2]), max(fell[0.2]), 0, min(fell[0]), max(fell[0])) in text
    far = {size: sorted(r["kl"] for r in runs if r["kl_coef"] == 0 and r["reward_size"] == size) for size in (192, 16)}
    assert "{0:.0f} and {1:.0f} nats instead of {2:.0f} and {3:.0f}".format(*far[192], *far[16]) in text
    for size in (192, 16):
        lost = [
            gold - run["gold_first"]
            for run in runs if run["reward_size"] == size
            for kl, gold in zip(run["curves"]["objective/kl"], run["curves"]["objective/gold_scores"]) if 3.5 < kl < 4.5
        ]  # fmt: skip
        assert f"{-sum(lost) / len(lost):.1f}" == "1.5"
    means = [sum(lost) / len(lost) for size in (16, 64, 192)
             for lost in [[r["gold_first"] - r["gold_end"] for r in runs if r["reward_size"] == size]]]  # fmt: skip
    assert "ends {:.1f}, {:.1f} and {:.1f} lower in the mean".format(*means) in text
    accuracy = [result("scaling")["runs"][size][seed]["reward/accuracy"]
                for size in ("192", "64") for seed in ("44413", "55513")]  # fmt: skip
    assert "accuracy {:.3f} and {:.3f}) are not better than the two middle ones ({:.3f} and {:.3f})".format(*accuracy) in text
    early = {row["metric"]: row["rho_early"] for row in record["warnings"]}
    for name in ("objective/kl", "objective/entropy", "val/eos_share", "objective/rm_scores"):
        assert f"{early[name]:+.2f})" in text, name


def test_what_the_benchmarks_say_of_agreement_is_in_the_results():
    record, text = result("scaling"), " ".join(BENCHMARKS.split())
    judge = [figure["mean"] for figure in record["aggregated"]["reward/agreement_with_judge"].values()]
    assert ", ".join(f"{share:.2f}" for share in judge) + " on held-out pairs" in text
    seeds = [about["agreement_between_seeds"] for about in record["sizes"].values()]
    mean = {name: [sum(found[name]) / len(found[name]) for found in seeds] for name in seeds[0]}
    assert f"{min(mean['reward models']):.2f} to {max(mean['reward models']):.2f} of the pairs" in text
    rouge = mean["PPO ROUGE-L"]
    assert f"ROUGE-L {rouge[0]:.2f} at 43 thousand parameters, {rouge[-1]:.2f} at 1.33 million" in text
    same = sorted(f"{100 * share:.0f}" for share in mean["SFT identical"][2:])
    assert f"the same text for {same[0]} to {same[1]}% of the posts" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_described(name):
    assert f"[`{name}`]({name})" in README
