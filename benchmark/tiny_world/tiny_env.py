"""
The tiny world: made-up posts in which the quality of a summary is known exactly.

sft.py, reward.py, ppo.py and eval_judge.py run on the folder that this script writes as they run on the real TL;DR
data. It holds posts with reference summaries, human-like comparisons in OpenAI's schema, and a GPT-NeoX (Pythia's
architecture) with a byte-level BPE tokenizer: a small pretrained one, or, with --base_model random, new weights and a
tokenizer of this very text.

A post states six facts: who did what, where, over how much money, how the author feels and what they ask. A good
summary states the facts of its post, and no others, briefly: `gold_score` defines that in numbers. As in the real
data, most reference summaries are vague, some carry an error, and the labels of comparisons are noisy: a worker
prefers the left summary with probability sigmoid(0.5 * (gold left - gold right)). So supervised fine-tuning,
which imitates references, learns to be vague, and a policy that is trained against a reward model can do better
than its references.

    python benchmark/tiny_world/tiny_env.py --output_dir runs/tiny_env          # the size of the quickstart
    python benchmark/tiny_world/tiny_env.py --output_dir runs/hard --num_values 24 --distractor_share 0.6 \\
        --max_fillers 4 --base_model random --hidden_size 128

What is written:
    posts/{train,validation,test}.parquet            id, subreddit, title, post, summary
    comparisons/{train,validation,test}.parquet      OpenAI's schema; validation_cnndm.parquet is the CNN/DM form
    facts/{train,validation,test,validation_cnndm}.jsonl     what the gold score and the judge read
    base_model/                                      config, safetensors and tokenizer
    tiny_env.json                                    settings, counts, statistics; written last

It can show that a pipeline is right, what an implementation detail is worth when everything else is held fixed, and
how a proxy reward departs from a known truth. It shows nothing about language: there are a few hundred words, the
gold score reads phrases and not meaning, and its annotators are one formula. Figures found here do not carry over
to large models.

Same flags, same library versions: same bytes.
"""

import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator, Literal, Optional

import tyro

# torch, transformers, tokenizers and pyarrow are imported where they are needed: the judge imports this file for
# `gold_score` alone, and should be up in a moment.

WORLD_VERSION = 8  # raised when the same flags give another world; other versions have other posts


@dataclass
class Args:
    output_dir: str  # the folder to write; a complete one made with the same flags is left as it is
    seed: int = 1  # seed of posts, references and comparisons
    # ---- How much data ----
    num_train_posts: int = 8000  # posts (with references) to train on
    num_validation_posts: int = 600  # posts to choose settings on
    num_test_posts: int = 600  # posts to report on, once
    num_train_pairs: int = 10000  # comparisons to train on; they are about the train posts
    num_validation_pairs: int = 2000  # comparisons about the validation posts
    num_test_pairs: int = 2000  # comparisons about the test posts
    num_cnndm_pairs: int = 300  # comparisons in CNN/DM form (news articles instead of posts), for validation only
    num_pretraining_posts: int = 0  # posts with replies to pretrain a base model on, the same with every --seed
    # ---- How hard the world is ----
    num_values: int = 6  # values that a fact can take (4 to 24; the pretrained base model knows 12)
    distractor_share: float = 0.25  # share of posts that also mention, in passing, a value that is not a fact
    max_fillers: int = 2  # a post has 0 to this many sentences that are beside the point (0 to 6)
    # ---- The base model (GPT-NeoX) ----
    base_model: Literal["pretrained", "random"] = "pretrained"
    """pretrained: that of benchmark/tiny_world/base_model, with its tokenizer; random: new weights, of these shapes"""
    hidden_size: int = 64  # width of the model
    num_heads: int = 4  # attention heads; must divide the width into even parts


# ---- The world: constant tables --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Slot:
    """One kind of fact. A value is one lower-case word that no other slot, filler or template uses."""

    weight: float  # what a right value adds to the gold score
    lead_in: str  # a summary states a value right after this word, else it is no statement
    clause: str  # how a summary states it; empty where a slot has no clause of its own
    values: tuple[str, ...]
    statements: tuple[str, ...]  # sentences by which a post states the fact
    distractors: tuple[str, ...]  # sentences by which a post mentions a value that is not its fact


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# `who` has no sentence of its own: it stands in the event's.
SLOTS: dict[str, Slot] = {
    "who": Slot(
        1.0, "my", "",
        words("""boss sister brother roommate landlord neighbor cousin coworker uncle teacher girlfriend boyfriend
            mother father aunt friend nephew tenant mechanic plumber coach doctor grandma stepdad"""),
        (),
        ("My {v} says it is normal.", "My {v} told me to post here."),
    ),
    "event": Slot(
        2.0, "just", "",
        words("""lied cheated yelled vanished cried gambled snored proposed laughed drank smoked fainted panicked
            argued cursed overslept objected meddled spied flirted bragged whined screamed sulked"""),
        ("My {who} {v} last week.", "It began when my {who} {v}.", "So my {who} {v} again.", "Then my {who} {v}."),
        ("A year ago somebody else {v}.", "Nobody else ever {v}."),
    ),
    "ask": Slot(
        1.5, "i", " Should I {v}?",
        words("""leave apologize wait complain sue pay quit stay move confess cancel retaliate forgive interfere
            resign listen refuse agree respond testify intervene relocate negotiate surrender"""),
        ("Should I {v}?", "Part of me wants to {v}.", "Would it be wrong to {v}?", "I think I have to {v}."),
        ("Everybody tells me not to {v}.", "I will never {v}."),
    ),
    "feeling": Slot(
        1.0, "feel", " I feel {v}.",
        words("""angry sad scared guilty jealous lonely proud tired confused ashamed nervous hurt hopeful bored
            shocked relieved furious anxious bitter helpless numb worried annoyed happy"""),
        ("Now I feel {v}.", "I am so {v}.", "Honestly I am {v} all day.", "It makes me {v}."),
        ("My family seems {v}.", "People look {v} to me."),
    ),
    "place": Slot(
        0.8, "the", " at the {v}",
        words("""office kitchen wedding party school gym church airport hospital beach hotel bar garden library
            museum station market theater zoo bakery farm pool bank court"""),
        ("It was at the {v}.", "We were at the {v} then.", "It happened at the {v}."),
        ("I am typing this near the {v}.", "I grew up behind the {v}."),
    ),
    "amount": Slot(
        1.0, "over", " over {v} dollars",
        words("""40 50 60 70 80 90 110 120 150 180 200 250 300 350 400 450 500 550 600 650 700 750 800 900"""),
        ("It is about {v} dollars.", "There are {v} dollars at stake.", "I could lose {v} dollars."),
        ("My rent is {v} dollars.", "I earn {v} dollars a day."),
    ),
}  # fmt: skip
# A thorough summary is one sentence about what happened, with its circumstances, and then short sentences of their own.
TAILS = ("place", "amount")  # clauses that hang on `who` + `event`
SENTENCES = ("feeling", "ask")  # clauses that are sentences of their own

# Sentences beside the point, in posts and in poor summaries, with the word by which the gold score knows them.
FILLERS = {
    "weather": "The weather was nice.", "coffee": "I had coffee first.", "dog": "My dog is fine.",
    "traffic": "There was traffic.", "pizza": "We had pizza.", "music": "Some music was on.",
}  # fmt: skip
# Talk about the post itself: harmless in a post, noise in a summary.
GLUE = {"thanks": "Thanks for reading.", "sorry": "Sorry for the long post.", "throwaway": "Throwaway account."}

# Vague references with their chances. The first is likelier than every other way to begin a summary, thorough ones
# included, so that greedy decoding of a model that imitates references is vague, as it is with real data.
VAGUE = (
    (0.45, " Trouble with my {who}. Should I {ask}?"),
    (0.15, " Problem with my {who}, need advice."),
    (0.10, " My {who} just {event}. What now?"),
    (0.10, " I feel {feeling}. Should I {ask}?"),
    (0.10, " Trouble at the {place} with my {who}."),
    (0.10, " It is all over {amount} dollars. Should I {ask}?"),
)
THOROUGH_STYLES = ("event", "feeling", "place")  # the fact that a thorough summary begins with
VAGUE_SHARE = 0.6  # of the references are vague
WRONG_VALUE_SHARE = 0.04  # chance of each value in a reference to be wrong
LABEL_BETA = 0.5  # a worker prefers the left summary with probability sigmoid(LABEL_BETA * gold margin)

# Titles and ages are noise, except that half of the titles name the person: so do real ones.
SUBREDDITS = ("relationships", "advice", "legaladvice", "personalfinance", "offmychest", "askreddit")
TITLES = ("Me ({age}{sex}) and my {who}", "Need advice about my {who}", "Advice please ({age}{sex})", "What now?")

# Every word that some template can put into a summary; what is none of them is debris of a model that has come apart.
SUMMARY_TEXTS = [text for _, text in VAGUE] + [slot.clause for slot in SLOTS.values()]
# The last four words are those of clauses that this version does not use; they stay, so that scores do.
SUMMARY_TEXTS += [*FILLERS.values(), *GLUE.values(), "because just", "work as a in"]
SUMMARY_WORDS = frozenset(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", " ".join(SUMMARY_TEXTS)).lower()))
SLOT_OF = {value: name for name, slot in SLOTS.items() for value in slot.values}  # value word -> its slot


# ---- The gold score --------------------------------------------------------------------------------------------------
def read_statements(summary: str, facts: dict[str, str]) -> dict[str, list[str]]:
    """Sort the words of a summary by what they are worth.

    >>> found = read_statements(" My boss just lied. I feel happy, thanks.", {"who": "boss", "event": "lied"})
    >>> {kind: words for kind, words in found.items() if words}
    {'right': ['boss', 'lied'], 'wrong': ['happy'], 'glue': ['thanks']}
    """
    found: dict[str, list[str]] = {k: [] for k in ("right", "wrong", "again", "bare", "irrelevant", "glue", "junk")}
    previous = ""  # one word of context is enough for a lead-in, and can be checked by eye
    for word in split_words(summary):
        name = SLOT_OF.get(word)
        if name is not None:
            if word in found["right"] or word in found["wrong"]:
                found["again"].append(word)
            # A heap of value words is no summary: without its lead-in ("my", "at the", ...) a value states nothing.
            elif previous != SLOTS[name].lead_in:
                found["bare"].append(word)
            else:
                found["right" if facts.get(name) == word else "wrong"].append(word)
        elif word in FILLERS:
            found["irrelevant"].append(word)
        elif word in GLUE:
            found["glue"].append(word)
        elif word not in SUMMARY_WORDS:
            found["junk"].append(word)
        previous = word
    return found


def gold_score(summary: str, facts: dict[str, str]) -> float:
    """How good a summary is, by the known facts of its post: {"who": "boss", "event": "lied", ...}.

    Words are runs of letters, digits and apostrophes, in lower case. A value word (one of the tables in SLOTS) states
    its fact when the word before it is its slot's lead-in. The score is the sum of

        + weight of the slot           for each right value (all six add up to 7.3)
        - (weight of the slot + 0.5)   for each wrong value: invented, or mentioned in the post but not its fact
        - 0.4                          for each value that was stated before and is said again
        - 0.2                          for each value without a lead-in, and for each word no template has (junk)
        - 0.6                          for each filler word (weather, coffee, ...)
        - 0.3                          for each glue word (thanks, sorry, throwaway)
        - 0.1                          for each word beyond 3 x the number of facts - 1, which is room to say them all

    A wrong value costs more than a right one earns, so guessing does not pay and leaving out is better than inventing.
    An empty summary scores 0.
    """
    found = read_statements(summary, facts)
    score = sum(SLOTS[SLOT_OF[word]].weight for word in found["right"])
    score -= sum(SLOTS[SLOT_OF[word]].weight + 0.5 for word in found["wrong"])
    score -= 0.4 * len(found["again"]) + 0.2 * (len(found["bare"]) + len(found["junk"]))
    score -= 0.6 * len(found["irrelevant"]) + 0.3 * len(found["glue"])
    score -= 0.1 * max(0, len(split_words(summary)) - (3 * len(facts) - 1))
    return round(score, 6)  # sums of the same terms in another order must tie exactly


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, as the gold score and the lengths in words count them."""
    return re.findall(r"[a-z0-9']+", text.lower())


def format_query(subreddit: str, title: str, post: str) -> str:
    """The query as the training scripts format it (detail 2); the judge finds a post by this text."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


# ---- Posts and references --------------------------------------------------------------------------------------------
def draw_facts(rng: random.Random, args: Args) -> dict[str, str]:
    """One value for each slot."""
    return {name: rng.choice(slot.values[: args.num_values]) for name, slot in SLOTS.items()}


def other_value(rng: random.Random, args: Args, name: str, value: str) -> str:
    """A value of the same slot that is not `value`."""
    return rng.choice([v for v in SLOTS[name].values[: args.num_values] if v != value])


def draw_distractors(rng: random.Random, args: Args, facts: dict[str, str]) -> dict[str, str]:
    """With probability `distractor_share` one value that the post mentions and that is not its fact, else none."""
    if rng.random() >= args.distractor_share:
        return {}
    name = rng.choice(list(facts))
    return {name: other_value(rng, args, name, facts[name])}


def write_story(rng: random.Random, args: Args, facts: dict[str, str], distractors: dict[str, str]) -> list[str]:
    """The sentences of a post: each fact once, in loose order, with fillers and distractors in between."""
    stated = {n: rng.choice(SLOTS[n].statements).format(v=v, who=facts["who"]) for n, v in facts.items() if n != "who"}
    # The event opens the story and the question closes it, mostly; the rest comes in any order.
    middle = [text for name, text in stated.items() if name not in ("event", "ask")]
    middle += [rng.choice(SLOTS[name].distractors).format(v=value) for name, value in distractors.items()]
    middle += [FILLERS[word] for word in rng.sample(sorted(FILLERS), rng.randint(0, args.max_fillers))]
    if rng.random() < 0.2:
        middle.append(rng.choice(sorted(GLUE.values())))
    rng.shuffle(middle)
    story = [stated["event"]] + middle + [stated["ask"]]
    if rng.random() < 0.25:
        rng.shuffle(story)
    return story


def say_thorough(rng: random.Random, facts: dict[str, str], style: Optional[str] = None) -> str:
    """A summary of all `facts` given (it needs `who` and `event`), begun by the fact that `style` names if it is there.

    >>> say_thorough(random.Random(0), {"who": "boss", "event": "lied", "place": "bar", "ask": "sue"}, "event")
    ' My boss just lied at the bar. Should I sue?'
    """
    # Three ways to begin, none as likely as the commonest vague reference: see VAGUE.
    style = style if style is not None else rng.choice(THOROUGH_STYLES)
    left = dict(facts)  # what is still to be said
    core = f"my {left.pop('who')} just {left.pop('event')}"
    if style == "feeling" and "feeling" in left:
        text = f" I feel {left.pop('feeling')} because {core}"
    elif style == "place" and "place" in left:
        text = f" At the {left.pop('place')} {core}"
    else:
        text = " M" + core[1:]
    text += "".join(SLOTS[name].clause.format(v=left[name]) for name in TAILS if name in left) + "."
    return text + "".join(SLOTS[name].clause.format(v=left[name]) for name in SENTENCES if name in left)


def say_vague(rng: random.Random, facts: dict[str, str]) -> str:
    """A summary that names one or two facts."""
    template = rng.choices([text for _, text in VAGUE], [chance for chance, _ in VAGUE])[0]
    return template.format(**facts)


def drop_facts(rng: random.Random, facts: dict[str, str], keep_share: float) -> dict[str, str]:
    """Each fact but who and event stays with probability `keep_share`."""
    # These two make the core of every thorough summary; without it the other clauses would have nothing to hang on.
    return {n: v for n, v in facts.items() if n in ("who", "event") or rng.random() < keep_share}


def alter(rng: random.Random, args: Args, facts: dict, names: list[str], distractors: dict) -> dict[str, str]:
    """`facts` with the values of `names` made wrong; what the post mentions in passing is taken every other time."""
    altered = dict(facts)
    for name in names:
        confused = name in distractors and rng.random() < 0.5
        altered[name] = distractors[name] if confused else other_value(rng, args, name, facts[name])
    return altered


def say_noise(rng: random.Random) -> str:
    """One sentence that no summary should have."""
    return " " + rng.choice(sorted(FILLERS.values()) + sorted(GLUE.values()))


def write_reference(rng: random.Random, args: Args, facts: dict, distractors: dict) -> tuple[str, str]:
    """(kind, text): vague or thorough, sometimes with a wrong value or a useless sentence, as people write them."""
    kind = "vague" if rng.random() < VAGUE_SHARE else "thorough"
    # Errors come before the choice of what to say, so that vague references have their share of them.
    wrong = [name for name in facts if rng.random() < WRONG_VALUE_SHARE]
    told = alter(rng, args, facts, wrong, distractors)
    style = rng.choices(THOROUGH_STYLES, (1, 2, 2))[0]  # where its fact is left out, the first style takes its place
    text = say_vague(rng, told) if kind == "vague" else say_thorough(rng, drop_facts(rng, told, 0.7), style)
    return kind, text + (say_noise(rng) if rng.random() < 0.1 else "")


def make_posts(args: Args, split: str, count: int, seen: set) -> list[dict]:
    """`count` posts that are in no other split; `seen` holds all post texts so far and is added to."""
    # A stream of its own for every split: more train posts leave validation and test as they are.
    rng = random.Random(f"posts {WORLD_VERSION} {args.seed} {split}")
    posts: list[dict] = []
    while len(posts) < count:
        facts = draw_facts(rng, args)
        distractors = draw_distractors(rng, args, facts)
        story = write_story(rng, args, facts, distractors)
        title = rng.choice(TITLES).format(age=rng.randint(18, 39), sex=rng.choice("fm"), who=facts["who"])
        kind, summary = write_reference(rng, args, facts, distractors)
        # Line breaks at a few places give the truncation rule of detail 2 something to cut at.
        text = story[0] + "".join(("\n" if rng.random() < 0.1 else " ") + sentence for sentence in story[1:])
        if text in seen:
            continue
        seen.add(text)
        post = {"id": f"tiny_{split}_{len(posts):06d}", "subreddit": rng.choice(SUBREDDITS)}
        # Detail 3: reference summaries lack the leading space, the texts of comparisons have it.
        post |= {"title": title, "post": text, "summary": summary.strip()}
        post |= {"facts": facts, "distractors": distractors, "reference_kind": kind}
        posts.append(post)
    return posts


# ---- Comparisons -----------------------------------------------------------------------------------------------------
def write_by_policy(rng: random.Random, args: Args, post: dict, stranger: dict) -> tuple[str, str]:
    """(policy, text) of a summary by one of several writers with different faults; `stranger` is another post."""
    facts, distractors = post["facts"], post["distractors"]
    # Each writer has one fault that PPO could fall into: a reward model that never saw it could not punish it.
    policy = rng.choice(("full", "partial", "vague", "slip", "inventor", "rambler", "repeater", "other_post"))
    some = drop_facts(rng, facts, 0.6)
    if policy == "vague":
        text = say_vague(rng, facts)
    elif policy in ("full", "partial"):
        text = say_thorough(rng, facts if policy == "full" else some)
    elif policy == "slip":
        text = say_thorough(rng, alter(rng, args, some, rng.sample(list(some), 1), distractors))
    elif policy == "inventor":
        text = say_thorough(rng, alter(rng, args, some, list(some), distractors))
    elif policy == "rambler":
        text = say_thorough(rng, some) + say_noise(rng) + say_noise(rng)
    elif policy == "repeater":
        text = (say_vague(rng, facts) if rng.random() < 0.5 else say_thorough(rng, some)) + say_vague(rng, facts)
    else:
        text = say_thorough(rng, drop_facts(rng, stranger["facts"], 0.6))
    return policy, text


def write_reply(rng: random.Random, args: Args, facts: dict, distractors: dict) -> str:
    """What a base model is pretrained on: a summary, perhaps with wrong values, and whether that is right.

    >>> facts = {"who": "boss", "event": "lied", "ask": "sue", "feeling": "sad", "place": "bar", "amount": "40"}
    >>> write_reply(random.Random(1), Args(""), facts, {})
    ' My boyfriend just lied over 40 dollars. I feel sad. Should I sue? No, my boss.'
    """
    wrong = [name for name in facts if rng.random() < 0.2]
    told = alter(rng, args, facts, wrong, distractors)
    if rng.random() < 0.2:
        text = say_vague(rng, told)
    else:
        text = say_thorough(rng, drop_facts(rng, told, rng.choice((0.5, 1.0))))
    names = [SLOT_OF[value] for value in read_statements(text, facts)["wrong"]]
    return text + (
        " No," + "".join(f" {SLOTS[name].lead_in} {facts[name]}" for name in names) + "." if names else " Yes."
    )


def draw_pair(rng: random.Random, args: Args, post: dict, stranger: dict) -> tuple[str, list[tuple[str, str]]]:
    """(batch, two (policy, text)): the batch says how the pair was put together, as OpenAI's batches do in their way.

    batch3  a policy against the reference          batch7  one or two values of a summary made wrong
    batch5  two policies                            batch8  every value of a summary made wrong
                                                    batch9  one fact of a summary left out
    """
    facts, distractors = post["facts"], post["distractors"]
    batch = rng.choices(("batch3", "batch5", "batch7", "batch8", "batch9"), (0.10, 0.10, 0.20, 0.55, 0.05))[0]
    if batch == "batch3":
        return batch, [("ref", " " + post["summary"]), write_by_policy(rng, args, post, stranger)]
    if batch == "batch5":
        return batch, [write_by_policy(rng, args, post, stranger), write_by_policy(rng, args, post, stranger)]

    # The rest are minimal pairs: one form twice, so that only the facts tell them apart. Without them a reward model
    # learns length and style and no facts. Batch 8 is the way in: many wrong values at once and labels almost without
    # noise, by which a small model finds out that comparing with the post pays at all.
    style = rng.choice(THOROUGH_STYLES)
    some = drop_facts(rng, facts, 0.7)
    if batch == "batch9":
        optional = [name for name in some if name not in ("who", "event")]
        gone = rng.choice(optional) if optional else None
        # Where nothing is left to leave out the two texts are equal, and the caller draws again.
        fewer = {name: value for name, value in some.items() if name != gone}
        return batch, [("partial", say_thorough(rng, some, style)), ("shorter", say_thorough(rng, fewer, style))]
    policy, all_wrong = ("inventor", True) if batch == "batch8" else ("slip", False)
    if rng.random() < 0.25:
        template = rng.choice([text for _, text in VAGUE])
        names = [name for name in facts if "{" + name + "}" in template]
        wrong = alter(rng, args, facts, names if all_wrong else rng.sample(names, 1), distractors)
        return batch, [("vague", template.format(**facts)), (policy, template.format(**wrong))]
    names = list(some) if all_wrong else rng.sample(list(some), rng.choice((1, 1, 2)))
    wrong = alter(rng, args, some, names, distractors)
    return batch, [("partial", say_thorough(rng, some, style)), (policy, say_thorough(rng, wrong, style))]


def label_pair(rng: random.Random, left: float, right: float) -> tuple[int, int]:
    """(choice, confidence) of a noisy worker who sees the gold scores `left` and `right`.

    A logistic error on the perceived margin is the Bradley-Terry model. Confidence is OpenAI's scale: 1 (left, surely)
    to 4 (left, barely) and 6 (right, barely) to 9 (right, surely); the label and its confidence come of one perception,
    so accuracy is lowest at 4 and 6.
    """
    uniform = min(max(rng.random(), 1e-12), 1 - 1e-12)  # the logarithm needs the open interval
    perceived = LABEL_BETA * (right - left) + math.log(uniform / (1 - uniform))
    strength = sum(abs(perceived) > edge for edge in (0.5, 1.2, 2.2))  # 0 barely ... 3 surely
    return (1, 6 + strength) if perceived > 0 else (0, 4 - strength)


def comparison_row(rng: random.Random, info: dict, batch: str, split: str, pair, facts: dict) -> dict:
    """One row in OpenAI's schema; which summary stands on the left is drawn here."""
    left, right = rng.sample(pair, 2)
    choice, confidence = label_pair(rng, gold_score(left[1], facts), gold_score(right[1], facts))
    return {
        "info": info,
        "summaries": [{"text": text, "policy": policy, "note": ""} for policy, text in (left, right)],
        "choice": choice,
        "worker": f"worker{rng.randrange(20):02d}",
        "batch": batch,
        "split": split,
        "extra": {"confidence": confidence},
    }


def make_pretraining(args: Args, split: str, count: int) -> list[dict]:
    """`count` posts with replies in the place of references."""
    rng = random.Random(f"pretraining 2 {split}")  # the text of the base model that is in the repository
    rows = []
    for number in range(count):
        facts = draw_facts(rng, args)
        distractors = draw_distractors(rng, args, facts)
        title = rng.choice(TITLES).format(age=rng.randint(18, 39), sex=rng.choice("fm"), who=facts["who"])
        story = write_story(rng, args, facts, distractors)
        text = story[0] + "".join(("\n" if rng.random() < 0.1 else " ") + sentence for sentence in story[1:])
        row = {
            "id": f"tiny_pretraining_{number:06d}",
            "subreddit": rng.choice(SUBREDDITS),
            "title": title,
            "post": text,
        }
        rows.append(row | {"summary": write_reply(rng, args, facts, distractors).strip()})
    return rows


def make_comparisons(args: Args, split: str, count: int, posts: list[dict]) -> list[dict]:
    """`count` comparisons of two different texts about the posts of one split, going round the posts in order."""
    rng = random.Random(f"comparisons {WORLD_VERSION} {args.seed} {split}")
    name_of_split = {"train": "train", "validation": "valid1", "test": "valid2"}[split]
    rows: list[dict] = []
    while len(rows) < count:
        post = posts[len(rows) % len(posts)]  # in turn, so that no post is left out before another comes twice
        batch, pair = draw_pair(rng, args, post, rng.choice(posts))
        if pair[0][1] == pair[1][1]:
            continue  # two equal texts have no preference to learn
        info = {name: post[name] for name in ("id", "post", "title", "subreddit")}
        info |= {"article": None, "site": None}  # columns of the CNN/DM rows
        rows.append(comparison_row(rng, info, batch, name_of_split, pair, post["facts"]))
    return rows


def make_cnndm(args: Args, count: int) -> tuple[list[dict], list[dict]]:
    """(comparisons, facts rows) about news articles: the same kinds of facts, told with a dateline and in lines."""
    # Another form and no references: a reward model meets it in its evaluation only, as it meets CNN/DM.
    rng = random.Random(f"cnndm {WORLD_VERSION} {args.seed}")
    posts: list[dict] = []
    for i in range(count):
        facts = draw_facts(rng, args)
        distractors = draw_distractors(rng, args, facts)
        article = "By a staff reporter.\n" + "\n".join(write_story(rng, args, facts, distractors))
        kind, summary = write_reference(rng, args, facts, distractors)
        posts.append({"id": f"tiny_cnndm_{i:06d}", "article": article, "summary": summary.strip(), "facts": facts,
                      "distractors": distractors, "reference_kind": kind})  # fmt: skip
    rows: list[dict] = []
    while len(rows) < count:
        post = posts[len(rows)]
        _, pair = draw_pair(rng, args, post, rng.choice(posts))
        if pair[0][1] == pair[1][1]:
            continue
        info = {"id": post["id"], "article": post["article"], "site": "cnn"}  # the other columns stay empty
        batch = ("batch0_cnndm", "cnndm0", "cnndm2")[len(rows) % 3]  # the three names by which detail 1 knows such rows
        rows.append(comparison_row(rng, info, batch, "valid2", pair, post["facts"]))
    return rows, [facts_row(post, f"Article:\n{post['article']}\n\nTL;DR:") for post in posts]


def facts_row(post: dict, query: str) -> dict:
    """What the judge and the gold score know of a post. `query` is stripped text, the judge's key to the row."""
    return {"id": post["id"], "query": query} | {k: post[k] for k in ("reference_kind", "facts", "distractors")}


# ---- Tokenizer and base model ----------------------------------------------------------------------------------------
POSITIONS = 2048  # as Pythia's; they cost nothing (positions are rotary) and leave room for the scripts' length limits


def train_tokenizer(texts: Iterator[str], folder: str) -> int:
    """Byte-level BPE as Pythia's: EOS is id 0 and there is no pad token (the scripts bring their own, detail 3)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The world has a few hundred words, so merging stops by itself, when every word that comes up twice is one token.
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded, whatever a user types
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=POSITIONS,
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_base_model(args: Args, vocab_size: int, folder: str) -> int:
    """A GPT-NeoX with random weights, seeded; returns its number of parameters."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        # Spare rows as in Pythia, so that the scripts' [PAD] finds room without a resize.
        vocab_size=64 * math.ceil((vocab_size + 1) / 64),
        hidden_size=args.hidden_size,
        num_hidden_layers=3,  # copying a fact takes two, and a third adds up what was checked
        num_attention_heads=args.num_heads,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=POSITIONS,
        rotary_pct=0.25,  # Pythia's; the other dimensions compare contents, and copying a fact is such a comparison
        bos_token_id=0,
        eos_token_id=0,
        # The usual 0.02 leaves attention flat in so narrow a model, and it takes long to find out where to look.
        initializer_range=0.1,
        # On purpose: the scripts have to switch dropout off (detail 7), and it shows when they do not.
        hidden_dropout=0.1,
        attention_dropout=0.1,
        classifier_dropout=0.1,
    )
    with torch.random.fork_rng(devices=[]):  # a caller's own random state stays as it is
        torch.manual_seed(1)
        model = GPTNeoXForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


# ---- Writing ---------------------------------------------------------------------------------------------------------
def write_comparisons(rows: list[dict], path: str) -> None:
    """OpenAI's schema. Types are named, since a column of nulls (article, site) would otherwise lose its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    fields = {
        "info": pa.struct([(name, text) for name in ("id", "post", "title", "subreddit", "article", "site")]),
        "summaries": pa.list_(pa.struct([(name, text) for name in ("text", "policy", "note")])),
        "choice": pa.int64(),
        "worker": text,
        "batch": text,
        "split": text,
        "extra": pa.struct([("confidence", pa.int64())]),
    }
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(fields.items()))), path)


def write_posts(rows: list[dict], path: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in ("id", "subreddit", "title", "post", "summary")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_facts(rows: list[dict], path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def describe_posts(posts: list[dict]) -> dict:
    """What the references of one split are worth."""
    scores = [gold_score(post["summary"], post["facts"]) for post in posts]
    thorough = [score for score, post in zip(scores, posts) if post["reference_kind"] == "thorough"]
    about = {"posts": len(posts), "vague_share": round(1 - len(thorough) / len(posts), 4)}
    about["reference_gold"] = round(sum(scores) / len(scores), 4)
    return about | {"thorough_reference_gold": round(sum(thorough) / max(1, len(thorough)), 4)}


def describe_comparisons(rows: list[dict], facts: list[dict]) -> dict:
    """How far labels agree with the gold score: what a perfect judge reaches, and so the ceiling of a reward model."""
    facts_of, agree = {row["id"]: row["facts"] for row in facts}, 0.0
    for row in rows:
        left, right = (gold_score(summary["text"], facts_of[row["info"]["id"]]) for summary in row["summaries"])
        agree += 0.5 if left == right else float((right > left) == bool(row["choice"]))
    return {"pairs": len(rows), "label_gold_agreement": round(agree / len(rows), 4)}


def build(args: Args, folder: str) -> dict:
    """Write everything but the manifest under `folder`; returns counts and statistics for the manifest."""
    for name in ("posts", "comparisons", "facts"):
        os.makedirs(f"{folder}/{name}")
    about, posts, seen = {}, {}, set()
    # Test first: what is seen is never drawn again, so the small splits do not depend on the size of the large one.
    for split in ("test", "validation", "train"):
        posts[split] = make_posts(args, split, getattr(args, f"num_{split}_posts"), seen)
    for split in ("train", "validation", "test"):
        comparisons = make_comparisons(args, split, getattr(args, f"num_{split}_pairs"), posts[split])
        facts = [facts_row(post, format_query(post["subreddit"], post["title"], post["post"])) for post in posts[split]]
        write_posts(posts[split], f"{folder}/posts/{split}.parquet")
        write_comparisons(comparisons, f"{folder}/comparisons/{split}.parquet")
        write_facts(facts, f"{folder}/facts/{split}.jsonl")
        about[split] = describe_posts(posts[split]) | describe_comparisons(comparisons, facts)
    cnndm, facts = make_cnndm(args, args.num_cnndm_pairs)
    write_comparisons(cnndm, f"{folder}/comparisons/validation_cnndm.parquet")
    write_facts(facts, f"{folder}/facts/validation_cnndm.jsonl")
    about["validation_cnndm"] = describe_comparisons(cnndm, facts)
    sample = posts["train"]
    if args.num_pretraining_posts:
        os.makedirs(f"{folder}/pretraining")
        for split, count in (("validation", 600), ("train", args.num_pretraining_posts)):
            sample = make_pretraining(args, split, count)
            write_posts(sample, f"{folder}/pretraining/{split}.parquet")
    if args.base_model == "pretrained":
        shutil.copytree(BASE_MODEL, f"{folder}/base_model")
        return about
    # A few thousand posts hold every word of the world many times over; more would change no merge that matters.
    sample = sample[:4000]
    texts = (format_query(p["subreddit"], p["title"], p["post"]) + " " + p["summary"] for p in sample)
    vocab_size = train_tokenizer(texts, f"{folder}/base_model")
    parameters = write_base_model(args, vocab_size, f"{folder}/base_model")
    return about | {"base_model": {"tokenizer_size": vocab_size, "parameters": parameters}}


# ---- Main ------------------------------------------------------------------------------------------------------------
MANIFEST = "tiny_env.json"
BASE_MODEL = Path(__file__).resolve().with_name("base_model")  # made by pretrain.sh


def fail(message: str) -> None:
    """Bad input: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_facts(env_dir: str) -> dict[str, dict]:
    """{id: facts row}, of every split of a folder that this script has written."""
    rows = {}  # ids are unique over the splits
    for path in sorted(Path(env_dir, "facts").glob("*.jsonl")):
        try:
            with open(path, encoding="utf-8") as file:
                rows |= {row["id"]: row for row in map(json.loads, file)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{path} cannot be read as facts ({error})")
    # The manifest is written last: without it the folder is no world, or not yet.
    if not rows or not os.path.exists(os.path.join(env_dir, MANIFEST)):
        fail(f"{env_dir} is no tiny world; benchmark/tiny_world/tiny_env.py makes such a folder")
    return rows


def check_args(args: Args) -> None:
    """Refuse flags that make no world, before anything is written."""
    if args.base_model == "pretrained" and (args.hidden_size, args.num_heads) != (Args.hidden_size, Args.num_heads):
        fail("--hidden_size and --num_heads are for new weights: pass --base_model random")
    bounds = {name: (1, 10**9) for name in vars(args) if name.startswith("num_")}
    bounds |= {"num_pretraining_posts": (0, 10**9), "num_values": (4, 24), "max_fillers": (0, len(FILLERS))}
    bounds["distractor_share"] = (0, 1)
    for name, (low, high) in bounds.items():
        if not low <= getattr(args, name) <= high:
            fail(f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    # Rotary embeddings turn pairs of dimensions, a quarter of each head's.
    if args.hidden_size % args.num_heads or args.hidden_size < 8 or (args.hidden_size // args.num_heads) % 8:
        fail(f"--hidden_size {args.hidden_size} must be --num_heads {args.num_heads} times a multiple of 8")


def settings_of(args: Args) -> dict:
    """What decides the bytes that are written: every flag but the place."""
    return {"world_version": WORLD_VERSION} | {k: v for k, v in asdict(args).items() if k != "output_dir"}


def already_there(args: Args) -> bool:
    """True where the folder holds this very world; a folder of anything else is refused."""
    folder, ours = args.output_dir, settings_of(args)
    manifest = os.path.join(folder, MANIFEST)
    if not os.path.exists(manifest):
        if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
            fail(f"--output_dir {folder} holds something else; name a new or an empty folder")
        return False
    try:
        with open(manifest, encoding="utf-8") as file:
            theirs = dict(json.load(file)["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--output_dir: {manifest} cannot be read; name a new folder")
    for name, value in ours.items():
        if theirs.get(name) != value:
            fail(f"--output_dir {folder} was made with {name} {theirs.get(name)}, not {value}; name a new folder")
    return True


def main() -> None:
    args = tyro.cli(Args, use_underscores=True, description=__doc__)
    check_args(args)
    if already_there(args):
        print(f"{args.output_dir} is complete, nothing to do")
        return
    # Beside its place and not in the system's temporary folder, so that the last step is a rename on one disk.
    building = args.output_dir.rstrip("/") + ".building"
    try:
        shutil.rmtree(building, ignore_errors=True)  # what a killed run left
        about = build(args, building)
        with open(os.path.join(building, MANIFEST), "w", encoding="utf-8") as file:
            json.dump({"settings": settings_of(args), **about}, file, indent=2)
        os.replace(building, args.output_dir)
    except OSError as error:
        fail(f"--output_dir {args.output_dir}: cannot be written ({error.strerror or error})")
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for name, figures in about.items():
        if name != "test":  # in the manifest for reports, not on the screen of who is choosing settings
            print(f"{name:17s}" + "  ".join(f"{key} {value:,}" for key, value in figures.items()))
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    main()
