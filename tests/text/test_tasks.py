"""Tasks as text to text: templates, the forms of T5's appendix, tasks of one's own."""

import json

import pytest

from lmx.errors import DataError
from lmx.text.corpora import open_source
from lmx.text.tasks import TASKS, Task, TaskRecords
from lmx.text.templates import Template

PAIR = ("source", "target")
RECORD = {"text": "hi", "label": 2, "answers": {"text": ["one", b"two"]}, "content-type": "html"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("say: {text}", "say: hi"),
        ("{text} {text}!", "hi hi!"),
        ("{label}", 2),
        ("{label} ", "2 "),
        ("{answers[text][1]}", "two"),
        ("{{{text}}}", "{hi}"),
        ("{content-type}", "html"),
        ("nothing", "nothing"),
    ],
)
def test_templates_write_fields(text, expected):
    assert Template(text)(RECORD) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{text", "cannot be read: expected '}'"),
        ("text}", "A brace in the text is doubled"),
        ("{}", "has '' in braces, where the name of a field is due"),
        ("{text.__class__}", "has 'text.__class__' in braces"),
        ("{text!r}", "has 'text' in braces"),
        ("{text:>5}", "has 'text' in braces"),
    ],
)
def test_what_is_no_template_is_an_error(text, message):
    with pytest.raises(DataError, match=message):
        Template(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{txt}", "has no field 'txt'; did you mean 'text'"),
        ("{answers[text][2]}", r"field 'answers\[text\]\[2\]' of .*: there is no \[2\]"),
        ("{answers[txt]}", r"there is no \[txt\]"),
        ("{label[0]}", r"there is no \[0\] in 2"),
    ],
)
def test_a_record_without_the_field_is_an_error(text, message):
    with pytest.raises(DataError, match=message):
        Template(text)(RECORD)


# Raffel et al. 2020, appendix D: "processed input" and "processed target" of each, shortened.
APPENDIX_D = {
    "glue_cola": ({"sentence": "John made Bill.", "label": 0}, ("cola sentence: John made Bill.", "unacceptable")),
    "glue_rte": (
        {"sentence1": "A smaller proportion.", "sentence2": "Yugoslavs.", "label": 1},
        ("rte sentence1: A smaller proportion. sentence2: Yugoslavs.", "not_entailment"),
    ),
    "glue_mnli": (
        {"premise": "yeah well losing.", "hypothesis": "The Cardinals won.", "label": 2},
        ("mnli hypothesis: The Cardinals won. premise: yeah well losing.", "contradiction"),
    ),
    "glue_mrpc": (
        {"sentence1": "We acted.", "sentence2": "We did.", "label": 1},
        ("mrpc sentence1: We acted. sentence2: We did.", "equivalent"),
    ),
    "glue_qnli": (
        {"question": "Where?", "sentence": "In Zurich.", "label": 0},
        ("qnli question: Where? sentence: In Zurich.", "entailment"),
    ),
    "glue_qqp": (
        {"question1": "Q1?", "question2": "Q2?", "label": 0},
        ("qqp question1: Q1? question2: Q2?", "not_duplicate"),
    ),
    "glue_sst2": ({"sentence": "it confirms", "label": 1}, ("sst2 sentence: it confirms", "positive")),
    "glue_stsb": (
        {"sentence1": "Rice.", "sentence2": "Iraq.", "label": 3.25},
        ("stsb sentence1: Rice. sentence2: Iraq.", "3.2"),
    ),
    "cnn_dailymail": (
        {"article": "marouane fellaini", "highlights": "the belgian duo"},
        ("summarize: marouane fellaini", "the belgian duo"),
    ),
    "squad": (
        {"question": "What?", "context": "Hyperbaric.", "answers": {"text": ["carbon monoxide", "monoxide"]}},
        ("question: What? context: Hyperbaric.", "carbon monoxide"),
    ),
    "wmt_en_de": ({"de": "Luigi", "en": "Luigi often"}, ("translate English to German: Luigi often", "Luigi")),
    "wmt_en_fr": ({"fr": "Ce site", "en": "This site"}, ("translate English to French: This site", "Ce site")),
    "wmt_en_ro": (
        {"ro": "Taco Bell a", "en": "Taco Bell"},
        ("translate English to Romanian: Taco Bell", "Taco Bell a"),
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_the_forms_of_the_paper(name):
    record, expected = APPENDIX_D[name]
    (found,) = TaskRecords([record], TASKS[name])
    assert found == dict(zip(PAIR, expected, strict=True))


@pytest.mark.parametrize(("value", "written"), [(0.0, "0.0"), (2.6, "2.6"), (2.69, "2.6"), (4.91, "5.0"), (5.0, "5.0")])
def test_similarities_are_rounded_to_fifths(value, written):
    record = {"sentence1": "a", "sentence2": "b", "label": value}
    assert TaskRecords([record], TASKS["glue_stsb"])[0]["target"] == written


def test_a_split_without_labels_is_an_error():
    with pytest.raises(DataError, match="has label -1, which has no name"):
        TaskRecords([{"sentence": "a", "label": -1}], TASKS["glue_cola"])[0]


@pytest.mark.parametrize(
    ("source", "split", "spec"),
    [
        ("tfds:glue/cola", "validation", "tfds:glue/cola@validation"),
        ("tfds:glue/cola", "", "tfds:glue/cola"),
        ("jsonl:data/{split}.jsonl", "test", "jsonl:data/test.jsonl"),
        ("jsonl:data/{split}.jsonl", "", "jsonl:data/train.jsonl"),
    ],
)
def test_a_split_goes_to_the_tasks_source(source, split, spec):
    assert Task(source, "{a}", "{b}").spec(split) == spec


SHOUT = {"name": "shout", "source": "jsonl:{split}.jsonl", "input": "shout: {text}", "target": "{label}!"}


@pytest.fixture
def words(tmp_path, monkeypatch):
    """train.jsonl and test.jsonl, and tasks.jsonl with the task shout."""
    monkeypatch.chdir(tmp_path)
    for split, letters in (("train", "abcdefghij"), ("test", "xyz")):
        lines = [json.dumps({"text": letter, "label": letters.index(letter) % 2}) for letter in letters]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks.jsonl").write_text(json.dumps(SHOUT | {"labels": ["NO", "YES"]}) + "\n")


@pytest.mark.parametrize("name", ["shout", "tasks.jsonl#shout"])
def test_tasks_of_ones_own_come_from_the_config_or_a_file(words, name):
    own = (json.dumps(SHOUT | {"labels": ["NO", "YES"]}),)
    source = open_source(f"task:{name}@test", PAIR, own)
    assert [source[i] for i in range(len(source))] == [
        {"source": f"shout: {letter}", "target": answer}
        for letter, answer in zip("xyz", ("NO!", "YES!", "NO!"), strict=True)
    ]
    assert len(open_source(f"task:{name}[:30%]", PAIR, own)) == 3
    mixed = open_source(f"task:{name} + task:{name}@test", PAIR, own)
    assert len(mixed) == 13 and mixed.weights == ()


@pytest.mark.parametrize(
    ("spec", "own", "message"),
    [
        ("task:glue_coal", (), "there is no task 'glue_coal'; did you mean 'glue_cola'"),
        ("task:tasks.jsonl#shuot", (), "there is no task 'shuot' in tasks.jsonl; did you mean 'shout'"),
        ("task:none.jsonl#shout", (), "no file 'none.jsonl'"),
        ("task:bad", ("{",), "entry 0 of data.tasks is not JSON"),
        ("task:bad", ("[]",), "entry 0 of data.tasks is no task: it lacks name"),
        ("task:bad", ('{"name": "bad", "source": "x"}',), "lacks input, target"),
        ("task:shout", (json.dumps(SHOUT | {"label": 1}),), "a field 'label', which a task has not; .*'labels'"),
        ("task:shout", (json.dumps(SHOUT | {"labels": "no"}),), "'no' as 'labels', where a list of texts is due"),
        ("task:shout", (json.dumps(SHOUT | {"input": "{txt}"}),), "train.jsonl line 1 has no field 'txt'"),
        ("task:shout@test", (json.dumps(SHOUT | {"source": "jsonl:test.jsonl"}),), "has no splits, so @test"),
    ],
)
def test_a_bad_task_is_an_error(words, spec, own, message):
    with pytest.raises(DataError, match=message):
        open_source(spec, PAIR, own)
