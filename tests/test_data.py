"""Text for training: what is read and refused, batches by step, entropies by counting."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from plait.ir import DataError
from plait.runtime.data import Text, batch, bigram_entropy, check_length, read_bytes, split, windows


def as_bytes(data: torch.Tensor) -> bytes:
    return data.numpy().tobytes()


def test_a_file_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "any.bin"
    path.write_bytes(bytes(range(256)) * 3)
    assert as_bytes(read_bytes(path)) == bytes(range(256)) * 3
    assert as_bytes(read_bytes(str(path), limit=100)) == bytes(range(100))


def test_a_folder_is_its_text_files_in_one_order(tmp_path: Path) -> None:
    for name in ("b.py", "a.txt", "c.bin", "z/a.md", "d/e/f.PY", ".git/x.py", "site-packages/y.py", "d/__pycache__/q.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{name}>")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert as_bytes(read_bytes(tmp_path)) == b"<a.txt><b.py><d/e/f.PY><z/a.md>"
    everything = b"<b.py><d/__pycache__/q.py><site-packages/y.py>"
    assert as_bytes(read_bytes(tmp_path, suffixes=(".py",), skip=("e",))) == everything
    assert as_bytes(read_bytes(tmp_path, limit=9)) == b"<a.txt><b"


def test_what_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"x")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "x.py").touch()
    wanted = {"absent": "no such", "empty.txt": "no text", "folder": r"no file named \*.py", "hollow": "no text"}
    for name, what in wanted.items():
        with pytest.raises(DataError, match=f"{name}: .*{what}"):
            read_bytes(tmp_path / name)
    with pytest.raises(DataError, match="device"):
        read_bytes("/dev/null")


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.py").write_text("x")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for path in (tmp_path, tmp_path / "x.py"):
        with pytest.raises(DataError, match=r"x\.py: cannot be read: Permission denied"):
            read_bytes(path)


def test_split_by_position() -> None:
    data = torch.arange(200, dtype=torch.uint8)
    text = split(data, 0.1)
    assert torch.equal(text.train, data[:180]) and torch.equal(text.valid, data[180:])
    for share in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(DataError, match="share"):
            split(data, share)


def test_too_little_text_for_a_row() -> None:
    data = torch.zeros(100, dtype=torch.uint8)
    check_length(Text(data, data[:64]), 63)
    with pytest.raises(DataError, match="validation part is 64 bytes, must be at least 65"):
        check_length(Text(data, data[:64]), 64)
    with pytest.raises(DataError, match="training part is 100 bytes"):
        check_length(Text(data, data), 100)


@pytest.mark.parametrize("length", [1, 63, 65])
def test_batches_follow_from_seed_and_step(length: int) -> None:
    data = torch.randint(256, (1000,), dtype=torch.uint8)
    tokens, labels = batch(data, rows=5, length=length, seed=3, step=7)
    assert tokens.shape == labels.shape == (5, length) and tokens.dtype == labels.dtype == torch.int64
    text = as_bytes(data)
    for row, after in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row[1:] == after[:-1] and bytes([*row, after[-1]]) in text
    torch.manual_seed(99)
    assert torch.equal(tokens, batch(data, rows=5, length=length, seed=3, step=7)[0])
    others = [batch(data, rows=5, length=length, seed=s, step=t)[0] for s, t in ((3, 8), (4, 7), (7, 3))]
    assert not any(torch.equal(tokens, other) for other in others)


def test_batches_reach_every_byte() -> None:
    data = torch.arange(20, dtype=torch.uint8)
    drawn = [batch(data, rows=8, length=4, seed=0, step=t) for t in range(100)]
    assert {int(t[0]) for tokens, _ in drawn for t in tokens} == set(range(16))
    assert max(int(labels.max()) for _, labels in drawn) == 19


def test_windows_cover_the_data_evenly() -> None:
    data = torch.arange(101, dtype=torch.uint8)
    tokens, labels = windows(data, rows=5, length=20)
    assert tokens[:, 0].tolist() == [0, 20, 40, 60, 80] and labels[:, -1].tolist() == [20, 40, 60, 80, 100]
    assert len(windows(data, rows=1, length=100)[0]) == 1
    # No row is given twice when there are fewer than were asked for.
    assert windows(data[:5], rows=9, length=3)[0].tolist() == [[0, 1, 2], [1, 2, 3]]


def test_entropy_of_independent_bytes() -> None:
    data = torch.multinomial(torch.tensor([0.5, 0.25, 0.25]), 200_000, replacement=True).to(torch.uint8)
    found = bigram_entropy(data[:150_000], data[150_000:])
    assert found.unigram == pytest.approx(1.5 * math.log(2), abs=0.01)
    assert found.bigram == pytest.approx(found.unigram, abs=0.01)


def test_entropy_of_a_chain() -> None:
    # Each byte is the last one plus 0 or 1: a bit per byte given the one before, 8 bits without it.
    data = torch.randint(2, (300_000,)).cumsum(0).to(torch.uint8)
    found = bigram_entropy(data[:250_000], data[250_000:])
    assert found.bigram == pytest.approx(math.log(2), abs=0.01) and found.unigram == pytest.approx(8 * math.log(2), abs=0.02)


def test_entropy_is_that_of_a_distribution() -> None:
    """Against the formula, byte by byte: and each row of probabilities sums to one."""
    train, valid = b"the cat sat on the mat, the end", b"that hat"
    single, pairs = Counter(train), Counter(pairwise(train))
    follow = {a: [b for (x, b) in pairs if x == a] for a in range(256)}

    def one(b: int) -> float:
        return (single[b] + 1) / (len(train) + 256)

    def two(a: int, b: int) -> float:
        seen = sum(pairs[a, x] for x in follow[a])
        return (pairs[a, b] + len(follow[a]) * one(b)) / (seen + len(follow[a])) if seen else one(b)

    assert all(sum(two(a, b) for b in range(256)) == pytest.approx(1) for a in range(256))
    found = bigram_entropy(*(torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (train, valid)))
    assert found.unigram == pytest.approx(-sum(math.log(one(b)) for b in valid) / 8)
    assert found.bigram == pytest.approx(-sum(math.log(two(a, b)) for a, b in pairwise(valid)) / 7)


def test_entropy_needs_a_pair() -> None:
    with pytest.raises(DataError, match="at least 2"):
        bigram_entropy(torch.zeros(10, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8))
