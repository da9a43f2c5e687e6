"""One contract of places, kept by the local disk and by an S3-compatible store."""

import pickle
import threading
from pathlib import Path

import pytest

from raycompress import storage
from raycompress.errors import ConfigError
from raycompress.storage import ObjectPath, Segments, place_of, read_all, staged, write_whole


def test_what_is_written_is_read(place):
    file = place / "a" / "b.bin"
    assert not place.exists() and not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    write_whole(file, b"one")
    assert file.read_bytes() == b"one" and file.exists() and (place / "a").exists()
    write_whole(file, "größer".encode())
    assert file.read_text(encoding="utf-8") == "größer"
    assert file.name == "b.bin" and file.parent == place / "a"
    write_whole(place / "empty", b"")
    assert (place / "empty").read_bytes() == b"" and (place / "empty").exists()


def test_what_is_removed_is_gone(place):
    file = place / "a"
    write_whole(file, b"one")
    file.unlink()
    assert not file.exists()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()


def test_names_are_taken_as_they_are(place):
    names = ["a b", "50%", "a%20b", "x=1&y", "ü", "a#b", "a?b"]
    for name in names:
        write_whole(place / name, name.encode())
    assert [(place / name).read_bytes().decode() for name in names] == names


def test_a_place_survives_pickle_and_text(place):
    write_whole(place / "a", b"one")
    assert pickle.loads(pickle.dumps(place / "a")).read_bytes() == b"one"
    assert place_of(str(place)) == place
    assert place_of(place) == place
    assert (place_of(str(place)) / "a").read_bytes() == b"one"
    assert len({place, place_of(str(place))}) == 1


def test_a_reader_never_sees_a_part(place):
    file = place / "big"
    contents = [bytes([i]) * 300_000 for i in range(2)]
    write_whole(file, contents[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(file.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_whole(file, contents[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents) and seen


def test_a_folder_is_staged_on_the_local_disk(place):
    with staged(place / "results") as folder:
        assert folder.is_dir() and not list(folder.iterdir())
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("one")
        (folder / "b").write_text("two")
    assert (place / "results" / "sub" / "a").read_text() == "one"
    with pytest.raises(ZeroDivisionError), staged(place / "results") as folder:
        assert (folder / "sub" / "a").read_text() == "one"
        (folder / "b").write_text("three")
        (folder / "c").write_text("four")
        raise ZeroDivisionError  # as on the local disk, what was written is there
    assert (place / "results" / "b").read_text() == "three"
    assert (place / "results" / "c").read_text() == "four"


def test_only_what_changed_is_put_back(remote, monkeypatch):
    write_whole(remote / "a", b"one")
    write_whole(remote / "b", b"two")
    written = []
    monkeypatch.setattr(ObjectPath, "write_bytes", lambda self, data: written.append(self.name))
    with staged(remote) as folder:
        (folder / "b").write_text("three")
    assert written == ["b"]
    assert not folder.exists()


def test_objects_come_in_order_of_name_at_any_depth(remote):
    names = [f"{i:03d}/x.json" for i in range(30)]
    for name in [*reversed(names), "x.txt"]:
        write_whole(remote / name, name.encode())
    found = remote.objects(".json")
    assert [each.uri[len(remote.uri) + 1 :] for each in found] == names
    assert [data.decode() for data in read_all(found)] == names
    assert (remote / "none").objects() == [] and read_all([]) == []


def test_segments_are_a_file_that_grows(remote):
    one, two = Segments(remote / "a.jsonl"), Segments(remote / "a.jsonl")
    other = Segments(remote / "a.b.jsonl")
    for i in range(3):
        for each in (one, two, other):
            each.write(f"{i}\n".encode())
            each.commit()
            each.commit()
    found = Segments.of(remote / "a.jsonl")
    assert b"".join(read_all(found)) == b"0\n0\n1\n1\n2\n2\n"
    assert len(Segments.of(remote / "a.b.jsonl")) == 3
    one.write(b"lost\n")
    assert len(Segments.of(remote / "a.jsonl")) == 6


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "ftp://host/x",
            "ftp://host/x must be a path, file:///folder, s3://bucket/folder or gs://bucket/folder",
        ),
        (
            "s3://bucket",
            "s3://bucket must be a path, file:///folder, s3://bucket/folder or gs://bucket/folder",
        ),
        (
            "file://host/x",
            "file://host/x must be a path, file:///folder, s3://bucket/folder or "
            "gs://bucket/folder",
        ),
        (
            "s3://bucket/a/../b",
            "s3://bucket/a/../b must not have '.', '..' or nothing between slashes",
        ),
        (
            "s3://KEY:SECRET@bucket/a",
            "s3://***@bucket/a must not hold credentials: they would be in logs; set them in the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, on all nodes",
        ),
        (
            "s3://bucket/a?secret_key=SECRET",
            "s3://bucket/a?... must not hold credentials (secret): they would be in logs; set them "
            "in the environment, on all nodes",
        ),
    ],
)
def test_uris_that_cant_be_used(uri, message):
    with pytest.raises(ConfigError) as caught:
        place_of(uri)
    assert str(caught.value) == message


def test_an_option_that_pyarrow_doesnt_know():
    with pytest.raises(ConfigError) as caught:
        place_of("s3://bucket/a?endpoint=x")
    assert "s3://bucket/a?endpoint=x can't be used (options: endpoint)" in str(caught.value)
    assert "endpoint" in str(caught.value).partition("): ")[2]


def test_paths_stay_paths():
    assert place_of("/a/b") == Path("/a/b") == place_of("file:///a/b")
    assert place_of(Path("a")) == Path("a")


def test_a_store_that_is_away_for_a_while_is_asked_again(remote, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    errors = [OSError("AWS Error NETWORK_CONNECTION"), OSError("AWS Error SLOW_DOWN")]

    def ask():
        if errors:
            raise errors.pop()
        return "answer"

    assert storage._patiently(ask) == "answer"
    for error in (FileNotFoundError(), PermissionError(), OSError("AWS Error ACCESS_DENIED")):
        asked = []

        def refuse(error=error, asked=asked):
            asked.append(1)
            raise error

        with pytest.raises(type(error)):
            storage._patiently(refuse)
        assert asked == [1]


def test_a_store_that_stays_away_is_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(storage.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def ask():
        raise OSError("AWS Error NETWORK_CONNECTION")

    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        storage._patiently(ask)
    assert storage.PATIENCE - 5 < now[0] <= storage.PATIENCE


def test_the_library_alone_doesnt_load_pyarrow():
    import subprocess
    import sys

    code = "import sys, raycompress.storage; print('pyarrow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
