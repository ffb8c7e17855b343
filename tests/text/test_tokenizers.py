"""Every kind of tokenizer: nothing lost, the same from the same text, saved and opened, and clear about bad input."""

import json
import random
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest

from lmx.config import Tokenizer as Settings
from lmx.errors import ConfigError, DataError, LmxError
from lmx.text.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer, make_tokenizer

ENGLISH = [topics[name] for name in sorted(topics)[:12]]
CONTROL = "<s> </s> <pad> <mask> <unk> <extra_id_0> <0x41>"
TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\nlines\r\n\tand tabs\t",
    CONTROL,
    "\u2581 is SentencePiece's own space\u2581\u2581",
    "\u2585 and \u2047 are its unknowns",
    "caf\u00e9 cafe\u0301 \ufb01 \u212b \uff21",  # what NFKC would change
    "\u6f22\u5b57 \U0001f469\u200d\U0001f52c \ufeff\u2028\u00a0\u3000",
    "nul \x00 and \x7f",
]


def settings(**fields) -> Settings:
    return Settings(**{"kind": "sentencepiece", "vocab_size": 600, "num_sentinels": 3} | fields)


def english():
    return iter(ENGLISH)


def random_text(rng: random.Random) -> str:
    """Characters from all over Unicode, but for halves of surrogate pairs."""
    alphabets = ["ab \n", "".join(map(chr, range(128))), "".join(map(chr, range(0x2570, 0x2590)))]
    characters = []
    for _ in range(rng.randrange(60)):
        code = rng.randrange(0x110000)
        wild = chr(code) if not 0xD800 <= code < 0xE000 else "?"
        characters.append(rng.choice([wild, *(rng.choice(alphabet) for alphabet in alphabets)]))
    return "".join(characters)


@pytest.fixture(scope="module")
def unigram():
    return make_tokenizer(settings(), english)


@pytest.fixture(scope="module")
def bpe():
    return make_tokenizer(settings(model_type="bpe"), english)


@pytest.fixture(scope="module")
def characters():
    return make_tokenizer(settings(kind="characters"), lambda: iter(["hello world\n", "_2x! "]))


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "play", "##ing", "##ed", "caf", "##e", ",", "Play"]
    path.write_text("\n".join(pieces) + "\n")
    return make_tokenizer(settings(kind="file", path=str(path), lowercase=True, num_sentinels=0), english)


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory):
    """A tokenizer.json like GPT-2's, which also asks for padding and truncation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(ENGLISH, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer.save(str(path))
    return make_tokenizer(settings(kind="file", path=str(path.parent), num_sentinels=2), english)


KINDS = ["bytes", "characters", "unigram", "bpe", "word_piece", "byte_level_file"]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return ByteTokenizer(num_sentinels=3) if request.param == "bytes" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("kind", ["bytes", "unigram", "bpe", "byte_level_file"])
def test_what_is_encoded_decodes_to_the_same_text(kind, request):
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    rng = random.Random(0)
    texts = [*TRICKY, ENGLISH[3], *(random_text(rng) for _ in range(300))]
    if kind == "byte_level_file":  # the tokenizers library reads special tokens out of a text
        texts.remove(CONTROL)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert not tokenizer.special_ids.intersection(ids)


def test_our_kinds_begin_with_the_same_special_tokens(characters, unigram, bpe):
    for tokenizer in (ByteTokenizer(num_sentinels=3), characters, unigram, bpe):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id) == (
            0,
            1,
            2,
            3,
            4,
        )
        assert (tokenizer.cls_id, tokenizer.sep_id) == (1, 2)
        assert tokenizer.sentinel_ids == (5, 6, 7)
        assert tokenizer.special_ids == frozenset(range(8))
        ids = tokenizer.encode("hello")
        assert tokenizer.decode([1, *ids[:2], 5, 4, 3, *ids[2:], 0, 2]) == "hello"


def test_sizes_are_as_asked(unigram, bpe, characters):
    assert (unigram.vocab_size, bpe.vocab_size) == (600, 600)
    assert ByteTokenizer(num_sentinels=3).vocab_size == 264
    assert characters.vocab_size == 8 + len(set("hello world\n_2x! "))


def test_bytes_and_characters_have_known_ids(characters):
    assert ByteTokenizer(num_sentinels=3).encode("Aé") == [8 + 0x41, 8 + 0xC3, 8 + 0xA9]
    assert characters.characters == "\n !2_dehlorwx"
    assert characters.encode("he\n?\U0010ffff") == [8 + 7, 8 + 6, 8, 3, 3]
    assert characters.decode([9, 3, 8]) == " \n"


def test_word_piece_gives_berts_ids(word_piece):
    assert word_piece.encode("The playing, CAF\u00c9 zzz") == [5, 6, 7, 11, 9, 10, 1]
    assert word_piece.decode([2, 5, 6, 8, 3, 0]) == "the played"
    roles = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id", "bos_id", "eos_id")
    assert [getattr(word_piece, role) for role in roles] == [0, 1, 2, 3, 4, 2, 3]
    assert word_piece.special_ids == frozenset(range(5))


def test_a_tokenizer_json_is_read_whole(byte_level_file):
    assert len(byte_level_file.encode("one two three four five six")) > 4  # its truncation and padding are off
    assert len(byte_level_file.encode("a")) == 1
    end = byte_level_file.eos_id
    assert (byte_level_file.bos_id, byte_level_file.pad_id, byte_level_file.mask_id) == (end, None, None)
    assert byte_level_file.encode("<|endoftext|>") == [end]
    assert byte_level_file.sentinel_ids == (401, 400)  # above the vocabulary, <extra_id_0> last, as in T5
    assert byte_level_file.vocab_size == 402


def test_a_batch_is_its_texts(tokenizer):
    texts = [*TRICKY, "hello world"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)


def test_a_saved_tokenizer_opens_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "folder")
    tokenizer.save(tmp_path / "deep" / "folder")  # over the old one
    opened = load_tokenizer(tmp_path / "deep" / "folder")
    assert type(opened) is type(tokenizer)
    for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "unk_id", "mask_id", "cls_id", "sep_id", "sentinel_ids"):
        assert getattr(opened, name) == getattr(tokenizer, name)
    assert opened.special_ids == tokenizer.special_ids
    for text in [*TRICKY, "Hello World, the playing"]:
        assert opened.encode(text) == tokenizer.encode(text)
        assert opened.decode(opened.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert not list((tmp_path / "deep" / "folder").glob("*.tmp"))
    through_path = make_tokenizer(settings(kind=tokenizer.kind, path=str(tmp_path / "deep" / "folder")), english)
    assert through_path.encode("hello") == tokenizer.encode("hello")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_again_gives_the_same_model(model_type, tmp_path, request):
    first = request.getfixturevalue(model_type)
    again = make_tokenizer(settings(model_type=model_type), english)
    assert again._model == first._model
    other = make_tokenizer(settings(model_type=model_type), lambda: iter(ENGLISH[6:]))
    assert other._model != first._model


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_vocabulary_that_does_not_fit_is_an_error_that_names_one_that_does(model_type):
    def texts():
        return iter(["a rose is a rose is a rose\n" * 3])

    with pytest.raises(DataError, match="the largest possible is") as raised:
        make_tokenizer(settings(model_type=model_type, vocab_size=5000), texts)
    largest = int(str(raised.value).split("the largest possible is ")[1].split(".")[0])
    assert make_tokenizer(settings(model_type=model_type, vocab_size=largest), texts).vocab_size == largest
    with pytest.raises(DataError, match="set tokenizer.vocab_size to at least") as raised:
        make_tokenizer(settings(model_type=model_type, vocab_size=100), texts)
    least = int(str(raised.value).split("at least ")[1].rstrip("."))
    assert make_tokenizer(settings(model_type=model_type, vocab_size=least), texts).vocab_size == least


@pytest.mark.parametrize("kind", ["characters", "sentencepiece"])
def test_no_text_to_train_on_is_an_error(kind):
    with pytest.raises(DataError, match="the training source is empty"):
        make_tokenizer(settings(kind=kind), lambda: iter([""]))


def test_without_byte_fallback_unknown_characters_are_unk():
    tokenizer = make_tokenizer(settings(byte_fallback=False, vocab_size=300), english)
    assert tokenizer.encode("\u6f22") == [3]
    assert tokenizer.encode("a\u2581b").count(3) == 1
    assert tokenizer.decode(tokenizer.encode("plain text\n")) == "plain text\n"


def test_only_so_many_characters_are_read():
    seen = []

    def texts():
        for text in ("aab", "cdef", "g"):
            seen.append(text)
            yield text

    tokenizer = make_tokenizer(settings(kind="characters", training_characters=5), texts)
    assert tokenizer.characters == "abcd"
    assert seen == ["aab", "cdef"]


@pytest.mark.parametrize("kind", ["bytes", "characters", "sentencepiece"])
def test_lower_casing_is_of_training_and_of_encoding(kind, tmp_path):
    made = make_tokenizer(settings(kind=kind, lowercase=True), lambda: (text.upper() for text in ENGLISH))
    made.save(tmp_path)
    for tokenizer in (made, load_tokenizer(tmp_path)):
        assert tokenizer.encode("Hello WORLD") == tokenizer.encode("hello world")
        assert tokenizer.decode(tokenizer.encode("Hello WORLD")) == "hello world"
    if kind == "characters":
        assert not any(character.isupper() for character in made.characters)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_text_is_its_lines(model_type, request):
    """Also where "*****" could be cut in several ways that are equally likely."""
    tokenizer = request.getfixturevalue(model_type)
    for text in ENGLISH[:4]:
        lines = text.splitlines(keepends=True)
        assert tokenizer.encode(text) == [i for line in lines for i in tokenizer.encode(line)]


def test_very_long_lines_are_encoded_in_parts(bpe, monkeypatch):
    texts = ["no newline in it, " * 200, "unbroken" * 200, "two  spaces  here " * 90]
    expected = [bpe.encode(text) for text in texts]
    pieces, encoded_at_once = bpe._pieces, []

    class Counting:
        def encode(self, parts):
            encoded_at_once.append(max(map(len, parts)))
            return pieces.encode(parts)

    monkeypatch.setattr("lmx.text.subwords.LONG_LINE", 50)
    monkeypatch.setattr(bpe, "_pieces", Counting())
    assert [bpe.encode(text) for text in texts] == expected
    assert [length < 70 for length in encoded_at_once] == [True, False, True]  # only the unbroken one stayed long


def words(tokenizer, text: str) -> list[str]:
    """The tokens of a text joined to words where ``word_starts`` says."""
    ids = tokenizer.encode(text)
    starts = tokenizer.word_starts(ids)
    assert starts.dtype == bool and starts.shape == (len(ids),)
    groups = np.split(ids, np.flatnonzero(starts)[1:])
    return [tokenizer.decode(group).strip() for group in groups]


def test_words_start_where_text_has_them(tokenizer):
    if tokenizer.kind == "file" and tokenizer.mask_id is not None:
        assert words(tokenizer, "playing the played, play") == ["playing", "the", "played", ",", "play"]
    elif tokenizer.kind == "characters":
        assert [word for word in words(tokenizer, "hello_2 world! he\nllo") if word] == [
            "hello_2",
            "world",
            "!",
            "he",
            "llo",
        ]
    else:
        text = "the statement_2 (caf\u00e9): x\ny\tz  unquestionably"
        expected = ["the", "statement_2", "(", "caf\u00e9", ")", ":", "x", "y", "z", "unquestionably"]
        assert [word for word in words(tokenizer, text) if word] == expected


def test_special_tokens_and_the_first_token_are_words(unigram):
    ids = unigram.encode("unquestionably")
    assert len(ids) > 3
    assert unigram.word_starts([1, *ids, 2]).tolist() == [True, True, *[False] * (len(ids) - 1), True]
    assert unigram.word_starts(ids[1:]).tolist() == [True, *[False] * (len(ids) - 2)]
    assert unigram.word_starts([]).shape == (0,)


def test_a_model_trained_elsewhere_gets_t5s_sentinels(tmp_path):
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(ENGLISH).split("\n")),
        model_writer=model,
        vocab_size=500,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = make_tokenizer(settings(path=str(tmp_path / "spiece.model")), english)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, None)
    assert tokenizer.sentinel_ids == (502, 501, 500)
    assert tokenizer.vocab_size == 503
    ids = tokenizer.encode("the  statement")  # with the model's own normalization
    assert tokenizer.decode([*ids, 502, 1]) == "the statement"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sentinel_ids == (502, 501, 500)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kind": "file"}, ConfigError, "needs tokenizer.path"),
        ({"path": "nowhere"}, DataError, "there is no 'nowhere', seen from"),
        ({"path": "empty"}, ConfigError, "does not open 'empty'.*SentencePiece model file"),
        (
            {"kind": "bytes", "path": "notes.txt"},
            ConfigError,
            "kind='bytes' does not open 'notes.txt'.*or no path at all",
        ),
        ({"path": "notes.txt"}, DataError, "not a SentencePiece model"),
        ({"kind": "file", "path": "empty"}, DataError, "holds neither tokenizer.json nor vocab.txt"),
        ({"kind": "file", "path": "notes.txt"}, DataError, r"no line \[UNK\], \[CLS\], \[SEP\]"),
        ({"kind": "file", "path": "twice.txt"}, DataError, "1 of its lines are there twice"),
        ({"kind": "file", "path": "notes.json"}, DataError, "not a tokenizer.json"),
        ({"kind": "file", "path": "notes.json", "lowercase": True}, ConfigError, "has its own normalization"),
        ({"kind": "characters", "path": "bytes"}, ConfigError, "holds one of kind 'bytes'"),
    ],
)
def test_a_bad_path_is_an_error_that_says_why(tmp_path, monkeypatch, fields, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("buy milk\n")
    (tmp_path / "twice.txt").write_text("[UNK]\na\na\n")
    (tmp_path / "notes.json").write_text('{"milk": 1}')
    ByteTokenizer().save(tmp_path / "bytes")
    with pytest.raises(error, match=message):
        make_tokenizer(settings(**fields), english)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no tokenizer of lmx: there is no"),
        ("{", "is damaged"),
        ('{"num_sentinels": 0}', "is damaged: KeyError"),
        ('{"kind": "bytes", "colour": 1}', "is damaged: TypeError"),
        ('{"kind": "byte"}', "unknown kind 'byte'; did you mean 'bytes'"),
        ('{"kind": "sentencepiece", "num_sentinels": 0, "lowercase": false}', "there is no .*spiece.model"),
    ],
)
def test_a_damaged_folder_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "lmx_tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_the_description_is_plain_json(tmp_path):
    CharacterTokenizer("é\nab", num_sentinels=1).save(tmp_path)
    assert json.loads((tmp_path / "lmx_tokenizer.json").read_bytes()) == {
        "kind": "characters",
        "lowercase": False,
        "characters": "\nabé",
        "num_sentinels": 1,
    }


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(LmxError, match=r"needs the package 'tokenizers'.*pip install 'lmx\[hf\]'"):
        make_tokenizer(settings(kind="file", path=str(tmp_path)), english)
