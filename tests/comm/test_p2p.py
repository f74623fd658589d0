"""Messages between real ranks: what arrives is what was sent, in any order of use; nothing is read early or kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineError
from internals import in_progress, send_header
from ranks import RanksFailed, run_ranks
from torch import Tensor

from ds_vshape.comm import channels, payload
from ds_vshape.comm.channels import Channels, PeerLost, Signatures, is_connection_error
from ds_vshape.comm.exchange import Exchange
from ds_vshape.comm.payload import Payload, Signature, TensorSignature
from ds_vshape.schedule.lowering import Channel, Content, Message

CPU = torch.device("cpu")
THERE = Channel(0, 1, Content.ACTIVATION)
BACK = Channel(1, 0, Content.GRADIENT)


def forward(micro_batch: int, stage: int = 1) -> Message:
    return Message(THERE, stage, micro_batch)


def backward(micro_batch: int) -> Message:
    return Message(BACK, 0, micro_batch)


def pair(channels: tuple[Channel, ...] = (THERE, BACK)) -> Channels:
    return Channels(channels, [[0, 1]], CPU)


def transfer(rank: int, ends: Channels, message: Message, payload: Payload) -> Payload | None:
    """Rank 0 sends `payload`; rank 1 gets it."""
    if rank == 0:
        ends.send(message, payload)
        ends.release(message)
        return None
    ends.post(message)
    return ends.receive(message)


def payloads(seed: int) -> dict[str, Payload]:
    random = torch.Generator().manual_seed(seed)
    grid = torch.randn(6, 8, generator=random)
    large, pairs = grid * 40, torch.complex(grid, -grid)
    every_dtype = (grid.half(), grid.bfloat16(), grid, grid.double(), pairs, pairs.to(torch.complex128), grid > 0,
                   large.to(torch.int8), large.to(torch.int16), large.int(), large.long(), large.abs().to(torch.uint8),
                   large.abs().to(torch.uint16), large.to(torch.float8_e5m2))
    return {
        "tensor": grid,
        "requires_grad": grid.clone().requires_grad_(),
        "tuple of one": (grid,),
        "every dtype": every_dtype,
        "0-dim": (torch.tensor(float(seed)), torch.tensor(seed), torch.tensor(bool(seed % 2))),
        "empty": (torch.empty(0), grid, torch.empty(3, 0, 2, dtype=torch.bool)),
        "only empty": torch.empty(0, 4),
        "non-contiguous": (grid.t(), grid[:, ::3], grid[::2].half(), grid[0].expand(5, 8)),
        "none": (None, grid, None),
        "only none": (None, None),
        "mask beside activations": (grid.clone().requires_grad_(), grid > 0, torch.arange(8)),
        "in other memory than it says": (pairs.conj(), pairs.conj().imag, pairs.conj()[0, 0]),
        "made by an operation": (grid.clone().requires_grad_() * 2, grid * 2),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    if one is None or other is None:
        return one is other
    if one.dtype.itemsize == 1 and one.is_floating_point():
        one, other = one.float(), other.float()  # torch.equal doesn't know them
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_what_arrives_is_what_was_sent() -> None:
    def body(rank: int) -> list[tuple[str, str]]:
        ends, wrong = pair(), []
        for name in payloads(0):
            signatures: Signatures | None = None
            for batch in range(3):  # the first is announced, the others are known
                ends.begin_batch(signatures)
                for micro_batch in range(2):
                    sent = payloads(2 * batch + micro_batch)[name]
                    got = transfer(rank, ends, forward(micro_batch), sent)
                    if rank == 1 and not same(got, sent):
                        wrong.append((name, "content"))
                    if rank == 1 and not wanted(got, sent):
                        wrong.append((name, "requires_grad"))
                signatures = ends.end_batch()
        return wrong

    def wanted(got: Payload, sent: Payload) -> bool:
        """Leaves that require a gradient where the sender's tensors did, and nothing of the sender's graph."""
        pairs = zip(got, sent) if isinstance(got, tuple) else [(got, sent)]
        return all(g is None or (g.is_leaf and g.requires_grad == s.requires_grad) for g, s in pairs)

    assert run_ranks(2, body) == [[], []]


def test_gradients_and_evaluation_require_no_gradient() -> None:
    def body(rank: int) -> Any:
        ends = pair()
        ends.begin_batch(None)
        activation = torch.ones(3, requires_grad=True)
        with torch.no_grad():
            got = transfer(rank, ends, forward(0), activation)
        if rank == 1:
            ends.send(backward(0), activation)
            ends.release(backward(0))
        else:
            ends.post(backward(0))
            got = ends.receive(backward(0))
        ends.end_batch()
        return got.requires_grad

    assert run_ranks(2, body) == [False, False]


def many(rank: int, ends: Channels, signatures: Signatures | None, order: list[int],
         scale: float) -> tuple[bool, Signatures]:
    """Six messages both ways at once on two channels, used in `order`; a different shape for each stage."""
    def activation(number: int) -> Tensor:
        return torch.full((1 + number % 2, 500), scale * number)

    def gradient(number: int) -> Tensor:
        return torch.full((7,), -scale * number)

    # Two stages share the channel: stage 1 gets the even messages, stage 3 the odd ones.
    forwards, backwards = [forward(number, 1 + 2 * (number % 2)) for number in range(6)], list(map(backward, range(6)))
    incoming, outgoing = (forwards, backwards) if rank == 1 else (backwards, forwards)
    ends.begin_batch(signatures)
    for message in incoming:
        ends.post(message)
    for number, message in enumerate(outgoing):
        ends.send(message, gradient(number) if rank == 1 else activation(number))
    right = all(torch.equal(ends.receive(incoming[number]), activation(number) if rank == 1 else gradient(number))
                for number in order)
    for message in reversed(outgoing):
        ends.release(message)
    return right, ends.end_batch()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 0, 1, 4, 2], [1, 0, 3, 2, 5, 4]])
def test_messages_are_used_in_another_order_than_they_come(order: list[int]) -> None:
    def body(rank: int) -> list[bool]:
        ends, signatures, results = pair(), None, []
        for batch in range(3):
            right, signatures = many(rank, ends, signatures, order, 1.0 + batch)
            results.append(right)
        return results

    assert run_ranks(2, body) == [[True] * 3] * 2


def test_both_kinds_of_messages_of_one_direction_are_used_in_any_order() -> None:
    def body(rank: int) -> list[str]:
        # As between the arms of a V: rank 0 sends activations down one of them and gradients down the other.
        kinds = [Channel(0, 1, content) for content in Content]
        messages = [Message(kinds[number % 2], 1 + number % 3, number) for number in range(6)]
        ends, signatures, wrong = Channels(kinds, [[0, 1]], CPU), None, []
        for batch in range(3):
            ends.begin_batch(signatures)
            if rank == 0:
                for number, message in enumerate(messages):
                    ends.send(message, torch.full((1 + number % 3, 7), 10.0 * batch + number))
                for message in messages:
                    ends.release(message)
            else:
                for message in messages:
                    ends.post(message)
                for number in (3, 5, 0, 4, 1, 2):
                    got = ends.receive(messages[number])
                    if not torch.equal(got, torch.full((1 + number % 3, 7), 10.0 * batch + number)):
                        wrong.append(f"{messages[number]} in batch {batch}")
            signatures = ends.end_batch()
        return wrong

    assert run_ranks(2, body) == [[], []]


def test_pipelines_side_by_side_keep_their_messages_apart() -> None:
    def body(rank: int) -> list[bool]:
        pipelines = [[0, 2], [1, 3]]
        ends = Channels((THERE, BACK), pipelines, CPU)
        place, pipeline = rank // 2, rank % 2
        signatures, results = None, []
        for batch in range(3):
            right, signatures = many(place, ends, signatures, [2, 0, 1, 3, 5, 4], 10.0 * pipeline + batch + 1)
            results.append(right)
        return results

    assert run_ranks(4, body) == [[True] * 3] * 4


def test_a_rank_without_channels_takes_part_in_making_them() -> None:
    def body(rank: int) -> bool:
        # Ranks 0 and 2 are neighbours in neither direction of this chain, and rank 1 stands at all ends.
        chain = (Channel(0, 1, Content.ACTIVATION), Channel(1, 2, Content.ACTIVATION))
        ends = Channels(chain, [[0, 1, 2]], CPU)
        ends.begin_batch(None)
        first, second = Message(chain[0], 1, 0), Message(chain[1], 2, 0)
        if rank > 0:
            ends.post((first, second)[rank - 1])
            received = ends.receive((first, second)[rank - 1])
        else:
            received = torch.arange(4.0)
        if rank < 2:
            ends.send((first, second)[rank], received + rank)
            ends.release((first, second)[rank])
        ends.end_batch()
        return rank == 0 or torch.equal(received, torch.arange(4.0) + rank - 1)

    assert run_ranks(3, body) == [True, True, True]


def test_both_ranks_may_send_first_whatever_the_environment_asks_of_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")

    def body(rank: int) -> bool:
        ends = pair()
        ends.begin_batch(None)
        own, other = (forward(0), backward(0))[::1 if rank == 0 else -1]
        ends.send(own, torch.full((3,), float(rank)))
        ends.post(other)
        received = ends.receive(other)
        ends.release(own)
        ends.end_batch()
        return torch.equal(received, torch.full((3,), 1.0 - rank))

    assert run_ranks(2, body, timeout=60) == [True, True]


def test_groups_share_the_thread_that_torch_would_give_each_of_them() -> None:
    def body(rank: int) -> list[int]:
        def threads() -> int:
            return sum(name.read_text() == "gloo_tcp_loop\n" for name in Path("/proc/self/task").glob("*/comm"))

        counts = [threads()]
        for make in (pair, pair, Exchange, lambda: dist.new_group(), lambda: dist.new_group()):
            make()
            counts.append(threads())
        return counts

    # The first is that of the job's own group, and the last two are those of torch's groups.
    assert run_ranks(2, body) == [[1, 2, 2, 2, 3, 4]] * 2


def test_a_changed_shape_is_named_by_the_sender() -> None:
    def body(rank: int) -> str:
        ends = pair()
        ends.begin_batch(None)
        transfer(rank, ends, forward(0), (torch.ones(2, 3), torch.ones(2) > 0))
        signatures = ends.end_batch()
        ends.begin_batch(signatures)
        if rank:
            return ""
        with pytest.raises(PipelineError) as caught:
            ends.send(forward(4), (torch.ones(2, 5), None))
        return str(caught.value)

    assert run_ranks(2, body)[0] == (
        "the activation for stage 1 changed: [[2, 3] float32, [2] bool] in an earlier batch, [[2, 5] float32, none] in "
        "micro-batch 4 now. Set dynamic_shape=True in the PipelineModule, or call engine.reset_activation_shape() on "
        "every rank before the batch")


def test_announced_batches_may_change_shape_at_every_message() -> None:
    def body(rank: int) -> bool:
        ends, right = pair(), True
        for batch in range(2):
            ends.begin_batch(None)
            for micro_batch in range(3):
                sent = torch.full((micro_batch + 1, batch + 2), float(micro_batch))
                got = transfer(rank, ends, forward(micro_batch), (sent,) * (batch + 1) if micro_batch else sent)
                right &= rank == 0 or same(got, (sent,) * (batch + 1) if micro_batch else sent)
            ends.end_batch()
        return right

    assert run_ranks(2, body) == [True, True]


def test_a_send_does_not_wait_and_buffers_are_not_read_before_they_are_filled() -> None:
    def body(rank: int) -> bool:
        poison(payload)
        ends = pair()
        signatures = None
        clean = True
        for batch in range(2):
            ends.begin_batch(signatures)
            if rank == 0:
                for number in range(4):
                    ends.send(forward(number), torch.full((100_000,), float(number)))
                ends.post(backward(0))
                # The peer sends only when it is told to, so a send that waits for its receive would hang here.
                assert torch.equal(ends.receive(backward(0)), torch.ones(1))
                for number in range(4):
                    ends.release(forward(number))
            else:
                ends.send(backward(0), torch.ones(1))
                for number in range(4):
                    ends.post(forward(number))
                for number in (3, 1, 2, 0):
                    clean &= torch.equal(ends.receive(forward(number)), torch.full((100_000,), float(number)))
                ends.release(backward(0))
            signatures = ends.end_batch()
        return clean

    assert run_ranks(2, body) == [True, True]


def poison(module: Any) -> None:
    """Let every buffer of this process hold NaN until something is received into it."""
    empty: Callable[[TensorSignature, torch.device], Tensor] = module.TensorSignature.empty
    module.TensorSignature.empty = lambda self, device: empty(self, device).fill_(float("nan"))


def test_what_is_never_waited_for_is_noticed() -> None:
    def body(rank: int) -> bool:
        ends = pair()
        ends.begin_batch(None)
        if rank == 0:
            ends.send(forward(0), torch.ones(2))
        else:
            ends.post(forward(0))
        with pytest.raises(AssertionError, match="never waited for"):
            ends.end_batch()
        if rank == 0:
            ends.release(forward(0))
        else:
            ends.receive(forward(0))
        return in_progress(ends, forward(0)) is None

    assert run_ranks(2, body) == [True, True]


def test_no_tensor_outlives_its_use() -> None:
    def body(rank: int) -> list[bool]:
        ends, signatures = pair(), None
        alive = []
        for _ in range(2):
            ends.begin_batch(signatures)
            sent = (torch.ones(1000, requires_grad=True) * 2, torch.arange(50))
            seen = [weakref.ref(tensor) for tensor in sent]
            if rank == 0:
                ends.send(forward(0), sent)
                del sent
                # On its way: the graph is gone with its owner, the numbers must stay (in a tensor without a graph).
                assert seen[0]() is None and in_progress(ends, forward(0))
                kept = [weakref.ref(tensor) for tensor in in_progress(ends, forward(0)) or ()]
                ends.release(forward(0))
            else:
                ends.post(forward(0))
                received = ends.receive(forward(0))
                kept = [weakref.ref(tensor) for tensor in received]
                del received
            gc.collect()
            alive.append(any(ref() is not None for ref in kept))
            signatures = ends.end_batch()
        return alive

    assert run_ranks(2, body) == [[False, False]] * 2


def test_a_sender_that_is_gone_is_an_error_for_its_peer() -> None:
    def body(rank: int) -> None:
        ends = pair()
        ends.begin_batch(None)
        if rank == 0:
            raise PipelineError("what the user must read")
        ends.post(forward(0))
        ends.receive(forward(0))

    with pytest.raises(RanksFailed, match="what the user must read"):
        run_ranks(2, body, timeout=20)


def test_signatures_travel_as_numbers() -> None:
    for sent in payloads(1).values():
        signature = Signature.of(sent)
        assert Signature.decode(signature.encode() + [0] * 20) == signature
    with pytest.raises(PipelineError, match="too many tensors or dimensions: 302 numbers"):
        Signature.of((torch.ones(2),) * 75).encode()


def test_a_pipeline_of_one_rank_has_no_channels() -> None:
    def body(rank: int) -> Signatures:
        ends = Channels((), [[0], [1]], CPU)
        ends.begin_batch(None)
        dist.barrier()
        return ends.end_batch()

    assert run_ranks(2, body) == [{}, {}]


def test_errors_of_connections_are_told_from_others() -> None:
    for broken in ("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3728",
                   "Application timeout caused pair closure", "NCCL communicator was aborted on rank 1."):
        assert is_connection_error(RuntimeError(broken))
    assert is_connection_error(dist.DistBackendError("any")) and is_connection_error(TimeoutError())
    for other in (RuntimeError("view_as_real doesn't work on unresolved conjugated tensors"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
                  torch.OutOfMemoryError("NCCL buffers: out of memory"), KeyError("timeout")):
        assert not is_connection_error(other)


def test_what_fails_while_a_message_starts_leaves_both_ends_in_step() -> None:
    """An error that isn't the connection's comes as itself, before anything has left; and where the receiver has no
    memory for a message, it can take it in later."""
    def body(rank: int) -> list[str]:
        ends, errors = pair(), []
        signatures: Signatures | None = None

        def fails(what: str) -> Any:
            with pytest.raises(ZeroDivisionError) as error:
                if what == "send":
                    ends.send(forward(0), (torch.ones(3), torch.arange(4)))
                else:
                    getattr(ends, what)(forward(0))
            errors.append(f"{type(error.value).__name__}: {error.value}")

        for batch in range(2):
            ends.begin_batch(signatures)
            if rank == 0:
                with fails_once(channels, "settled", 2):
                    fails("send")
                ends.send(forward(0), (torch.full((3,), float(batch)), torch.arange(4)))
                ends.release(forward(0))
            else:
                with fails_once(payload.TensorSignature, "empty", 2):
                    if batch:
                        fails("post")
                    ends.post(forward(0))
                    if not batch:
                        fails("receive")
                assert same(ends.receive(forward(0)), (torch.full((3,), float(batch)), torch.arange(4)))
            signatures = ends.end_batch()
        return errors

    assert run_ranks(2, body) == [["ZeroDivisionError: not now"] * 2] * 2


@contextmanager
def fails_once(place: Any, name: str, call: int) -> Iterator[None]:
    """Let call number `call` of a function raise."""
    function, calls = getattr(place, name), iter(range(1, 1000))

    def failing(*args: Any) -> Any:
        if next(calls) == call:
            raise ZeroDivisionError("not now")
        return function(*args)

    setattr(place, name, failing)
    try:
        yield
    finally:
        setattr(place, name, function)


def test_numbers_in_place_of_a_header_are_an_error() -> None:
    def body(rank: int) -> str:
        ends = pair()
        ends.begin_batch(None)
        if rank == 0:
            send_header(ends, torch.full((payload.HEADER_SIZE,), 7), 1)
            return ""
        ends.post(forward(0))
        with pytest.raises(PeerLost) as error:
            ends.receive(forward(0))
        return str(error.value)

    assert run_ranks(2, body)[1] == ("pipeline rank 0 is out of step: it sent something else where a message's "
                                     "header was expected (7 isn't a number from 0 to 1)")
