"""The second front end: `torch.export`, for Python that depends on data."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxprune.cloning import aliased_state, clone, named_state
from fxprune.errors import TraceError
from fxprune.sources import short_line
from fxprune.traced import TRAINING, Traced, TrainingFlag, left_out, taking_part

_TORCH = os.path.dirname(torch.__file__) + os.sep


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Trace a model with `torch.export`, with dynamic sizes where it allows them."""
    root = clone(model)
    auto = pytree.tree_map(
        lambda v: dict.fromkeys(range(v.ndim), torch.export.Dim.AUTO) if isinstance(v, torch.Tensor) else None,
        (args, kwargs),
    )
    try:
        program = torch.export.export(root, args, kwargs, dynamic_shapes=(*auto[0], *auto[1].values()), strict=False)
        notes = ["traced by torch.export"]
    except Exception:
        program = torch.export.export(root, args, kwargs, strict=False)
        notes = ["traced by torch.export with the sizes of the example inputs: other sizes are not supported"]
    module = program.module()
    graph = module.graph
    _check_transforms(graph)
    _erase_guards(graph)
    _erase_copies_onto_themselves(graph)
    module.add_module(TRAINING, TrainingFlag())
    _ask_for_mode(graph)
    own = {name: t for name, t, _ in aliased_state(model)}
    graph_module = fx.GraphModule(module, graph, type(model).__name__)
    for name, _, _ in list(named_state(graph_module)):
        if name in own:
            holder, _, key = name.rpartition(".")
            setattr(graph_module.get_submodule(holder), key, own[name])
    graph_module.train(model.training)
    notes += [] if model.training else _on_batch_norms(model)
    sources = {n.name: line for n in graph.nodes if (line := _line_of(n.stack_trace))}
    state, _ = taking_part(graph_module, graph_module.graph)
    used = {id(t) for _, t, _ in state}
    notes += left_out([name for name, t, is_parameter in named_state(model) if is_parameter and id(t) not in used])
    return Traced(
        model, graph_module, graph_module.graph, args, kwargs, "export", model.training, tuple(notes), sources, state
    )


def _check_transforms(graph: fx.Graph) -> None:
    """Refuse `torch.vmap`: its calls open and close levels, and may not run one by one, as nodes do.

    Raises:
        TraceError: the graph holds such calls.
    """
    for node in graph.nodes:
        if getattr(node.target, "__module__", None) == "torch._functorch.predispatch":
            line = short_line(_line_of(node.stack_trace))
            raise TraceError(
                f"forward calls torch.vmap ({line}), which cannot be followed. Write it for whole batches."
            )


def _erase_guards(graph: fx.Graph) -> None:
    """Drop what only checks that sizes, dtypes and devices are those of the export: the network may be moved."""
    for node in list(graph.nodes):
        guards = node.op == "call_module" and "_guards_fn" in str(node.target)
        if guards or node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _erase_copies_onto_themselves(graph: fx.Graph) -> None:
    """Drop the copies of buffers that were written in place onto themselves: gradients could not pass by these."""
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.copy_.default:
            continue
        home, source = node.args
        while isinstance(source, fx.Node) and getattr(getattr(source.target, "_schema", None), "is_mutable", False):
            source = source.args[0]  # which it has written to and returned
        if source is home:
            node.replace_all_uses_with(home)
            graph.erase_node(node)


def _ask_for_mode(graph: fx.Graph) -> None:
    """Let dropout and batch norm of an exported graph ask for the mode instead of the one they were exported in."""
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for i, argument in enumerate(schema.arguments):
            if argument.name in ("train", "training") and i < len(node.args) and isinstance(node.args[i], bool):
                with graph.inserting_before(node):
                    node.update_arg(i, graph.call_module(TRAINING))


def _on_batch_norms(model: nn.Module) -> list[str]:
    """Return notes on batch norms: the op that is exported of one in eval mode does not count batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    notes = ["batch norms do not count batches in num_batches_tracked"] if norms else []
    if any(m.momentum is None for m in norms):
        notes.append("batch norms with momentum=None keep their running statistics in train()")
    return notes


def _line_of(stack_trace: str | None) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    mine = [(path, line) for path, line in found if not path.startswith(_TORCH)]
    return ":".join((mine or found)[-1]) if found else ""
