"""The pictures of report.py, drawn from its records (scaling.json, overoptimisation.json)."""

import math
import os
from pathlib import Path

import numpy as np

CURVES = {
    "objective/kl": "KL to the SFT model (nats)",
    "objective/rm_scores": "reward model's score",
    "objective/rlhf_reward": "RLHF reward (score - KL penalty)",
    "objective/gold_scores": "gold score",
    "policy/approxkl_avg": "approxkl (nats)",
    "policy/entropy_avg": "entropy per token (nats)",
    "objective/response_length": "response length (tokens)",
    "val/eos_share": "share of responses with EOS",
    "objective/invented_share": "share of invented values",
}
SFT, PPO, REWARD, GREY = "tab:blue", "tab:red", "tab:purple", "0.5"
# A share lies between 0 and 1, whatever t says of four seeds: its bars end there (in the tables they do not).
SHARES = ("win_rate", "accuracy", "agreement", "invented")


def short_count(number: int) -> str:
    """31,234 -> 31k"""
    return f"{number / 1e6:.2f}M" if number >= 999_500 else f"{number / 1e3:.0f}k"


def trend_text(test) -> str:
    """rho and p of a trend."""
    if test is None or test["rho"] is None:
        return "-"
    return f"{test['rho']:+.2f}, p {'<' if test['p'] < 0.0001 else '='} {max(test['p'], 0.0001):.4f}"


def new_figure(rows: int, columns: int, width: float, height: float, title: str):
    """A figure without pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(axes, **labels):
    axes.set(**labels)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5)


def save(figure, path: Path):
    figure.savefig(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)


class Sizes:
    """What the pictures of one record share."""

    def __init__(self, record: dict):
        from matplotlib import colormaps

        self.record, self.sizes, self.about = record, record["sizes"], record["about"]
        last = max(1, len(self.sizes) - 1)
        self.colors = {size: colormaps["viridis_r"](0.12 + 0.85 * i / last) for i, size in enumerate(self.sizes)}
        self.names = {size: f"{short_count(one['parameters'])} (h{size})" for size, one in self.sizes.items()}
        self.seeds = f"{max(len(one['seeds']) for one in self.sizes.values())} seeds"
        self.posts, self.pairs = f"{self.about['posts']} held-out posts", f"{self.about['pairs']} held-out pairs"

    def size_axis(self, axes, **labels):
        """The x axis of all panels by size: parameters, logarithmic, each size a tick."""
        counts = [one["parameters"] for one in self.sizes.values()]
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{short_count(n)}\nh{size}" for n, size in zip(counts, self.sizes)])
        axes.minorticks_off()
        finish(axes, xlim=(counts[0] / 1.5, counts[-1] * 1.5), xlabel="parameters (h: width)", **labels)

    def by_size(self, axes, key: str, label: str, color: str, marker: str = "o", shift: float = 0):
        """A figure by size: every seed a dot, the mean with its interval. `shift` moves it sideways."""
        points = []
        for size, seeds in self.record["runs"].items():
            values = [run[key] for run in seeds.values() if run.get(key) is not None]
            if not values:
                continue
            count = self.sizes[size]["parameters"] * math.exp(shift)
            places = count * np.exp(np.linspace(-0.1, 0.1, len(values)))  # equal dots do not hide one another
            axes.plot(places, values, marker, color=color, markersize=4, alpha=0.55, markeredgewidth=0)
            figure = self.record["aggregated"][key][size]
            bounds = [figure["mean"] if figure[side] is None else figure[side] for side in ("low", "high")]
            low, high = np.clip(bounds, 0, 1) if any(name in key for name in SHARES) else bounds
            points.append((count, figure["mean"], figure["mean"] - low, high - figure["mean"]))
        x, means, *errors = np.transpose(points)
        text = f"{label} (rho {trend_text(self.record['trends'][key])})"
        axes.errorbar(x, means, yerr=errors, color=color, capsize=4, linewidth=1.6, label=text)

    def bins(self, axes, x, rows: list[dict], rate: str, **options):
        """Shares of bins, all seeds together, with their Wilson intervals."""
        share, low, high = np.transpose([(row[rate], row["low"], row["high"]) for row in rows])
        errors = np.maximum(0, [share - low, high - share])
        axes.errorbar(x, share, yerr=errors, markersize=4, capsize=2, **options)

    def draw_sft(self):
        title = f"SFT by size: {self.posts}, {self.seeds} (dots), mean and 95% t interval"
        figure, ((left, right),) = new_figure(1, 2, 11, 4.6, title)
        self.by_size(left, "sft/loss", "loss", SFT)
        self.by_size(right, "sft/rougeL", "ROUGE-L", SFT)
        self.size_axis(left, title="Loss on reference summaries", ylabel="nats per token")
        self.size_axis(right, title="ROUGE-L against references, temperature 0.01", ylabel="F measure")
        return figure

    def draw_reward(self):
        title = f"Reward models by size: {self.pairs}, {self.seeds}"
        figure, ((left, middle, right),) = new_figure(1, 3, 16, 5.2, title)
        self.by_size(left, "reward/accuracy", "held-out pairs", REWARD)
        self.by_size(left, "reward/accuracy_cnndm", "CNN/DM form", "tab:orange", "s", shift=0.12)
        self.by_size(left, "reward/train_accuracy", "train pairs, end", "tab:green", "^", shift=-0.12)
        left.axhline(self.about["label_gold_agreement"], color=GREY, linestyle="--", label="ceiling: labels are noisy")
        left.axhline(0.5, color=GREY, linestyle=":", label="chance")
        self.size_axis(left, title="Accuracy; dots are seeds, bars 95% t intervals", ylabel="share of pairs")
        for size, one in self.sizes.items():
            options = dict(color=self.colors[size], fmt="o-", label=self.names[size])
            rows = sorted(one["confidence"], key=lambda row: int(row["group"]))
            self.bins(middle, [int(row["group"]) for row in rows], rows, "accuracy", **options)
            rows = sorted(one["calibration"], key=lambda row: row["margin"])
            self.bins(right, [row["margin"] for row in rows], rows, "accuracy", **options)
        grid = np.linspace(0, max(1.0, right.get_xlim()[1]), 100)
        right.plot(grid, 1 / (1 + np.exp(-grid)), "--", color=GREY, label="perfect: sigmoid(margin)")
        label = "confidence (1 surely left ... 4 | 6 ... 9 surely right)"
        finish(middle, title="By confidence of the label; all seeds", ylabel="share of pairs", xlabel=label)
        label = "|score difference| (mean of the bin, nats)"
        finish(right, title="Calibration; all seeds", ylabel="share of pairs where the label agrees", xlabel=label)
        return figure

    def draw_agreement(self):
        title = f"Agreement by size, {self.seeds}; judge: the known truth (gold score)"
        figure, ((left, middle, right),) = new_figure(1, 3, 16, 5.0, title)
        self.by_size(left, "reward/agreement_with_judge", "held-out pairs", REWARD)
        self.by_size(left, "reward/agreement_on_ppo", "its PPO policy against reference", PPO, "s", shift=0.1)
        for axes, what, color in (
            (middle, "reward models", REWARD), (right, "SFT ROUGE-L", SFT), (right, "PPO ROUGE-L", PPO)
        ):  # fmt: skip
            found = [(one["parameters"], one["agreement_between_seeds"].get(what)) for one in self.sizes.values()]
            found = [(count, values) for count, values in found if values]  # a single seed agrees with nobody
            for count, values in found:
                axes.plot([count] * len(values), values, "o", color=color, markersize=4, alpha=0.5)
            axes.plot([count for count, _ in found], [np.mean(values) for _, values in found], color=color, label=what)
        for axes in (left, middle):
            axes.axhline(0.5, color=GREY, linestyle=":", label="chance")
        self.size_axis(left, title="Reward model and judge", ylabel="share of pairs (judge's ties left out)")
        self.size_axis(middle, title=f"Reward models of two seeds, {self.pairs}", ylabel="share of pairs")
        self.size_axis(right, title=f"Policies of two seeds, {self.posts}", ylabel="ROUGE-L, F measure")
        return figure

    def draw_win_rate(self):
        title = f"Win rate against references: {self.posts}, {self.seeds} (dots), mean and 95% t interval"
        figure, ((left, right, gain),) = new_figure(1, 3, 18, 5.0, title)
        for axes, name in ((left, "win_rate"), (right, "gold")):
            self.by_size(axes, f"ppo/{name}", "PPO", PPO)
            self.by_size(axes, f"sft/{name}", "SFT", SFT, shift=0.1)
        left.axhline(0.5, color=GREY, linestyle="--", linewidth=1, label="as good as the references")
        self.size_axis(left, title="Judged by the gold score, temperature 0.01", ylabel="win rate (ties half)")
        self.size_axis(right, title="Gold score, temperature 0.01", ylabel="gold score (mean over posts)")
        for size, seeds in self.record["runs"].items():
            x, y = [[run[key] for run in seeds.values()] for key in ("reward/accuracy", "ppo/gain")]
            gain.plot(x, y, "o", color=self.colors[size], label=f"{self.names[size]}, n {len(x)}")
        gain.axhline(0, color=GREY, linestyle="--", linewidth=1, label="PPO changes nothing")
        gain.axvline(self.about["label_gold_agreement"], color=GREY, linestyle=":", label="ceiling: labels are noisy")
        label = "reward model's accuracy on held-out pairs"
        title = "What PPO gains, over what its reward model knows"
        finish(gain, title=title, ylabel="gold score, PPO minus SFT", xlabel=label)
        return figure

    def draw_length(self):
        title = "Win rate by length: bins of posts (all seeds together) with 95% Wilson interval, logistic fits"
        figure, (row,) = new_figure(1, len(self.sizes), 1.2 + 3.4 * len(self.sizes), 4.6, title)
        for axes, (size, one) in zip(row, self.sizes.items()):
            for stage, color in (("sft", SFT), ("ppo", PPO)):
                found, fit = one["by_length"][stage], one["by_length"][stage]["fit"]
                bins = [b | dict(zip(("low", "high"), b["win_rate_ci95"])) for b in found["bins"] if b["n"]]
                x = [b["mean_log_ratio"] for b in bins]
                label = f"{stage.upper()}, n = {found['n']:,}"
                label += f"\n(no fit: {fit['why_not']})" if fit["why_not"] else ""
                self.bins(axes, x, bins, "win_rate", color=color, fmt="o", alpha=0.85, label=label)
                if fit["slope"] is not None:
                    grid = np.linspace(min(x), max(x), 100)
                    axes.plot(grid, 1 / (1 + np.exp(-fit["intercept"] - fit["slope"] * grid)), color=color)
            axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
            axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
            finish(axes, title=self.names[size], ylim=(-0.03, 1.03), xlabel="log(response / reference)")
        row[0].set_ylabel(f"win rate (ties half); lengths in {self.about['length_unit']}")
        return figure

    def draw_curves(self):
        title = f"PPO by update: mean of {self.seeds}, band from the lowest to the highest seed; "
        title += f"{self.about['samples_per_update']} samples per update, temperature 0.7, train posts"
        figure, axes = new_figure(3, 3, 15, 10.8, title)
        for axis, (name, label) in zip(axes.flat, CURVES.items()):
            for size, seeds in self.record["runs"].items():
                values = np.array([run["curves"][name] for run in seeds.values()])  # (seeds, updates)
                x = np.arange(1, values.shape[1] + 1)
                axis.plot(x, values.mean(0), color=self.colors[size], label=self.names[size])
                axis.fill_between(x, values.min(0), values.max(0), color=self.colors[size], alpha=0.15, linewidth=0)
            finish(axis, xlabel="update", ylabel=label, title=name)
        return figure


def draw_sizes(record: dict, output: Path):
    sizes = Sizes(record)
    for name in ("sft", "reward", "agreement", "win_rate", "length", "curves"):
        save(getattr(sizes, f"draw_{name}")(), output / f"scaling_{name}.png")


def smooth(values: list[float]) -> np.ndarray:
    """Means over three updates in a row, since one update is a small sample."""
    width = min(3, len(values))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def draw_overoptimisation(record: dict, output: Path):
    """Above the reward model's score, below the gold score, both over KL; a column per reward model."""
    from matplotlib import colormaps

    runs, about = record["runs"], record["about"]
    rewards = list(dict.fromkeys(run["reward_size"] for run in runs))
    kl_coefs = sorted({run["kl_coef"] for run in runs})
    title = f"Over-optimisation: policies h{about['policy_size']} during PPO at learning rate {about['lr']:g}, "
    title += f"a line per seed (n = {len({run['seed'] for run in runs})}),\n"
    title += f"means of three updates of {about['samples_per_update']} samples; dot: end of training"
    figure, axes = new_figure(2, len(rewards), 1.5 + 4.2 * len(rewards), 8, title)
    for run in runs:
        column = axes[:, rewards.index(run["reward_size"])]
        color = colormaps["plasma"](0.05 + 0.8 * kl_coefs.index(run["kl_coef"]) / max(1, len(kl_coefs) - 1))
        x = np.maximum(0, smooth(run["curves"]["objective/kl"]))
        for axis, name in zip(column, ("objective/rm_scores", "objective/gold_scores")):
            y, label = smooth(run["curves"][name]), f"KL coefficient {run['kl_coef']:g}"
            known = axis.get_legend_handles_labels()[1]
            axis.plot(x, y, color=color, linewidth=1.3, alpha=0.85, label=None if label in known else label)
            axis.plot(x[-1], y[-1], "o", color=color, markersize=5)
        count = short_count(run["reward_parameters"])
        column[0].set_title(f"Reward model h{run['reward_size']}, {count} parameters:\nwhat PPO is paid for")
        column[1].set_title("what it is worth")
    for row, what in zip(axes, ("reward model's score", "gold score")):
        limits = np.array([axis.get_ylim() for axis in row])
        for axis in row:
            label = "KL to the SFT model (nats, square-root scale)"
            finish(axis, xlabel=label, ylabel=what, ylim=(limits.min(), limits.max()))
            axis.set_xscale("function", functions=(np.sqrt, np.square))
            axis.set_xlim(0, 1.1 * max(line.get_xdata().max() for line in axis.get_lines()) or 1)
    save(figure, output / "overoptimisation.png")
