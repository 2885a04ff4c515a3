"""Fixtures for tests that need a mount: private instances that are always taken away and looked at afterwards."""

from collections.abc import Callable, Iterator

import pytest

from tests.lib.instance import Instance

MakeInstance = Callable[..., Instance]


@pytest.fixture
def make_instance() -> Iterator[MakeInstance]:
    """Makes instances that are not mounted yet; arguments as for ``Instance``.

    Behind the test all of them are unmounted; it fails if a log or a store of theirs is not as it should be.
    """
    made: list[Instance] = []

    def make(**options: object) -> Instance:
        made.append(Instance(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    problems = [problem for instance in made for problem in instance.take_down()]
    problems += [problem for instance in made for problem in instance.verdict()]
    for instance in made:
        instance.remove()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture
def mount(make_instance: MakeInstance) -> Instance:
    """A private instance, mounted."""
    return make_instance().mount()
