"""The READMEs: what they name is there, and their figures are those of the results."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"benchmark/{name}README.md" for name in ("", "ablations/", "algorithms/", "scaling/")))
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
README = PAGES["README.md"]
RESULTS = ROOT / "benchmark" / "results"
FILES = [path for name in ("*.*", "benchmark/**/*", "tests/**/*") for path in ROOT.glob(name)]
FILES = [path for path in FILES if not any(part.startswith(".venv") for part in path.parts)]  # peers have their own
TRAINERS = ("sft.py", "reward.py", "ppo.py")
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*TRAINERS, "eval_judge.py")}


def blocks(text, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# ---- Files, links, anchors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https://)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if target.suffix == ".md" and anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = PAGES[page]
    names = set(re.findall(r"(?<![\w./])[\w./-]+\.(?:py|sh|yaml|sbatch|diff)\b", text))
    names |= set(re.findall(r"(?<![\w./-])(?:benchmark|tests|results)/[\w./-]*\w", text))
    names |= set(re.findall(r"`([\w-]+\.png)`", text))
    names -= set(re.findall(r"\bcp \S+ ([\w./-]+)", text))  # a copy that the reader makes
    for name in names:
        name = re.sub(r"^L/", "benchmark/accelerate/", name)  # the README's abbreviation
        assert any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in FILES), name


def test_line_anchors_are_where_the_functions_are():
    """[`name`](ppo.py#L123), or [`sft.py: name`](sft.py#L123): the line of the `def`, or of its first decorator."""
    links = re.findall(r"\[`(?:\w+\.py: )?(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10 and len(links) == len(re.findall(r"\.py#L", README))
    bodies = {script: ast.parse(source).body for script, source in SOURCES.items()}
    for name, script, line in links:
        [node] = [node for node in bodies[script] if getattr(node, "name", "") == name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        assert first <= int(line) <= node.lineno, f"{name} of {script} begins at line {node.lineno}"


# ---- Code and flags --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES)
def test_code_is_code(page):
    for code in blocks(PAGES[page], "python"):
        compile(code, page, "exec")
    for code in blocks(PAGES[page], "bash"):
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert done.returncode == 0, (code, done.stderr)
    for code in blocks(PAGES[page], "diff"):
        for line in code.splitlines():
            assert line.startswith("+") or line[1:] in SOURCES["ppo.py"].splitlines(), line


def flags_of(path):
    """The flags of a script: the fields of its Args, or what it reads by hand."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if getattr(node, "name", "") == "Args":
            return {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    return set(re.findall(r'"--(\w+)"', text))


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    """In a command, as flags of that script; elsewhere, as flags of any."""
    scripts = {path.name: flags_of(path) for path in FILES if path.suffix == ".py" and "tests" not in path.parts}
    options = [name.strip("-") for action in launch_command_parser()._actions for name in action.option_strings]
    everything = set.union(*scripts.values(), options, {"nodes"})  # the last is sbatch's
    named = 0
    for code in re.split(r"[`|;&\n]", PAGES[page].replace("\\\n", " ")):
        allowed = everything
        for word in code.split():
            allowed = scripts.get(word.rpartition("/")[2], allowed)
            for flag in re.findall(r"^--([a-z][\w-]*)", word):
                named += 1
                assert flag in allowed, f"--{flag} in: {code}"
    assert named > 0


# ---- Details, metrics, figures ---------------------------------------------------------------------------------------
def test_the_table_of_details_is_that_of_the_tags():
    rows = re.findall(r"^\| ([A-Z](?:, [A-Z])*|\d[\d, ]*) \| .* \| ([^|]*) \|$", README, re.M)
    listed = [tag for tags, _ in rows for tag in tags.split(", ")]
    assert listed[:25] == [str(number) for number in range(1, 26)] and len(listed) == len(set(listed))
    tags_of = {script: set(re.findall(r"# Detail (\w+) \(", source)) for script, source in SOURCES.items()}
    assert set(listed) == set.union(*tags_of.values())
    for tags, where in rows:
        named = set(re.findall(r"\w+\.py", where)) | set(TRAINERS if "all three" in where else ())
        assert named, where
        for tag in tags.split(", "):
            for script in named:
                assert tag in tags_of[script], f"no '# Detail {tag} (' in {script}"
    for script, source in SOURCES.items():  # references to details, in comments and texts
        assert set(re.findall(r"Details? (\d+|[A-Z])\b", source)) <= set(listed), script


def test_every_metric_is_explained():
    explained = set(re.findall(r"`([\w/*.]+)`", README))
    for script in TRAINERS:
        metrics = set(re.findall(r'"((?:objective|policy|loss|val|rm|sft|time)/\w+)"', SOURCES[script]))
        assert metrics
        unknown = {name for name in metrics - explained if f"{name.partition('/')[0]}/*" not in explained}
        assert not unknown, f"{script}: {unknown}"


def test_figures_in_tables_are_those_of_the_results():
    """A row that names files of results/, or all rows of a table of which the paragraph before or after does: each
    figure with a decimal point is in these files, rounded, as it is, in percent, or in thousandths.
    """
    checked = 0
    named = r"((?!README)[\w-]+\.(?:jsonl?|md))\b"
    for page in (*PAGES, "benchmark/results/README.md"):
        text = re.sub("^```.*\n", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
        parts = ["", *re.split(r"\n\s*\n", text), ""]
        for before, part, after in zip(parts, parts[1:], parts[2:]):
            for line in re.findall(r"^\|.*", part, re.M):
                names = re.findall(named, line) or re.findall(named, f"{before} {after}")
                raw = " ".join((RESULTS / name).read_text() for name in names if (RESULTS / name).exists())
                known = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", raw)]
                for figure in re.findall(r"(?<![\w.])\d+\.\d+(?:e-\d+)?(?![\w.]*\d)", line) if raw else []:
                    digits, _, exponent = figure.partition("e")
                    half = 0.5001 * 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
                    off = [abs(number * scale - float(figure)) for number in known for scale in (1, 100, 1000)]
                    assert min(off) <= half, f"{page}: {figure} is not in {', '.join(names)}: {line}"
                    checked += 1
    assert checked > 10
