"""Duplicates: the estimate is right, the rule is kept, and spilling changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("rensa")

from lmx.preparation import duplicates
from lmx.preparation.duplicates import (
    EXACT,
    MINIMA,
    NEAR,
    Bands,
    Column,
    alike,
    band_keys,
    find_duplicates,
    minima,
    text_digest,
)
from lmx.preparation.ngrams import WORD, ngram_hashes


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"w{i}" for i in rng.integers(0, 5000, count)]


def changed(rng: np.random.Generator, text: list[str], count: int) -> list[str]:
    text = list(text)
    for place in rng.choice(len(text), count, replace=False):
        text[place] = "other"
    return text


def columns(tmp_path, texts: list[str], parts: int) -> tuple[Column, Column]:
    bounds = np.linspace(0, len(texts), parts + 1).astype(int)
    names = []
    for number, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        names.append((tmp_path / f"{number}.digests", tmp_path / f"{number}.minima"))
        names[-1][0].write_bytes(b"".join(map(text_digest, texts[a:b])))
        names[-1][1].write_bytes(minima(texts[a:b]).tobytes() if b > a else b"")
    return Column([d for d, _ in names], np.uint64, 2), Column([m for _, m in names], np.uint32, MINIMA)


def runs(text: bytes, n: int) -> list[int]:
    return ngram_hashes([text], n)[0].tolist()


def test_runs_of_words_hash_alike_where_they_are_alike():
    a, b = (runs(text, 3) for text in (b"a bee c d\n e", b"x bee\tc  d e y "))
    assert len(a) == 3 and len(set(a) & set(b)) == 2
    assert len(runs(b"a b", 3)) == 1 and runs(b" \n", 3) == runs(b"", 3) == []
    assert runs(b"a b", 2) != runs(b"b a", 2)
    words = [str(i).encode() * (1 + i % 9) for i in range(10_000, 30_000)]
    assert len(set(runs(b" ".join(words), 1))) == len(words)


@given(
    st.lists(st.text("ab \n\xe9" + "x" * 9, max_size=300).map(str.encode), max_size=8), st.integers(1, 14), st.randoms()
)
def test_hashes_of_a_text_are_its_own_whatever_stands_beside_it(texts, n, random):
    alone = [runs(text, n) for text in texts]
    assert [len(one) for one in alone] == [number_of_runs(text, n) for text in texts]
    order = random.sample(range(len(texts)), len(texts))
    hashes, bounds = ngram_hashes([texts[i] for i in order], n)
    assert len(bounds) == len(texts) + 1 and bounds[-1] == len(hashes)
    for place, i in enumerate(order):
        assert hashes[bounds[place] : bounds[place + 1]].tolist() == alone[i]


def number_of_runs(text: bytes, n: int) -> int:
    words = sum(-(-len(word) // WORD) for word in text.split())
    return max(words - n + 1, min(words, 1))


@given(st.lists(st.sampled_from([b"a", b"bee", b"c" * 8, b"c" * 9, b"d" * 64, b"d" * 65, b"e" * 200]), max_size=40))
def test_runs_have_one_hash_if_and_only_if_their_words_are_the_same(words):
    cut = [word[i : i + WORD] for word in words for i in range(0, len(word), WORD)]
    same = {}
    for i, found in enumerate(runs(b" ".join(words), 2) if len(cut) > 1 else []):
        assert same.setdefault(tuple(cut[i : i + 2]), found) == found
    assert len(set(same.values())) == len(same)


def test_minima_estimate_the_jaccard_similarity():
    rng = np.random.default_rng(0)
    for count in (0, 5, 20, 60):
        first = words(rng, 400)
        second = changed(rng, first, count)
        sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (first, second)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        a, b = minima([" ".join(first), " ".join(second)])
        assert np.mean(a == b) == pytest.approx(jaccard, abs=4 * np.sqrt(0.25 / MINIMA))


def test_bands_meet_at_the_similarity():
    assert Bands.of(0.8) == Bands(16, 8)
    assert Bands.of(0.95).rows > Bands.of(0.5).rows
    for similarity in (0.3, 0.5, 0.8, 0.95):
        bands = Bands.of(similarity)
        assert bands.count * bands.rows == MINIMA
        assert 1 - (1 - similarity**bands.rows) ** bands.count > 0.6


def reference(texts: list[str], similarity: float) -> list[int]:
    """The rule of the module's docstring, pair by pair."""
    signatures, reasons = minima(texts), []
    for i, text in enumerate(texts):
        reasons.append(EXACT if text in texts[:i] else 0)
    keys, heads = band_keys(signatures, Bands.of(similarity)), {}
    for i in range(len(texts)):
        for key in keys[i].tolist() if not reasons[i] else ():
            head = heads.setdefault(key, i)
            if head != i and alike(signatures[head], signatures[i], similarity):
                reasons[i] = NEAR
    return reasons


@pytest.mark.parametrize("bucket_bytes", [1 << 26, 500])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_rule_is_kept_in_memory_and_spilled(tmp_path, monkeypatch, bucket_bytes, parts):
    monkeypatch.setattr(duplicates, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(1)
    originals = [words(rng, 100) for _ in range(15)]
    texts = [" ".join(text) for text in originals]
    texts += [" ".join(changed(rng, originals[i % 15], 1 + i % 12)) for i in range(60)]
    texts += texts[:5] + [texts[20]] + ["short text"] * 3
    rng.shuffle(texts)
    expected = reference(texts, 0.8)
    scratch = tmp_path / "buckets"
    scratch.mkdir()
    digests, signatures = columns(tmp_path, texts, parts)
    found = find_duplicates(digests, signatures, Bands.of(0.8), 0.8, scratch)
    assert found.tolist() == expected
    assert {EXACT, NEAR, 0} == set(expected)
    assert find_duplicates(digests, None, Bands.of(0.8), 0.8, scratch).tolist() == [
        reason if reason == EXACT else 0 for reason in expected
    ]
    assert not list(scratch.iterdir())


def test_without_the_package_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match=r"pip install 'lmx\[prepare\]'"):
        minima(["a"])
