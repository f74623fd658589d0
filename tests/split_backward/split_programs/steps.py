"""What each step does. A step is found by its kind and variant: in LEAVES if it holds no others, else in HOLDERS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from split_programs.program import BATCH, FROZEN, ROWS, WIDTH, Program, Step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_vshape.split_backward import SplitFunction

VOCABULARY, EXPERTS = 5, 3
SHAPES = {"matrix": (WIDTH, WIDTH), "wide": (2 * WIDTH, WIDTH), "vector": (WIDTH,), "table": (VOCABULARY, WIDTH),
          "rows": (ROWS, ROWS), "batch": (BATCH, WIDTH, WIDTH), "kernel": (WIDTH, WIDTH, 3), "image": (1, 1, 3, 3),
          "grouped": (WIDTH, 2, 3), "one": (1,), "experts": (EXPERTS, WIDTH, WIDTH), "biases": (EXPERTS, WIDTH)}


class Stage(nn.Module):
    """The steps of one stage. `log` gets what its hooks see: a name of the hook, and a tensor. Weights are made when
    they are first used, and told to `made`."""

    def __init__(self, program: Program, number: int, weights: nn.ParameterDict,
                 log: Callable[[str, Any], None], made: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.weights, self.log, self._made = weights, log, made
        self._prefix = "" if program.tied else f"{number}."
        self._dtype = getattr(torch, program.dtype)
        self.micro_batch = 0
        self.parts: list[Callable[[Tensor], Tensor]] = []
        for place, step in enumerate(program.stages[number]):
            self.parts.append(self._make(step, f"{number}.{place}"))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def _make(self, step: Step, name: str) -> Callable[[Tensor], Tensor]:
        if step.kind == "weight hook":
            WEIGHT_HOOKS[step.variant](self.weight("matrix", step.weight), lambda seen: self.log(name, seen))
            return lambda x: x
        if step.kind in HOLDERS:
            inner = [self._make(part, f"{name}.{place}") for place, part in enumerate(step.body)]

            def body(x: Tensor) -> Tensor:
                for part in inner:
                    x = part(x)
                return x

            if step.kind == "module":
                module = _Module(body)
                MODULE_HOOKS[step.variant](module, lambda seen: self.log(name, seen))
                return module
            holder = HOLDERS[step.kind][step.variant]
            return lambda x: holder(self, step, body, x)
        leaf = LEAVES[step.kind][step.variant]
        if step.kind == "hook":
            return lambda x: leaf(x, lambda seen: self.log(name, seen))
        return lambda x: leaf(self, step.weight, x)

    def weight(self, kind: str, number: int) -> nn.Parameter:
        name = f"{self._prefix}{kind}{number}".replace(".", "_")
        if name not in self.weights:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            values = torch.randn(SHAPES[kind], generator=generator, dtype=torch.float64) / 2
            self.weights[name] = nn.Parameter(values.to(self._dtype), requires_grad=number != FROZEN)
            if self._made is not None:
                self._made(self.weights[name])
        found: nn.Parameter = self.weights[name]
        return found

    def indices(self) -> Tensor:
        return torch.randint(0, VOCABULARY, (BATCH, ROWS // BATCH),
                             generator=torch.Generator().manual_seed(self.micro_batch))


class _Module(nn.Module):
    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Scale(SplitFunction):
    """x * weight, as users write it."""

    weight_arguments = (1,)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> Any:
        return (gradient * ctx.saved_tensors[1] if ctx.needs_input_grad[0] else None), None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient * ctx.saved_tensors[0]).flatten(0, -2).sum(0)


class Double(torch.autograd.Function):
    """2 x, by an ordinary function of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def _flat(x: Tensor) -> Tensor:
    return x.reshape(ROWS, WIDTH)


def _by_columns(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _first_part(x: Tensor) -> Tensor:
    return torch.cat([x, x.detach()], -1)[..., :WIDTH]


def _with_hooked_view(x: Tensor, weight: Tensor) -> Tensor:
    transposed = weight.t()
    if transposed.requires_grad:
        transposed.register_hook(lambda gradient: gradient * 2)
    return x @ transposed


def _set(x: Tensor) -> Tensor:
    x[..., 0] = 1.0
    return x


def _by_experts(x: Tensor, product: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Rows of x in three groups, by the expert of each: a number, the same as a tensor, and one from the end."""
    experts: tuple[Any, ...] = (0, torch.tensor(0), -1)
    return torch.cat([product(rows, expert) for rows, expert in zip(_flat(x).chunk(3), experts)]).view(x.shape)


def _selected(x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each row of x by a matrix of its own."""
    return product(_flat(x), weight[torch.tensor([2, 0, 2, 2, 0, -1])]).view(x.shape)


def _hooked_expert(x: Tensor, weight: Tensor, hook: bool) -> Tensor:
    expert = weight[1]
    if expert.requires_grad:
        expert.register_hook(lambda gradient: gradient * 2) if hook else expert.retain_grad()
    return x @ expert


def _one_expert_often(x: Tensor, weight: Tensor) -> Tensor:
    """One view three times, and meanwhile another one of the same expert."""
    expert = weight[1]
    return torch.tanh(torch.tanh(x @ expert) @ weight[1] @ expert) @ expert


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of x in groups, one of which is empty; without expanded gradients, which torch refuses."""
    ends = torch.tensor([2, 2, ROWS], dtype=torch.int32)
    return (F.grouped_mm(_flat(x), weight, offs=ends) * 1).view(x.shape)


Leaf = Callable[[Stage, int, Tensor], Tensor]

LEAVES: dict[str, dict[str, Any]] = {
    "linear": {
        "": lambda s, n, x: F.linear(x, s.weight("matrix", n)),
        "bias": lambda s, n, x: F.linear(x, s.weight("matrix", n), s.weight("vector", n)),
        "2-D": lambda s, n, x: F.linear(_flat(x), s.weight("matrix", n), s.weight("vector", n)).view_as(x),
        "1-D": lambda s, n, x: x + F.linear(x[0, 0], s.weight("matrix", n), s.weight("vector", n)),
        "1-D, strided": lambda s, n, x: x + F.linear(_by_columns(x)[0, 0], s.weight("matrix", n),
                                                     s.weight("vector", n)),
        "keywords": lambda s, n, x: F.linear(input=x, bias=s.weight("vector", n), weight=s.weight("matrix", n)),
        "sequence first": lambda s, n, x: F.linear(x.transpose(0, 1), s.weight("matrix", n),
                                                   s.weight("vector", n)).transpose(0, 1),
        "by columns": lambda s, n, x: F.linear(_by_columns(x), s.weight("matrix", n)),
        "part": lambda s, n, x: F.linear(_first_part(x), s.weight("matrix", n), s.weight("vector", n)),
        "frozen bias": lambda s, n, x: F.linear(x, s.weight("matrix", n), s.weight("vector", FROZEN)),
        "detached in place": lambda s, n, x: x + F.linear(x, s.weight("matrix", n)).detach_(),
        "written to": lambda s, n, x: F.linear(x, s.weight("matrix", n), s.weight("vector", n)).relu_(),
        "written to, bare": lambda s, n, x: F.linear(x, s.weight("matrix", n)).mul_(0.5),
        "transposed weight": lambda s, n, x: F.linear(x, s.weight("matrix", n).t()),
        "part of a weight": lambda s, n, x: F.linear(x, s.weight("wide", n)[WIDTH:]),
        "every other row": lambda s, n, x: F.linear(x, s.weight("wide", n)[::2]),
        "wide": lambda s, n, x: torch.add(*F.linear(x, s.weight("wide", n)).chunk(2, -1)),
        "computed weight": lambda s, n, x: F.linear(x, s.weight("matrix", n) * 2),
        "vmap": lambda s, n, x: torch.func.vmap(lambda row: F.linear(row, s.weight("matrix", n)))(x),
        "bf16": lambda s, n, x: F.linear(x.bfloat16(), s.weight("matrix", n).bfloat16()).to(x.dtype),
    },
    "matmul": {
        "": lambda s, n, x: x @ s.weight("matrix", n),
        "function": lambda s, n, x: torch.matmul(x, other=s.weight("matrix", n)),
        "method": lambda s, n, x: x.matmul(s.weight("matrix", n)),
        ".t()": lambda s, n, x: x @ s.weight("matrix", n).t(),
        ".mT": lambda s, n, x: x @ s.weight("matrix", n).mT,
        "hooked .t()": lambda s, n, x: _with_hooked_view(x, s.weight("matrix", n)),
        "a view of a view": lambda s, n, x: x @ s.weight("matrix", n).t().t().t(),
        "mm": lambda s, n, x: torch.mm(_flat(x), s.weight("matrix", n)).view_as(x),
        "mm method": lambda s, n, x: _flat(x).mm(mat2=s.weight("matrix", n)).view_as(x),
        "mm by columns": lambda s, n, x: _by_columns(_flat(x)).mm(s.weight("matrix", n)).view_as(x),
        "left": lambda s, n, x: (s.weight("rows", n) @ _flat(x)).view_as(x),
        "left by columns": lambda s, n, x: (s.weight("rows", n).mm(_by_columns(_flat(x)))).view_as(x),
        "left of all": lambda s, n, x: (s.weight("matrix", n) @ x.transpose(1, 2)).transpose(1, 2),
        "bmm": lambda s, n, x: torch.bmm(x, s.weight("batch", n)),
        "bmm method": lambda s, n, x: _by_columns(x).bmm(s.weight("batch", n)),
        "batch": lambda s, n, x: x @ s.weight("batch", n),
        "one of a batch": lambda s, n, x: x @ s.weight("batch", n)[1],
        "weight by weight": lambda s, n, x: x @ (s.weight("matrix", n) @ s.weight("matrix", (n + 1) % 2)),
        "vector": lambda s, n, x: x + (x @ s.weight("vector", n)).unsqueeze(-1),
        "einsum": lambda s, n, x: torch.einsum("abk,km->abm", x, s.weight("matrix", n)),
        "part of a weight": lambda s, n, x: x @ s.weight("wide", n)[:WIDTH],
    },
    "experts": {
        "": lambda s, n, x: _by_experts(x, lambda rows, e: F.linear(rows, s.weight("experts", n)[e])),
        "biases": lambda s, n, x: _by_experts(x, lambda rows, e: F.linear(rows, s.weight("experts", n)[e],
                                                                          s.weight("biases", n)[e])),
        "matmul": lambda s, n, x: _by_experts(x, lambda rows, e: rows @ s.weight("experts", n)[e]),
        "one often": lambda s, n, x: _one_expert_often(x, s.weight("experts", n)),
        "each": lambda s, n, x: torch.stack([x @ one for one in s.weight("experts", n)]).sum(0),
        "select": lambda s, n, x: x @ s.weight("experts", n).select(-3, 2),
        "transposed": lambda s, n, x: x @ s.weight("experts", n)[1].t(),
        "another dimension": lambda s, n, x: F.pad(F.linear(x, s.weight("experts", n)[:, 1]), (0, WIDTH - EXPERTS)),
        "hooked": lambda s, n, x: _hooked_expert(x, s.weight("experts", n), True),
        "retained": lambda s, n, x: _hooked_expert(x, s.weight("experts", n), False),
        "selection": lambda s, n, x: _selected(x, s.weight("experts", n),
                                               lambda rows, w: torch.bmm(w, rows.unsqueeze(-1))),
        "selection right": lambda s, n, x: _selected(x, s.weight("experts", n), lambda rows, w: rows.unsqueeze(1) @ w),
        "selection written to": lambda s, n, x: _selected(
            x, s.weight("experts", n), lambda rows, w: rows.unsqueeze(1) @ w.mul_(0.5)),
        "selection and one": lambda s, n, x: x @ s.weight("experts", n)[2] + _selected(
            x, s.weight("experts", n), lambda rows, w: rows.unsqueeze(1) @ w),
        "batch": lambda s, n, x: s.weight("batch", n).bmm(x.transpose(1, 2)).transpose(1, 2),
        "transposed batch": lambda s, n, x: torch.bmm(x, s.weight("batch", n).mT),
        "batch and one": lambda s, n, x: (x @ s.weight("batch", n)) @ s.weight("batch", n)[0],
        "grouped": lambda s, n, x: _grouped(x, s.weight("experts", n)),
        "grouped, transposed": lambda s, n, x: _grouped(x, s.weight("experts", n).transpose(-2, -1)),
        "grouped and one": lambda s, n, x: _grouped(x @ s.weight("experts", n)[1], s.weight("experts", n)),
    },
    "addmm": {
        "": lambda s, n, x: torch.addmm(s.weight("vector", n), _flat(x), s.weight("matrix", n)).view_as(x),
        "method": lambda s, n, x: s.weight("vector", n).addmm(_flat(x), s.weight("matrix", n)).view_as(x),
        ".t()": lambda s, n, x: torch.addmm(s.weight("vector", n), _flat(x), s.weight("matrix", n).t()).view_as(x),
        "scaled": lambda s, n, x: torch.addmm(s.weight("vector", n), _flat(x), s.weight("matrix", n), beta=0.5,
                                              alpha=2).view_as(x),
        "keywords": lambda s, n, x: torch.addmm(input=s.weight("vector", n), mat1=_flat(x),
                                                mat2=s.weight("matrix", n)).view_as(x),
        "of itself": lambda s, n, x: torch.addmm(_flat(x), _flat(x), s.weight("matrix", n)).view_as(x),
        "baddbmm": lambda s, n, x: torch.baddbmm(x, x, s.weight("batch", n)),
    },
    "embedding": {
        "": lambda s, n, x: x + F.embedding(s.indices(), s.weight("table", n)),
        "padding": lambda s, n, x: x + F.embedding(s.indices(), s.weight("table", n), padding_idx=-2),
        "by frequency": lambda s, n, x: x + F.embedding(s.indices(), s.weight("table", n), scale_grad_by_freq=True),
        "max_norm": lambda s, n, x: x + F.embedding(s.indices(), s.weight("table", n), max_norm=0.5),
        "sparse": lambda s, n, x: x + F.embedding(s.indices(), s.weight("table", n), sparse=True),
        "indexed": lambda s, n, x: x + s.weight("table", n)[s.indices()],
        "head": lambda s, n, x: F.linear(x, s.weight("table", n)).softmax(-1) @ s.weight("table", FROZEN),
    },
    "convolution": {
        "": lambda s, n, x: F.conv1d(x.transpose(1, 2), s.weight("kernel", n), s.weight("vector", n), padding=1).mT,
        "same": lambda s, n, x: F.conv1d(x.transpose(1, 2), s.weight("kernel", n), padding="same").transpose(1, 2),
        "grouped": lambda s, n, x: F.conv1d(x.transpose(1, 2), s.weight("grouped", n), None, 1, 1, 1, 2).mT,
        "unbatched": lambda s, n, x: x + F.conv1d(x[0].t(), s.weight("kernel", n), padding=2, dilation=2).t(),
        "2-D": lambda s, n, x: F.conv2d(x.unsqueeze(1), s.weight("image", n), s.weight("one", n), padding=1).squeeze(1),
        "transposed": lambda s, n, x: F.conv_transpose1d(x.transpose(1, 2), s.weight("kernel", n), padding=1).mT,
    },
    "norm": {
        "layer": lambda s, n, x: F.layer_norm(x, (WIDTH,), s.weight("vector", n), s.weight("vector", 1 - n % 2)),
        "layer, no bias": lambda s, n, x: F.layer_norm(x, (WIDTH,), s.weight("vector", n)),
        "rms": lambda s, n, x: F.rms_norm(x, (WIDTH,), s.weight("vector", n)),
        "group": lambda s, n, x: F.group_norm(x.transpose(1, 2), 2, s.weight("vector", n)).transpose(1, 2),
    },
    "pointwise": {
        "tanh": lambda s, n, x: torch.tanh(x),
        "sine": lambda s, n, x: torch.sin(x),
        "dropout": lambda s, n, x: F.dropout(x, 0.3),
        "scale": lambda s, n, x: x * s.weight("vector", n),
        "add": lambda s, n, x: x + s.weight("vector", n),
        "prelu": lambda s, n, x: F.prelu(x, s.weight("one", n)),
        "user's function": lambda s, n, x: Scale.apply(x, s.weight("vector", n)),
        "autograd function": lambda s, n, x: Double.apply(x),
        "attention": lambda s, n, x: F.scaled_dot_product_attention(*(x.unsqueeze(1),) * 3).squeeze(1),
    },
    "view": {
        "transposed in memory": lambda s, n, x: _by_columns(x),
        "chunks": lambda s, n, x: torch.cat(x.chunk(2, -1)[::-1], -1),
        "expanded": lambda s, n, x: x.mean(1, keepdim=True).expand_as(x),
        "slice": lambda s, n, x: x[:, :1] + x,
        "flat": lambda s, n, x: _flat(x).view(x.shape),
        "stacked": lambda s, n, x: torch.stack(x.unbind(1), 1),
    },
    "in place": {
        "mul_": lambda s, n, x: x.mul_(0.5),
        "tanh_": lambda s, n, x: x.tanh_(),
        "set": lambda s, n, x: _set(x),
        "of a part": lambda s, n, x: (x[:, :1].add_(1), x)[1],
        "add_ a product": lambda s, n, x: x.add_(x.detach() @ s.weight("matrix", n)),
    },
    "hook": {
        "sees": lambda x, log: _hooked(x, lambda gradient: log(gradient)),
        "scales": lambda x, log: _hooked(x, lambda gradient: gradient * 2),
        "in place": lambda x, log: _hooked(x, lambda gradient: (gradient.mul_(2), None)[1]),
        "node before": lambda x, log: _node_hooked(x, "register_prehook", lambda gradients: log(gradients[0])),
        "node after": lambda x, log: _node_hooked(x, "register_hook", lambda _, gradients: log(gradients[0])),
        "retained": lambda x, log: (x.retain_grad() if x.requires_grad else None, x)[1],
    },
}


def _hooked(x: Tensor, hook: Any) -> Tensor:
    # torch 2.13 itself crashes on views that were written to without gradients; asked for their node it doesn't.
    if x.requires_grad and (x.is_leaf or x.grad_fn is not None):
        x.register_hook(hook)
    return x


def _node_hooked(x: Tensor, register: str, hook: Any) -> Tensor:
    if x.grad_fn is not None:
        getattr(x.grad_fn, register)(hook)
    return x


def _nothing(*_: Any) -> None:
    return None


def _accumulator(weight: Tensor) -> Any:
    return weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_kept_nodes: list[Any] = []  # a hook on a node lives as long as the node's Python object does


def _on_accumulator(weight: Tensor, register: str, hook: Any) -> None:
    if weight.requires_grad:
        node = _accumulator(weight)
        getattr(node, register)(hook)
        _kept_nodes.append(node)
        del _kept_nodes[:-100]


WEIGHT_HOOKS: dict[str, Any] = {
    "sees": lambda weight, log: weight.requires_grad and weight.register_hook(lambda gradient: log(gradient)),
    "scales": lambda weight, log: weight.requires_grad and weight.register_hook(lambda gradient: gradient * 2),
    "post accumulate": lambda weight, log: weight.requires_grad and weight.register_post_accumulate_grad_hook(
        lambda parameter: log(parameter.grad)),
    "accumulator after": lambda weight, log: _on_accumulator(weight, "register_hook", lambda *_: log(None)),
    "accumulator before": lambda weight, log: _on_accumulator(
        weight, "register_prehook", lambda gradients: log(gradients[0])),
}
MODULE_HOOKS: dict[str, Any] = {
    "": lambda module, log: None,
    "forward before": lambda module, log: module.register_forward_pre_hook(lambda _, inputs: log(inputs[0])),
    "forward": lambda module, log: module.register_forward_hook(lambda _, inputs, output: log(output)),
    "forward, changing": lambda module, log: module.register_forward_hook(lambda _, inputs, output: output * 2),
    "backward": lambda module, log: module.register_full_backward_hook(
        lambda _, gradients, of_output: (log(gradients[0]), log(of_output[0]), None)[2]),
    "backward, changing": lambda module, log: module.register_full_backward_hook(
        lambda _, gradients, of_output: tuple(None if g is None else g * 2 for g in gradients)),
    "backward before": lambda module, log: module.register_full_backward_pre_hook(
        lambda _, of_output: log(of_output[0])),
    "backward before, changing": lambda module, log: module.register_full_backward_pre_hook(
        lambda _, of_output: tuple(None if g is None else g * 2 for g in of_output)),
}

Body = Callable[[Tensor], Tensor]


def _under(body: Body, x: Tensor, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tensor:
    with torch.autocast("cpu", dtype, **options):
        return body(x).to(x.dtype)


def _without_gradients(body: Body, x: Tensor) -> Tensor:
    with torch.no_grad():
        return body(x)


def _offloaded(body: Body, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        return body(x)


def _of_input(body: Body, x: Tensor, create_graph: bool, cut: bool) -> Tensor:
    """x and the gradient of a score by it, as a gradient penalty or forces."""
    inside = x.detach().requires_grad_() if cut else (x if x.requires_grad else x.detach().requires_grad_())
    with torch.enable_grad():
        score = torch.tanh(body(inside)).sum()
        gradient, = torch.autograd.grad(score, inside, create_graph=create_graph, allow_unused=True)
    return x if gradient is None else x + gradient


def _of_weight(stage: Stage, step: Step, body: Body, x: Tensor, create_graph: bool) -> Tensor:
    """The body's value, weighed by a norm of the gradient by a weight, as VQGAN's adaptive weight."""
    weight = stage.weight("matrix", step.weight % 2)
    value = body(x)
    if not value.requires_grad:
        return value
    gradient, = torch.autograd.grad(torch.tanh(value).sum(), weight, retain_graph=True, create_graph=create_graph,
                                    allow_unused=True)
    return value if gradient is None else value * (1 + torch.tanh(gradient.square().sum()))


def _backward_inside(body: Body, x: Tensor) -> Tensor:
    """A local loss: its backward runs in the middle of the forward."""
    value = torch.tanh(body(x.detach().requires_grad_())).sum()
    if value.requires_grad:
        value.backward()
    return x


def _through_inputs(body: Body, x: Tensor) -> Tensor:
    """A backward for a tensor of its own alone: weights get nothing."""
    inside = x.detach().requires_grad_()
    value = torch.tanh(body(inside)).sum()
    if value.requires_grad:
        value.backward(inputs=[inside])
    return x if inside.grad is None else x + inside.grad


HOLDERS: dict[str, dict[str, Any]] = {
    "residual": {"": lambda s, step, body, x: x + body(x),
                 "twice": lambda s, step, body, x: body(torch.tanh(body(x))),
                 "product": lambda s, step, body, x: body(x) * x},
    "unused": {"all": lambda s, step, body, x: (body(x), x)[1],
               "part": lambda s, step, body, x: x + body(x)[:, :1],
               "detached input": lambda s, step, body, x: x + body(x.detach()),
               "detached output": lambda s, step, body, x: x + body(x).detach()},
    "no grad": {"": lambda s, step, body, x: x + _without_gradients(body, x)},
    "checkpoint": {"": lambda s, step, body, x: checkpoint(body, x, use_reentrant=False),
                   "reentrant": lambda s, step, body, x: checkpoint(body, x, use_reentrant=True),
                   "no early stop": lambda s, step, body, x: checkpoint(body, x, use_reentrant=False,
                                                                        early_stop=False)},
    "offload": {"": lambda s, step, body, x: _offloaded(body, x)},
    "autocast": {"": lambda s, step, body, x: _under(body, x),
                 "without cache": lambda s, step, body, x: _under(body, x, cache_enabled=False),
                 "off": lambda s, step, body, x: _under(body, x, enabled=False),
                 "fp16": lambda s, step, body, x: _under(body, x, torch.float16, cache_enabled=False)},
    "module": dict.fromkeys(MODULE_HOOKS),
    "gradient": {"by input": lambda s, step, body, x: _of_input(body, x, False, False),
                 "by a cut input": lambda s, step, body, x: _of_input(body, x, False, True),
                 "by input, twice": lambda s, step, body, x: _of_input(body, x, True, False),
                 "by weight": lambda s, step, body, x: _of_weight(s, step, body, x, False),
                 "by weight, twice": lambda s, step, body, x: _of_weight(s, step, body, x, True),
                 "backward": lambda s, step, body, x: _backward_inside(body, x),
                 "backward by inputs": lambda s, step, body, x: _through_inputs(body, x)},
}
LEAVES["weight hook"] = dict.fromkeys(WEIGHT_HOOKS)
