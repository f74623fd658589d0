"""What a stage holds of a micro-batch: inputs that may be changed in place, and a way back that keeps no outputs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ds_vshape.runtime.buffers import Buffer, edges, enter, leaves


@pytest.mark.parametrize("count", [1, 2])
def test_a_stage_may_change_its_inputs_in_place(count: int) -> None:
    inputs = tuple(torch.full((3,), float(number + 1), requires_grad=True) for number in range(count))
    buffer = Buffer(inputs=(*inputs, torch.ones(3) > 0, None))
    entered = enter(buffer.inputs)
    assert entered[0].data_ptr() == inputs[0].data_ptr(), "no memory is copied"
    for tensor in entered[:count]:
        tensor.mul_(5).relu_()
    torch.autograd.backward([tensor.sum() for tensor in entered[:count]])
    grads = buffer.take_input_grads()
    assert grads[count:] == [None, None] and buffer.inputs is None
    for grad in grads[:count]:
        assert torch.equal(grad, torch.full((3,), 5.0))


def test_a_bare_tensor_stays_one_and_data_without_gradients_is_passed_on() -> None:
    bare = torch.ones(2, requires_grad=True)
    assert torch.is_tensor(enter(bare)) and not enter(bare).is_leaf
    data = (torch.ones(2), torch.arange(3))
    assert enter(data) is data


def test_edges_lead_back_without_the_outputs() -> None:
    source = torch.ones(4, requires_grad=True)
    outputs = (source + 1, torch.arange(4), None, source.detach() * 2)
    held = weakref.ref(outputs[0])
    roots = edges(outputs, torch.device("cpu"))
    assert [root is not None for root in roots] == [True, False, False, False]
    del outputs
    gc.collect()
    assert held() is None
    torch.autograd.backward([roots[0]], [torch.full((4,), 3.0)])
    assert torch.equal(source.grad, torch.full((4,), 3.0))


def test_the_next_stage_on_the_same_rank_gets_leaves_over_the_same_memory() -> None:
    outputs = (torch.ones(4, requires_grad=True) * 2, torch.ones(4), None, torch.ones(4) > 0)
    cut = leaves(outputs)
    assert [t is not None and t.requires_grad for t in cut] == [True, False, False, False]
    assert all(t is None or (t.is_leaf and t.data_ptr() == o.data_ptr()) for t, o in zip(cut, outputs))
    assert torch.is_tensor(leaves(outputs[0]))


def test_an_input_that_nothing_used_has_no_gradient() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    buffer = Buffer(inputs=(used, unused))
    enter(buffer.inputs)[0].sum().backward()
    found = buffer.take_input_grads()
    assert torch.equal(found[0], torch.ones(2)) and found[1] is None
