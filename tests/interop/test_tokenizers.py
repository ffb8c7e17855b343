"""Published tokenizers against transformers' own: ids, offsets, special tokens, chat."""

import io
import json
import pydoc_data.topics

import pytest
import sentencepiece
import tokenizers
import transformers as hf

from lmx import config as schema
from lmx.errors import DataError, LmxError
from lmx.text.published import PublishedTokenizer
from lmx.text.subwords import SentencePieceTokenizer
from lmx.text.tokenizers import ByteTokenizer, CharacterTokenizer

MANUAL = pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["types"] + " é ü 中 文 😀 ß к о ш"
TEXTS = [
    "The quick brown fox isn't lazy; it can't be.",
    "  two  spaces,   three\tand a tab\n\nnew lines \n",
    "Größe, naïve café, Ångström, ﬁne ½ — “quotes”…",
    "中文字符和日本語のテキスト, 한국어, русский кошка, العربية, हिन्दी",
    "def f(x: int) -> list[str]:\n    return {'a': [x ** 2, 0x1F]}  # code",
    "👩‍👩‍👧‍👦 😀 \u200b\ufeff zero width, \x00 \x07 control",
    "",
    "a",
    "https://example.org/a?b=c&d=%20 user@example.com 3.14159e-10",
]


def train_sentence_pieces(folder, kind, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(MANUAL.split("\n")), model_writer=model, model_type=kind, vocab_size=600,
        minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


def settings(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def bert(folder):
    model = tokenizers.BertWordPieceTokenizer(lowercase=True)
    model.train_from_iterator([MANUAL], vocab_size=500)
    model.save_model(str(folder))
    settings(folder, tokenizer_class="BertTokenizer", do_lower_case=True)
    return "bert"


def bert_cased(folder):
    model = tokenizers.BertWordPieceTokenizer(lowercase=False)
    model.train_from_iterator([MANUAL], vocab_size=500)
    model.save_model(str(folder))
    settings(folder, tokenizer_class="BertTokenizer", do_lower_case=False)
    return "bert"


def gpt2(folder):
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([MANUAL], vocab_size=500, special_tokens=["<|endoftext|>"])
    model.save_model(str(folder))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings(folder, tokenizer_class="GPT2Tokenizer", **names)
    return "gpt2"


def roberta(folder):
    model = tokenizers.ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    model.train_from_iterator([MANUAL], vocab_size=500, special_tokens=specials)
    model.save_model(str(folder))
    settings(folder, tokenizer_class="RobertaTokenizer")
    return "roberta"


def t5(folder):
    model = train_sentence_pieces(
        folder, "unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc"
    )
    (folder / "spiece.model").write_bytes(model)
    settings(
        folder, tokenizer_class="T5Tokenizer", extra_ids=100, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    return "t5"


def llama(folder):
    model = train_sentence_pieces(
        folder, "bpe", byte_fallback=True, character_coverage=0.99, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model)
    settings(folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
             add_bos_token=True, add_eos_token=False, legacy=False)  # fmt: skip
    return "llama"


@pytest.mark.parametrize("form", ["as published", "as tokenizer.json"])
@pytest.mark.parametrize("make", [bert, bert_cased, gpt2, roberta, t5, llama])
def test_ids_and_offsets_are_those_of_transformers(make, form, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": make(tmp_path)}))
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    if form == "as tokenizer.json":
        theirs.save_pretrained(tmp_path)
    ours = PublishedTokenizer.open(tmp_path)
    for text in TEXTS:
        expected = theirs(text, return_offsets_mapping=True)
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == expected["input_ids"], text
        assert offsets == [tuple(pair) for pair in expected["offset_mapping"]], text
        assert ours.frame().around([ours.encode(text)])[0] == expected["input_ids"]
    pair = theirs(TEXTS[0], TEXTS[4])
    framed, types = ours.frame(pair=True).around([ours.encode(TEXTS[0]), ours.encode(TEXTS[4])])
    assert framed == pair["input_ids"] and types == pair.get("token_type_ids", types)
    for role in ("pad", "eos", "bos", "unk", "mask", "cls", "sep"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id"), role


def test_what_is_saved_opens_as_the_same(tmp_path):
    gpt2(tmp_path)
    ours = PublishedTokenizer.open(tmp_path)
    ours.save(tmp_path / "saved")
    again = PublishedTokenizer.open(tmp_path / "saved")
    assert again.encode(MANUAL) == ours.encode(MANUAL) and again.eos_id == ours.eos_id


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'bad' %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ message['role'] }}>{{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chat_templates_are_rendered_as_transformers_does(tmp_path):
    gpt2(tmp_path)
    settings(tmp_path, tokenizer_class="GPT2Tokenizer", bos_token="<|endoftext|>", chat_template=TEMPLATE)
    messages = [{"role": "user", "content": " Hello  "}, {"role": "assistant", "content": "Yes?"}]
    theirs, ours = hf.AutoTokenizer.from_pretrained(tmp_path), PublishedTokenizer.open(tmp_path)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat(messages, add_generation_prompt=prompt) == expected
    with pytest.raises(LmxError, match="no such role"):
        ours.chat([{"role": "bad", "content": ""}])


def test_folders_without_a_tokenizer_say_what_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"there is no tokenizer: tokenizer.json, vocab.txt, vocab.json with merges.txt"
    ):
        PublishedTokenizer.open(tmp_path)


def trained(**settings):
    config = schema.Tokenizer(kind="sentencepiece", vocab_size=700, **settings)
    return SentencePieceTokenizer.train([MANUAL], config)


def equally_likely(ours, ids, others):
    """Whether the texts are cut into unigrams of one likelihood (a row of dashes); which it is, rounding decides."""
    if not isinstance(ours, SentencePieceTokenizer) or ours.decode(ids) != ours.decode(others):
        return False
    one, other = (sum(ours._pieces.get_score(i) for i in cut) for cut in (ids, others))
    return abs(one - other) < 1e-5 * abs(other)


OURS = {
    "bytes": lambda: ByteTokenizer(num_sentinels=3),
    "characters": lambda: CharacterTokenizer(MANUAL),
    "few characters": lambda: CharacterTokenizer("abc"),
    "unigram": lambda: trained(num_sentinels=4),
    "bpe": lambda: trained(model_type="bpe"),
    "lowercase": lambda: trained(lowercase=True),
    "no bytes": lambda: trained(byte_fallback=False),
    "bpe, no bytes": lambda: trained(model_type="bpe", byte_fallback=False),
}


@pytest.mark.parametrize("kind", OURS)
def test_our_own_tokenizers_are_written_so_that_transformers_reads_them_alike(kind, tmp_path):
    ours = OURS[kind]()
    ours.publish(tmp_path)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["abc cab\n\tx", "don't 12", *MANUAL.split("\n")[::5], *TEXTS]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text) or equally_likely(ours, ids, ours.encode(text)), text
        assert theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ours.decode(ids)
    assert theirs.pad_token_id == ours.pad_id and theirs.mask_token_id == ours.mask_id
