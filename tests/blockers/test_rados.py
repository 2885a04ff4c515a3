"""The ``rados`` driver against the contract, on a cluster, and what is its own."""

import pytest

from archipfs.blockers.rados.blocker import RadosBlocker
from tests.blockers.claims import ClaimConformance
from tests.blockers.conformance import Conformance, Store

pytestmark = pytest.mark.ceph


class TestRados(Conformance, ClaimConformance):
    @pytest.fixture
    def store(self, ceph_backend: dict[str, str]) -> Store:
        return Store(lambda: RadosBlocker.from_options(**ceph_backend))
