"""Cleaning steps: what each takes away, and how it is counted."""

import pytest

from lmx.errors import ConfigError
from lmx.preparation.cleaning import C4, STEPS, Cleaner, chosen_steps, describe_steps

LINES = "This line is a whole sentence.\nMenu\nThis one has no end mark at all\nSo does it end? Yes, and well! Good.\n"


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("unicode", "cafe\u0301 \u212b", "caf\u00e9 \u00c5"),
        ("control", "\ufeffa\x00b\tc\r\nd\re\x1b[0m\x85\ud800", "ab\tc\nd\ne[0m"),
        ("citations", "Seen[1] there[23][citation needed] [edit][a]", "Seen there [a]"),
        ("javascript", "Please enable JavaScript.\nText", "Text"),
        ("policy", "Read our Privacy Policy.\nText\nThis site uses cookies", "Text"),
        ("punctuation", 'One.\nTwo\nThree! \n"Four"\n“Five”\nMore...\n', 'One.\nThree! \n"Four"\n“Five”'),
        ("line_words", "a b c d\na b c d e", "a b c d e"),
        ("placeholder", "Here is Lorem ipsum dolor", ""),
        ("curly", "int main() { }", ""),
        ("curly", "no code", "no code"),
        ("sentences", "One. Two! And a third", ""),
        ("sentences", 'One. Two! "And a third?"', 'One. Two! "And a third?"'),
    ],
)
def test_a_step_does_what_it_says(step, text, expected):
    assert STEPS[step][0](text) == expected


def test_the_rules_of_c4_together():
    cleaner = Cleaner(C4, min_words=1)
    assert cleaner(LINES) == "This line is a whole sentence.\nSo does it end? Yes, and well! Good."
    assert cleaner("Menu\nHome") == ""
    assert cleaner.dropped == dict.fromkeys([*C4, "min_words"], 0) | {"punctuation": 1}
    assert cleaner.removed["punctuation"] == len("Menu\nThis one has no end mark at all\n\n") + len("Menu\nHome")


def test_short_documents_are_dropped_and_counted():
    cleaner = Cleaner(("unicode", "control"), min_words=3)
    assert [cleaner(text) for text in ("a b c", "a b", "\x00\x01", " \n", "a  b\nc d")] == [
        "a b c",
        "",
        "",
        "",
        "a  b\nc d",
    ]
    assert cleaner.dropped == {"unicode": 1, "control": 1, "min_words": 1}
    assert cleaner.removed == {"unicode": 2, "control": 2, "min_words": 3}


def test_steps_are_named_in_any_order_and_done_in_one():
    assert chosen_steps("control,unicode") == chosen_steps("default") == ("unicode", "control")
    assert chosen_steps("c4, default") == ("unicode", "control", *C4)
    assert chosen_steps("none") == chosen_steps("") == ()
    with pytest.raises(ConfigError, match="no cleaning step 'unicod'; did you mean 'unicode'"):
        chosen_steps("unicod")
    assert all(name in describe_steps() for name in STEPS)
