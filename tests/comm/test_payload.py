"""What can cross a stage boundary, and how: any dense tensor, as the memory that backends carry."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.module import PipelineError

from ds_vshape.comm.payload import HEADER_SIZE, Signature, carried, check_payload, settled

CPU = torch.device("cpu")
PAIRS = torch.complex(torch.arange(6.0).view(2, 3), -torch.ones(2, 3))
BITS = torch.arange(8, dtype=torch.uint8)
# Dtypes that some backend doesn't carry, and numbers that don't lie in memory as they are.
ODD = {"conjugated": PAIRS.conj(), "conjugated twice": PAIRS.conj().conj(), "negated": PAIRS.conj().imag,
       "conjugated view": PAIRS.conj().t()[1:], "0-dim conjugated": PAIRS[0, 0].conj(),
       "int16": BITS.to(torch.int16), "0-dim int16": torch.tensor(7, dtype=torch.int16), "empty": BITS[:0].short(),
       **{str(dtype): BITS.view(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
                                                     torch.float8_e5m2, torch.float8_e8m0fnu)}}


@pytest.mark.parametrize("case", ODD)
def test_every_dense_tensor_travels(case: str) -> None:
    tensor = ODD[case]
    check_payload(tensor, CPU)
    described, = Signature.decode(Signature.of(tensor).encode()).tensors
    assert described is not None
    received = described.empty(CPU)
    sent, into = carried(settled(tensor)), carried(received)
    assert sent.dtype in (torch.float32, torch.uint8) and sent.is_contiguous()
    into.copy_(sent)
    assert received.dtype is tensor.dtype and received.shape == tensor.shape
    assert bytes(received.reshape(-1).view(torch.uint8).tolist()) == bytes(
        tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist())


def test_ordinary_tensors_are_not_copied() -> None:
    for tensor in (torch.ones(2, 3), torch.arange(3), PAIRS, torch.tensor(1.0), BITS.short()):
        assert carried(settled(tensor)).data_ptr() == tensor.data_ptr()


REFUSED: dict[str, tuple[Any, str]] = {
    "text": ("text", "a stage's output holds str"),
    "list": ([torch.ones(2)], "a stage's output holds list"),
    "number": ((torch.ones(2), 3), r"holds int \(member 1 of 2\)"),
    "sparse": (torch.ones(2).to_sparse(), "holds a sparse_coo tensor"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "holds a nested tensor"),
    "bits": (torch.empty(2, dtype=torch.bits8), "holds torch.bits8"),
    "elsewhere": ((torch.ones(2), torch.ones(2, 3, device="meta")),
                  r"holds a float32 tensor of shape \[2, 3\] on meta \(member 1 of 2\): only dense tensors on cpu"),
    "nothing": ((), "is an empty tuple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_cross_is_refused(case: str) -> None:
    payload, message = REFUSED[case]
    with pytest.raises(PipelineError, match=message):
        check_payload(payload, CPU)


def test_a_header_that_is_none_is_an_error() -> None:
    signature = Signature.of((torch.ones(2, 3, requires_grad=True), None, BITS > 0))
    whole = signature.encode() + [0] * (HEADER_SIZE - len(signature.encode()))
    assert Signature.decode(whole) == signature
    bad: dict[str, list[int]] = {
        "no numbers": [], "no tuple": [2, *whole[1:]], "no count": [1, -3], "too many": [1, 300, *whole[2:]],
        "dtype": [1, 1, 99, 0, 0], "below none": [1, 1, -2, 0, 0], "gradient": [1, 1, 0, 2, 0],
        "dimensions": [1, 1, 0, 0, HEADER_SIZE, 1], "negative size": [1, 1, 0, 0, 1, -4],
        "more after it": [*whole[:-1], 1], "two without a tuple": [0, 2, -1, -1], "cut off": whole[:5]}
    for numbers in bad.values():
        with pytest.raises(ValueError):
            Signature.decode(numbers)


def test_numbers_by_chance_are_no_header() -> None:
    generator = random.Random(3)
    for spread in (3, 300, 2**62):
        for _ in range(200):
            with pytest.raises(ValueError):
                Signature.decode([generator.randint(-spread, spread) for _ in range(HEADER_SIZE)])
