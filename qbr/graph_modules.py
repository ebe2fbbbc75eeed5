"""torch.fx.GraphModules (symbolic_trace, torchvision's create_feature_extractor): copies of them are made from their
graphs, so that it is these that are rewritten, and what else a copy is to have is named to torch.fx."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from qbr.traced_forward import TracedForward, rewrite

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


class RewrittenGraphs:
    """The graphs of a GraphModule, in which ReLUs called as functions are modules.

    Args, Raises: as TracedForward's; it is what is read, and refused.
    """

    def __init__(
        self,
        owner: GraphModule,
        given: tuple[str, ...],
        relus: list[str | None],
        in_place: Container[nn.Module] = (),
        values: dict[str, Any] | None = None,
    ) -> None:
        self.owner = owner
        self.forward = TracedForward(owner, given, relus, in_place, values)
        own = {name: value for name, value in vars(owner).items() if isinstance(value, Graph) and name != "_graph"}
        # torchvision's have a train_graph and an eval_graph, of which one is the graph.
        self.current = next((name for name, graph in own.items() if graph is owner.graph), None)
        if self.current is None:
            own = {"graph": owner.graph}
        self.graphs = {name: copy.deepcopy(graph) for name, graph in own.items()}
        for graph in self.graphs.values():
            rewrite(owner, graph, relus, in_place)

    def install(self) -> None:
        """Put the graphs in place of owner's."""
        for name, graph in self.graphs.items():
            setattr(self.owner, name, graph)
        if self.current is not None:
            self.owner.graph = self.graphs[self.current]


def keep_in_copies(model: nn.Module) -> None:
    """Have copies of the GraphModules in a prepared model keep their forward hooks, which torch.fx leaves out, and what
    prepare() noted on them."""
    for module in model.modules():
        if isinstance(module, GraphModule):
            noted = {name: value for name, value in vars(module).items() if name in ("qat_config", "_qbr_roots")}
            meta = getattr(module, "meta", {})
            kept = {**meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}), **{name: vars(module)[name] for name in _HOOKS}}
            module.meta = {**meta, _USER_PRESERVED_ATTRIBUTES_KEY: {**kept, **noted}}
