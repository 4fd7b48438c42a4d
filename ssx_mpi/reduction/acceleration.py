"""Fixed-point iterations that reach their end in fewer rounds, over the ranks."""

from __future__ import annotations

import numpy as np

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.reduction.sums import exact_sum

# a residual that grows by this factor means that the history misleads
_GROWTH = 2.0
# of the largest diagonal element: differences that say no more than the ones before are left out
_CONDITION = 1e-9


class Acceleration:
    """Anderson's acceleration of x -> G(x).

    The last steps G(x) - x tell how the iteration goes on; the combination of the last states for which the steps
    cancel best is nearer to the end than the last state. Every rank has its part of the state; inner products, a few
    numbers, are summed over the ranks.

    References
    ----------
    Anderson (1965). J. ACM 12, 547. Walker & Ni (2011). SIAM J. Numer. Anal. 49, 1715.
    """

    def __init__(self, comm: Communicator, depth: int = 6) -> None:
        self._comm, self._depth = comm, depth
        self.forget()

    def forget(self) -> None:
        """Begin anew, as when G has changed."""
        self._states: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []
        self._size = np.inf

    def next(self, state: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Where to go on. Collective.

        Parameters
        ----------
        state
            (n,) G(x), this rank's part.
        step
            (m,) G(x) - x in whatever units make the squares of its elements comparable; what all ranks share must be
            zero on all but one.
        """
        size = float(exact_sum(self._comm, step[:, None] ** 2)[0])
        if size > _GROWTH**2 * self._size:
            self.forget()
        self._size = min(size, self._size)
        self._states = [*self._states[-self._depth :], state]
        self._steps = [*self._steps[-self._depth :], step]
        if len(self._steps) == 1:
            return state
        differences = np.diff(np.array(self._steps), axis=0)
        products = differences[:, None] * np.concatenate([differences, step[None]])
        inner = exact_sum(self._comm, products.reshape(-1, len(step)).T).reshape(products.shape[:2])
        matrix, right = inner[:, :-1], inner[:, -1]
        ridge = _CONDITION * np.max(np.diag(matrix)) * np.eye(len(matrix))
        share = np.linalg.solve(matrix + ridge, right) if ridge.any() else np.zeros(len(right))
        for part, difference in zip(share, np.diff(np.array(self._states), axis=0)):
            state = state - part * difference
        return state
