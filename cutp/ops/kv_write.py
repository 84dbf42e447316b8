"""Write of new keys and values, or of new latents, into the paged cache."""

from __future__ import annotations

import numpy as np


def kv_write(k: np.ndarray, v: np.ndarray, pages: np.ndarray, slots: np.ndarray) -> None:
    """Stores token t's keys and values in slot slots[t].

    k, v: [T, H_kv, D]; pages: [P, 2, H_kv, S, D] with S slots a page, keys at index 0 and values at index 1;
    slots: int [T], page * S + slot inside the page. Slots must differ from each other.
    """
    page, slot = np.divmod(slots, pages.shape[3])
    pages[page, 0, :, slot] = k
    pages[page, 1, :, slot] = v


def latent_write(latent: np.ndarray, pages: np.ndarray, slots: np.ndarray) -> None:
    """Stores token t's latent vector in slot slots[t] of a latent cache.

    latent: [T, C]; pages: [P, 1, 1, S, C]; slots: int [T] as in `kv_write`.
    """
    page, slot = np.divmod(slots, pages.shape[3])
    pages[page, 0, 0, slot] = latent
