"""Locations: local paths, addresses, members of tar files."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import numbered_frame, shared_clips, write_video

from kinema.data import tar_index
from kinema.data.files import (
    exists,
    expand,
    file_name,
    is_folder,
    is_pattern,
    is_remote,
    join,
    list_folder,
    local_path,
    open_binary,
    parent,
    read_bytes,
    split_member,
    status,
    stem,
    suffix,
)
from kinema.data.patterns import braces
from kinema.data.records import MediaError
from kinema.data.tar_index import member_span, read_contents
from kinema.errors import UserError

REMOTE = "memory://kinema-files"


@pytest.fixture
def remote() -> Iterator[str]:
    storage = fsspec.filesystem("memory")
    storage.makedirs(REMOTE, exist_ok=True)
    yield REMOTE
    storage.rm(REMOTE, recursive=True)


def put(location: str, data: bytes) -> str:
    if is_remote(location):
        fsspec.filesystem("memory").pipe(location, data)
    else:
        Path(location).write_bytes(data)
    return location


def write_tar(path: Path, members: dict[str, bytes], **keys: int) -> Path:
    with tarfile.open(path, "w", **keys) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("location", "name", "its_stem", "its_suffix", "folder"),
    [
        ("/data/a.b.MP4", "a.b.MP4", "a.b", ".mp4", "/data"),
        ("a.png", "a.png", "a", ".png", "."),
        ("/a.png", "a.png", "a", ".png", "/"),
        ("sub/folder/", "folder", "folder", "", "sub"),
        ("s3://bucket/x/a.png", "a.png", "a", ".png", "s3://bucket/x"),
        ("s3://bucket/a.png", "a.png", "a", ".png", "s3://bucket/"),
        ("https://host/x/a.png?key=1/2.mp4#p", "a.png", "a", ".png", "https://host/x"),
        ("s3://b/what?.png", "what?.png", "what?", ".png", "s3://b"),
        ("/d/x.tar::sub/a.png", "a.png", "a", ".png", "/d/x.tar::sub"),
        ("/d/x.tar::a.png", "a.png", "a", ".png", "/d/x.tar::"),
        ("s3://b/x.tar::a.PNG", "a.PNG", "a", ".png", "s3://b/x.tar::"),
    ],
)
def test_parts_of_a_location(location: str, name: str, its_stem: str, its_suffix: str, folder: str) -> None:
    assert (file_name(location), stem(location), suffix(location)) == (name, its_stem, its_suffix)
    assert parent(location).rstrip("/") == folder.rstrip("/")
    if "?key" not in location and not location.endswith("/"):
        assert join(parent(location), name) in (location, f"./{location}")


@pytest.mark.parametrize(
    ("root", "name", "expected"),
    [
        ("/data", "a.png", "/data/a.png"),
        ("/data/", "sub/a.png", "/data/sub/a.png"),
        ("", "a.png", "a.png"),
        ("/data", "/abs/a.png", "/abs/a.png"),
        ("/data", "s3://b/a.png", "s3://b/a.png"),
        ("s3://b", "a.png", "s3://b/a.png"),
        ("s3://b/x/", "./../y/a.png", "s3://b/y/a.png"),
        ("s3://b/x", "../../../a.png", "s3://b/a.png"),
        ("x.tar::", "a.png", "x.tar::a.png"),
        ("x.tar::sub", "../a.png", "x.tar::a.png"),
        ("file:///data", "a.png", "file:///data/a.png"),
    ],
)
def test_join(root: str, name: str, expected: str) -> None:
    assert join(root, name) == expected


def test_what_lies_where() -> None:
    assert [is_remote(x) for x in ("a", "/a", "C:/a", "file:///a", "s3://b/a", "s3://b/x.tar::a", "x.tar::a")] == [
        False, False, False, False, True, True, False,
    ]  # fmt: skip
    assert local_path("a/b.png") == Path("a/b.png") and local_path("file:///a/b.png") == Path("/a/b.png")
    assert local_path("s3://b/a.png") is None and local_path("x.tar::a.png") is None
    assert split_member("a/x.TAR::b::c.png") == ("a/x.TAR", "b::c.png") and split_member("a::b.png") is None
    assert split_member("https://h/x.tar?k=1::a.png") == ("https://h/x.tar?k=1", "a.png")


# ---------------------------------------------------------------------------------------------- reading


def test_a_local_file_is_read_without_fsspec(tmp_path: Path) -> None:
    data = os.urandom(1000)
    path = put(str(tmp_path / "x.bin"), data)
    with open_binary(path) as file:
        assert isinstance(file, io.BufferedReader) and file.read() == data
    assert read_bytes(f"file://{path}") == data
    found = status(path)
    assert (found.size, found.stamp) == (1000, str(os.stat(path).st_mtime_ns))
    os.utime(path, ns=(1, 1))
    assert status(path) != found


@pytest.mark.parametrize("call", [open_binary, status, read_bytes])
def test_what_cannot_be_read_is_said(call: Callable[[str], object], tmp_path: Path, remote: str) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")  # opening it would wait for ever
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    write_tar(tmp_path / "x.tar", {"a.png": b"1"})
    for name, words in {
        "none.png": "No such file", "fifo.mp4": "not a regular file", "": "not a regular file",
        "dangling.png": "No such file", "x.tar::b.png": "no member of this name", "y.tar::a.png": "No such file",
        "nul\0.png": "null byte",
    }.items():  # fmt: skip
        with pytest.raises(MediaError, match=words) as caught:
            call(f"{tmp_path}/{name}")
        assert caught.value.code == "missing"
    for location in (f"{remote}/none.png", f"{remote}/none.tar::a.png"):
        with pytest.raises(MediaError, match=r"kinema-files/none\.(png|tar) cannot be read: No such file") as caught:
            call(location)
        assert caught.value.code == "missing"


def test_missing_packages_and_unknown_schemes_are_said() -> None:
    with pytest.raises(UserError, match="Protocol not known: nosuch"):
        status("nosuch://bucket/a.png")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r'pip install "kinema\[remote\]"'):
            status("s3://bucket/a.png")


def test_readers_of_one_remote_file_do_not_share_their_place(remote: str) -> None:
    location = put(f"{remote}/x.bin", bytes(range(100)))
    with open_binary(location) as first, open_binary(location) as second:
        first.seek(50)
        assert second.read(2) == b"\0\1" and first.read(2) == bytes((50, 51))
    assert status(location).size == 100
    before = status(location)
    put(location, b"other")
    assert status(location) != before


class Streamed(io.RawIOBase):
    """What a web server without ranges gives: no size, from front to back alone."""

    size = None

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *_: int) -> int:
        raise ValueError("cannot seek")

    def readinto(self, buffer) -> int:
        return self.data.readinto(buffer)


def test_a_file_that_only_streams_can_be_read_at_random(monkeypatch: pytest.MonkeyPatch, remote: str) -> None:
    data = os.urandom(10_000)
    storage = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(storage, "open", lambda self, path, *args, **keys: Streamed(data))
    with open_binary(f"{remote}/stream.mp4") as file:
        file.seek(9_000)
        assert file.read(10) == data[9_000:9_010]
        file.seek(-5, os.SEEK_END)
        assert file.read() == data[-5:]


def test_folders(tmp_path: Path, remote: str) -> None:
    for root in (str(tmp_path), remote):
        for name in ("b.png", "a.png", "sub/c.png"):
            (tmp_path / "sub").mkdir(exist_ok=True)
            put(f"{root}/{name}", b"x")
        assert [(e.name, e.location, e.is_folder) for e in list_folder(root)] == [
            ("a.png", f"{root}/a.png", False), ("b.png", f"{root}/b.png", False), ("sub", f"{root}/sub", True),
        ]  # fmt: skip
        assert is_folder(root) and is_folder(f"{root}/sub") and not is_folder(f"{root}/a.png")
        assert exists(f"{root}/a.png") and exists(root) and not exists(f"{root}/z")
        with pytest.raises(MediaError, match="cannot be read: No such file"):
            list_folder(f"{root}/nowhere")
    assert not is_folder(f"{tmp_path}/x.tar::a")
    # no request is made: a file may have gigabytes
    assert is_folder("https://host/clips/") and not is_folder("https://host/shard.tar")


# ------------------------------------------------------------------------------------------- tar members


def test_members_of_a_tar_equal_what_tarfile_extracts(tmp_path: Path, remote: str) -> None:
    """GNU, PAX and old headers, long and strange names, big and empty members; on disk and behind an address."""
    generator = np.random.default_rng(0)
    names = [
        "a.png",
        "./b/c.png",
        "d" * 150 + ".png",
        "f/" * 60 + "e.png",
        "\u00fc \u4e16.png",
        "empty.txt",
        "x::y.png",
    ]
    members = {name: generator.bytes(int(generator.integers(1, 200_000))) for name in names} | {"empty.txt": b""}
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{kind}.tar", members, format=kind)
        copy = put(f"{remote}/{kind}.tar", path.read_bytes())
        for tar in (str(path), copy):
            assert {name: read_bytes(f"{tar}::{name}") for name in names} == members
            assert status(f"{tar}::a.png").size == len(members["a.png"])
            assert status(f"{tar}::a.png").stamp == status(tar).stamp
        contents = read_contents(str(path), lambda name: name.endswith(".txt"))
        assert contents.texts == {"empty.txt": b""} and not contents.damage and not contents.others
        with tarfile.open(path) as reference:
            assert [(m.name, m.offset, m.size) for m in contents.members] == [
                (m.name, m.offset_data, m.size) for m in reference.getmembers()
            ]


def test_old_headers_are_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    """The prefix of POSIX, folders of the oldest tars, numbers in base 256, names of exactly 100 bytes."""
    path = write_tar(
        tmp_path / "u.tar", {"p" * 60 + "/" + "q" * 60 + ".txt": b"1", "r" * 100: b"22"}, format=tarfile.USTAR_FORMAT
    )
    blocks = bytearray(path.read_bytes())
    extra = []
    for name, size, kind in ((b"old/", b"0" * 11 + b"\0", b"\0"), (b"big.bin", b"\x80" + b"\0" * 9 + b"\2\1", b"0")):
        header = bytearray(512)
        header[: len(name)], header[124:136], header[156:157] = name, size, kind
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        extra.append(bytes(header))
    blocks[:0] = extra[0] + extra[1] + b"x" * 513 + b"\0" * 511
    path.write_bytes(blocks)
    contents = read_contents(str(path))
    with tarfile.open(path) as reference:
        expected = [(m.name, m.offset_data, m.size) for m in reference.getmembers() if m.isreg()]
    assert [tuple(member) for member in contents.members] == expected and len(expected) == 3
    assert expected[0] == ("big.bin", 1024, 513) and not contents.damage


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_member_behaves_like_a_file_of_its_own(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any seeks and reads give what io.BytesIO gives."""
    content = bytes(range(256)) * 3
    path = tmp_path_factory.getbasetemp() / "span.tar"
    if not path.exists():
        write_tar(path, {"before": b"b" * 1000, "it": content, "after": b"a" * 1000})
    ours, reference = open_binary(f"{path}::it"), io.BytesIO(content)
    with ours:
        for _ in range(data.draw(st.integers(1, 12))):
            whence = data.draw(st.sampled_from((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)))
            here = {os.SEEK_SET: 0, os.SEEK_CUR: reference.tell(), os.SEEK_END: len(content)}[whence]
            offset = data.draw(st.integers(-here, 900))
            assert ours.seek(offset, whence) == reference.seek(offset, whence)
            count = data.draw(st.integers(-1, 900))
            assert ours.read(count) == reference.read(count) and ours.tell() == reference.tell()


def test_opening_a_member_reads_nothing_but_headers_and_the_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{n:03}.bin": bytes([n]) * 2_000_000 for n in range(20)}
    path = write_tar(tmp_path / "big.tar", members)
    read = 0

    class Counted(io.FileIO):
        def readinto(self, buffer) -> int:
            nonlocal read
            count = super().readinto(buffer)
            read += count
            return count

    def opened(location: str) -> io.BufferedReader:
        return io.BufferedReader(Counted(location))

    monkeypatch.setattr(tar_index, "open_binary", opened)
    with tar_index.open_member(str(path), "007.bin") as file:
        assert file.read(10) == b"\7" * 10
    assert read < 20 * 2 * io.DEFAULT_BUFFER_SIZE + 2**17  # of 40 MB


def test_a_tar_is_indexed_once_and_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", {"a": b"1", "b": b"22"})
    walks = []
    original = tar_index._walk
    monkeypatch.setattr(tar_index, "_walk", lambda *args: walks.append(1) or original(*args))
    assert [read_bytes(f"{path}::{name}") for name in "abab"] == [b"1", b"22", b"1", b"22"]
    assert len(walks) == 1
    write_tar(path, {"b": b"new", "a": b"1"})
    os.utime(path, ns=(10**9, 10**9))
    assert read_bytes(f"{path}::b") == b"new" and len(walks) == 2


def test_indices_that_were_not_used_for_longest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "KEPT_MEMBERS", 5)
    monkeypatch.setattr(tar_index, "_indices", type(tar_index._indices)())
    paths = [str(write_tar(tmp_path / f"{n}.tar", {"a": b"1", "b": b"2"})) for n in range(3)]
    for n in (0, 1, 0, 2):
        assert member_span(paths[n], "b")[1] == 1
    assert [tar for tar, _ in tar_index._indices] == [paths[0], paths[2]] and tar_index._indices.members == 4
    write_tar(Path(paths[2]), {"b": b"22"})
    assert member_span(paths[2], "b")[1] == 2 and tar_index._indices.members == 5


def test_the_later_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"old", b"newer"):
            info = tarfile.TarInfo("a.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert read_bytes(f"{path}::a.txt") == b"newer"


def test_tars_put_together_with_cat_are_read_to_the_end(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{n}.tar", {f"{n}.txt": n.encode()}) for n in "ab")
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    assert read_bytes(f"{tmp_path}/both.tar::b.txt") == b"b"
    assert not read_contents(f"{tmp_path}/both.tar").damage


def test_damaged_tars(tmp_path: Path) -> None:
    """What comes before the damage can be read; every cut and every broken header is noticed."""
    members = {f"{n}.bin": bytes([n]) * 700 for n in range(3)}  # 512 + 1024 bytes each
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    path = tmp_path / "cut.tar"
    for cut in range(512, 3 * 1536 + 1, 256):
        path.write_bytes(whole[:cut])
        contents = read_contents(str(path))
        complete = [n for n in range(3) if cut >= n * 1536 + 512 + 700]
        assert [member.name for member in contents.members] == [f"{n}.bin" for n in complete], cut
        assert contents.damage, cut
        assert all(read_bytes(f"{path}::{n}.bin") == members[f"{n}.bin"] for n in complete)
    broken = bytearray(whole)
    broken[1536 + 10] ^= 255
    path.write_bytes(broken)
    contents = read_contents(str(path))
    assert [member.name for member in contents.members] == ["0.bin"] and "byte 1,536" in contents.damage


def test_what_is_no_tar_is_said(tmp_path: Path) -> None:
    for name, data in {"text": b"no tar " * 200, "empty": b"", "short": b"x"}.items():
        put(f"{tmp_path}/{name}.tar", data)
        with pytest.raises(MediaError, match="is no tar file") as caught:
            read_contents(f"{tmp_path}/{name}.tar")
        assert caught.value.code == "damaged tar"
    (tmp_path / "z.tar").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match=r"z\.tar is compressed \(gzip\).*Unpack") as compressed:
        read_bytes(f"{tmp_path}/z.tar::a")
    assert not isinstance(compressed.value, MediaError)


def test_special_members_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.png": b"1"})
    with tarfile.open(path, "a") as tar:
        for name, kind in {"folder": tarfile.DIRTYPE, "link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
    contents = read_contents(str(path))
    assert [m.name for m in contents.members] == ["a.png"] and contents.others == ["link.png", "hard.png"]


# --------------------------------------------------------------------------- PyAV and Pillow on locations


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small mp4 with its index at the end, a real clip where there is one, a png; and a tar of them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    frames = [numbered_frame(n) for n in range(12)]
    found = {"video.mp4": write_video(folder / "video.mp4", frames)}
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (33, 47, 3), np.uint8)).save(folder / "picture.png")
    found["picture.png"] = folder / "picture.png"
    if (clip := shared_clips_or_none()) is not None:
        found["clip.mp4"] = clip
    write_tar(folder / "all.tar", {name: path.read_bytes() for name, path in found.items()})
    return found | {"all.tar": folder / "all.tar"}


def shared_clips_or_none() -> Path | None:
    try:
        return shared_clips() / "h265_video.mp4"
    except pytest.skip.Exception:
        return None


@pytest.mark.parametrize("place", ["plain", "tar", "memory", "memory tar"])
def test_pyav_and_pillow_read_every_location(media: dict[str, Path], place: str, remote: str) -> None:
    """Pixels equal those that the libraries read from the path, after seeking too."""
    import av
    from PIL import Image

    def frames_of(source: object) -> np.ndarray:
        with av.open(source) as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            stream = container.streams.video[0]
            container.seek(0, stream=stream)
            every.append(next(container.decode(stream)).to_ndarray(format="rgb24"))
        return np.stack(every)

    for name, path in media.items():
        if name == "all.tar":
            continue
        location = {
            "plain": lambda path=path: str(path),
            "tar": lambda name=name: f"{media['all.tar']}::{name}",
            "memory": lambda name=name, path=path: put(f"{remote}/{name}", path.read_bytes()),
            "memory tar": lambda name=name: put(f"{remote}/all.tar", media["all.tar"].read_bytes()) + f"::{name}",
        }[place]()
        with open_binary(location) as file:
            if name == "picture.png":
                with Image.open(file) as ours, Image.open(path) as reference:
                    assert np.array_equal(np.asarray(ours), np.asarray(reference))
            else:
                assert np.array_equal(frames_of(file), frames_of(str(path)))


def test_threads_read_one_tar_at_once(media: dict[str, Path]) -> None:
    expected = {name: path.read_bytes() for name, path in media.items() if name != "all.tar"}
    wrong: list[str] = []

    def read(name: str) -> None:
        for _ in range(20):
            if read_bytes(f"{media['all.tar']}::{name}") != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(name,)) for name in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --------------------------------------------------------------------------------------------- patterns


def test_patterns(tmp_path: Path, remote: str) -> None:
    names = [
        "a.tar",
        "b.tar",
        "c1.csv",
        ".hidden.tar",
        "sub/d.tar",
        "sub/deep/e.tar",
        "sub/f.csv",
        "x-08.tar",
        "x-09.tar",
    ]
    for root in (str(tmp_path), remote):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            put(f"{root}/{name}", b"x")

        def found(pattern: str, root: str = root) -> list[str]:
            return [location.removeprefix(f"{root}/") for location in expand(f"{root}/{pattern}")]

        assert found("*.tar") == ["a.tar", "b.tar", "x-08.tar", "x-09.tar"]
        assert found("**/*.tar") == ["a.tar", "b.tar", "sub/d.tar", "sub/deep/e.tar", "x-08.tar", "x-09.tar"]
        assert found("**/deep/*") == ["sub/deep/e.tar"]
        assert found("sub/**") == ["sub/d.tar", "sub/deep/e.tar", "sub/f.csv"]
        assert found("?.tar") == ["a.tar", "b.tar"] and found("[!a].tar") == ["b.tar"]
        assert found("s*/f.csv") == ["sub/f.csv"] and found("s*/no.csv") == [] and found("no*/x") == []
        assert found("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]  # the missing one too
        assert found("{b,a}.tar") == ["a.tar", "b.tar"] and found("{a,[a-b]}.tar") == ["a.tar", "b.tar"]
        assert found("a.tar") == ["a.tar"]


def test_patterns_of_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put("a.tar", b"")
    assert expand("*.tar") == ["a.tar"] and expand("./*.tar") == ["./a.tar"]


def test_links_do_not_make_a_pattern_run_in_circles(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    put(f"{tmp_path}/sub/a.tar", b"")
    for name in ("up", "again"):
        (tmp_path / "sub" / name).symlink_to(tmp_path)
    assert expand(f"{tmp_path}/**/*.tar") == [f"{tmp_path}/sub/a.tar"]


def test_a_file_that_is_called_like_a_pattern_is_itself(tmp_path: Path) -> None:
    path = put(f"{tmp_path}/take [1].mp4", b"x")
    assert not is_pattern(path) and expand(path) == [path]
    assert is_pattern(f"{tmp_path}/take [2].mp4")
    assert not is_pattern("https://host/a.mp4?key=1") and is_pattern("https://host/{0..3}.tar?key=1")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x{0..2}y", ["x0y", "x1y", "x2y"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{a,}{1,2}", ["a1", "a2", "1", "2"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{a", "a}", "{{a,b},c}", "{3..1}", "{a}", "{0..99999999}", "{0..999}{0..9999}"])
def test_braces_that_make_no_sense(pattern: str) -> None:
    with pytest.raises(UserError):
        braces(pattern)


def test_files_needs_no_heavy_import() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kinema.data.files, kinema.data.tar_index as t; print({'numpy', 'fsspec', 'av'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
