"""What the routes share: the model's scheduler, the store, the records, and how a request becomes tokens.

Everything here runs on the event loop's thread, except what is handed to a thread: tokenising, the store, the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from linstate.engine.jobs import Event, Failed, Finished, Job, Reading, Request
from linstate.engine.language_model import LanguageModel
from linstate.engine.scheduler import Scheduler
from linstate.engine.tokens import AnyTokenizer, encode_at_most, with_special_tokens
from linstate.errors import BusyError, InputError, StateNotFoundError
from linstate.files import write_atomically
from linstate.serve.constraints import Grammars
from linstate.serve.finder import Finder
from linstate.serve.keys import Keys
from linstate.serve.memory import keep_trimmed
from linstate.serve.metrics import Metrics
from linstate.serve.prefix import PrefixCache
from linstate.serve.problems import Refused
from linstate.serve.records import Records
from linstate.serve.room import Reserve, no_room
from linstate.serve.router import Pool, Router
from linstate.serve.settings import Settings
from linstate.state import artifact
from linstate.state.state import State
from linstate.state.store import Checkpoints, Handle, StateStore
from linstate.state.store.checks import bound_key

T = TypeVar("T")
COLLECT_EVERY = 60.0
"""Seconds between two collections."""
log = logging.getLogger("linstate.serve")


class Service:
    """See the module. Make it, then :meth:`start` on the event loop, in the end :meth:`stop`.

    Args:
        model: a model that is loaded already; default: the one that ``settings`` name.
        pool: prefill workers other than ``settings.workers`` (:class:`linstate.serve.router.Router`).
    """

    def __init__(
        self, settings: Settings, model: LanguageModel | None = None, pool: Pool | None = None
    ) -> None:
        self.settings = settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.model = model or LanguageModel.from_pretrained(settings.model)
        self.store = StateStore(
            settings.store,
            catalogue=settings.catalogue,
            max_states=settings.max_states,
            max_bytes=settings.max_bytes,
        )
        self.folder = Path(settings.catalogue).parent if settings.catalogue else Path(settings.store)
        self.records = Records(self.folder / "responses.sqlite", settings.max_records)
        self.reserve = Reserve(self.folder / "reserve")
        self.keys = None if settings.keys is None else Keys(settings.keys)
        self.secret = _secret(self.folder / "signing.key")
        self.prefix = PrefixCache(settings.prefix_bytes)
        self.grammars = Grammars(self.model)
        self.finder = Finder(self.model, self.store, self.describe)
        self.metrics = Metrics(self.prefix, self.store, lambda: getattr(self, "scheduler", None))
        self.router = Router(self.model, settings, self.metrics, pool)
        self._special: AnyTokenizer | None = None
        self._queues: dict[Job, asyncio.Queue[Event]] = {}
        self._per_tenant: Counter[str] = Counter()
        self.stopping = False
        self.started = int(time.time())

    def start(self) -> None:
        """Begin to work; call on the event loop."""
        self._loop = asyncio.get_running_loop()
        s = self.settings
        self.scheduler = Scheduler(
            self.model, slots=s.slots, waiting=s.waiting, memory=s.memory, deliver=self._deliver
        )
        self._tasks = [self._loop.create_task(task) for task in (keep_trimmed(), self._keep_collected())]

    async def stop(self) -> None:
        """Finish what is under way, then end."""
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.scheduler.close, drain=self.settings.drain)
        await self.router.close()
        self.store.close()
        self.records.close()

    async def _keep_collected(self) -> None:
        """Delete what has expired, and what no state needs, once in a while."""
        while True:
            await asyncio.sleep(COLLECT_EVERY)
            try:
                await asyncio.to_thread(self.store.gc)
                await asyncio.to_thread(self.records.expire)
                await asyncio.to_thread(self.reserve.refill)
            except Exception as error:  # a full disk, a store that is away: the next time
                log.error("cannot collect what has expired: %s", error)

    async def freeing(self, function: Callable[[], T]) -> T:
        """Run what frees room, in a thread: on a full disk, too, where it gets the room that was set aside for it."""
        try:
            return await asyncio.to_thread(function)
        except Exception as error:
            if not no_room(error):
                raise
            await asyncio.to_thread(self.reserve.release)
            return await asyncio.to_thread(function)

    # ------------------------------------------------------------------------------------------------ who asks

    @property
    def open(self) -> bool:
        """Whether there are no API keys, so that everybody who can reach the server is one tenant."""
        return self.keys is None

    # --------------------------------------------------------------------------------------------------- jobs

    def _deliver(self, events: list[tuple[Job, Event]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            if (waiting := self._queues.get(job)) is not None:
                waiting.put_nowait(event)

    async def run(self, request: Request) -> AsyncGenerator[Event]:
        """Submit a request; its events, the last a :class:`Finished`. Left early, it is cancelled.

        Raises:
            BusyError: too many are waiting, of all or of this tenant. What the job failed with.
        """
        if self._per_tenant[request.tenant] >= self.settings.per_tenant:
            raise BusyError(
                f"{self._per_tenant[request.tenant]} of your requests are under way already",
                self.scheduler.retry_after(),
            )
        job = self.scheduler.submit(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._queues[job] = events
        self._per_tenant[request.tenant] += 1
        try:
            while True:
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            job.cancel()
            self._queues.pop(job, None)
            self._per_tenant[request.tenant] -= 1
            if not self._per_tenant[request.tenant]:
                del self._per_tenant[request.tenant]

    async def on_model(self, function: Callable[[], T]) -> T:
        """Run a function on the model's thread."""
        return await asyncio.wrap_future(self.scheduler.run(function))

    # ------------------------------------------------------------------------------------------ text and states

    async def encode(self, text: str, behind: State, *, special: bool = False) -> tuple[int, ...]:
        """Token ids of a text behind a state; what the tokenizer puts before a text comes before the first only.

        Args:
            special: special tokens in it count as such (text of a chat template).

        Raises:
            Refused: more tokens than one request may bring.
        """
        tokenizer = self._template_tokenizer() if special else self.model.tokenizer
        goes_on, first, most = behind.position > 0, self.model.first_tokens, self.settings.max_prompt
        if len(text) > 4096:
            found = await asyncio.to_thread(encode_at_most, tokenizer, text, most, goes_on=goes_on)
        else:
            found = encode_at_most(tokenizer, text, most, goes_on=goes_on)
        if found is None:
            raise Refused(413, f"the text has more than the {most:,} tokens that this server takes at once")
        ids = tuple(found)
        if not goes_on and not special and text:
            ids = (*first, *ids)
        elif goes_on and special and first and ids[: len(first)] == first:
            ids = ids[len(first) :]
        self.check_prompt(len(ids))
        return ids

    def check_prompt(self, count: int) -> None:
        """Raises Refused when a request brings too many tokens."""
        if count > self.settings.max_prompt:
            raise Refused(
                413, f"the text has {count:,} tokens; this server takes {self.settings.max_prompt:,} at once"
            )

    def _template_tokenizer(self) -> AnyTokenizer:
        if self._special is None:
            self._special = with_special_tokens(self.model.tokenizer)
        return self._special

    async def load(self, ref: str | None, tenant: str) -> State:
        """The kept state that a request names; the empty one if it names none. Raises as ``StateStore.load``."""
        if ref is None:
            return self.model.empty_state()
        state = await asyncio.to_thread(
            self.store.load, ref, tenant=tenant, model=self.model.fingerprint, tokens=False
        )
        return self.model.accept(state, ref)

    async def keep(
        self,
        state: State,
        tenant: str,
        *,
        name: str | None = None,
        move: bool = False,
        tags: dict[str, str] | None = None,
        ttl: float | None = None,
        parent: str | None = None,
        ids: Sequence[int] = (),
    ) -> Handle:
        """Keep a state; when this returns it outlives a crash.

        Args:
            parent: the kept state that it went on from; may be gone by now. ids: what was read or generated behind it; kept
                with the state (for search) if all ids before are known too.
        """

        def put() -> Handle:
            known, before = parent, tuple[int, ...]()
            if known is not None:
                try:
                    before = self.store.ids(known, tenant=tenant) or ()
                except StateNotFoundError:
                    known = None
            all_ids = (*before, *ids)
            return self.store.put(
                state,
                tenant=tenant,
                name=name,
                move=move,
                tags=tags,
                ttl=ttl or None,
                parent=known,
                ids=all_ids if len(all_ids) == state.position else None,
            )

        return await asyncio.to_thread(put)

    async def begin(
        self, state: State, ids: Sequence[int], tenant: str
    ) -> tuple[State, tuple[int, ...], int]:
        """The best state to go on from: the state itself, or, for a text from nothing, the longest beginning of it that was
        read before (in memory or kept), or what a prefill worker makes of it.

        Returns the state, the ids that are left to read, and how many tokens of the text it had read.
        """
        ids = whole = tuple(ids)
        if state.position == 0 and len(ids) > self.model.grid:
            found = self.prefix.find(ids, tenant, self.model.grid)
            length = 0 if found is None else found.position
            match = await asyncio.to_thread(
                self.store.longest_prefix,
                ids,
                tenant=tenant,
                model=self.model.fingerprint,
                grid=self.model.grid,
            )
            if match.handle is not None and match.length > length:
                loaded = await asyncio.to_thread(
                    self.store.load,
                    match.handle.id,
                    tenant=tenant,
                    model=self.model.fingerprint,
                    replay=False,
                    tokens=False,
                )
                found, length = self.model.accept(loaded, match.handle.id), match.length
            if found is not None:
                state, ids = found, ids[length:]
            if self.router.sends_away(len(ids)) and (shipped := await self.router.read(whole)) is not None:
                return shipped, (), 0
        return state, ids, state.position - len(state.tail)

    def check_tokens(self, wanted: int | None, default: int) -> int:
        """How many tokens to generate. Raises Refused when it is more than the server gives."""
        if wanted is None:
            return min(default, self.settings.max_tokens)
        if not 0 <= wanted <= self.settings.max_tokens:
            raise Refused(
                400, f"max_tokens must be 0 to {self.settings.max_tokens}, got {wanted}", param="max_tokens"
            )
        return wanted

    def checkpointer(self, tenant: str, origin: State) -> Callable[[State], None]:
        """Keeps states of a long reading in memory on the way, at geometric positions, for texts that share its beginning."""
        due = Checkpoints()

        def keep(state: State) -> None:
            if due.due(state.position - len(state.tail), state.grid):
                self.prefix.add(state, tenant)

        return keep

    async def read(
        self, state: State, ids: tuple[int, ...], tenant: str
    ) -> AsyncGenerator[Reading | Finished]:
        """Read ``ids``; tells how far it is, in the end the state."""
        request = Request(state, ids, tenant=tenant, on_block=self.checkpointer(tenant, state))
        began = time.perf_counter()
        async with contextlib.aclosing(self.run(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self.router.read_here(len(ids), time.perf_counter() - began)
                if isinstance(event, Reading | Finished):
                    yield event

    def take_in(self, blob: bytes, tenant: str, name: str | None) -> Handle:
        """Keep the state of a file, everything checked first.

        Raises:
            StateFileError: damaged, altered, or not signed by this server for this tenant. StateMismatchError: another model's.
        """
        key = bound_key(self.secret, tenant)
        found = artifact.unpack(blob, "the file")
        if not self.open or "signature" in found.metadata:
            found = artifact.unpack(blob, "the file", key=key)
        table = self.model.decoder.state_table
        state = State.from_artifact(found, "the file", model=self.model.fingerprint, table=table)
        self.model.accept(state, "the file")
        return self.store.put(state, tenant=tenant, name=name)

    def describe(self, handle: Handle) -> dict[str, Any]:
        """A kept state as the interface shows it."""
        return {
            "id": handle.id,
            "object": "state",
            "name": handle.name,
            "kind": handle.kind,
            "model": handle.model_name,
            "position": handle.position,
            "bytes": handle.nbytes,
            "kv_cache_bytes": self.kv_bytes(handle.position),
            "created": int(handle.created),
            "expires": None if handle.expires is None else int(handle.expires),
            "tags": dict(handle.tags),
            "parent": handle.parent,
        }

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache of a softmax model of the same width and depth, keys and values in 16 bits."""
        config = self.model.decoder.config
        return tokens * config.num_layers * config.repeats * 2 * config.d_model * 2


def noted(state: State, **notes: str) -> State:
    """The state with further notes."""
    return replace(state, notes={**state.notes, **notes})


def _secret(path: Path) -> bytes:
    """The server's own secret, made on the first start; readable by its owner only."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_bytes(32))
        path.chmod(0o600)
    found = path.read_bytes()
    if len(found) != 32:
        raise InputError(
            f"{path}: expected 32 bytes, found {len(found)}; restore it, or delete it (states exported before are refused then)"
        )
    return found
