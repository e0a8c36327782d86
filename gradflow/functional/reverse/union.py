"""The union of the graphs of several steps, in which every node stands for the same thing at every step.

NOTE [What is the same in two steps]
The layer calls, the inputs and the loss are told by their names. Operations have running numbers, and where
a step leaves a branch out, those of all later ones shift; so an operation is told by where it stands: its
kind, the module call it ran in, the parameters it takes, and what ran last of that which feeds it (a layer
or an input by name, an operation by where that stands). Several that have all of this in common are told
apart by what reads them, and then by their order. An operation of one operand that has no match so, as its
feeder differs (the loss of another exit), is told by what reads it. One without a match is new to the union.

Steps may also run the same layers in another order, and a module that is called several times may be called
for the first time at another place. Their union would have a cycle, which no data flow has; what is on one
and against the order of the union is kept apart, as a node of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Mapping

import attrs

from gradflow.functional.reverse.autograd_graph import MODEL, Group, Structure, own_name


@attrs.define(eq=False)
class _Step:
    """One step's graph, prepared to be matched: neighbours by name, in the order of the data."""

    groups: Mapping[str, Group]
    preds: dict[str, list[str]]
    succs: dict[str, list[str]]
    order: list[str]
    by_feeder: dict[str, int]
    by_reader: dict[str, int]
    readers: dict[str, frozenset[int]]


@attrs.define(eq=False)
class Union:
    """The nodes of all steps so far, by number, and the edges between them.

    Args:
        groups: the nodes, as the first step that had them showed them.
        edges: pairs of numbers, in the order in which they were met.
        cuts: the like, where data runs and no gradient.
        places: where each belongs in the order of execution: the place of the node before it that the first
            step knew, and its own place in its step.
        readers: what has read each node: the keys of its consumers in all steps.
        kinds: the key of whatever tells a node from others: see NOTE [What is the same in two steps].
        candidates: by key, the nodes that have it.
        read_alike: by the key of a node and of what reads it, the nodes that have it.
        known: by the names of its nodes and edges, what is known of a step that was met before.
    """

    groups: list[Group] = attrs.field(factory=list)
    edges: dict[tuple[int, int], None] = attrs.field(factory=dict)
    cuts: dict[tuple[int, int], None] = attrs.field(factory=dict)
    places: list[tuple[int, int]] = attrs.field(factory=list)
    readers: list[set[int]] = attrs.field(factory=list)
    kinds: dict[tuple, int] = attrs.field(factory=dict)
    candidates: dict[int, list[int]] = attrs.field(factory=dict)
    read_alike: dict[int, dict[int, None]] = attrs.field(factory=dict)
    known: dict[tuple, dict[str, int]] = attrs.field(factory=dict)

    def add(self, structure: Structure) -> dict[str, int]:
        """Take in the graph of one more step.

        Returns:
            The number of each of its nodes, by its name in that step.
        """
        same = (frozenset(structure.groups), frozenset(structure.edges))
        if same not in self.known:
            step = self._prepared(structure)
            image = self._matched(step) if self.groups else {}
            self.known[same] = self._taken_in(step, structure, image)
        image = self.known[same]
        for name, group in structure.groups.items():
            self.groups[image[name]].use(group.parameters)
        return image

    def cut(self, edges: Iterable[tuple[int, int]]) -> None:
        """Take in edges where data runs and no gradient."""
        self.cuts |= dict.fromkeys(edges)

    def add_alone(self, group: Group) -> int:
        """Take in a layer call or an input that no gradient reaches, and return its number."""
        return self._new(group, self._key((group.kind, group.base)), (group.order, 0))

    def in_order(self, names: list[str]) -> list[int]:
        """Return the nodes in the order of execution; that of steps that differ is made of all of theirs.

        Args:
            names: a name for every node, which decides between equals.
        """
        nodes = range(len(names))
        if len(self.known) < 2:
            return sorted(nodes, key=lambda i: (self.groups[i].order, names[i]))
        edges = self.edges | self.cuts
        heads: list[list[int]] = [[] for _ in nodes]
        waiting = [0] * len(names)
        for u, v in edges:
            heads[u].append(v)
            waiting[v] += 1
        ready = [(self.places[i], names[i], i) for i in nodes if not waiting[i]]
        heapq.heapify(ready)
        order = []
        while ready:
            node = heapq.heappop(ready)[-1]
            order.append(node)
            for head in heads[node]:
                waiting[head] -= 1
                if not waiting[head]:
                    heapq.heappush(ready, (self.places[head], names[head], head))
        return order

    def named(self) -> list[str]:
        """Return a name for every node: layer calls keep theirs, others get one that is free."""
        names = [""] * len(self.groups)
        first = {nodes[0] for nodes in self.candidates.values()}
        own = [i for i, g in enumerate(self.groups) if g.kind == "layer" and g.base and i in first]
        for i in own:
            names[i] = self.groups[i].base
        taken = {names[i] for i in own}
        numbers: dict[str, int] = {}
        for i, group in enumerate(self.groups):
            if names[i]:
                continue
            if group.kind == "op":
                names[i] = _numbered(group.name, (f"{group.base}@", ""), taken, numbers, 1)
            elif i in first:
                names[i] = own_name(group.base or MODEL, taken)
            else:
                base = group.base or MODEL
                names[i] = _numbered(base, (f"{base} (", ")"), {*taken, base}, numbers, 2)
            taken.add(names[i])
        return names

    # ---------------------------------------------------------------- one more step

    def _key(self, kind: tuple) -> int:
        return self.kinds.setdefault(kind, len(self.kinds))

    def _prepared(self, structure: Structure) -> _Step:
        groups = structure.groups
        preds: dict[str, list[str]] = {name: [] for name in groups}
        succs: dict[str, list[str]] = {name: [] for name in groups}
        for source, target in structure.edges:
            preds[target].append(source)
            succs[source].append(target)
        names = list(groups)
        number = {name: i for i, name in enumerate(names)}
        pairs = [(number[u], number[v]) for u, v in structure.edges]
        order = [names[i] for i in _topological(len(names), pairs)]
        by_feeder: dict[str, int] = {}
        for name in order:
            last = max(preds[name], key=lambda p: (groups[p].order, p), default=None)
            by_feeder[name] = self._kind(groups[name], "fed by", by_feeder.get(last or ""))
        by_reader: dict[str, int] = {}
        for name in reversed(order):
            first = min(succs[name], key=lambda s: (groups[s].order, s), default=None)
            by_reader[name] = self._kind(groups[name], "read by", by_reader.get(first or ""))
        readers = {name: frozenset(by_feeder[s] for s in succs[name]) for name in order}
        return _Step(groups, preds, succs, order, by_feeder, by_reader, readers)

    def _kind(self, group: Group, beside: str, other: int | None) -> int:
        """Return the key of a node of a step."""
        if group.kind != "op":
            return self._key((group.kind, group.base))
        return self._key((group.base, beside, other, *sorted(group.parameters)))

    def _taken_in(self, step: _Step, structure: Structure, image: dict[str, int]) -> dict[str, int]:
        """Add what is new of a step, and what reads what."""
        first = not self.groups
        for name in structure.groups if first else step.order:
            group = step.groups[name]
            if name not in image:
                base = max((self.places[image[p]][0] for p in step.preds[name] if p in image), default=-1)
                place = (group.order, 0) if first else (base, group.order)
                image[name] = self._new(group, step.by_feeder[name], place)
            self.readers[image[name]] |= step.readers[name]
            same = self.read_alike.setdefault(step.by_reader[name], {})
            same[image[name]] = None
        self.edges |= dict.fromkeys((image[u], image[v]) for u, v in structure.edges)
        return image

    def _new(self, group: Group, key: int, place: tuple[int, int]) -> int:
        number = len(self.groups)
        self.groups.append(group)
        self.places.append(place)
        self.readers.append(set())
        self.candidates.setdefault(key, []).append(number)
        return number

    def _matched(self, step: _Step) -> dict[str, int]:
        """Return the nodes of the union that nodes of a step are the same as."""
        alike: dict[int, list[str]] = {}
        for name in step.order:
            alike.setdefault(step.by_feeder[name], []).append(name)
        for names in alike.values():
            names.sort(key=lambda name: step.groups[name].order)
        refused: set[tuple[str, int]] = set()
        while True:
            image: dict[str, int] = {}
            for key, names in alike.items():
                if key in self.candidates:
                    self._match(names, self.candidates[key], step, refused, image)
            self._match_by_readers(step, refused, image)
            against = self._against_the_order(step, image)
            if not against:
                return image
            refused |= {(name, image[name]) for name in against}

    def _match(
        self,
        names: list[str],
        candidates: list[int],
        step: _Step,
        refused: set[tuple[str, int]],
        image: dict[str, int],
    ) -> None:
        """Match nodes of a step that have one key with those of the union that have it."""
        if step.groups[names[0]].kind != "op":
            found = next((i for i in candidates if (names[0], i) not in refused), None)
            if found is not None:
                image[names[0]] = found
            return
        free = dict.fromkeys(candidates)
        exact: dict[frozenset[int], list[int]] = {}
        for i in reversed(candidates):
            exact.setdefault(frozenset(self.readers[i]), []).append(i)
        for name in names:
            same = exact.get(step.readers[name])
            if same and (name, same[-1]) not in refused:
                image[name] = same.pop()
                del free[image[name]]
        for name in names:
            if name in image:
                continue
            allowed = [i for i in free if (name, i) not in refused]
            shared = [len(self.readers[i] & step.readers[name]) for i in allowed]
            if allowed and (max(shared) or len(names) == len(candidates) == 1):
                image[name] = allowed[shared.index(max(shared))]
                del free[image[name]]

    def _match_by_readers(self, step: _Step, refused: set[tuple[str, int]], image: dict[str, int]) -> None:
        """Match operations of one operand that what feeds them did not tell."""
        used = set(image.values())
        for name in step.order:
            if name in image or step.groups[name].kind != "op" or len(step.preds[name]) > 1:
                continue
            alike = self.read_alike.get(step.by_reader[name], {})
            found = next((i for i in alike if i not in used and (name, i) not in refused), None)
            if found is not None:
                image[name] = found
                used.add(found)

    def _against_the_order(self, step: _Step, image: dict[str, int]) -> list[str]:
        """Return the nodes of a step on whose account its union with the others would have a cycle.

        On a cycle the order of the union decides: a layer call must not stand behind, in the step, one that
        stands before it in the union; an operation must stand between the layer calls round it in both.
        """
        num = len(self.groups)
        fresh = {name: num + i for i, name in enumerate(n for n in step.order if n not in image)}
        number = {**image, **fresh}
        edges = {
            *self.edges,
            *self.cuts,
            *((number[u], number[v]) for v in step.order for u in step.preds[v]),
        }
        total = num + len(fresh)
        if len(_topological(total, edges)) == total:
            return []
        import networkx as nx  # takes long to import, and is needed for graphs that change alone

        graph = nx.DiGraph(list(edges))
        rings = [ring for ring in nx.strongly_connected_components(graph) if len(ring) > 1]
        ring_of = {node: i for i, ring in enumerate(rings) for node in ring}
        place = {node: i for i, node in enumerate(_topological(num, self.edges | self.cuts))}
        on_ring = [name for name in step.order if number[name] in ring_of]

        def near(name: str, others: Mapping[str, list[str]]) -> list[str]:
            return [o for o in others[name] if ring_of.get(number[o]) == ring_of[number[name]]]

        against: list[str] = []
        high: dict[str, int] = {}  # the place of the last node kept before each
        for name in on_ring:
            before = max((high[p] for p in near(name, step.preds)), default=-1)
            layer = name in image and step.groups[name].kind != "op"
            if layer and place[image[name]] <= before:
                against.append(name)
            high[name] = max(before, place[image[name]]) if layer else before
        low: dict[str, int] = {}  # the place of the first layer call kept behind each
        kept = set(image) - set(against)
        for name in reversed(on_ring):
            layer = name in kept and step.groups[name].kind != "op"
            low[name] = min((low[s] for s in near(name, step.succs)), default=num)
            low[name] = place[image[name]] if layer else low[name]
        for name in on_ring:
            before = max((high[p] for p in near(name, step.preds)), default=-1)
            high[name] = before
            if name not in kept:
                continue
            if step.groups[name].kind == "op" and not before < place[image[name]] < low[name]:
                against.append(name)
            else:
                high[name] = place[image[name]]
        return against


def _numbered(
    name: str, around: tuple[str, str], taken: Container[str], numbers: dict[str, int], start: int
) -> str:
    """Return the name, or the first that is free with a number between the two parts."""
    while name in taken:
        number = numbers[around[0]] = numbers.get(around[0], start - 1) + 1
        name = f"{around[0]}{number}{around[1]}"
    return name


def _topological(num: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Return the nodes 0 … num − 1 behind all that feed them; those on a cycle or behind one are left out."""
    waiting = [0] * num
    heads: list[list[int]] = [[] for _ in range(num)]
    for u, v in edges:
        heads[u].append(v)
        waiting[v] += 1
    order = [node for node, count in enumerate(waiting) if not count]
    for node in order:  # grows while it is walked
        for head in heads[node]:
            waiting[head] -= 1
            if not waiting[head]:
                order.append(head)
    return order
