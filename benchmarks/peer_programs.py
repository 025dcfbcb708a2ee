"""The ways in which two other programs embed photos: processes for ``benchmarks.peers``, which describes them.

They import nothing of sortd, whose modules would count as their memory.
"""

import argparse
import hashlib
import http.client
import io
import json
import socket
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.harness import answer_requests

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

BATCH, BATCHES_AHEAD, LOADERS, CLIENTS, SERVICE_THREADS = 8, 3, 2, 2, 2
HASHED_BYTES = 65_536

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]


def decode_in_full(file: Any, side: int) -> Pixels:  # noqa: ANN401 -- whatever Pillow opens
    """Return a square of pixels from the centre of an image, resized after it was decoded at its full size."""
    image = Image.open(file).convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


class Tower:
    """An image tower in ONNX Runtime."""

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        """Open it with the default options, or with so many threads and without an arena."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.enable_cpu_mem_arena = False
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.side: int = self._session.get_inputs()[0].shape[1]

    def embed(self, images: Sequence[Pixels]) -> Rows:
        """Return a unit row for each image."""
        (rows,) = self._session.run(None, {"pixels": np.stack(images)})
        unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


# ------------------------------------------------------------ the indexer


class Indexer:
    """Embeds the files of a folder into a database."""

    def __init__(self, tower: Tower, database: Path) -> None:
        """Open the database."""
        self._tower, self._database = tower, sqlite3.connect(database)
        self._database.execute("CREATE TABLE images (path TEXT PRIMARY KEY, hash TEXT, size INTEGER, row BLOB)")

    def index(self, folder: str) -> int:
        """Add a row for each file, and return how many."""
        count = 0
        loaded = self._loaded(sorted(Path(folder).iterdir()))
        while batch := list(islice(loaded, BATCH)):
            rows = self._tower.embed([pixels for _, _, pixels in batch])
            self._database.executemany(
                "INSERT INTO images VALUES (?, ?, ?, ?)",
                [
                    (str(path), digest, path.stat().st_size, row.tobytes())
                    for (path, digest, _), row in zip(batch, rows, strict=True)
                ],
            )
            count += len(batch)
        self._database.commit()
        return count

    def _loaded(self, files: Sequence[Path]) -> Iterator[tuple[Path, str, Pixels]]:
        ahead: deque[Future[tuple[Path, str, Pixels]]] = deque()
        with ThreadPoolExecutor(LOADERS) as loaders:
            for file in files:
                ahead.append(loaders.submit(self._load, file))
                if len(ahead) >= BATCH * BATCHES_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _load(self, path: Path) -> tuple[Path, str, Pixels]:
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(HASHED_BYTES)).hexdigest()
            return path, digest, decode_in_full(file, self._tower.side)


# ------------------------------------------------------------ the service


def start_service(tower: Tower) -> int:
    """Serve ``POST /predict`` in a thread, and return the port."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def embedded(content: bytes) -> list[float]:
        row: list[float] = tower.embed([decode_in_full(io.BytesIO(content), tower.side)])[0].tolist()
        return row

    async def predict(request: "Request") -> "Response":
        return JSONResponse(await run_in_threadpool(embedded, await request.body()))

    listener = socket.create_server(("127.0.0.1", 0))
    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def send_all(port: int, files: Sequence[Path]) -> int:
    """Have files embedded by the service, two at a time, and return how many."""

    def send(some: Sequence[Path]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for file in some:
            connection.request("POST", "/predict", file.read_bytes())
            json.loads(connection.getresponse().read())
        connection.close()
        return len(some)

    with ThreadPoolExecutor(CLIENTS) as clients:
        return sum(clients.map(send, [files[start::CLIENTS] for start in range(CLIENTS)]))


# ------------------------------------------------------------ the process


def main() -> None:
    """Be a peer: answer requests on stdin, the folders to index, or any for the service's port."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["indexer", "service"])
    parser.add_argument("tower", type=Path, help="ONNX file")
    parser.add_argument("database", type=Path)
    options = parser.parse_args()
    if options.peer == "indexer":
        answer_requests(Indexer(Tower(options.tower), options.database).index)
    else:
        port = start_service(Tower(options.tower, threads=SERVICE_THREADS))
        answer_requests(lambda _: port)


if __name__ == "__main__":
    main()
