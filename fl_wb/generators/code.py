"""The code: the cells of several measures in one latent space, as a binary tree over coordinates.

Ours; not in the paper. With u = Phi(z), or what makes uniform numbers of latents of another law
(`fl_wb.generators.latents`), a node at depth d cuts coordinate d (modulo the latent's
dimension) at p = mass(left) / mass(node). To the left of the cut u_d becomes u_d / p, to the right
(u_d - p) / (1 - p), so that the latents of a leaf, its *cell*, are again N(0, I). Where cell k uses
map G_k, the push-forward of the whole is sum_k lambda_k mu_k itself.

The tree is Huffman's ("A method for the construction of minimum-redundancy codes", 1952): cell k
lies about -log2 lambda_k deep, so that a generator that learns the mixture meets log2 K cuts of
different coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from fl_wb.generators.latents import Latents

Map = Callable[[Tensor], Tensor]
"""Latents (n, latent_dim) to samples (n, ...)."""


ROUNDING = 1e-12
"""How far from 1 a sum of shares may be."""


class Code:
    """Which cell each latent lies in, and where in it.

    Parameters
    ----------
    shares : sequence of float
        lambda_k > 0, one a cell, of any sum. They alone determine the tree.

    Raises
    ------
    ValueError
        If there is none, or one is not positive and finite.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        if not shares or not all(0 < share < math.inf for share in shares):
            raise ValueError(f"shares must be positive and finite, not {list(shares)}")
        total = math.fsum(shares)
        # What are shares already stay what they are: their last digits may part ties of the tree.
        whole = total if abs(total - 1) > ROUNDING else 1.0
        self.shares = tuple(share / whole for share in shares)
        self._children = _huffman(self.shares)
        self._paths = _paths(self._children, len(self.shares))

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.shares)

    def place(
        self,
        z: Tensor,
        weights: Sequence[float] | None = None,
        latents: Latents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return each latent's cell (n,), and where in it the latent lies: (n, latent_dim).

        With ``weights``, >= 0 and one a cell, the cells have these shares of the latents instead.
        These are N(0, I), or of the law ``latents``.
        """
        law = latents or Latents(z.shape[1])
        children, ratio, _ = self._tree(weights, z.device)
        node = torch.zeros(len(z), dtype=torch.long, device=z.device)
        if len(self) == 1:
            return node, z
        u, cut, free = law.uniforms(z), torch.zeros_like(z, dtype=torch.bool), law.free
        for depth in range(self._paths.shape[1]):
            inside = node >= 0
            at, here = node.clamp(min=0), free[depth % len(free)]
            column, p = u[:, here], ratio[at]
            right = (column >= p) & (p < 1)  # a number may be 1, where nothing lies to the right
            inner = torch.where(right, (column - p) / (1 - p), column / p)
            u[:, here] = torch.where(inside, inner, column)
            cut[:, here] |= inside
            node = torch.where(inside, children[at, right.long()], node)
        return ~node, torch.where(cut, law.rows(u).to(z.dtype), z)

    def embed(
        self,
        cell: Tensor,
        z: Tensor,
        weights: Sequence[float] | None = None,
        latents: Latents | None = None,
    ) -> Tensor:
        """Return the latents (n, latent_dim) that `place` finds at z (n, latent_dim) of cells (n,).

        A cell of weight 0 has none; what is returned for it lies on its border.
        """
        if len(self) == 1:
            return z
        law = latents or Latents(z.shape[1])
        _, ratio, paths = self._tree(weights, z.device)
        u, cut, free = law.uniforms(z), torch.zeros_like(z, dtype=torch.bool), law.free
        for depth in reversed(range(paths.shape[1])):
            step = paths[cell, depth]  # 2 node + side, or -1 below the leaf
            inside, here = step >= 0, free[depth % len(free)]
            column, p = u[:, here], ratio[step.clamp(min=0) // 2]
            outer = torch.where(step % 2 == 1, p + (1 - p) * column, p * column)
            u[:, here] = torch.where(inside, outer, column)
            cut[:, here] |= inside
        return torch.where(cut, law.rows(u).to(z.dtype), z)

    def branches(self, depth: int) -> Tensor:
        """Return which branch (K,) each cell is on, of those into which `depth` cuts part all."""
        steps = self._paths[:, :depth]
        if not steps.shape[1]:
            return torch.zeros(len(self), dtype=torch.long)
        last = (steps >= 0).sum(1, keepdim=True) - 1
        return steps.gather(1, last).squeeze(1)

    def recode(self, z: Tensor, weights: Sequence[float], latents: Latents | None = None) -> Tensor:
        """Move latents so that cell k gets weights[k] of them, distributed as before."""
        return self.embed(*self.place(z, weights, latents), latents=latents)

    def mix(self, maps: Sequence[Map], z: Tensor, latents: Latents | None = None) -> Tensor:
        """Evaluate the exact mixture of maps, one a cell, at latents z (n, latent_dim).

        A map that gets no latent is not called.
        """
        cell, inner = self.place(z, latents=latents)
        order = cell.argsort(stable=True)
        found, counts = cell[order].unique_consecutive(return_counts=True)
        parts = inner[order].split(counts.tolist())
        made = torch.cat([_made(maps[k], p) for k, p in zip(found.tolist(), parts, strict=True)])
        return torch.empty_like(made).index_copy(0, order, made)

    def _tree(
        self, weights: Sequence[float] | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nodes' children (K-1, 2), their cuts (K-1,), and the cells' paths."""
        masses = self.shares if weights is None else tuple(weights)
        if len(masses) != len(self) or not all(0 <= mass < math.inf for mass in masses):
            raise ValueError(f"{len(self)} weights >= 0 are needed, not {list(masses)}")
        below = torch.zeros(len(self._children), 2, dtype=torch.float64)
        steps = self._paths.clamp(min=0)
        mass = torch.tensor(masses, dtype=torch.float64).unsqueeze(1) * (self._paths >= 0)
        below.view(-1).index_add_(0, steps.flatten(), mass.flatten())
        total = below.sum(1)
        ratio = torch.where(total > 0, below[:, 0] / total, 0.5)
        return self._children.to(device), ratio.to(device), self._paths.to(device)


@lru_cache(maxsize=16)
def code_of(shares: tuple[float, ...]) -> Code:
    """Return the code of these shares, made once."""
    return Code(shares)


def _made(one: Map, z: Tensor) -> Tensor:
    """Call a map with two latents at least: of one, some drop the first dimension."""
    return one(z) if len(z) > 1 else one(z.expand(2, -1))[:1]


def _huffman(shares: Sequence[float]) -> Tensor:
    """Return the children (K-1, 2) of each node, the root first; cell k stands as ~k.

    The two lightest subtrees are joined, the earlier of equal ones first; the one with the earliest
    cell becomes the left one.
    """
    heap = [(share, cell, ~cell) for cell, share in enumerate(shares)]
    heapify(heap)
    joined: list[tuple[int, int]] = []
    while len(heap) > 1:
        one, other = heappop(heap), heappop(heap)
        left, right = sorted((one, other), key=lambda subtree: subtree[1])
        heappush(heap, (one[0] + other[0], left[1], len(joined)))
        joined.append((left[2], right[2]))
    last = len(joined) - 1  # the root was joined last
    turned = [[last - c if c >= 0 else c for c in pair] for pair in reversed(joined)]
    return torch.tensor(turned, dtype=torch.long).reshape(-1, 2)


def _paths(children: Tensor, cells: int) -> Tensor:
    """Return the way (K, depth) to each cell: 2 node + side at each depth, -1 below the cell."""
    ways: dict[int, list[int]] = {}
    ahead: list[tuple[int, list[int]]] = [(0, [])] if len(children) else []
    while ahead:
        node, way = ahead.pop()
        for side, child in enumerate(children[node].tolist()):
            further = [*way, 2 * node + side]
            if child >= 0:
                ahead.append((child, further))
            else:
                ways[~child] = further
    depth = max(map(len, ways.values()), default=0)
    rows = [ways[k] + [-1] * (depth - len(ways[k])) for k in range(cells)] if ways else [[]]
    return torch.tensor(rows, dtype=torch.long).reshape(cells, depth)
