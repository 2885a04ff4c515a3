"""mount(8)'s helper: the same mount, said in mount(8)'s words."""

import pytest

from archipfs.cli.mount_helper import translate


def test_the_directory_and_the_options_are_handed_on() -> None:
    assert translate(["archipfs", "/mnt/a", "-o", "rw,root=/r"]) == ["mount", "-o", "rw,root=/r", "--", "/mnt/a"]


def test_flags_of_mount_that_mean_nothing_here_are_passed_over() -> None:
    assert translate(["none", "/mnt/a", "-n", "-s", "-v", "-t", "fuse.archipfs"]) == ["mount", "--", "/mnt/a"]


def test_a_dry_run_does_nothing() -> None:
    assert translate(["archipfs", "/mnt/a", "-f"]) is None


@pytest.mark.parametrize("arguments", [[], ["archipfs"], ["archipfs", "/mnt/a", "more"], ["archipfs", "/mnt/a", "-z"]])
def test_anything_else_is_refused_with_the_usage(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="usage"):
        translate(arguments)
