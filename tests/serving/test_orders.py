"""What an order asks for is read before anything is made."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longsana.config import InferenceConfig
from longsana.serving import orders


def test_few_pictures_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data, lock, now = io.BytesIO(), threading.Lock(), [0, 0]
    Image.new("RGB", (8, 8)).save(data, "PNG")

    def slowly(*arguments: Any) -> np.ndarray:
        with lock:
            now[0] += 1
            now[1] = max(now)
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(orders, "picture_of", slowly)
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(orders._picture, data.getvalue(), (8, 8), InferenceConfig()) for _ in range(6)]
    assert all(one.result().shape == (8, 8, 3) for one in made) and now == [0, orders.DECODING]
