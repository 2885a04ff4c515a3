"""Every kind of damage has its name in ``check``, and what is whole has none."""

from collections.abc import Callable

import msgspec
import pytest

from archipfs.blockers.memory import MemoryBlocker
from archipfs.map.check import Severity, check_backend
from archipfs.map.mapper import Attributes, Mapper, bitmap_key, data_key
from archipfs.map.names import name_ident
from archipfs.map.records import (
    Hold,
    LayerRecord,
    LockRecord,
    NameRecord,
    VolumeRecord,
    encode,
)
from archipfs.types import VOLUME_BYTES_MAX, LayerId, new_layer_id, new_volume_id
from tests.compose.world import World

FUTURE = b"archipfs-record 9 volume 00 00\n{}"


class Patient:
    """A store with two layers under a volume, a snapshot, and a lock; and the ways to damage it."""

    def __init__(self, world: World) -> None:
        self.store: MemoryBlocker = world.store
        self.mapper: Mapper = world.mapper()
        composer = world.composer()
        composer.create("vm", 1 << 20)
        composer.snapshot("vm", "snap")
        composer.lock("vm")
        self.volume = self.record("vm")
        self.snapshot = self.record("snap")

    def record(self, name: str) -> VolumeRecord:
        found = self.mapper.find(name)
        assert found is not None
        return found.record

    def overwrite(self, key: str, value: bytes) -> None:
        found = self.store.get_record(key)
        self.store.put_record(key, value, found.version if found else None)

    def drop(self, key: str) -> None:
        found = self.store.get_record(key)
        assert found is not None
        self.store.delete_record(key, found.version)

    def change_volume(self, **fields: object) -> None:
        self.mapper.change(self.volume.id, lambda record: msgspec.structs.replace(record, **fields))

    def change_layer(self, layer: LayerId, **fields: object) -> None:
        found = self.mapper.catalog.layer(layer)
        self.mapper.catalog.put(msgspec.structs.replace(found.record, **fields), layer, found.version)

    def name_key(self, name: str) -> str:
        return f"name/{name_ident(name)}"


@pytest.fixture
def patient(world: World) -> Patient:
    return Patient(world)


def test_a_whole_store_has_no_findings(patient: Patient) -> None:
    assert check_backend(patient.mapper) == []


def test_an_empty_store_has_no_findings(world: World) -> None:
    assert world.check() == []


Damage = Callable[[Patient], object]

ERRORS: dict[str, tuple[Damage, str, str]] = {
    "damaged volume record": (
        lambda patient: patient.overwrite(f"volume/{patient.volume.id}", b"nonsense"),
        "is damaged: no header",
        "record volume/",
    ),
    "damaged layer record": (
        lambda patient: patient.overwrite(f"layer/{patient.snapshot.layer}", encode(patient.volume)),
        "is damaged: wrong header",
        "record layer/",
    ),
    "damaged name record": (
        lambda patient: patient.overwrite(patient.name_key("vm"), b""),
        "is damaged",
        "record name/",
    ),
    "damaged lock record": (
        lambda patient: patient.overwrite(f"lock/{patient.volume.id}", b"archipfs-record 1 lock 0 0\n{}"),
        "bad checksum",
        "record lock/",
    ),
    "damaged store record": (
        lambda patient: patient.overwrite("store/info", b"archipfs-record"),
        "is damaged",
        "record store/info",
    ),
    "record of a later format": (
        lambda patient: patient.overwrite(f"volume/{patient.volume.id}", FUTURE),
        "has format 9",
        "record volume/",
    ),
    "a volume's record in another's place": (
        lambda patient: patient.overwrite(f"volume/{patient.snapshot.id}", encode(patient.volume)),
        "another record's content lies in its place",
        "record volume/",
    ),
    "a name's record in another's place": (
        lambda patient: patient.overwrite(patient.name_key("vm"), encode(NameRecord("snap", patient.snapshot.id))),
        "another record's content lies in its place",
        "record name/",
    ),
    "a layer's record in another's place": (
        lambda patient: patient.overwrite(
            f"layer/{patient.volume.layer}", encode(patient.mapper.catalog.layer(patient.snapshot.layer).record)
        ),
        "another record's content lies in its place",
        "record layer/",
    ),
    "name lost": (
        lambda patient: patient.drop(patient.name_key("vm")),
        "volume's name does not lead to it",
        "volume vm",
    ),
    "name speaks of another": (
        lambda patient: patient.overwrite(patient.name_key("vm"), encode(NameRecord("vm", new_volume_id()))),
        "volume's name does not lead to it",
        "volume vm",
    ),
    "head lost": (
        lambda patient: patient.drop(f"layer/{patient.volume.layer}"),
        "is missing",
        "volume vm",
    ),
    "parent lost": (
        lambda patient: patient.drop(f"layer/{patient.snapshot.layer}"),
        "is missing",
        "layer ",
    ),
    "layer lost of a snapshot": (
        lambda patient: patient.drop(f"layer/{patient.snapshot.layer}"),
        "is missing",
        "volume snap",
    ),
    "data object lost": (
        lambda patient: patient.store.delete_data(data_key(patient.volume.layer)),
        "its layer object is missing",
        "layer ",
    ),
    "bitmap object lost": (
        lambda patient: patient.store.delete_data(bitmap_key(patient.snapshot.layer)),
        "its bitmap object is missing",
        "layer ",
    ),
    "circle": (
        lambda patient: patient.change_layer(patient.snapshot.layer, parent=patient.volume.layer),
        "go round in a circle",
        "volume vm",
    ),
    "two writers of one layer": (
        lambda patient: patient.mapper.catalog.put_volume(
            msgspec.structs.replace(patient.snapshot, id=new_volume_id(), layer=patient.volume.layer), None
        ),
        "another volume reads the layer it writes",
        "volume vm",
    ),
    "a writer below a child": (
        lambda patient: patient.change_volume(layer=patient.mapper.catalog.layer(patient.volume.layer).record.parent),
        "another volume reads the layer it writes",
        "volume vm",
    ),
}


def clone_of_the_head(patient: Patient) -> None:
    """A volume whose layer has the head of another for its parent."""
    made = patient.mapper.create("child", 4096, Attributes()).record
    patient.change_layer(made.layer, parent=patient.volume.layer)


ERRORS["a head with a child"] = (clone_of_the_head, "the layer it writes has children", "volume vm")


@pytest.mark.parametrize("damage", ERRORS)
def test_damage_is_named(patient: Patient, damage: str) -> None:
    act, what, which = ERRORS[damage]
    act(patient)
    findings = check_backend(patient.mapper)
    assert any(
        what in found.what and found.which.startswith(which) and found.severity is Severity.ERROR for found in findings
    ), findings
    assert findings == sorted(findings, key=lambda found: found.severity.value), "errors come first"
    assert all("\n" not in found.what for found in findings)


LEFTOVERS: dict[str, tuple[Damage, str]] = {
    "removed volume": (lambda patient: patient.mapper.remove(patient.volume.id), "removed and not purged"),
    "dangling name": (
        lambda patient: patient.mapper.catalog.put_name(NameRecord("x", new_volume_id()), None),
        "name leads to no volume",
    ),
    "unnamed layer": (
        lambda patient: patient.mapper.catalog.put(
            LayerRecord(layer := new_layer_id(), patient.volume.layer, VOLUME_BYTES_MAX, "node", 0), layer, None
        ),
        "layer that nothing leads to",
    ),
    "unnamed layer without its parent": (
        lambda patient: patient.mapper.catalog.put(
            LayerRecord(layer := new_layer_id(), new_layer_id(), 0, "node", 0), layer, None
        ),
        "layer that nothing leads to",
    ),
    "data object without a layer": (
        lambda patient: patient.store.create_data(f"layer/{new_layer_id()}"),
        "data object without a layer",
    ),
    "bitmap object without a layer": (
        lambda patient: patient.store.create_data(f"bitmap/{new_layer_id()}"),
        "data object without a layer",
    ),
    "lock of nothing": (
        lambda patient: patient.mapper.catalog.put(
            LockRecord(volume := new_volume_id(), 0, "node", "host", 0, (Hold.IO,)), volume, None
        ),
        "lock of a volume that is gone",
    ),
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_leftovers_are_no_errors(patient: Patient, leftover: str) -> None:
    act, what = LEFTOVERS[leftover]
    act(patient)
    findings = check_backend(patient.mapper)
    assert findings
    assert {found.severity for found in findings} == {Severity.LEFTOVER}
    assert any(what in found.what for found in findings)


def test_several_findings_are_all_there(patient: Patient) -> None:
    for name in ("name lost", "data object lost", "parent lost"):
        ERRORS[name][0](patient)
    findings = check_backend(patient.mapper)
    whats = " ".join(found.what for found in findings)
    for what in ("does not lead to it", "layer object is missing", "parent"):
        assert what in whats


def test_what_a_look_catches_on_the_way_is_no_damage(world: World) -> None:
    """A volume is made between the look at volumes and the look at objects, every time anew."""
    mapper = world.mapper()

    made: list[VolumeRecord] = []
    list_data = world.store.list_data

    def busily(kind: str) -> object:
        found = list(list_data(kind))
        number = len(made)
        made.append(mapper.create(f"vm{number}", 4096, Attributes()).record)
        return iter(found)

    world.store.list_data = busily  # type: ignore[method-assign,assignment]
    assert [found for found in check_backend(mapper) if found.severity is Severity.ERROR] == []
    assert len(made) >= 2


def test_looking_changes_nothing(patient: Patient) -> None:
    patient.drop(patient.name_key("vm"))
    before = {kind: list(patient.store.list_records(kind)) for kind in ("volume", "layer", "name", "lock", "store")}
    first = check_backend(patient.mapper)
    assert check_backend(patient.mapper) == first
    assert before == {kind: list(patient.store.list_records(kind)) for kind in before}
