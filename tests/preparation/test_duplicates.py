"""Duplicates: the estimate is right, the rule is kept, and spilling changes nothing."""

import numpy as np
import pytest

pytest.importorskip("rensa")

from lmx.preparation import duplicates, ngrams
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
from lmx.preparation.ngrams import ngram_hashes


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


def test_runs_of_words_hash_alike_where_they_are_alike():
    a, b = (ngram_hashes(text, 3) for text in (b"a bee c d\n e", b"x bee\tc  d e y "))
    assert len(a) == 3 and len(set(a.tolist()) & set(b.tolist())) == 2
    assert len(ngram_hashes(b"a b", 3)) == 1 and len(ngram_hashes(b" \n", 3)) == len(ngram_hashes(b"", 3)) == 0
    assert ngram_hashes(b"a b", 2) != ngram_hashes(b"b a", 2)
    words = [str(i).encode() for i in range(20_000)]
    assert len(set(ngram_hashes(b" ".join(words), 1).tolist())) == len(words)


def test_long_texts_are_hashed_in_pieces(monkeypatch):
    text = " ".join(f"word{i}" for i in range(2000)).encode()
    whole = ngram_hashes(text, 5)
    monkeypatch.setattr(ngrams, "PIECE", 1600)
    ngrams._powers.cache_clear()
    assert np.array_equal(ngram_hashes(text, 5), whole)
    assert len(ngram_hashes(b"x" * 5000, 5)) == 1
    ngrams._powers.cache_clear()


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
