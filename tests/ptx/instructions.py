"""What each instruction does to a warp."""

import re
from collections.abc import Callable

import numpy as np

from ptx.gpu import PEER, WAITS, YIELDS, Barrier, Execute, Fault, Grid, Warp
from ptx.lanes import dtype_of, floats, meaning
from ptx.program import Instruction, Program, pieces
from ptx.tiles import box_places, left, operand_places, right, sums_of, words_of

Value = Callable[[Warp], np.ndarray]

NOTHING = ("griddepcontrol", "fence", "membar", "prefetch", "setmaxnreg", "wgmma.fence")
"""They order what here is in order, bring sooner what is here at once, or hand out what there is enough of."""


def compiled(each: Instruction, program: Program) -> Execute:
    """What the instruction does. Raises NotImplementedError, with its text, for one that no kernel has had so far."""
    for start, make in _MAKERS.items():
        if each.op.startswith(start):
            return make(each, program)
    if each.op.startswith(NOTHING):
        return lambda warp, active: None
    if each.op.startswith("mov.b") and "{" in each.text:
        return _halves(each, program)
    if (found := meaning(each.op)) is None:
        raise NotImplementedError(each.text)
    compute, kinds = found
    values = [_value(operand, program, kind) for operand, kind in zip(each.operands[1:], kinds, strict=True)]
    to = each.operands[0]

    def execute(warp: Warp, active: np.ndarray) -> None:
        found = compute(*(value(warp) for value in values))
        warp.put(to, found if found.dtype == bool else found.view(f"u{found.dtype.itemsize}"), active)

    return execute


def _value(operand: str, program: Program, kind: str) -> Value:
    """What the lanes have there, as this type."""
    dtype = dtype_of(kind)
    if operand == "%tid.x":
        return lambda warp: (warp.index * 32 + np.arange(32)).astype(dtype)
    if special := re.fullmatch(r"%(n?ctaid)\.([xyz])", operand):
        axis = "xyz".index(special[2])
        if special[1] == "nctaid":
            return lambda warp: np.full(32, warp.grid.size[axis], dtype)
        return lambda warp: np.full(32, warp.block.place[axis], dtype)
    if operand == "%cluster_ctarank":
        return lambda warp: np.full(32, warp.block.rank, dtype)
    if operand == "%cluster_nctarank":
        return lambda warp: np.full(32, len(warp.block.cluster.blocks), dtype)
    if operand.startswith("%"):
        if kind == "pred":
            return lambda warp: warp.registers[operand]
        return lambda warp: warp.registers[operand].astype(f"u{dtype.itemsize}", copy=False).view(dtype)
    if operand in program.parameters:
        constant = program.address_of(operand)
    elif operand in program.shared:
        constant = program.shared[operand]
    elif operand.startswith("0f"):
        constant = int(operand[2:], 16)
    else:
        constant = int(operand.rstrip("U"), 0)
    bits = np.full(32, constant & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
    lanes = bits.astype(bool) if kind == "pred" else bits.view(dtype)
    return lambda warp: lanes


def _address(operand: str, program: Program) -> Value:
    """Of "[a]" or "[a+4]"."""
    base, _, offset = operand.strip("[]").partition("+")
    kind = "u64" if base.startswith("%rd") or base in program.parameters else "u32"
    value = _value(base, program, kind)
    return lambda warp: value(warp).astype(np.int64) + int(offset or 0)


def _halves(each: Instruction, program: Program) -> Execute:
    """Registers of 16 bits made one of 32, or the other way round."""
    to, of = map(pieces, each.operands)
    values = [_value(part, program, "b16" if len(of) > 1 else "b32") for part in of]

    def execute(warp: Warp, active: np.ndarray) -> None:
        if len(of) > 1:
            warp.put(to[0], np.stack([value(warp) for value in values], 1).reshape(-1).view(np.uint32), active)
        else:
            for name, half in zip(to, values[0](warp).view(np.uint16).reshape(32, 2).T, strict=True):
                warp.put(name, half.copy(), active)

    return execute


# memory


def _places(warp: Warp, op: str, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a space, and where in them these addresses are. Raises Fault where they are not aligned, or nothing is there."""
    if (addresses % size).any():
        raise Fault(f"{op}: {size} bytes at {addresses.tolist()}")
    if "global" in op:
        return warp.grid.memory.at(addresses, size)
    if (addresses < 0).any() or (addresses + size > len(warp.block.shared)).any():
        raise Fault(f"{op}: outside of shared memory, {addresses.tolist()}")
    return warp.block.shared, addresses


def _load(each: Instruction, program: Program) -> Execute:
    kind = each.op.split(".")[-1]
    dtype, names = np.dtype(f"u{dtype_of(kind).itemsize}"), pieces(each.operands[0])
    if ".param" in each.op:
        number, most = program.parameters.index(each.operands[1].strip("[]")), (1 << 8 * dtype.itemsize) - 1
        return lambda warp, active: warp.put(names[0], np.full(32, int(warp.grid.values[number]) & most, dtype), active)
    address, size, polls = _address(each.operands[1], program), dtype.itemsize * len(names), "acquire" in each.op

    def execute(warp: Warp, active: np.ndarray) -> str | None:
        found, at = np.zeros((32, len(names)), dtype), address(warp)[active]
        if "::cluster" in each.op:
            lanes = []
            for peer in at:
                block, place = warp.block.peer(int(peer))
                lanes.append(block.shared[place : place + size])
            found[active] = np.stack(lanes).view(dtype)
        else:
            room, at = _places(warp, each.op, at, size)
            found[active] = room[at[:, None] + np.arange(size)].view(dtype)
        for name, lanes in zip(names, found.T, strict=True):
            warp.put(name, lanes.copy(), active)
        return YIELDS if polls and not found.any() else None

    return execute


def _store(each: Instruction, program: Program) -> Execute:
    kind = each.op.split(".")[-1]
    dtype, parts = np.dtype(f"u{dtype_of(kind).itemsize}"), pieces(each.operands[1])
    address, values = _address(each.operands[0], program), [_value(part, program, f"u{8 * dtype.itemsize}") for part in parts]
    size = dtype.itemsize * len(parts)

    def execute(warp: Warp, active: np.ndarray) -> None:
        warp.grid.events += "global" in each.op
        room, at = _places(warp, each.op, address(warp)[active], size)
        room[at[:, None] + np.arange(size)] = np.stack([value(warp)[active] for value in values], 1).view(np.uint8)

    return execute


def _store_async(each: Instruction, program: Program) -> Execute:
    to, barrier = (_address(operand, program) for operand in (each.operands[0], each.operands[2]))
    values = [_value(part, program, "u32") for part in pieces(each.operands[1])]

    def execute(warp: Warp, active: np.ndarray) -> None:
        lanes = np.stack([value(warp) for value in values], 1).view(np.uint8)
        for lane in np.flatnonzero(active):

            def arrive(at: int = int(to(warp)[lane]), its: int = int(barrier(warp)[lane]), sent: np.ndarray = lanes[lane]) -> None:
                block, place = warp.block.peer(at)
                block.shared[place : place + len(sent)] = sent
                other, where = warp.block.peer(its)
                other.barrier(where).come(len(sent))

            warp.grid.pending.append(arrive)

    return execute


def _load_async(each: Instruction, program: Program) -> Execute:
    """`cp.async`: nothing is there before it is waited for."""
    to, of = (_address(operand, program) for operand in each.operands[:2])
    size, read = int(each.operands[2]), _value(each.operands[3], program, "u32")

    def execute(warp: Warp, active: np.ndarray) -> None:
        places, froms, sizes = to(warp)[active], of(warp)[active], read(warp)[active]

        def arrive() -> None:
            for place, source, some in zip(places, froms, sizes, strict=True):
                warp.block.shared[place : place + size] = 0
                if some:
                    room, at = warp.grid.memory.at(np.array([source]), int(some))
                    warp.block.shared[place : place + some] = room[at[0] : at[0] + some]

        warp.loads[-1].append(arrive)

    return execute


def _cp_async(each: Instruction, program: Program) -> Execute:
    if each.op == "cp.async.commit_group":
        return lambda warp, active: warp.loads.append([])
    if each.op == "cp.async.wait_group":

        def wait(warp: Warp, active: np.ndarray) -> None:
            while len(warp.loads) > int(each.operands[0]) + 1:
                for arrive in warp.loads.pop(0):
                    arrive()

        return wait
    if each.op == "cp.async.bulk.commit_group":
        return _commit_bulk
    if each.op == "cp.async.bulk.wait_group.read":
        assert each.operands == ("0",)
        return _wait_bulk
    if ".tensor" in each.op:
        return _store_box(each, program) if "bulk_group" in each.op else _load_box(each, program)
    return _bulk(each, program) if ".bulk" in each.op else _load_async(each, program)


def _commit_bulk(warp: Warp, active: np.ndarray) -> None:
    for lane in np.flatnonzero(active):
        warp.copies[lane].append(warp.open[lane])
        warp.open[lane] = []


def _wait_bulk(warp: Warp, active: np.ndarray) -> str | None:
    return None if all(all(group) for lane in np.flatnonzero(active) for group in warp.copies[lane]) else WAITS


def _bulk(each: Instruction, program: Program) -> Execute:
    to, of, size, barrier = (_address(each.operands[0], program), _address(each.operands[1], program), *_size_and_barrier(each, program))

    def execute(warp: Warp, active: np.ndarray) -> None:
        for lane in np.flatnonzero(active):
            place, source, count = int(to(warp)[lane]), int(of(warp)[lane]), int(size(warp)[lane])
            if place % 16 or source % 16 or count % 16:
                raise Fault(f"{each.op}: {count} bytes from {source:#x} to {place}")

            def arrive(place: int = place, source: int = source, count: int = count, its: int = int(barrier(warp)[lane])) -> None:
                if count:
                    room, at = warp.grid.memory.at(np.array([source]), count)
                    warp.block.shared[place : place + count] = room[at[0] : at[0] + count]
                warp.block.last()
                warp.block.barrier(its).come(count)

            warp.grid.pending.append(arrive)

    return execute


def _size_and_barrier(each: Instruction, program: Program) -> tuple[Value, Value]:
    return _value(each.operands[2], program, "u32"), _address(each.operands[3], program)


def _box(each: str, program: Program) -> tuple[Value, Value, Value]:
    """The map's address, and the first column and row, of "[map, {column, row}]"."""
    tensor, column, row = (part.strip(" {}[]") for part in each.split(","))
    return _value(tensor, program, "u64"), _value(column, program, "s32"), _value(row, program, "s32")


def _within(grid: Grid, address: int, column: int, row: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """The box, which of its elements the tensor has, and where those are in memory."""
    tensor = grid.map_at(address)
    rows, columns = row + np.arange(tensor.box[0])[:, None], column + np.arange(tensor.box[1])[None, :]
    inside = (rows >= 0) & (rows < tensor.shape[0]) & (columns >= 0) & (columns < tensor.shape[1])
    return tensor.box, inside, (tensor.address + rows * tensor.stride + columns * 2)[inside]


def _load_box(each: Instruction, program: Program) -> Execute:
    to, box, barrier = _address(each.operands[0], program), _box(each.operands[1], program), _address(each.operands[2], program)

    def execute(warp: Warp, active: np.ndarray) -> None:
        for lane in np.flatnonzero(active):
            where, place, its = [int(part(warp)[lane]) for part in box], int(to(warp)[lane]), int(barrier(warp)[lane])

            def arrive(where: list[int] = where, place: int = place, its: int = its) -> None:
                size, inside, addresses = _within(warp.grid, *where)
                found = np.zeros((*inside.shape, 2), np.uint8)
                if len(addresses):
                    room, at = warp.grid.memory.at(addresses, 2)
                    found[inside] = room[at[:, None] + np.arange(2)]
                warp.block.shared[box_places(place, size)[..., None] + np.arange(2)] = found
                warp.block.last()
                warp.block.barrier(its).come(found.size)

            warp.grid.pending.append(arrive)

    return execute


def _store_box(each: Instruction, program: Program) -> Execute:
    box, of = _box(each.operands[0], program), _address(each.operands[1], program)

    def execute(warp: Warp, active: np.ndarray) -> None:
        for lane in np.flatnonzero(active):
            where, place, mine = [int(part(warp)[lane]) for part in box], int(of(warp)[lane]), warp.open[lane]
            mine.append(False)

            def leave(where: list[int] = where, place: int = place, mine: list[bool] = mine, i: int = len(mine) - 1) -> None:
                size, inside, addresses = _within(warp.grid, *where)
                if len(addresses):
                    room, at = warp.grid.memory.at(addresses, 2)
                    room[at[:, None] + np.arange(2)] = warp.block.shared[box_places(place, size)[inside][:, None] + np.arange(2)]
                mine[i] = True

            warp.grid.pending.append(leave)

    return execute


# barriers


def _mbarrier(each: Instruction, program: Program) -> Execute:
    what = each.op.split(".")[1]
    address = _address(each.operands[0 if what == "init" else 1], program)
    if what == "try_wait":
        parity, to = _value(each.operands[2], program, "u32"), each.operands[0]

        def look(warp: Warp, active: np.ndarray) -> str | None:
            lanes = zip(address(warp), parity(warp), active, strict=True)
            found = np.array([bool(a and warp.block.barrier(int(at)).ended(int(its))) for at, its, a in lanes])
            warp.put(to, found, active)
            return None if found[active].all() else YIELDS

        return look
    last = each.operands[-1]
    number = _value(last if not last.startswith("[") else "1", program, "u32")

    def execute(warp: Warp, active: np.ndarray) -> None:
        warp.grid.events += 1
        for lane in np.flatnonzero(active):
            at, count = int(address(warp)[lane]), int(number(warp)[lane])
            if what == "init":
                warp.block.barriers[at] = Barrier(count)
            elif "expect_tx" in each.op:
                warp.block.barrier(at).arrive(expected=count)
            else:
                warp.block.barrier(at).arrive(count)

    return execute


def _bar(each: Instruction, program: Program) -> Execute:
    if "warp" in each.op:
        return lambda warp, active: None
    number = _value(each.operands[0], program, "u32")
    given = int(each.operands[1]) if len(each.operands) > 1 else None

    def execute(warp: Warp, active: np.ndarray) -> str | None:
        state = warp.block.named.setdefault(int(number(warp)[0]), [0, 0])
        if warp.waiting is None:
            warp.waiting = state[1]
            state[0] += 32
            if state[0] >= (given or warp.grid.threads):
                state[0], state[1] = 0, state[1] + 1
                warp.grid.events += 1
        if state[1] == warp.waiting:
            return WAITS
        warp.waiting = None
        return None

    return execute


def _cluster_barrier(each: Instruction, program: Program) -> Execute:
    def execute(warp: Warp, active: np.ndarray) -> str | None:
        cluster = warp.block.cluster
        if ".arrive" in each.op:
            warp.arrived = cluster.phase
            cluster.arrived.add(warp)
            cluster.settle()
            warp.grid.events += 1
            return None
        if cluster.phase == warp.arrived:
            return WAITS
        warp.arrived = None
        return None

    return execute


def _shuffle(each: Instruction, program: Program) -> Execute:
    assert each.op == "shfl.sync.idx.b32"
    value, lane = (_value(operand, program, "u32") for operand in each.operands[1:3])
    return lambda warp, active: warp.put(each.operands[0].split("|")[0], value(warp)[lane(warp) % 32], active)


def _elect(each: Instruction, program: Program) -> Execute:
    """Nothing says which lane it is, only that it is always the same."""
    to = each.operands[0].split("|")[1]
    return lambda warp, active: warp.put(to, np.arange(32) == 31, active)


def _mapa(each: Instruction, program: Program) -> Execute:
    address, rank = (_value(operand, program, "u32") for operand in each.operands[1:])
    return lambda warp, active: warp.put(each.operands[0], address(warp) | (rank(warp) + np.uint32(1)) << np.uint32(PEER), active)


# matrices


def _ldmatrix(each: Instruction, program: Program) -> Execute:
    names, address = pieces(each.operands[0]), _address(each.operands[1], program)

    def execute(warp: Warp, active: np.ndarray) -> None:
        room, at = _places(warp, each.op, address(warp)[: 8 * len(names)], 16)
        rows = room[at[:, None] + np.arange(16)].view(np.uint32).reshape(len(names), 32)
        for name, lanes in zip(names, rows, strict=True):
            warp.put(name, lanes.copy(), active)

    return execute


def _transposed(words: np.ndarray) -> np.ndarray:
    """8 x 8 tiles of 16 bits, of which each of 32 lanes has two neighbours: [tiles, 32] -> [tiles, 8, 8]."""
    return np.ascontiguousarray(words.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1))


def _stmatrix(each: Instruction, program: Program) -> Execute:
    address, values = _address(each.operands[0], program), [_value(part, program, "u32") for part in pieces(each.operands[1])]
    assert ".trans" in each.op

    def execute(warp: Warp, active: np.ndarray) -> None:
        room, at = _places(warp, each.op, address(warp)[: 8 * len(values)], 16)
        tiles = _transposed(np.stack([value(warp) for value in values]))
        room[at[:, None] + np.arange(16)] = tiles.view(np.uint8).reshape(-1, 16)

    return execute


def _movmatrix(each: Instruction, program: Program) -> Execute:
    value = _value(each.operands[1], program, "u32")
    return lambda warp, active: warp.put(each.operands[0], _transposed(value(warp)[None]).reshape(-1).view(np.uint32), active)


def _mma(each: Instruction, program: Program) -> Execute:
    kind = each.op.split(".")[-2]
    names = pieces(each.operands[0])
    a, b, c = ([_value(part, program, "u32") for part in pieces(operand)] for operand in each.operands[1:])

    def execute(warp: Warp, active: np.ndarray) -> None:
        first, second, sums = (np.stack([value(warp) for value in part]) for part in (a, b, c))
        total = sums_of(sums) + left(first, kind) @ right(second, kind)
        for name, lanes in zip(names, words_of(total), strict=True):
            warp.put(name, lanes, active)

    return execute


def _wgmma(each: Instruction, program: Program) -> Execute:
    if ".commit_group" in each.op:
        return lambda warp, active: warp.products.append([])
    if ".wait_group" in each.op:

        def wait(warp: Warp, active: np.ndarray) -> None:
            while len(warp.products) > int(each.operands[0]) + 1:
                for look in warp.products.pop(0):
                    look()

        return wait
    kind, n = each.op.split(".")[-1], int(re.findall(r"m64n(\d+)k16", each.op)[0])
    names = pieces(each.operands[0])
    a = [_value(part, program, "u32") for part in pieces(each.operands[1])]
    descriptor = _value(each.operands[2], program, "u64")
    assert each.operands[3:] == ("1", "1", "1", "0"), "adds, negates nothing, inputs side by side"

    def execute(warp: Warp, active: np.ndarray) -> None:
        places = operand_places(int(descriptor(warp)[0]), n)[..., None] + np.arange(2)
        shared = warp.block.shared
        found = shared[places]
        sums = sums_of(np.stack([warp.registers[name] for name in names]))
        total = sums + left(np.stack([value(warp) for value in a]), kind) @ floats(found.view(np.uint16)[..., 0], kind).T
        for name, lanes in zip(names, words_of(total), strict=True):
            warp.put(name, lanes, active)

        def look() -> None:
            if not np.array_equal(found, shared[places]):
                raise Fault(f"{each.op}: what it reads changed before it was waited for")

        warp.products[-1].append(look)

    return execute


_MAKERS: dict[str, Callable[[Instruction, Program], Execute]] = {
    "ld.": _load,
    "st.async": _store_async,
    "st.": _store,
    "cp.async": _cp_async,
    "mbarrier.": _mbarrier,
    "bar.": _bar,
    "barrier.cluster": _cluster_barrier,
    "shfl": _shuffle,
    "elect": _elect,
    "mapa": _mapa,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "movmatrix": _movmatrix,
    "mma.": _mma,
    "wgmma.mma_async": _wgmma,
    "wgmma.commit_group": _wgmma,
    "wgmma.wait_group": _wgmma,
    "cvta": lambda each, program: _moved(each, program),
}


def _moved(each: Instruction, program: Program) -> Execute:
    value = _value(each.operands[1], program, "u64")
    return lambda warp, active: warp.put(each.operands[0], value(warp), active)
