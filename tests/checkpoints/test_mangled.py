"""A damaged file is refused by a clear error or loads: no other error, no lost process, no gigabytes."""

import limited
import pytest


def check(count, seconds, tmp_path):
    report = limited.run("mangled", tmp_path, count, "cfclip", seconds=seconds, memory=1)
    print(f"{count} files: {report['loaded']} load; {report['peak']:.2f} GiB; slowest {report['slowest']} s")
    assert len(report["files"]) == count
    assert not report["wrong"], "\n".join(report["wrong"][:10])
    assert 0.01 * count < report["loaded"] < 0.5 * count  # neither is all refused nor is little damaged
    assert report["slowest"][0] < 3
    assert report["peak"] < 0.5


def test_300_mangled_files_are_refused_or_load(tmp_path):
    check(300, 120, tmp_path)


@pytest.mark.long
def test_10000_mangled_files_are_refused_or_load(tmp_path):
    check(10_000, 900, tmp_path)
