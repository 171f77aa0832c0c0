"""Sentences as records: the splitter, the tokenizer, the two data sets, and bad input."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmi.data.dataset import DataError
from fedmi.data.partitions.by_identity import ByIdentity
from fedmi.data.sentences import sentences_of
from fedmi.data.state_of_the_union import StateOfTheUnion
from fedmi.data.text_csv import TextCSV
from fedmi.data.wordpiece import WordPiece, padded, train, words_of
from fedmi.exposure.schema import END, PADDING, SPECIAL, START, UNKNOWN, Text
from fedmi.exposure.seeding import Seed
from fedmi.models.minilm import MiniLM
from fedmi.models.text_bag import TextBag
from fedmi.models.text_transformer import TextTransformer

SMS = Path(__file__).parents[1].parent / "shared/data/sms_spam.tsv"
LINES = [
    "the state of the union is strong tonight",
    "we choose to go to the moon in this decade",
    "ask not what your country can do for you",
    "the union of these states is perpetual and strong",
    "a house divided against itself cannot stand",
    "government of the people shall not perish",
]
WORDS = [word for line in LINES for word in words_of(line)] * 3


def table(folder: Path, *rows: str, name: str = "own.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(("text,label,who", *rows)) + "\n", encoding="utf-8")
    return path


def many(folder: Path) -> Path:
    return table(folder, *(f"{line} {n},{n % 2},p{n % 4}" for n in range(8) for line in LINES[:4]))


# --- the splitter


def test_sentences_end_where_a_reader_ends_them() -> None:
    text = (
        "The President. Mr. Speaker, the U.S. Army is ready. It has $3.5 billion! [Applause] Is it "
        'enough? "Yes." No. 5 said so.\nDEFENSE\nThe items are:\n- guns;\nJ. Doe spoke (as ever).'
    )
    assert sentences_of(text) == [
        "The President.",
        "Mr. Speaker, the U.S. Army is ready.",
        "It has $3.5 billion!",
        "Is it enough?",
        '"Yes."',
        "No. 5 said so.",
        "J. Doe spoke (as ever).",
    ]


def test_what_is_no_sentence_is_left_out() -> None:
    assert (
        sentences_of("THE BUDGET\nIII.\nand so on.\nIn [1815-03-03] it ended.\nTotal 5 6 7") == []
    )


# --- the tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_words_come_back_from_their_pieces(text: str) -> None:
    pieces = train(words_of(text) + WORDS, 400, "test")
    longest = max(map(len, words_of(text)), default=0)
    back = pieces.decode(pieces.encode(text))
    assert back == " ".join(words_of(text)) or longest > 100
    assert START not in pieces.encode(text)


def test_a_word_is_cut_into_the_longest_pieces_from_the_left() -> None:
    pieces = WordPiece((*SPECIAL, "un", "union", "##i", "##on", "##ized", "u", "##n"))
    named = [pieces.pieces[number] for number in pieces.encode("Unionized UNON")]
    assert named == ["union", "##ized", "un", "##on"]


def test_a_word_with_an_unknown_character_is_unknown() -> None:
    pieces = train(WORDS, 200, "test")
    assert pieces.encode("мир") == [UNKNOWN]
    assert pieces.decode(pieces.encode("moon мир")) == "moon [UNK]"


def test_training_joins_the_commonest_neighbours_first() -> None:
    """Against byte-pair encoding as written in the paper: recount everything each time."""
    counts = Counter(WORDS)
    words = {word: [word[0], *("##" + c for c in word[1:])] for word in counts}
    made: list[str] = []
    while len(made) < 25:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        whole = best[0] + best[1].removeprefix("##")
        made.append(whole)
        for parts in words.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = [whole]
                at += 1
    alphabet = len(train(WORDS, 10_000, "test").pieces)
    characters = len({p for p in train(WORDS, 10_000, "test").pieces if len(p.strip("#")) == 1})
    assert alphabet > characters + 25
    assert list(train(WORDS, 4 + characters + 25, "test").pieces[-25:]) == made


def test_records_are_framed_and_padded() -> None:
    assert padded([[7, 8], [9]], 5).reshape(2, 5).tolist() == [
        [START, 7, 8, END, PADDING],
        [START, 9, END, PADDING, PADDING],
    ]


def test_a_vocabulary_too_small_for_the_characters_says_how_large() -> None:
    with pytest.raises(DataError, match=r"speech: vocabulary = 10 has no room .* at least \d+"):
        train(WORDS, 10, "speech")


# --- the addresses


def test_speeches_are_whole_sentences_of_presidents() -> None:
    data = StateOfTheUnion()
    records, card = data.load(), data.card()
    schema = records.schema
    assert isinstance(schema, Text)
    assert card.schema == schema
    assert card.shape == records.shape == (1, 1, 24)
    rows = torch.tensor(records.inputs).flatten(1)
    assert (rows[:, 0] == START).all()
    assert ((rows == END).sum(1) == 1).all()
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    assert np.bincount(records.identities).max() == 100
    said = " ".join(schema.words(torch.from_numpy(records.inputs[0])))
    assert said[-1] in ".!?"
    assert not (rows == UNKNOWN).any()
    left_out, found = re.findall(r"(\d+) of (\d+) sentences have more than 22", card.source)[0]
    assert 0 < int(left_out) < int(found)


def test_eras_and_parties_label_presidents() -> None:
    era = StateOfTheUnion()
    names, records = era.presidents(), era.load()
    assert len(names) == 43
    roosevelt = records.identities == names.index("Franklin D. Roosevelt")
    assert set(records.labels[roosevelt]) == {1}
    assert set(records.labels[records.identities == names.index("Abraham Lincoln")]) == {0}
    party = StateOfTheUnion(label="party")
    assert "George Washington" not in party.presidents()
    reagan = party.load().identities == party.presidents().index("Ronald Reagan")
    assert set(party.load().labels[reagan]) == {1}


def test_presidents_are_private_or_public_and_clients() -> None:
    split = StateOfTheUnion().split(Seed.root(3))
    private = {*split.private.identities, *split.held_out.identities}
    assert not private & {*split.public.identities}
    hands = ByIdentity().assign(split.private, 10, Seed.root(3))
    people = [set(split.private.identities[hand]) for hand in hands]
    assert sum(map(len, people)) == len(set().union(*people))
    twin = split.disjoint_twin(Seed.root(3))
    assert np.array_equal(twin.private.labels, split.private.labels)
    assert not set(twin.private.ids) & set(split.private.ids)


def test_private_presidents_are_the_named_ones() -> None:
    named = ("Abraham Lincoln", "Barack Obama")
    data = StateOfTheUnion(private_presidents=named)
    split = data.split(Seed.root(1))
    names = data.presidents()
    assert {names[i] for i in split.private.identities} == set(named)
    assert len(set(split.public.identities)) == 41
    with pytest.raises(DataError, match=r"private_presidents names Lincoln; .*Abraham Lincoln"):
        StateOfTheUnion(private_presidents=("Lincoln",)).split(Seed.root(1))


def test_by_record_every_president_may_be_on_every_side() -> None:
    split = StateOfTheUnion(disjoint="record").split(Seed.root(1))
    assert len(set(split.private.identities) & set(split.public.identities)) > 30
    assert not set(split.private.ids) & set(split.public.ids)


def test_longer_sentences_are_left_out_not_cut() -> None:
    short, longer = StateOfTheUnion(length=12).load(), StateOfTheUnion().load()
    assert isinstance(short.schema, Text)
    ends = (torch.from_numpy(short.inputs) == END).sum((1, 2, 3))
    assert (ends == 1).all()
    assert len(short) < len(longer)
    marks = {short.schema.words(torch.from_numpy(one))[-1] for one in short.inputs}
    assert all(mark in {".", "!", "?", '"', "'", ")"} for mark in marks)
    with pytest.raises(DataError, match="more than length = 4 tokens"):
        StateOfTheUnion(length=4).load()


# --- files of the user's own


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = many(tmp_path)
    records = TextCSV(path=path, vocabulary=200, length=32).load()
    assert isinstance(records.schema, Text)
    assert len(records) == 32
    assert records.schema.words(torch.from_numpy(records.inputs[0])) == [*LINES[0].split(), "0"]
    split = TextCSV(path=path, vocabulary=200, length=32, identity="who").split(Seed.root(0))
    assert not {*split.private.identities} & {*split.public.identities}
    before = TextCSV(path=path).fingerprint()
    path.write_text(path.read_text() + "one more,1,p0\n")
    assert TextCSV(path=path).fingerprint() != before


def test_long_sentences_of_a_file_are_counted(tmp_path: Path) -> None:
    rows = [f"{'very ' * (n % 3) * 14}short {n},{n % 2},x" for n in range(30)]
    data = TextCSV(path=table(tmp_path, *rows), vocabulary=100, length=16)
    assert len(data.load()) == 10
    assert "20 sentence(s) with more than 14 tokens are left out" in data.card().source


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (",0,a", r"own\.csv:3: 'text' is empty"),
        ("hello,,a", r"own\.csv:3: 'label' is empty"),
        ("hello", r"own\.csv:3: 1 cell"),
        ("\u200b,0,a", r"own\.csv:3: the sentence has no word"),
        ('"broken,0,a', r"own\.csv: not a readable table"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        TextCSV(path=table(tmp_path, "a fine row,1,b", row), vocabulary=100).load()


def test_bad_files_and_columns_are_named(tmp_path: Path) -> None:
    path = many(tmp_path)
    for options, said in (
        ({"text": "body"}, "no column 'body'; the header has text, label, who"),
        ({"vocabulary": 9}, "vocabulary = 9 has no room"),
        ({"length": 4}, "more than length = 4 tokens"),
        ({"label": "text"}, "too few for one private"),
    ):
        with pytest.raises(DataError, match=said):
            TextCSV.model_validate({"path": path, "length": 32, **options}).split(Seed.root(0))
    with pytest.raises(DataError, match="no such file"):
        TextCSV(path=tmp_path / "none.csv").load()
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncafé noir,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a readable table"):
        TextCSV(path=latin).load()


@pytest.mark.skipif(not SMS.is_file(), reason="the SMS collection is not beside the repository")
def test_the_sms_collection_is_read() -> None:
    data = TextCSV(path=SMS, vocabulary=1024, length=32)
    assert data.card().classes == 2
    assert len(data.load()) > 2000


# --- against the models


def test_a_vocabulary_or_length_that_the_model_has_not_is_refused() -> None:
    schema = train(WORDS, 200, "test").schema(24)
    count = len(schema.pieces)
    assert not TextTransformer(vocabulary=count, positions=24).misfit(schema)
    assert f"vocabulary = {count} would be right" in TextBag(vocabulary=9).misfit(schema)
    assert "positions = 16" in TextTransformer(positions=16).misfit(schema)
    assert "30522" not in MiniLM().misfit(schema)
