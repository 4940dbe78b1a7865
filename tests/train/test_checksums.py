"""Checksums: every bit counts, in every file and in the list of them."""

import json
import random
import shutil
import subprocess

import pytest

from diffjax.train import checksums
from diffjax.train.checksums import NAME, Damaged, verify, write

FILES = {"a/one": b"0123456789", "a/b/two": b"\x00" * 7, "a/empty": b"", "c/three": b"xyz" * 40}


@pytest.fixture
def directory(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "beside").write_bytes(b"not covered")
    write(tmp_path)
    return tmp_path


def test_sizes_and_digests_are_those_of_another_program(directory):
    listed = json.loads((directory / NAME).read_text())["files"]
    assert listed.keys() == FILES.keys()
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not here")
    for name, (size, digest) in listed.items():
        assert (size, digest) == (len(FILES[name]), digest_by("sha256sum", directory / name))


def digest_by(*command):
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def test_manifests_of_blake2_are_still_read(directory):
    """As they were written at first, here by another program."""
    if shutil.which("b2sum") is None:
        pytest.skip("b2sum is not here")
    b2sum = ("b2sum", "-l", "128")
    files = {name: [len(FILES[name]), digest_by(*b2sum, directory / name)] for name in FILES}
    (directory / "beside").write_text(json.dumps(files, sort_keys=True))
    found = {"blake2b": digest_by(*b2sum, directory / "beside"), "files": files}
    (directory / NAME).write_text(json.dumps(found, sort_keys=True, indent=1) + "\n")
    verify(directory, ("a", "c"))
    content = (directory / "c/three").read_bytes()
    (directory / "c/three").write_bytes(content[:-1] + b"!")
    with pytest.raises(Damaged, match="c/three is not what was written"):
        verify(directory, ("a", "c"))
    (directory / "c/three").write_bytes(content)
    (directory / NAME).write_text(json.dumps(found | {"md5": "0"}, sort_keys=True, indent=1))
    with pytest.raises(Damaged, match="manifest.json cannot be read"):
        verify(directory, ("a", "c"))


@pytest.mark.parametrize("name", [n for n, content in FILES.items() if content] + [NAME])
def test_every_flipped_bit_is_found(directory, name):
    verify(directory, ("a", "c"))
    content = (directory / name).read_bytes()
    bits = random.Random(0).sample(range(8 * len(content)), min(300, 8 * len(content)))
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(flipped)
        with pytest.raises(Damaged, match=NAME if name == NAME else f"{name} is not what was"):
            verify(directory, ("a", "c"))


def test_lost_shortened_and_longer_files_are_named(directory):
    harms = [
        ("a/one", b"012345678", "a/one has 9 bytes of 10"),
        ("a/empty", b"x", "a/empty has 1 bytes of 0"),
        ("c/three", None, "c/three is missing"),
        (NAME, b"", "manifest.json cannot be read"),
        (NAME, b"[]", "manifest.json cannot be read"),
        (NAME, None, "manifest.json is missing"),
    ]
    for name, content, message in harms:
        before = (directory / name).read_bytes()
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_bytes(content)
        with pytest.raises(Damaged, match=message):
            verify(directory, ("a", "c"))
        (directory / name).write_bytes(before)
    with pytest.raises(Damaged, match="knows no file of d"):
        verify(directory, ("a", "d"))
    verify(directory, ("a", "c"))


def test_exchanged_files_are_found(directory):
    (directory / "a" / "four").write_bytes(b"9876543210")
    write(directory)
    one, four = directory / "a" / "one", directory / "a" / "four"
    content = one.read_bytes()
    one.write_bytes(four.read_bytes())
    four.write_bytes(content)
    with pytest.raises(Damaged, match="a/four is not what was written"):
        verify(directory, ("a",))


def test_only_the_folders_asked_for_are_read(directory):
    (directory / "c" / "three").unlink()
    (directory / "beside").unlink()
    verify(directory, ("a",))


def test_processes_share_the_files_and_leave_none_out(directory):
    for name in FILES:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content + b"!")
        finders = []
        for part in range(3):
            try:
                verify(directory, ("a", "c"), part=part, parts=3)
            except Damaged:
                finders.append(part)
        assert len(finders) == 1
        (directory / name).write_bytes(content)


def test_a_manifest_that_cannot_be_written_leaves_none(directory, monkeypatch):
    (directory / NAME).unlink()
    monkeypatch.setattr(checksums, "_digest", lambda *of: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        write(directory)
    assert not (directory / NAME).exists()
