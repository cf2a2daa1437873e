"""
From files to token ids (details 1 to 6): the folders that people have, the format of queries, the truncation rule, BOS,
EOS and [PAD], and rows that cannot be used. Real posts and comparisons too, where TLDR_DIR names a folder of them.
"""

import gzip
import json
import os
from types import SimpleNamespace

import pandas as pd
import pytest
from common import EOS, SCRIPTS, make_pairs, make_posts, make_tokenizer, ppo, reward, sft, write_rows
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TLDR_DIR = os.environ.get("TLDR_DIR")
needs_real_data = pytest.mark.skipif(not TLDR_DIR, reason="needs real TL;DR data: TLDR_DIR names no folder of them")
POST = {"id": "x1", "subreddit": "AskReddit", "title": "a b", "post": "one\ntwo", "summary": "short text"}
PAIR = make_pairs(1, 24)[0]
PRINTER = SimpleNamespace(print=print)  # all that loading needs of accelerate


@pytest.fixture(scope="module", params=["no bos", "bos"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(bos=request.param == "bos").save_pretrained(folder)
    return sft.load_tokenizer(str(folder), "--base_model")


def load(folder, tokenizer, split="train", script=sft):
    return script.load_posts(script.Args(query_dataset=str(folder)), split, tokenizer, PRINTER)


def load_pairs(folder, tokenizer, split="train"):
    return reward.load_comparisons(reward.Args(label_dataset=str(folder)), split, tokenizer, 2021, PRINTER)


def tokenize(rows, tokenizer, **limits):
    return [sft.tokenize_post(sft.Args(**limits), row, tokenizer) for row in rows]


def compare(rows, tokenizer, longest_news=2021, **limits):
    return [reward.tokenize_comparison(reward.Args(**limits), row, tokenizer, longest_news) for row in rows]


def bos_of(tokenizer):
    return [tokenizer.bos_token_id] if tokenizer.bos_token == "<s>" else []


def refused(capsys, function, *inputs):
    """The one line of an error, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        function(*inputs)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ")
    return line


def count(tokenizer, text):
    """Tokens without BOS, by the backend."""
    return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def slow_query(row, tokenizer, room):
    """The truncation rule step by step: drop the last line, again and again; the first one loses its characters."""
    lines = row["post"].split("\n")
    bodies = ["\n".join(lines[:n]) for n in range(len(lines), 0, -1)]
    for body in bodies + [lines[0][:n] for n in range(len(lines[0]) - 1, -1, -1)]:
        query = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {body}\n\nTL;DR:"
        if count(tokenizer, query) <= room:
            return query
    return ""


# ---- Queries and responses -------------------------------------------------------------------------------------------
def test_format_of_a_row(tokenizer):
    """Details 2, 3 and 5: BOS once, if at all; no space after the colon, one before the summary, EOS at the end."""
    bos = bos_of(tokenizer)
    query = "SUBREDDIT: r/AskReddit\n\nTITLE: a b\n\nPOST: one\ntwo\n\nTL;DR:"
    for summary in ("short text", " short text", "\n  short text"):
        (row,) = tokenize([POST | {"summary": summary}], tokenizer)
        assert (row["query"], row["id"], row["problem"]) == (query, "x1", "")
        query_tokens, tokens = row["query_tokens"].tolist(), row["tokens"].tolist()
        assert query_tokens == bos + tokenizer.backend_tokenizer.encode(query, add_special_tokens=False).ids
        assert tokens[: len(query_tokens)] == query_tokens  # no merge across the boundary
        assert tokenizer.decode(tokens[len(bos) :]) == query + " short text" + EOS
        assert tokens.count(tokenizer.eos_token_id) == 1 and tokens.count(tokenizer.bos_token_id) == 1


def test_pad_is_new_and_not_eos(tmp_path):
    """Even where the tokenizer brings a pad of its own, as Pythia's does, and even where that is EOS."""
    for number, own in enumerate((None, "<|padding|>", EOS)):
        make_tokenizer(pad=own).save_pretrained(tmp_path / f"{number}")
        loaded = sft.load_tokenizer(str(tmp_path / f"{number}"), "")
        assert (loaded.pad_token, loaded.pad_token_id) == ("[PAD]", len(make_tokenizer(pad=own)))
        loaded.save_pretrained(tmp_path / "again")  # a folder of the scripts' own: no second [PAD]
        assert sft.load_tokenizer(str(tmp_path / "again"), "").get_vocab() == loaded.get_vocab()


def test_special_tokens_that_somebody_typed_are_text(tokenizer):
    """Under a unigram vocabulary too, where they are no token."""
    typed = "I said <|endoftext|> and [PAD] and <s> here"
    (row,) = tokenize([POST | {"post": typed, "title": typed, "summary": typed}], tokenizer)
    body = row["tokens"].tolist()[len(bos_of(tokenizer)) : -1]
    assert not set(tokenizer.all_special_ids) & set(body) and tokenizer.decode(body).count(typed) == 3

    letters = [(letter, -5.0) for letter in map(chr, range(32, 127))] + [("<unk>", -20.0), ("</s>", 0.0)]
    backend = Tokenizer(models.Unigram(letters, unk_id=95))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    unigram.add_special_tokens({"pad_token": "[PAD]"})
    (row,) = tokenize([POST | {"post": typed}], unigram)
    assert row["problem"] == "" and unigram.pad_token_id not in row["tokens"] and len(row["query_tokens"]) > 50


@pytest.mark.parametrize("room", [26, 36, 50])
def test_truncation_rule(tokenizer, room):
    rows = make_posts(40, 3)
    odd = ["no newline here but a lot of text that must be cut by characters " * 3, "\n\n\nmoney\n\n" * 20, "a\n" * 90]
    odd += ["zwölf Boxkämpfer jagen Viktor \u2603 \U0001f600 über den Sylter Deich " * 3, "", "\n", "x" * 300]
    for row, post in zip(rows, odd):
        row["post"] = post
    expected = [slow_query(row, tokenizer, room - len(bos_of(tokenizer))) for row in rows]
    posts = tokenize(rows, tokenizer, max_query_length=room)
    assert [post.get("query", "") for post in posts] == expected
    assert all("cannot be cut" in post["problem"] or len(post["query_tokens"]) <= room for post in posts)
    assert sum(row["post"] not in query for row, query in zip(rows, expected)) > 5 and ("" in expected) == (room == 26)


@pytest.mark.parametrize("post", ["she said it " * 1700, "x" * 20000, "she said\nit again " * 11000])
def test_long_posts_are_cut_in_few_calls(post):
    """Not one call per character or line, of which there are thousands."""
    tokenizer, lengths = make_tokenizer(), []

    class Counting:
        def encode(self, text, **options):
            lengths.append(len(text))
            return tokenizer.encode(text, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    (row,) = tokenize([POST | {"post": post}], Counting())
    assert len(lengths) < 200 and sum(lengths) < 40 * len(post)
    assert row["problem"] == "" and count(tokenizer, row["query"]) <= 512
    body = row["query"].split("POST: ")[1].removesuffix("\n\nTL;DR:")
    assert post.startswith(body) and len(body) > 400
    longer = post[: post.find("\n", len(body) + 1) if "\n" in post else len(body) + 1]
    assert count(tokenizer, row["query"].replace(body, longer)) > 512  # no more fits


def test_rows_that_are_too_long_are_left_out_and_not_cut(tokenizer):
    """Detail 4: a cut would remove EOS."""
    post = POST | {"summary": "money " * 9}
    (row,) = tokenize([post], tokenizer)
    (pair,) = compare([PAIR], tokenizer)
    total, both = len(row["tokens"]), max(len(pair["chosen"]), len(pair["rejected"]))
    query = reward.encode(tokenizer, slow_query(PAIR["info"], tokenizer, 512))
    response, summary = total - len(row["query_tokens"]), both - len(query)
    for less in (0, 1):
        for limit in (dict(max_response_length=response - less), dict(max_query_response_length=total - less)):
            assert ("longer than" in tokenize([post], tokenizer, **limit)[0]["problem"]) == bool(less)
        for limit in (dict(max_response_length=summary - less), dict(max_query_response_length=both - less)):
            assert ("longer than" in compare([PAIR], tokenizer, **limit)[0]["problem"]) == bool(less)


BAD_POSTS = [
    ({"summary": ""}, "summary"), ({"summary": "  \n"}, "summary"), ({"summary": None}, "summary"),
    ({"title": None}, "title"), ({"title": ["a", "list"]}, "title"), ({"title": 20260101}, "title"),
    ({"post": None}, "post"), ({"subreddit": 7}, "subreddit"), ({"id": None}, "id"), ({"id": " "}, "id"),
    ({"subreddit": "\ud83d"}, "subreddit"),  # one half of an emoji, which JSON may hold
]  # fmt: skip


def test_unusable_posts_are_named_and_counted(tokenizer, tmp_path, capsys):
    rows = make_posts(14, 6)
    for row, (change, _) in zip(rows[1:], BAD_POSTS):
        row |= change
    rows[12]["id"] = 0
    rows[2]["id"] = "0"  # an id is taken only by a row that can be used
    rows[-1]["id"] = rows[0]["id"]  # samples are joined by id
    write_rows(tmp_path / "train.jsonl", rows)
    for script in SCRIPTS:
        assert [post["id"] for post in load(tmp_path, tokenizer, script=script)] == ["t3_6_0", "0"]
        out = capsys.readouterr().out
        assert "2 of 14 rows can be used" in out and "1 x the id occurs twice (first: row 13, id t3_6_0)" in out
        for number, name, first in ((1, "summary", 3), (3, "title", 4), (1, "post", 7), (2, "subreddit", 8)):
            assert f"{number} x {name} is missing or not a text (first: row {first}, id t3_6_{first})" in out
        assert "4 x the summary or the id is empty (first: row 1, id t3_6_1)" in out
    rows[1]["title"] = pd.Timestamp("2026-01-01")
    pd.DataFrame(rows[1:2]).to_parquet(tmp_path / "test.parquet")
    assert "title is missing or not a text" in refused(capsys, load, tmp_path, tokenizer, "test")  # no row is left


# ---- Files and folders -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [
    "train.parquet", "train.jsonl", "train.csv", "data/train-00000-of-00001.parquet", "gz", "shards", "save_to_disk",
])  # fmt: skip
def test_folders_as_people_have_them(kind, tmp_path):
    rows = make_posts(7, 7)
    rows[2]["post"] = 'a "quoted", line\nNA\nnull'  # for csv
    rows[3]["summary"] = "NA"
    more = [row | {"query_token": [1, 2]} for row in rows]  # other columns are ignored
    folder = tmp_path / "set"
    if kind == "save_to_disk":
        DatasetDict({"train": Dataset.from_list(more)}).save_to_disk(folder)
    elif kind == "gz":
        path = write_rows(tmp_path / "x.jsonl", more)
        write_rows(folder / "validation.jsonl", rows)
        (folder / "train.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "shards":
        write_rows(folder / "train-00001-of-00002.parquet", more[4:])
        write_rows(folder / "train-00000-of-00002.parquet", more[:4])
    else:
        write_rows(folder / kind, more)
        write_rows(folder / "train_old.jsonl", make_posts(2, 9))  # no split of that name
    tokenizer = make_tokenizer()
    for post, expected in zip(load(folder, tokenizer), tokenize(rows, tokenizer), strict=True):
        assert all((post[name] == expected[name]).all() for name in ("query_tokens", "tokens"))
        assert post["id"] == expected["id"]


@pytest.mark.parametrize("name", ["run[12]", "a::b", "$HOME", "https:/x", "*", "zwölf é", "~"])
def test_odd_folder_names_are_read_and_their_neighbours_never(name, tmp_path):
    write_rows(tmp_path / name / "train.parquet", make_posts(3, 7))
    for neighbour in ("run1", "run2", "a", "b"):
        write_rows(tmp_path / neighbour / "train.parquet", make_posts(5, 8))
    assert [post["id"] for post in load(tmp_path / name, make_tokenizer())] == [row["id"] for row in make_posts(3, 7)]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    (tmp_path / "train.jsonl").write_text("\ufeff" + json.dumps(POST) + "\n\n \n", encoding="utf-8")
    assert len(load(tmp_path, make_tokenizer())) == 1


def test_a_file_that_changes_is_read_again(tmp_path):
    """Also when it keeps its size and its modification time."""
    for summary in ("good one", "bad one!"):
        path = write_rows(tmp_path / "train.jsonl", [POST | {"summary": summary}])
        os.utime(path, (1e9, 1e9))
        assert load(tmp_path, make_tokenizer())[0]["reference"] == " " + summary


def test_a_column_that_is_null_for_12_megabytes(tmp_path):
    """Readers that infer a type from the first blocks refuse it; so it is with the real comparisons."""
    rows = [POST | {"id": f"{i}", "note": "x" * 20000, "title": None if i < 600 else "late"} for i in range(610)]
    rows[-1]["info"] = {"appears": "late"}
    assert write_rows(tmp_path / "train.jsonl", rows).stat().st_size > 12e6
    assert len(load(tmp_path, make_tokenizer())) == 10


# ---- Comparisons -----------------------------------------------------------------------------------------------------
def test_comparisons_follow_the_choice(tokenizer):
    rows, bos = make_pairs(30, 20), bos_of(tokenizer)
    for pair, row in zip(compare(rows, tokenizer, max_query_length=45), rows, strict=True):
        query = slow_query(row["info"], tokenizer, 45 - len(bos))
        assert bool(query) != bool(pair["problem"])
        for name, which in (("chosen", row["choice"]), ("rejected", 1 - row["choice"])):
            text = query + " " + row["summaries"][which]["text"].strip() + EOS
            assert not query or pair[name][: len(bos)].tolist() == bos
            assert not query or tokenizer.decode(pair[name][len(bos) :]) == text
        expected = (row["info"]["id"], row["batch"], str(row["extra"]["confidence"]))
        assert (pair["id"], pair["batch"], pair["confidence"]) == expected
        assert pair["policies"] == " | ".join(sorted(summary["policy"] for summary in row["summaries"]))
    assert {row["choice"] for row in rows} == {0, 1}


def test_the_published_set_has_columns_of_both_schemas(tmp_path):
    """`chosen` and `rejected`, with EOS as text, stand beside `info`, `summaries` and `choice`, without a prompt."""
    tokenizer, rows = make_tokenizer(), make_pairs(20, 24)
    write_rows(tmp_path / "train.parquet", [row | {"chosen": " a" + EOS, "rejected": " b" + EOS} for row in rows])
    for pair, expected in zip(load_pairs(tmp_path, tokenizer), compare(rows, tokenizer), strict=True):
        assert all((pair[name] == expected[name]).all() for name in ("chosen", "rejected"))


def test_prompt_chosen_rejected(tmp_path):
    """The schema of most preference sets: the same ids as OpenAI's, and cut by the same rule."""
    tokenizer, rows, others = make_tokenizer(), make_pairs(20, 21), []
    for row in rows:
        texts = [summary["text"] for summary in row["summaries"]]
        prompt = slow_query(row["info"], tokenizer, 10**6)
        others.append({"prompt": prompt, "chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]]})
        others[-1]["id"] = row["info"]["id"]
    spaced = [row | {"prompt": row["prompt"] + " \n" * (i % 3)} for i, row in enumerate(others)]
    write_rows(tmp_path / "train.parquet", spaced)
    found, cut = load_pairs(tmp_path, tokenizer), compare(others, tokenizer, max_query_length=40)
    for pair, expected, short, row in zip(found, compare(rows, tokenizer), cut, others, strict=True):
        assert all((pair[name] == expected[name]).all() for name in ("chosen", "rejected"))
        assert pair["id"] == row["id"]
        query = tokenizer.decode(short["chosen"]).split("\n\nTL;DR: ")[0]
        kept = query.split("\n")
        assert kept == row["prompt"].removesuffix("\n\nTL;DR:").split("\n")[: len(kept)]
        assert count(tokenizer, query + "\n\nTL;DR:") <= 40
    # One of another format, on which PPO's queries would be something else.
    (other,) = compare([others[0] | {"prompt": "Human: Hello\n\nAssistant:"}], tokenizer)
    assert "the prompt does not end with" in other["problem"]


@pytest.mark.parametrize("limit", [512, 40])
def test_another_format_is_changed_in_one_place(monkeypatch, limit):
    """`format_post` decides for both schemas: a prompt is used as it is, and keeps its end where it is cut."""
    tokenizer, rows, prompts = make_tokenizer(), make_pairs(20, 29), []
    monkeypatch.setattr(reward, "format_post", lambda subreddit, title, post: ("Text: ", post, "\n\nSummary:"))
    for row in rows:
        row["info"]["post"] += " \n"
        texts = [summary["text"] for summary in row["summaries"]]
        prompts.append({"prompt": f"Text: {row['info']['post']}\n\nSummary:"})
        prompts[-1] |= {"chosen": texts[row["choice"]], "rejected": texts[1 - row["choice"]]}
    pairs = [compare(table, tokenizer, max_query_length=limit) for table in (rows, prompts)]
    for pair, other in zip(*pairs, strict=True):
        assert all((pair[name] == other[name]).all() for name in ("chosen", "rejected"))
        assert "\n\nSummary: " in tokenizer.decode(other["chosen"])
    cut = [tokenizer.decode(pair["chosen"]).count(" \n\n\nSummary: ") == 0 for pair in pairs[1]]
    assert any(cut) == (limit == 40)


def test_cnndm_format_and_truncation(monkeypatch):
    """The newline after "TL;DR:" counts in the truncation and is stripped before the summary is joined."""
    tokenizer, row = make_tokenizer(), make_pairs(1, 22, news=True)[0]
    lines = ["First line is here.", "Second line is there.", "Third"]
    row["info"]["article"] = "\n".join(lines)
    summary = row["summaries"][row["choice"]]["text"].strip()
    for number in (3, 2, 1):
        query = "Article:\n" + "\n".join(lines[:number]) + "\n\nTL;DR:\n"
        monkeypatch.setattr(reward, "CNNDM_LIMITS", (count(tokenizer, query), 155, 2021))
        (fits,) = compare([row], tokenizer)
        monkeypatch.setattr(reward, "CNNDM_LIMITS", (count(tokenizer, query) - 1, 155, 2021))
        (less,) = compare([row], tokenizer)
        assert tokenizer.decode(fits["chosen"]) == query.strip() + " " + summary + EOS
        assert len(less["chosen"]) < len(fits["chosen"])
    length = max(len(less[side]) for side in ("chosen", "rejected"))
    problems = [compare([row], tokenizer, longest_news=longest)[0]["problem"] for longest in (length, length - 1)]
    assert problems == ["", f"longer than {length - 1} tokens with its query"]


@pytest.mark.parametrize("choice", [2, -1, None, "1", True])
def test_one_odd_choice_refuses_the_whole_set(choice, tmp_path, capsys):
    """It means another convention, by which half of the pairs would be inverted."""
    write_rows(tmp_path / "train.jsonl", make_pairs(5, 25) + [PAIR | {"choice": choice}])
    line = refused(capsys, load_pairs, tmp_path, make_tokenizer())
    assert f"row 5 has choice {choice!r}" in line


def test_unusable_comparisons_are_named_and_counted(tmp_path, capsys):
    """And optional fields may be missing."""
    good, other = make_pairs(2, 25), PAIR["summaries"][0]
    good.append({"info": dict(good[0]["info"], id="x"), "choice": 1, "summaries": [{"text": "a"}, {"text": "b"}]})
    bad = [{"info": None}, {"info": {"id": "a", "post": None}}, {"summaries": [other]}, {"summaries": [other] * 3}]
    bad += [{"summaries": None}, {"summaries": [{"text": " "}, other]}, {"summaries": [{"text": None}, other]}]
    bad += [{"info": "text"}, {"summaries": ["a", "b"]}]
    bad += [{"summaries": 5}, {"info": PAIR["info"] | {"title": ["a", "list"]}}, {"info": PAIR["info"] | {"post": 5}}]
    same = {"summaries": [{"text": " same text", "policy": "a"}, {"text": "same text ", "policy": "b"}]}
    write_rows(tmp_path / "train.jsonl", good + [PAIR | change for change in [*bad, same]])
    pairs = load_pairs(tmp_path, make_tokenizer())
    assert [pair["id"] for pair in pairs] == [row["info"]["id"] for row in good]
    assert [pairs[2][name] for name in ("batch", "confidence", "policies")] == ["", "", "unknown | unknown"]
    out = capsys.readouterr().out
    reasons = ("3 of 16 rows can be used", "1 x the summaries are the same (first: row 15, id t3_24_0)")
    reasons += ("5 x not two summaries, or one of the texts is empty", "7 x subreddit, title, post, article, prompt")
    assert all(reason in out for reason in reasons)


def test_cnndm_pairs_come_from_their_split_or_from_their_batches(tmp_path, monkeypatch):
    """Details 1 and 17: the hub set has a split of them, OpenAI's own files mix both kinds under batch names."""
    tldr, news = make_pairs(6, 27), make_pairs(8, 28, news=True)
    news[0]["batch"] = "batch0_cnndm"
    news[1]["summaries"][0]["text"] = " longer" * 100  # too long for the limits of TL;DR
    write_rows(tmp_path / "posts" / "validation.jsonl", [POST])
    write_rows(tmp_path / "split" / "validation.jsonl", tldr)
    write_rows(tmp_path / "split" / "validation_cnndm.jsonl", news)
    write_rows(tmp_path / "batches" / "validation.jsonl", news[:4] + tldr + news[4:])
    write_rows(tmp_path / "none" / "validation.jsonl", tldr)
    assert reward.CNNDM_LIMITS == (1919, 155, 2021)  # the paper's
    monkeypatch.setattr(reward, "CNNDM_LIMITS", (1919, 1500, 2021))
    both = DatasetDict(validation=Dataset.from_list(tldr), validation_cnndm=Dataset.from_list(news))
    both.save_to_disk(tmp_path / "disk")
    for name in ("split", "batches", "none", "disk"):
        folders = dict(label_dataset=str(tmp_path / name), query_dataset=str(tmp_path / "posts"))
        args = reward.Args(**folders, max_response_length=50)
        found = reward.load_evaluation(args, SimpleNamespace(max_position_embeddings=2048), make_tokenizer(), PRINTER)
        for pairs, rows in zip(found, (tldr, news if name != "none" else [])):
            assert [pair["id"] for pair in pairs] == [row["info"]["id"] for row in rows]
    # News that a model has no positions for is left out.
    lengths = [max(len(pair["chosen"]), len(pair["rejected"])) for pair in found[1]]
    limit = sorted(lengths)[3]
    short = reward.load_evaluation(args, SimpleNamespace(max_position_embeddings=limit), make_tokenizer(), PRINTER)[1]
    assert len(short) == sum(length <= limit for length in lengths) < 8


# ---- Real posts and comparisons --------------------------------------------------------------------------------------
@needs_real_data
def test_real_posts_and_comparisons():
    """Detail 4's published lengths; the truncation rule; nothing is left out for its length."""
    pythia = sft.load_tokenizer(f"{TLDR_DIR}/pythia_tokenizer", "--base_model")
    assert pythia.pad_token_id == 50277 and pythia.eos_token_id == 0 and bos_of(pythia) == []
    posts = load(f"{TLDR_DIR}/posts", pythia, "validation", script=ppo)
    raw = pd.read_parquet(f"{TLDR_DIR}/posts/validation.parquet").to_dict("records")
    # Published on the whole set, of which these are a part: 347 and 380 tokens on average.
    assert sum(len(post["query_tokens"]) for post in posts) / len(posts) == pytest.approx(347, abs=20)
    assert sum(len(post["tokens"]) for post in posts) / len(posts) == pytest.approx(380, abs=20)
    for row, post in zip(raw, posts, strict=True):
        if not post["query"].endswith("POST: " + row["post"] + "\n\nTL;DR:"):
            assert post["query"] == slow_query(row, pythia, 512)
    for row, post in zip(raw[:10], tokenize(raw[:10], pythia, max_query_length=150), strict=True):
        assert post["query"] == slow_query(row, pythia, 150)
        assert pythia.decode(post["tokens"]) == post["query"] + " " + row["summary"].lstrip() + EOS
    columns = ["info", "summaries", "choice", "batch", "extra"]
    rows = reward.read_rows(f"{TLDR_DIR}/comparisons", "test", columns, "--label_dataset")
    assert len(rows) == 531
    for pair in compare(rows[:100], pythia):
        text = pythia.decode(pair["chosen"])
        assert text.count(EOS) == 1 and text.endswith(EOS) and "\n\nTL;DR: " in text and "TL;DR:  " not in text
        assert "longer" not in pair["problem"] and "cut" not in pair["problem"]
