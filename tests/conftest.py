"""Fixtures for tests that need a mount or a Ceph cluster, which are always taken away and looked at afterwards."""

import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.lib import searching, ways
from tests.lib.ceph import Cluster, cluster
from tests.lib.instance import Instance, Place, instances
from tests.lib.ways import Way

settings.load_profile(searching.REPEATABLE)

MakeInstance = Callable[..., Instance]


def pytest_configure() -> None:
    # What a shell starts in the background ignores interrupts, and so would all that is started here, on to the test
    # that interrupts a program.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    ways.parametrize(metafunc)


@pytest.fixture(scope="module")
def way(request: pytest.FixtureRequest) -> Way:
    """What mounts the test runs on; modules that run on several say so with the marker ``ways``."""
    return getattr(request, "param", Way.FRONT)


@pytest.fixture(scope="module")
def front(way: Way) -> bool:
    """Whether mounts have the native front."""
    return way is not Way.PLAIN


@pytest.fixture(scope="module")
def new_place(way: Way, request: pytest.FixtureRequest) -> Callable[[], Place]:
    """Where the volumes of one more instance lie: in a directory of its own, or in a namespace of its own in a pool."""
    if way is not Way.POOL:
        return dict
    cluster: Cluster = request.getfixturevalue("ceph_cluster")
    return lambda: {"rados": cluster.options()}


@pytest.fixture
def make_instance(new_place: Callable[[], Place]) -> Iterator[MakeInstance]:
    """Makes instances that are not mounted yet; arguments as for ``Instance``."""
    with instances(new_place) as make:
        yield make


@pytest.fixture
def mount(make_instance: MakeInstance, front: bool) -> Instance:
    """A private instance, mounted."""
    return make_instance(front=front).mount()


@pytest.fixture(scope="module")
def shared_instance(new_place: Callable[[], Place], front: bool) -> Iterator[Instance]:
    with instances(new_place) as make:
        yield make(front=front).mount()


@pytest.fixture
def shared_mount(shared_instance: Instance) -> Iterator[Instance]:
    """As ``mount``, but the same one for all tests of a module, emptied between them: that takes no second each."""
    yield shared_instance
    problems = shared_instance.empty()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture(scope="session")
def ceph_cluster() -> Iterator[Cluster]:
    """One cluster with one OSD, for all tests; a test that stops something in it brings it back."""
    with cluster() as made:
        yield made


@pytest.fixture
def ceph_backend(ceph_cluster: Cluster) -> dict[str, str]:
    """The options of a backend in that cluster: the restricted user's, in a namespace that nothing has used yet."""
    return ceph_cluster.options()
