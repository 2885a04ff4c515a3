"""The engine against plain bytearrays: whatever is done in whatever order, both hold the same."""

import shutil
import tempfile
import uuid
from pathlib import Path

from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.engine import EngineLayer, EngineVolume, format_bitmap
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX
from tests.lib.searching import searching

SIZE_MAX = 20 * SECTOR_BYTES
LAYERS_MAX = 8

offsets = st.one_of(st.integers(0, SIZE_MAX - 1), st.integers(0, 19).map(lambda sector: sector * SECTOR_BYTES))
lengths = st.one_of(st.integers(1, 3 * SECTOR_BYTES), st.integers(1, 4).map(lambda sectors: sectors * SECTOR_BYTES))


class EngineModel(RuleBasedStateMachine):
    """A volume with its layers, and the bytes it has to show."""

    def __init__(self) -> None:
        super().__init__()
        self.blocker = MemoryBlocker()
        self.live = Path(tempfile.mkdtemp())
        self.boot = uuid.uuid4().hex
        self.expected = bytearray(7 * SECTOR_BYTES + 100)
        self.recorded_size = len(self.expected)
        self.frozen: list[tuple[int, bytes]] = []
        self.chain = [(self.new_layer(), VOLUME_BYTES_MAX)]
        self.open(len(self.expected))

    # The chain, as a mapper would keep it: head first, with how far each layer's parent shows

    def new_layer(self) -> str:
        layer_id = uuid.uuid4().hex
        self.blocker.create_data(f"data/{layer_id}").close()
        bitmap = self.blocker.create_data(f"bitmap/{layer_id}")
        format_bitmap(bitmap, layer_id)
        bitmap.close()
        return layer_id

    def layer(self, layer_id: str, visible: int, *, head: bool, live: bool = True) -> EngineLayer:
        return EngineLayer(
            layer_id,
            self.blocker.open_data(f"data/{layer_id}", writable=True),
            self.blocker.open_data(f"bitmap/{layer_id}", writable=True),
            parent_visible=visible,
            head=head,
            live_path=str(self.live / layer_id) if live else None,
            boot_id=self.boot,
        )

    def open(self, size: int) -> None:
        self.layers = [self.layer(*link, head=index == 0) for index, link in enumerate(self.chain)]
        assert max(size, self.layers[0].live_size) == len(self.expected)
        self.volume = EngineVolume(self.layers, len(self.expected), writable=True)
        self.note_visible()

    def note_visible(self) -> None:
        self.chain[0] = self.chain[0][0], self.layers[0].parent_visible

    def close(self, *, clean: bool) -> None:
        for layer in self.layers:
            layer.close()
        self.volume.close(clean=clean)

    # What is done

    @rule(offset=offsets, length=lengths, byte=st.integers(1, 255))
    def write(self, offset: int, length: int, byte: int) -> None:
        data = bytes([byte]) * min(length, SIZE_MAX - offset)
        self.volume.write(offset, data)
        end = offset + len(data)
        if end > len(self.expected):
            self.expected.extend(bytes(end - len(self.expected)))
        self.expected[offset:end] = data

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        expected = self.expected[offset : offset + length]
        assert self.volume.read(offset, length) == expected
        buffer = bytearray(length)
        assert self.volume.read_into(offset, buffer) == len(expected)
        assert buffer[: len(expected)] == expected

    @rule(offset=offsets, length=lengths, zero=st.booleans())
    def discard(self, offset: int, length: int, zero: bool) -> None:
        if zero:
            self.volume.write_zeros(offset, length)
        else:
            self.volume.discard(offset, length)
        end = min(offset + length, len(self.expected))
        if offset < end:
            self.expected[offset:end] = bytes(end - offset)

    @rule(offset=offsets)
    def seek(self, offset: int) -> None:
        data, hole = self.volume.seek_data(offset), self.volume.seek_hole(offset)
        size = len(self.expected)
        assert not any(self.expected[offset : size if data is None else data])
        if offset >= size:
            assert data is None
            assert hole is None
        else:
            assert hole is not None
            assert offset <= hole <= size
            assert hole == size or self.expected[hole] == 0

    @rule()
    def flush(self) -> None:
        self.volume.flush()
        self.recorded_size = len(self.expected)
        assert not any(layer.dirty for layer in self.layers)

    @rule(size=st.integers(0, SIZE_MAX))
    def resize(self, size: int) -> None:
        self.volume.pause()
        self.volume.announce_size(size)
        self.volume.resize(size)
        self.volume.resume()
        self.recorded_size = size
        self.note_visible()
        self.expected[size:] = bytes(max(0, size - len(self.expected)))

    @precondition(lambda self: len(self.chain) < LAYERS_MAX)
    @rule()
    def snapshot(self) -> None:
        self.note_visible()
        head = self.layer(layer_id := self.new_layer(), VOLUME_BYTES_MAX, head=True)
        assert self.volume.swap_head(head) == len(self.expected)
        self.layers.insert(0, head)
        self.chain.insert(0, (layer_id, VOLUME_BYTES_MAX))
        self.flush()
        self.frozen.insert(0, (len(self.chain) - 1, bytes(self.expected)))

    @precondition(lambda self: self.frozen)
    @rule(number=st.integers(0, LAYERS_MAX))
    def read_snapshot(self, number: int) -> None:
        depth, content = self.frozen[number % len(self.frozen)]
        layers = [self.layer(*link, head=False, live=False) for link in self.chain[len(self.chain) - depth :]]
        volume = EngineVolume(layers, len(content), writable=False)
        assert volume.read(0, SIZE_MAX) == content
        volume.close(clean=False)
        for layer in layers:
            layer.close()

    @rule(rebooted=st.booleans())
    def end_and_open(self, rebooted: bool) -> None:
        self.flush()
        self.close(clean=True)
        assert list(self.live.iterdir()) == []
        if rebooted:
            self.boot = uuid.uuid4().hex
        self.open(self.recorded_size)

    @rule()
    def kill(self) -> None:
        self.close(clean=False)
        self.open(self.recorded_size)

    @invariant()
    def same_bytes(self) -> None:
        assert self.volume.size == len(self.expected)
        assert self.volume.read(0, SIZE_MAX) == self.expected

    def teardown(self) -> None:
        self.close(clean=False)
        shutil.rmtree(self.live)


TestEngineModel = EngineModel.TestCase
TestEngineModel.settings = searching(150, stateful_step_count=40, suppress_health_check=list(HealthCheck))
