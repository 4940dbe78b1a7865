"""The mesh: its sizes, which rows of a batch lie where, and which a process brings."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffjax.train import mesh


@pytest.fixture(scope="module")
def eight():
    return mesh.make_mesh()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "tensor": -1}, (1, 1, 8)),
        ({"data": 1, "fsdp": 2, "tensor": 1}, (1, 2, 1)),  # the first two devices only
    ],
)
def test_minus_one_takes_the_rest(sizes, shape):
    made = mesh.make_mesh(**sizes)
    assert made.axis_names == ("data", "fsdp", "tensor")
    assert tuple(made.shape.values()) == shape
    assert len(set(made.devices.flat)) == np.prod(shape)
    assert all(kind == jax.sharding.AxisType.Auto for kind in made.axis_types)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"must divide the 8 devices; got data=-1, fsdp=3, tensor=1"),
        ({"fsdp": -1}, "at most one of them -1.*got data=-1, fsdp=-1"),
        ({"tensor": 0}, "at least 1.*tensor=0"),
        ({"data": -2}, "at least 1.*data=-2"),
        ({"data": 3, "fsdp": 4}, "needs 12 devices and there are 8; let one axis be -1"),
    ],
)
def test_sizes_that_do_not_fit_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh.make_mesh(**sizes)


def test_a_batch_is_split_over_data_and_fsdp_and_whole_along_tensor():
    on = mesh.make_mesh(data=2, fsdp=2, tensor=2)
    rows = np.arange(8.0)
    placed = mesh.global_batch(on, {"x": rows[:, None]})["x"]
    np.testing.assert_array_equal(placed, rows[:, None])
    for shard in placed.addressable_shards:
        data, fsdp, _ = np.argwhere(on.devices == shard.device)[0]
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(shard.data[:, 0], [first, first + 1])
    assert mesh.batch_sharding(on, 1).spec == PartitionSpec(None, ("data", "fsdp"))
    mesh.check_batch_size(on, 4)
    with pytest.raises(ValueError, match="multiple of the 4 devices along data and fsdp"):
        mesh.check_batch_size(on, 6)


def test_batches_that_do_not_split_raise(eight):
    with pytest.raises(ValueError, match="multiple of the 8 devices.*got 12. Use 8 or 16"):
        mesh.global_batch(eight, np.zeros((12, 2)))
    with pytest.raises(ValueError, match="got 3. Use 8,"):
        mesh.check_batch_size(eight, 3)


def test_dispatch_batches_are_lazy_and_whole(eight):
    read = []

    def local():
        for i in range(5):
            read.append(i)
            yield {"image": np.full((8, 2), i)}

    groups = mesh.dispatch_batches(eight, local(), n=2)
    assert read == []
    first = next(groups)["image"]
    assert read == [0, 1] and first.shape == (2, 8, 2)
    np.testing.assert_array_equal(first[:, 0, 0], [0, 1])
    assert len(list(groups)) == 1  # the fifth batch has no partner


def devices(processes, shape):
    """Stand-ins for the devices of several processes, in this order."""
    made = [SimpleNamespace(process_index=p, id=i) for i, p in enumerate(processes)]
    return np.array(made).reshape(shape)


@pytest.mark.parametrize(
    ("processes", "shape", "shares"),
    [
        ([0, 0, 1, 1], (4, 1, 1), {0: (0, 2), 1: (1, 2)}),
        ([0, 0, 1, 1], (1, 4, 1), {0: (0, 2), 1: (1, 2)}),
        ([0, 0, 1, 1], (2, 1, 2), {0: (0, 2), 1: (1, 2)}),
        # Two processes share one run of rows where "tensor" spans them.
        ([0, 0, 1, 1], (1, 1, 4), {0: (0, 1), 1: (0, 1)}),
        ([0, 0, 1, 1, 2, 2, 3, 3], (1, 2, 4), {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        # Rows of a process that are no run of their own.
        ([0, 1, 0, 1], (4, 1, 1), {0: None, 1: None}),
        ([0, 0, 0, 1, 1, 1], (3, 1, 2), {0: (0, 1), 1: None}),
    ],
)
def test_each_process_brings_one_run_of_rows(processes, shape, shares):
    found = mesh._shares(devices(processes, shape))
    if None in shares.values():
        assert None in found.values()
    else:
        assert found == shares


def test_interleaved_processes_are_put_in_order(monkeypatch):
    # As a pod's network may order them; the mesh falls back to the order of the processes.
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    process = {d: d.id // 4 for d in jax.devices()}
    shares = mesh._shares

    def two_processes(grid):
        stand_ins = [SimpleNamespace(process_index=process[d]) for d in grid.flat]
        return shares(np.array(stand_ins).reshape(grid.shape))

    monkeypatch.setattr(mesh, "_shares", two_processes)
    monkeypatch.setattr(
        jax,
        "make_mesh",
        lambda shape, names, axis_types, devices: jax.sharding.Mesh(
            np.array([devices[i] for i in order]).reshape(shape), names, axis_types=axis_types
        ),
    )
    made = mesh.make_mesh()
    assert [process[d] for d in made.devices.flat] == [0] * 4 + [1] * 4


def test_this_process_has_all_rows(eight):
    assert mesh.batch_share(eight) == (0, 1)
