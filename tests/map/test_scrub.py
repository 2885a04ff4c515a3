"""Damage of every kind is found, named with what it harms, confined to that, and mended if the bytes are elsewhere."""

import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.engine import format_bitmap
from archipfs.errors import ObjectDamaged, ObjectMissing
from archipfs.map.check import Severity, check_backend
from archipfs.map.locks import Node
from archipfs.map.mapper import Attributes, Mapper, create_store
from archipfs.map.packs import HEADER_BYTES, Kind
from archipfs.map.pages import Extent, decode_leaf, encode_leaf
from archipfs.map.records import DamageRecord, Sealed, VolumeRecord
from archipfs.map.records import Kind as VolumeKind
from archipfs.map.scrub import Bookmark, Elsewhere, repair, scrub
from archipfs.map.tree import Tree, updated
from archipfs.types import REGION_BYTES, SECTOR_BYTES, VOLUME_BYTES_MAX, LayerId, PackId
from tests.map.sealing import NODE, Content, Sealer, chunk_of, expected, sealer

MASK_BITS = 3
CONTENT: Content = {0: [1, 2, 3], 1: [4, 5], 300: [6, 7]}
OTHER: Content = {0: [1, 8], 2: [9]}


class Patient:
    """A store with two sealed snapshots that have a chunk in common, in packs of their own, and their volumes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blocker = MemoryBlocker()
        create_store(self.blocker)
        self.mapper = Mapper("default", self.blocker, Node(NODE, "host"), format_bitmap)
        with self.opened() as node:
            self.layers = {"snap": node.seal(CONTENT), "other": node.seal(OTHER)}
            for name, layer in self.layers.items():
                self._name(name, layer)
        self.packs = [PackId(key.partition("/")[2]) for key in self.blocker.list("pack")]

    def _name(self, name: str, layer: LayerId) -> None:
        with self.mapper.reserve(name) as reservation:
            record = VolumeRecord(
                id=reservation.volume,
                name=name,
                kind=VolumeKind.SNAPSHOT,
                size=400 * REGION_BYTES,
                layer=layer,
                visible=VOLUME_BYTES_MAX,
                origin=None,
                created_ns=0,
                mode=0o444,
                uid=0,
                gid=0,
                atime_ns=0,
                mtime_ns=0,
                ctime_ns=0,
            )
            self.mapper.publish(reservation, record)

    def opened(self):  # type: ignore[no-untyped-def]
        """The store as a process with an empty cache sees it."""
        number = len(list(self.directory.iterdir()))
        return sealer(self.blocker, self.directory / str(number))

    def bookmark(self) -> Bookmark:
        return Bookmark(self.directory / "bookmark" / "scrub.json", self.mapper.store.id)

    def overwrite(self, pack: PackId, data: bytes | None) -> None:
        self.blocker.delete(f"pack/{pack}")
        if data is not None:
            self.blocker.put(f"pack/{pack}", data)

    def errors(self, node: Sealer) -> list[str]:
        found = check_backend(self.mapper, node.store)
        return [f"{each.which}: {each.what}" for each in found if each.severity is Severity.ERROR]

    def readable(self, node: Sealer, name: str) -> dict[int, list[bytes | None]]:
        """By region the chunks of a snapshot, ``None`` for what cannot be read; nothing for one without its page."""
        seen: dict[int, list[bytes | None]] = {}
        for region in (CONTENT, OTHER)[name == "other"]:
            try:
                leaf = Tree(node.store.page, node.root(self.layers[name])).leaf(region)
                assert leaf is not None
                extents = decode_leaf(node.store.page(leaf))
            except (ObjectDamaged, ObjectMissing):
                seen[region] = []
                continue
            seen[region] = []
            for extent in extents:
                try:
                    seen[region].append(node.store.read(extent.digest))
                except (ObjectDamaged, ObjectMissing):
                    seen[region].append(None)
        return seen


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    return Patient(tmp_path)


def assert_nothing_wrong_is_read(patient: Patient, node: Sealer) -> int:
    """What can be read is right. Returns how many chunks cannot be."""
    unread = 0
    for name, content in (("snap", CONTENT), ("other", OTHER)):
        wanted = expected(content)
        for region, chunks in patient.readable(node, name).items():
            unread += sum(chunk is None for chunk in chunks) if chunks else len(wanted[region])
            assert all(chunk in (None, whole) for chunk, whole in zip(chunks, wanted[region], strict=False))
    return unread


def test_a_whole_store_has_no_findings(patient: Patient) -> None:
    with patient.opened() as node:
        assert check_backend(patient.mapper, node.store) == []
        done = scrub(node.catalog, node.store, patient.bookmark())
        assert (done.packs, done.damaged, done.resumed_after) == (2, 0, None)
        assert done.read_bytes == sum(
            entry.stored_bytes for pack in patient.packs for entry in node.store.index(pack).entries
        )
        assert list(patient.blocker.list_records("damage")) == []


def test_a_flip_anywhere_in_a_pack_is_found_and_confined(patient: Patient) -> None:
    """In the header, the index, a chunk, a page: at every entry, and at many places in between."""
    with patient.opened() as node:
        indexes = {pack: node.store.index(pack) for pack in patient.packs}
    for pack, index in indexes.items():
        whole = patient.blocker.get(f"pack/{pack}")
        data_offset = index.entries[0].offset
        places = [0, 9, 40, 88, HEADER_BYTES, HEADER_BYTES + 33, data_offset - 1, len(whole) - 1]
        places += [entry.offset + entry.stored_bytes // 2 for entry in index.entries]
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            patient.overwrite(pack, bytes(damaged))
            with patient.opened() as node:
                node.store.refresh()
                done = scrub(node.catalog, node.store, patient.bookmark())
                found = patient.errors(node)
                unread = assert_nothing_wrong_is_read(patient, node)
                hit = [entry for entry in index.entries if entry.offset <= place < entry.offset + entry.stored_bytes]
                assert found, f"a flip at {place} is not noticed"
                if hit:
                    assert done.damaged == 1
                    assert any(hit[0].digest.hex() in each for each in found), found
                    if hit[0].kind is Kind.CHUNK:
                        assert 1 <= unread <= 2, "only who has that chunk suffers"
                        assert all("bytes " in each for each in found)
                else:
                    assert done.damaged == 0
                    assert any(str(pack) in each for each in found), found
                    assert unread > 0
            patient.overwrite(pack, whole)
            for key, record in list(patient.blocker.list_records("damage")):
                patient.blocker.delete_record(key, record.version)


def test_a_cut_or_missing_pack_is_found_and_confined(patient: Patient) -> None:
    with patient.opened() as node:
        indexes = {pack: node.store.index(pack) for pack in patient.packs}
    for pack, index in indexes.items():
        whole = patient.blocker.get(f"pack/{pack}")
        ends = [0, 100, HEADER_BYTES, index.entries[0].offset, index.entries[1].offset + 5, len(whole) - 1]
        for end in (None, *ends):
            patient.overwrite(pack, None if end is None else whole[:end])
            with patient.opened() as node:
                node.store.refresh()
                scrub(node.catalog, node.store, patient.bookmark())
                found = patient.errors(node)
                assert found
                assert_nothing_wrong_is_read(patient, node)
                if end is not None:
                    assert any(str(pack) in each for each in found)
                if end is None or end < len(whole) - 1:
                    assert any("cannot be read" in each for each in found)
            patient.overwrite(pack, whole)
            for key, record in list(patient.blocker.list_records("damage")):
                patient.blocker.delete_record(key, record.version)


def test_what_is_added_to_a_pack_is_found(patient: Patient) -> None:
    pack = patient.packs[0]
    patient.overwrite(pack, patient.blocker.get(f"pack/{pack}") + b"more")
    with patient.opened() as node:
        assert any(str(pack) in each for each in patient.errors(node))
        assert assert_nothing_wrong_is_read(patient, node) == 0


def flip(patient: Patient, number: int, *, sector: int = 0) -> PackId:
    """Damage a chunk in the one pack that has it."""
    with patient.opened() as node:
        node.store.refresh()
        place = node.store.locate(node.store.hash.digest(chunk_of(number)))
    data = bytearray(patient.blocker.get(f"pack/{place.pack}"))
    data[place.offset + sector * SECTOR_BYTES + 77] ^= 0x01
    patient.overwrite(place.pack, bytes(data))
    return place.pack


def test_a_damaged_chunk_is_reported_with_all_who_hold_it(patient: Patient) -> None:
    flip(patient, 1)
    with patient.opened() as node:
        scrub(node.catalog, node.store, patient.bookmark())
        found = patient.errors(node)
    size = len(chunk_of(1))
    assert sorted(each.partition(" (")[0] for each in found) == ["snapshot other", "snapshot snap"]
    assert all(f"bytes 0 to {size} cannot be read" in each for each in found)


def test_offsets_are_those_in_the_volume(patient: Patient) -> None:
    flip(patient, 7)
    with patient.opened() as node:
        scrub(node.catalog, node.store, patient.bookmark())
        (found,) = patient.errors(node)
    begin = 300 * REGION_BYTES + len(chunk_of(6))
    assert f"bytes {begin} to {begin + len(chunk_of(7))} cannot be read" in found
    assert found.startswith("snapshot snap ")


def test_a_damaged_page_is_reported_with_the_bytes_below_it(patient: Patient) -> None:
    with patient.opened() as node:
        node.store.refresh()
        leaf = Tree(node.store.page, node.root(patient.layers["snap"])).leaf(300)
        assert leaf is not None
        place = node.store.locate(leaf)
    data = bytearray(patient.blocker.get(f"pack/{place.pack}"))
    data[place.offset + 20] ^= 0x01
    patient.overwrite(place.pack, bytes(data))
    with patient.opened() as node:
        scrub(node.catalog, node.store, patient.bookmark())
        (found,) = patient.errors(node)
    assert f"bytes {300 * REGION_BYTES} to {301 * REGION_BYTES} cannot be read" in found


def test_damage_that_is_gone_is_struck_off(patient: Patient) -> None:
    whole = {pack: patient.blocker.get(f"pack/{pack}") for pack in patient.packs}
    pack = flip(patient, 3)
    with patient.opened() as node:
        assert scrub(node.catalog, node.store, patient.bookmark()).damaged == 1
        record = node.catalog.get(DamageRecord, pack)
        assert record is not None
        assert record.record.digests == [node.store.hash.digest(chunk_of(3)).hex()]
        with pytest.raises(ObjectDamaged):
            node.store.locate(node.store.hash.digest(chunk_of(3)))
        patient.overwrite(pack, whole[pack])
        assert scrub(node.catalog, node.store, patient.bookmark()).damaged == 0
        assert node.catalog.get(DamageRecord, pack) is None
        assert node.store.read(node.store.hash.digest(chunk_of(3))) == chunk_of(3)


def test_records_of_packs_that_are_gone_are_leftovers(patient: Patient) -> None:
    gone = PackId("0" * 64)
    with patient.opened() as node:
        node.catalog.put(DamageRecord(gone, []), gone, None)
        found = check_backend(patient.mapper, node.store)
        assert [(each.severity, each.which) for each in found] == [(Severity.LEFTOVER, f"damage {gone}")]


# Stopped, and slow


class Stop(Exception):
    pass


def test_a_scrub_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    patient = Patient(tmp_path)
    bad = flip(patient, 5)
    first = min(patient.packs)
    with patient.opened() as node:
        sizes = {pack: sum(entry.stored_bytes for entry in node.store.index(pack).entries) for pack in patient.packs}

        def stop_in_the_second(done: int, total: int) -> None:
            assert total >= done
            if done > sizes[first]:
                raise Stop

        with pytest.raises(Stop):
            scrub(node.catalog, node.store, patient.bookmark(), progress=stop_in_the_second)
        again = scrub(node.catalog, node.store, patient.bookmark())
        assert again.resumed_after == first
        assert (again.packs, again.read_bytes) == (1, sizes[max(patient.packs)])
        assert node.catalog.get(DamageRecord, bad) is not None, "whichever of the two runs came to it"
        assert scrub(node.catalog, node.store, patient.bookmark()).resumed_after is None


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"store": "other", "after": "00"}', b'{"after": 3}'])
def test_a_bookmark_that_makes_no_sense_begins_anew(patient: Patient, content: bytes) -> None:
    bookmark = patient.bookmark()
    bookmark.write(PackId("f" * 64))
    assert bookmark.read() == "f" * 64
    (patient.directory / "bookmark" / "scrub.json").write_bytes(content)
    assert bookmark.read() is None


def test_a_rate_is_kept(patient: Patient) -> None:
    with patient.opened() as node:
        started = time.monotonic()
        done = scrub(node.catalog, node.store, patient.bookmark(), bytes_per_second=200_000)
        assert time.monotonic() - started >= done.read_bytes / 200_000 * 0.9


# Repair


def mend(patient: Patient, node: Sealer, elsewhere: list[Elsewhere]) -> tuple[int, int, tuple[str, ...]]:
    scrub(node.catalog, node.store, patient.bookmark())
    done = repair(node.catalog, node.store, elsewhere, MASK_BITS)
    with suppress(ObjectMissing):  # a page is lost still
        node.collector().collect(unreadable=True)
    return done.mended, done.lost, tuple(done.tried)


def assert_mended(patient: Patient, node: Sealer, bad: PackId) -> None:
    assert check_backend(patient.mapper, node.store) == []
    assert node.content(patient.layers["snap"]) == expected(CONTENT)
    assert node.content(patient.layers["other"]) == expected(OTHER)
    assert bad not in node.store.packs()
    assert list(patient.blocker.list_records("damage")) == []


def test_without_another_copy_it_says_where_it_looked(patient: Patient) -> None:
    flip(patient, 3)
    with patient.opened() as node:
        mended, lost, tried = mend(patient, node, [Elsewhere("default", patient.blocker, None)])
        assert (mended, lost) == (0, 1)
        assert tried == ("the other packs of this backend", "what is not sealed in backend default")
        assert len(patient.errors(node)) == 1
        assert assert_nothing_wrong_is_read(patient, node) == 1


def test_another_backend_has_it(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> None:
    other_blocker = MemoryBlocker()
    bad = flip(patient, 3)
    with patient.opened() as node, sealer(other_blocker, tmp_path_factory.mktemp("other")) as other:
        other.seal({9: [3]})
        assert mend(patient, node, [Elsewhere("second", other_blocker, other.store)])[:2] == (1, 0)
        assert_mended(patient, node, bad)


def test_a_backend_with_another_hash_is_not_asked(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> None:
    other_blocker = MemoryBlocker()
    flip(patient, 3)
    directory = tmp_path_factory.mktemp("other")
    with patient.opened() as node, sealer(other_blocker, directory, hash_name="sha256") as other:
        other.seal({9: [3]})
        mended, lost, tried = mend(patient, node, [Elsewhere("second", other_blocker, other.store)])
        assert (mended, lost) == (0, 1)
        assert "the packs of backend second" not in tried


@pytest.mark.parametrize("shift", [0, 1, 5, 1020, 1023])
def test_what_is_not_sealed_yet_has_it_wherever_it_lies(patient: Patient, shift: int) -> None:
    """The chunk numbered 7 has four sectors; one of them is damaged, and the rest leads to the right place."""
    bad = flip(patient, 7, sector=2)
    volume = patient.mapper.create("copy", 16 << 20, Attributes()).record
    data = patient.blocker.open_data(f"layer/{volume.layer}", writable=True)
    data.pwrite(shift * SECTOR_BYTES, chunk_of(6) + chunk_of(7) + chunk_of(20))
    data.close()
    with patient.opened() as node:
        assert mend(patient, node, [Elsewhere("default", patient.blocker, None)])[:2] == (1, 0)
        assert_mended(patient, node, bad)


def test_a_chunk_of_which_nothing_is_left_is_found_by_cutting_anew(tmp_path: Path) -> None:
    """As sealing cut it; a pack is gone altogether."""
    patient = Patient(tmp_path)
    volume = patient.mapper.create("copy", 16 << 20, Attributes()).record
    data = patient.blocker.open_data(f"layer/{volume.layer}", writable=True)
    for place, number in enumerate((9, 8)):
        data.pwrite(place * REGION_BYTES, chunk_of(number))
    data.close()
    with patient.opened() as node:
        node.store.refresh()
        place = node.store.locate(node.store.hash.digest(chunk_of(9)))
        before = len(node.store.packs())
        pages = [entry for entry in node.store.index(place.pack).entries if entry.kind is Kind.PAGE]
        with node.store.session() as session:
            kept = [node.store.read(entry.digest) for entry in pages]
            patient.overwrite(place.pack, None)
            node.store.refresh()
            for page in kept:
                session.add_page(page)
            session.flush()
        assert before == len(node.store.packs())
        assert mend(patient, node, [Elsewhere("default", patient.blocker, None)])[:2] == (2, 0)
        assert_mended(patient, node, place.pack)


def test_a_page_is_mended_before_what_it_leads_to(patient: Patient, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All packs are gone; another backend has the same layer."""
    other_blocker = MemoryBlocker()
    for pack in patient.packs:
        patient.overwrite(pack, None)
    with patient.opened() as node, sealer(other_blocker, tmp_path_factory.mktemp("other")) as other:
        other.seal(CONTENT)
        other.seal(OTHER)
        mended, lost, _ = mend(patient, node, [Elsewhere("second", other_blocker, other.store)])
        assert mended > 10
        assert lost == 0
        assert_mended(patient, node, patient.packs[0])


@pytest.mark.timeout(60)
def test_a_page_that_makes_no_sense_is_not_mended_for_ever(patient: Patient) -> None:
    """It is there, as its digest says: whoever made it was wrong, or knew more than we do."""
    with patient.opened() as node:
        node.store.refresh()
        layer = patient.layers["snap"]
        leaf = Tree(node.store.page, node.root(layer)).leaf(300)
        assert leaf is not None
        found = node.catalog.layer(layer)
        node.catalog.put(msgspec.structs.replace(found.record, sealed=Sealed(leaf.hex(), 0, 0)), layer, found.version)
        done = repair(node.catalog, node.store, [Elsewhere("default", patient.blocker, node.store)], MASK_BITS)
        assert (done.mended, done.lost) == (0, 1)


def damage_head(patient: Patient, pack: PackId) -> None:
    data = bytearray(patient.blocker.get(f"pack/{pack}"))
    data[40] ^= 1
    patient.overwrite(pack, bytes(data))


def test_a_pack_whose_head_is_damaged_goes_when_all_is_mended(
    patient: Patient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other_blocker = MemoryBlocker()
    damage_head(patient, patient.packs[0])
    with patient.opened() as node, sealer(other_blocker, tmp_path_factory.mktemp("other")) as other:
        assert mend(patient, node, [])[1] > 0
        assert f"pack/{patient.packs[0]}" in patient.blocker.list("pack"), "somebody may still make something of it"
        other.seal(CONTENT)
        other.seal(OTHER)
        assert mend(patient, node, [Elsewhere("second", other_blocker, other.store)])[1] == 0
        assert_mended(patient, node, patient.packs[0])
        assert f"pack/{patient.packs[0]}" not in patient.blocker.list("pack")


def test_what_this_node_remembers_of_a_pack_whose_head_is_damaged_is_rescued(patient: Patient) -> None:
    with patient.opened() as node:
        node.store.refresh()
        for pack in patient.packs:
            damage_head(patient, pack)
        node.collector().collect()
        assert mend(patient, node, [])[:2] == (0, 0)
        for pack in patient.packs:
            assert_mended(patient, node, pack)
    with patient.opened() as fresh:
        assert fresh.content(patient.layers["snap"]) == expected(CONTENT)


def test_a_pack_whose_head_is_damaged_stays_as_long_as_a_seal_needs_it(patient: Patient) -> None:
    """A node that knows from before what is in it has sealed against it, after the repair."""
    with patient.opened() as knowing, patient.opened() as node:
        knowing.store.refresh()
        with node.store.session() as session:
            session.add_chunk(node.store.hash.digest(b"y" * SECTOR_BYTES), b"y" * SECTOR_BYTES)
            session.flush()
        knowing.store.refresh()
        (lonely,) = knowing.store.packs() - set(patient.packs)
        damage_head(patient, lonely)
        layer = knowing.new_layer()
        with knowing.store.session() as session:
            digest = knowing.store.hash.digest(b"y" * SECTOR_BYTES)
            assert not session.add_chunk(digest, b"y" * SECTOR_BYTES)
            leaf = session.add_page(encode_leaf([Extent(0, 1, digest, 0)], knowing.store.hash.digest_bytes))
            root = updated(knowing.store.page, session.add_page, None, {0: leaf}, knowing.store.hash.digest_bytes)
            session.flush()
            session.verify()
            found = knowing.catalog.layer(layer)
            sealed = msgspec.structs.replace(found.record, sealed=Sealed(root.hex(), 0, 0))
            knowing.catalog.put(sealed, layer, found.version)
        node.collector().collect(unreadable=True)
        assert f"pack/{lonely}" in patient.blocker.list("pack")
        assert list(patient.blocker.list_records("condemned")) == []
