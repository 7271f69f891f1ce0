"""What the passes ask of a captured graph: sizes, blocks, provenance. Nothing here changes a graph but for dead code.

Before the sequence is cut, every size that depends on the length is written in the one symbol `Facts.sequence`; while
it is being cut, `meta["val"]` keeps meaning "in the length of my own region".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from simba_fx.errors import GraphError
from simba_fx.graph.marks import Role, region, role
from simba_fx.ops.recurrences import SCANS

SELECTS = (torch.ops.simba_fx.select_tokens.default, torch.ops.simba_fx.select_real_tokens.default)


BLOCK = "simba_fx_block"
"""Where a call of a block says what it runs, its `BlockCode`."""
CRITERION = "_simba_criterion"
"""Where the code of a block finds a user's criterion on the module that it runs on."""


@dataclass(frozen=True, eq=False)
class BlockCode:
    """What one block of an outlined graph runs (`outline-blocks`)."""

    graph: fx.Graph
    """Equal for blocks of one kind."""
    kind: int
    path: str | None
    """Of the module that the code reads tensors of, from the program's root; None: it reads none."""
    hooked: bool
    """Whether the code is all of that module's, and runs between its hooks."""
    scored_by_user: bool
    """Whether the code calls a user's criterion."""


@dataclass(frozen=True)
class Facts:
    """What is known of a captured graph and does not change while it is rewritten."""

    sequence: sympy.Symbol
    """The symbol of the input's length, L."""
    batch: sympy.Expr
    """The number of rows, B: a symbol, or a constant where Dynamo's graph has a fixed one."""
    primary: str
    """The placeholder that B and L are read from, `(B, L, ...)`."""
    mask: str | None
    """The placeholder of the padding mask `(B, L)`, if the graph takes one."""
    blocks: tuple[str, ...]
    """The module path of each block, in order."""
    values: int
    """How many of the graph's flat outputs are the model's values; the others are cache states."""
    mask_marks: str = "real"
    """What values of the mask other than 0 mark: "real" tokens or "padding"."""

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)


def look_up(root: Any, path: str) -> Any:
    """`root.a.b.c` for `"a.b.c"`. Raises: AttributeError where a part is missing."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def tensor_paths(root: nn.Module) -> set[str]:
    """The paths of a module's parameters and buffers, each by all the names that it has."""
    tensors = (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False))
    return {path for named in tensors for path, _ in named}


def value(node: fx.Node) -> Any:
    return node.meta.get("val")


def operator_of(node: fx.Node) -> Any:
    """The operator that a node calls (torch.fx types a target as a function or a string)."""
    return node.target


def is_size(node: fx.Node) -> bool:
    """Whether the node yields a (symbolic) number rather than tensors."""
    return isinstance(value(node), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def expression(size: float | torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    return sympy.sympify(size) if isinstance(size, int | float) else size.node.expr


def depends_on_length(node: fx.Node, facts: Facts) -> bool:
    """Whether a size node is computed from the sequence length."""
    return is_size(node) and facts.sequence in expression(value(node)).free_symbols


def sequence_dims(node: fx.Node, facts: Facts) -> tuple[int, ...]:
    """The dimensions of a tensor node whose size is the sequence length.

    Raises:
        GraphError: a dimension is computed from the length but is not the length itself (`2*s`, `s + 3`).
    """
    val = value(node)
    if isinstance(val, tuple | list) and any(isinstance(leaf, Tensor) for leaf in val):
        raise GraphError(
            f"Node {node.name} in {where(node)} has several results and crosses a cut; expected single tensors there. "
            "Keep that block whole (give the next block the same share)."
        )
    if not isinstance(val, Tensor):
        return ()
    dims = []
    for dim, size in enumerate(val.shape):
        expr = expression(size)
        if expr == facts.sequence:
            dims.append(dim)
        elif (expr - facts.sequence).is_Integer and expr != facts.sequence:
            raise GraphError(
                f"Node {node.name} in {where(node)} has shape {shape_text(val, facts)} and crosses a cut; expected "
                "(B, L, ...), since survivors are chosen among the L tokens of the input. If the model puts tokens of "
                "its own beside those, transform the module inside it that is given all of them, with "
                "protect=range(n) for n in front; else keep that block whole (give the next block the same share)."
            )
        elif facts.sequence in expr.free_symbols:
            raise GraphError(
                f"Node {node.name} in {where(node)} has shape {shape_text(val, facts)} and crosses a cut; dimension "
                f"{dim} is computed from the sequence length L but not equal to it, so survivors cannot be gathered "
                "along it. Keep that block whole (give the next block the same share)."
            )
    return tuple(dims)


def shape_text(val: Tensor, facts: Facts) -> str:
    """`(B, 2*L, 6)`: a shape with its symbols under the names of the glossary."""
    letters = {facts.sequence: sympy.Symbol("L")}
    if isinstance(facts.batch, sympy.Symbol):
        letters[facts.batch] = sympy.Symbol("B")
    return f"({', '.join(str(expression(size).subs(letters)) for size in val.shape)})"


def from_mask_alone(graph: fx.Graph, facts: Facts) -> set[fx.Node]:
    """Nodes computed from the padding mask and constants only."""
    if facts.mask is None:
        return set()
    found = {placeholder(graph, facts.mask)}
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
        bookkeeping = role(node) is Role.REAL
        if inputs and isinstance(value(node), Tensor) and not bookkeeping and all(n in found for n in inputs):
            found.add(node)
    return found


FACTORIES = ("full", "ones", "zeros", "empty", "rand", "randn", "randint", "scalar_tensor", "empty_strided")
SIMILAR = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1, "full_like": None, "new_full": None,
           "empty_like": 0, "new_empty": 0, "rand_like": None, "randn_like": None, "randint_like": None}  # fmt: skip
"""Operators that read the shape of a tensor, not what is in it; and the number that they fill (None: a given one)."""
MARKERS = ("site_enter", "site_exit", "own_enter", "own_exit")
"""Around calls that a graph may make again (`simba_fx.capture.lift`): identities of their first argument."""
SAME_PLACES = ("unsqueeze", "squeeze", "expand", "view", "reshape", "to", "_to_copy", "clone", "transpose", "permute",
               "alias", "detach", "detach_", "contiguous", "expand_as", "view_as", "lift_fresh_copy", "flatten",
               "type_as", "float", "masked_fill", "where")  # fmt: skip


def opname(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", ""))


def is_even(node: fx.Node) -> bool:
    """Whether the operator does the same at every place of a sequence."""
    known = opname(node) in (*FACTORIES, *SIMILAR, *SAME_PLACES)
    return known or torch.Tag.pointwise in getattr(node.target, "tags", ())


def stem(name: str) -> str:
    """A node's name without its numbers: equal blocks must name equal nodes alike."""
    return re.sub(r"(_\d+)+$", "", name)


def where(node: fx.Node) -> str:
    """The path of the innermost module that a node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return paths[-1] if paths else "the model's own forward"


def by_region(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """The graph's nodes by region, in one walk. Changes nothing; what is inserted later is not among them."""
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        found.setdefault(region(node), []).append(node)
    return found


def end_of(graph: fx.Graph, index: int) -> fx.Node:
    """The first node after region `index`: what is inserted before it belongs to the region's end."""
    node: fx.Node = next(node for node in graph.nodes if region(node) > index)
    return node


def scans_by_block(graph: fx.Graph, blocks: int) -> list[list[fx.Node]]:
    """The scans of each block, in order; not those outside of blocks. Changes nothing."""
    found: list[list[fx.Node]] = [[] for _ in range(blocks)]
    for node in graph.nodes:
        if node.target in SCANS and 0 <= region(node) < blocks:
            found[region(node)].append(node)
    return found


def selects(graph: fx.Graph) -> list[fx.Node]:
    """The selections in the graph, first cut first."""
    return [node for node in graph.nodes if node.target in SELECTS]


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    node: fx.Node = next(node for node in graph.nodes if node.op == "placeholder" and node.name == name)
    return node


def output_of(graph: fx.Graph) -> fx.Node:
    node: fx.Node = next(iter(graph.find_nodes(op="output")))
    return node


def returned(graph: fx.Graph) -> Any:
    """The graph's flat outputs, a tuple or list of nodes (torch.fx types an argument as anything that it may be)."""
    return output_of(graph).args[0]


def drop_dead_code(graph: fx.Graph) -> None:
    """Remove what nothing reads. Calls of submodules stay: blocks, and a user's criterion."""
    keep = ("placeholder", "output", "call_module")
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in keep or node.is_impure())
