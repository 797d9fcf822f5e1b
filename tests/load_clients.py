"""Many robots in one process: real openpi-clients that ask a server as fast as it answers.

python tests/load_clients.py PORT CLIENTS SECONDS
Prints JSON: for each client its replies, its lost requests and how often it connected. A client whose request is lost
connects again.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import WebSocketException


def observation(seed: int) -> dict[str, Any]:
    """The demo's, under openpi's keys."""
    random = np.random.default_rng(seed)
    images = {camera: random.integers(0, 256, (56, 56, 3), np.uint8) for camera in ("top", "wrist")}
    state = random.random(2, np.float32)
    return {"observation": {"images": images, "state": state}, "prompt": "touch the red block"}


def drive(port: int, seed: int, end: float, result: dict[str, Any]) -> None:
    asked = observation(seed)
    result |= {"replies": 0, "lost": [], "connections": 0}
    robot = None
    while time.monotonic() < end:
        if robot is None:
            try:
                robot = WebsocketClientPolicy("127.0.0.1", port)
            except (OSError, EOFError, WebSocketException):
                time.sleep(0.05)  # the server is away
                continue
            result["connections"] += 1
        try:
            actions = robot.infer(asked)["actions"]
            assert actions.shape == (8, 2) and np.isfinite(actions).all()
            result["replies"] += 1
        except (RuntimeError, OSError, EOFError, WebSocketException) as error:
            result["lost"].append(repr(error))
            robot = None
    if robot is not None:
        robot._ws.close()


def main(port: int, clients: int, seconds: float) -> None:
    os.nice(5)  # the server comes first
    end = time.monotonic() + seconds
    results: list[dict[str, Any]] = [{} for _ in range(clients)]
    threads = [threading.Thread(target=drive, args=(port, seed, end, results[seed])) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
