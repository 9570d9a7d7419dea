"""An SGLang server in a thread of the test that answers what it is told to: for faults that no real one has on demand.

Every response is the tokens 7, 8, ..., and the stop token; a score is -7.5, a log-prob -0.5, and, of a token that was
sampled from itself, 5 and its successor, -0.25. `faults` are used up by the next requests.
"""

import base64
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np

from helpers.fake_server import LOADS, ServerState
from helpers.plain_http import HttpServer, respond
from megatron_laser.rollout.client.engine import SglangEngine
from megatron_laser.rollout.client.identify import Expected
from megatron_laser.rollout.endpoints import ServerEndpoint
from megatron_laser.weight_sync.update import Update

VOCABULARY, STOP, SCORE = 28, 1, 2
LENGTH = 4  # tokens of a whole response, the stop token included
HELD = 2  # tokens that a held request has when it is aborted
_FAULTY = {
    "fewer tokens than stated": lambda reply: reply["meta_info"].update(completion_tokens=LENGTH + 1),
    "more tokens than stated": lambda reply: reply["meta_info"].update(completion_tokens=LENGTH - 1),
    "a log-prob is missing": lambda reply: reply["meta_info"]["output_token_logprobs"].pop(),
    "an id beyond the vocabulary": lambda reply: reply["output_ids"].__setitem__(0, VOCABULARY),
    "the answer to another prompt": lambda reply: reply["meta_info"].update(prompt_tokens=60),
    "other weights": lambda reply: reply["meta_info"].update(weight_version="other"),
    "a token is not in its set": lambda reply: reply["meta_info"]["output_token_sampling_mask"][0].pop(0),
    "no sets": lambda reply: reply["meta_info"].pop("output_token_sampling_mask"),
    "no meta_info": lambda reply: reply.clear(),
}


class FaultyServer(ServerState):
    """Listens at once. Attributes may be changed at any time.

    Attributes:
        faults: for the next requests to /generate: a key of `_FAULTY`, a status such as "500", or "truncated JSON",
            "cut off", "reset", "closed"; None: none.
        holds: requests (their bodies) that wait until they are aborted or let go, with `HELD` tokens.
        requests, aborted: bodies of /generate, and rids, as they came.
        paused: generation is, as far as control calls say.
        stuck: half done requests of a pause in place: the cache cannot be flushed before it was continued.
        flush_refusals: so many times the cache cannot be flushed.
        calls: paths, in their order, but for probes and questions of its load.
        silent: answer nothing at all, as a stopped process.
        weights: what its weights' checksum is; None: it gives none.
        experts: (layers, experts per token, experts) of its model, of which it tells who asks; None: it was not
            started for that. The token at position p goes to experts p, p + 1, ... in the first layer, and so on.
        experts_short: of so many tokens fewer than were fed.
        tells_aborted: it tells that of an aborted request, too, as a server does once it runs.
    """

    def __init__(self) -> None:
        super().__init__(info={"vocab_size": VOCABULARY, "dtype": "float32"})
        self.faults: deque[str | None] = deque()
        self.holds: Callable[[dict[str, Any]], bool] = lambda body: False
        self.requests: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.answered = 0
        self.stuck = False
        self.flush_refusals = 0
        self.calls: list[str] = []
        self.silent = False
        self.weights: str | None = None
        self.experts: tuple[int, int, int] | None = None
        self.experts_short = 0
        self.tells_aborted = True
        self.let_go = threading.Event()
        self._changed = threading.Condition()
        self._http: HttpServer | None = None
        self.start()

    @property
    def generations(self) -> list[dict[str, Any]]:
        """Requests that are not for a score."""
        return [body for body in self.requests if "token_ids_logprob" not in body]

    def start(self, port: int = 0) -> None:
        self._http = HttpServer(self._handle, port=port, keep_alive=True)
        self.port, self.url = self._http.server_port, self._http.url
        self._http.start()

    def stop(self) -> None:
        """Listen no more, and break what is open."""
        http, self._http = self._http, None
        if http is not None:
            http.stop()
        self.let_go.set()
        with self._changed:
            self._changed.notify_all()

    def let_go_of_all(self) -> None:
        """End the wait of requests that are held: they are answered."""
        with self._changed:
            self.let_go.set()
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool], deadline: float = 20.0) -> None:
        """Until `condition`, which depends on what has been received."""
        with self._changed:
            assert self._changed.wait_for(condition, deadline)

    def _handle(self, handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        if self.silent:
            self.let_go.wait(60)
            return reset(handler)
        if self._http is None:
            return reset(handler)
        refused = False
        with self._changed:
            if path not in ("/server_info", "/model_info", LOADS):
                self.calls.append(path)
            if path == "/generate":
                self.requests.append(body)
            elif path == "/abort_request":
                self.aborted.append(body["rid"])
            elif path == "/continue_generation":
                self.stuck = False
            elif path == "/flush_cache" and (self.stuck or self.flush_refusals):
                self.flush_refusals = max(0, self.flush_refusals - 1)
                refused = True
            reply = self.answer(path, body)
            self._changed.notify_all()
        if path == "/generate":
            return self._generate(handler, body)
        if refused:
            return respond(handler, 400, b"there are pending requests")
        if path == "/weights_checker" and self.weights is None:
            reply = None
        respond(handler, 200, {"success": True} if reply is None else reply)

    def rank_sums(self) -> dict[str, Any]:
        return {"checksums": {"all": self.weights}, "per_gpu_checksum": self.weights}

    def _generate(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        fault = self.faults.popleft() if self.faults else None
        held = self.holds(body)
        if held:
            with self._changed:
                self._changed.wait_for(lambda: body["rid"] in self.aborted or self.let_go.is_set(), 60)
        if self._http is None:
            return reset(handler)
        reply = self._reply(body, aborted=held and body["rid"] in self.aborted)
        if fault in _FAULTY:
            _FAULTY[fault](reply)
        data = json.dumps(reply).encode()
        self.answered += 1
        if fault is None or fault in _FAULTY:
            respond(handler, 200, data)
        elif fault.isdigit():
            respond(handler, int(fault), b"a fault was ordered")
        elif fault == "truncated JSON":
            respond(handler, 200, data[: len(data) // 2])
        elif fault == "cut off":
            respond(handler, 200, data[: len(data) // 2], stated=len(data))
            handler.close_connection = True
        elif fault in ("reset", "closed"):
            reset(handler, hard=fault == "reset")
        else:
            raise ValueError(fault)

    def _reply(self, body: dict[str, Any], *, aborted: bool) -> dict[str, Any]:
        if "token_ids_logprob" in body:
            ids, reason = [], {"type": "length", "length": 0}
        else:
            had = sum(token >= 7 for token in body["input_ids"])  # prompts have none of these
            ids = [7 + had + i for i in range(LENGTH - 1 - had)] + [STOP]
            reason = {"type": "stop", "matched": STOP}
            if aborted:
                ids, reason = ids[:HELD], {"type": "abort", "message": "Abort"}
        meta = {
            "finish_reason": reason,
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_version": self.version,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "cached_tokens": len(body["input_ids"]) - 1,
        }
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_mask"] = [[token, 5, token + 1] for token in ids]
            meta["output_token_sampling_logprobs"] = [-0.25] * len(ids)
        if "token_ids_logprob" in body:
            wanted = body["token_ids_logprob"]
            meta["output_token_ids_logprobs"] = [[[-7.5 - i, token, None] for i, token in enumerate(wanted)]]
        tells = not aborted or self.tells_aborted
        if self.experts is not None and body.get("return_routed_experts") and tells:
            start, fed = body["routed_experts_start_len"], len(body["input_ids"]) + len(ids) - 1
            told = routes(self.experts, start, fed - self.experts_short)
            meta["routed_experts"] = base64.b64encode(told.tobytes()).decode()
        return {"output_ids": ids, "meta_info": meta}


def routes(experts: tuple[int, int, int], start: int, stop: int) -> np.ndarray:
    """[stop - start, layers, experts per token] int32: where the tokens at these positions go."""
    layers, chosen, number = experts
    places = [np.arange(count) for count in (layers, chosen)]
    return (np.arange(start, stop)[:, None, None] + places[0][:, None] + places[1]).astype(np.int32) % number


class DiskLikeTransport:
    """A `WeightTransport` that only names the weights."""

    def send(self, engine: SglangEngine, weights: Any, version: int, label: str) -> None:
        update = Update(engine, label, seconds=20.0)
        with update.paused():
            update.post_all("/update_weights_from_disk", {"weight_version": label}, phase="naming weights")

    def close(self) -> None:
        return None


def open_engine(*servers: FaultyServer, **settings: Any) -> SglangEngine:
    """An engine over `servers`, with short deadlines; all of them are up."""
    endpoints = [ServerEndpoint(server.url) for server in servers]
    defaults: dict[str, Any] = {
        "start_deadline": 10.0,
        "servers_deadline": 10.0,
        "hang_deadline": 10.0,
        "transport": DiskLikeTransport(),
    }
    engine = SglangEngine(
        lambda: endpoints, api_key=None, expected=Expected(VOCABULARY), **defaults | settings
    )
    engine.run(engine.fleet.wait_until_up(len(servers), 10.0), 10.0, "waiting for the test's servers")
    return engine


def reset(handler: BaseHTTPRequestHandler, *, hard: bool = True) -> None:
    """End the connection: with an RST in the middle of an answer, or by an orderly close before one."""
    handler.close_connection = True
    if hard:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
