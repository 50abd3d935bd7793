"""A tenant's library: texts read into stored states, found again by what they say, and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from linstate.engine import Checkpointer, LanguageModel
from linstate.engine.tokens import encode
from linstate.engine.transitions import transitions
from linstate.errors import CompositionError, InputError, StateNotFoundError
from linstate.memory.embedding import Embed, hidden_states
from linstate.memory.index import How, Index
from linstate.memory.passages import Passage, cut
from linstate.state import State
from linstate.state.composition import Method, Transitions, compose_all
from linstate.state.store import Handle, StateStore, model_key

_ACTS = 16  # texts whose transitions are at hand


@dataclass(frozen=True)
class Added:
    """A text in the library: its state's handle, how many tokens had to be read, and why not fewer."""

    handle: Handle
    new: int
    reason: str


@dataclass(frozen=True)
class Found:
    """A state that has read what was asked for, the passage that says so, and its score in this search."""

    handle: Handle
    passage: Passage
    score: float


@dataclass(frozen=True)
class Answer:
    """An answer, the states that it is from, how they were put together ("alone", "exact" or "approximate"), and by which method."""

    text: str
    sources: tuple[Found, ...]
    composition: str
    method: str = ""


class Library:
    """Read texts into a store, find them, ask them. Needs the extra ``memory`` to find and ask.

    Args:
        store: where the states are. model: that reads and answers. tenant: whose library it is.
        index: where passages are found; default: beside the store's objects.
        embed: vectors for passages; default: the model's hidden states. embed_name: a name for its kind of vectors.
    """

    def __init__(
        self,
        store: StateStore,
        model: LanguageModel,
        *,
        tenant: str = "default",
        index: Index | None = None,
        embed: Embed | None = None,
        embed_name: str = "own",
    ) -> None:
        self.store, self.model, self.tenant = store, model, tenant
        self.embed = embed or hidden_states(model)
        self._index = index
        self._acts: dict[str, Transitions] = {}
        self._name = model_key(model.fingerprint) if embed is None else embed_name
        self._own_vectors = embed is None

    @property
    def index(self) -> Index:
        """The index, opened when it is first needed. Raises InputError where LanceDB is not installed."""
        if self._index is None:
            base = self.store.where.rstrip("/")
            where = f"{base}/index" if "://" in base else str(Path(base) / "index")
            dimension = self.embed(["dimension"]).shape[1]
            self._index = Index(where, name=self._name, dimension=dimension)
        return self._index

    def add(
        self,
        text: str,
        *,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        ttl: float | None = None,
    ) -> Added:
        """Read a text into a state of its own and index it; what a stored state has read of it is not read again."""
        ids = encode(self.model.tokenizer, text)
        if not ids:
            raise InputError("there is nothing to read: the text is empty")
        store, tenant, fingerprint = self.store, self.tenant, self.model.fingerprint
        match = store.longest_prefix(ids, tenant=tenant, model=fingerprint, grid=self.model.grid)
        start, parent = self.model.empty_state(), None
        if match.handle is not None:
            start = store.load(match.handle.id, tenant=tenant, model=fingerprint, replay=False, tokens=False)
            parent = match.handle.id if match.handle.kind == "state" else None
        reader = self.model.reader(start, on_block=Checkpointer(store, tenant=tenant))
        reader.feed(ids[match.length :])
        handle = store.put(
            reader.state(), tenant=tenant, name=name, tags=tags, ttl=ttl, ids=ids, parent=parent
        )
        self.index_state(handle)
        return Added(handle, len(ids) - match.length, match.reason)

    def index_state(self, handle: Handle) -> int:
        """Index what a stored state has read; returns how many passages. Its token ids must have been kept.

        Passages that it shares with the state that it came from are taken over, not embedded again; if nobody has given
        that one a name, it is found no longer, as its successor has read all that it had. Raises InputError.
        """
        ids, content = self.store.ids(handle.id, tenant=self.tenant), handle.content
        if ids is None or content is None:
            raise InputError(
                f"the token ids of state {handle.name or handle.id[:12]} were not kept, so nobody can say what it has read; "
                "read the text again with --keep-tokens, or with 'linstate store add'"
            )
        self.index.remove(self.tenant, content)
        begin = self._take_over(handle, content, ids)
        passages = cut(ids, self.model.tokenizer, begin=begin)
        for at in range(0, len(passages), 256):
            part = passages[at : at + 256]
            self.index.add(self.tenant, content, part, self.embed([p.text for p in part]))
        return len(passages)

    def _take_over(self, handle: Handle, content: str, ids: Sequence[int]) -> int:
        """Copy the passages of the parent that this state has read too; returns the token up to which they go."""
        if handle.parent is None:
            return 0
        try:
            parent = self.store.get(handle.parent, tenant=self.tenant)
        except StateNotFoundError:
            return 0
        before = self.store.ids(parent.id, tenant=self.tenant)
        if before is None or parent.content in (None, content) or tuple(ids[: len(before)]) != before:
            return 0
        old = str(parent.content)
        kept = [row for row in self.index.rows(self.tenant, old) if row["end"] < len(before)]
        self.index.add_rows({**row, "content": content} for row in kept)
        if parent.name is None:
            self.index.remove(self.tenant, old)
        return int(kept[-1]["end"]) if kept else 0

    def find(self, question: str, *, limit: int = 5, how: How | None = None) -> list[Found]:
        """The states that have read about something, the best first, each with its best passage.

        Args:
            how: by words, by vectors, or both (hybrid). Default: hybrid with vectors that were brought; else by words, and by
                vectors if no word of the question was read: a small model's own vectors find less than words do, and
                joining them with the words' ranks makes these worse (``linstate bench find``).
        """
        if how is None and self._own_vectors:
            return self.find(question, limit=limit, how="words") or self.find(
                question, limit=limit, how="vectors"
            )
        how = how or "hybrid"
        vector = None if how == "words" else self.embed([question])[0]
        found: dict[str, Found] = {}
        for hit in self.index.search(self.tenant, question, vector, limit=4 * limit, how=how):
            if hit.content in found:
                continue
            if (handle := self.store.with_content(hit.content, tenant=self.tenant)) is not None:
                found[hit.content] = Found(handle, hit.passage, hit.score)
            if len(found) == limit:
                break
        return list(found.values())

    def activate(self, found: Sequence[Found], *, method: Method | None = None) -> State:
        """One state of all that was found, the best last; see :func:`linstate.state.composition.compose_all`.

        ``method`` None is "picaso" where the model's texts have transitions, else "sum"; ``notes["composed_by"]`` of the state says which.

        "caso" and "picaso" need what each text does to the ones before it: two readings of each, the first time in this
        process. "sum" and "average" need nothing but the states.
        """
        handles = [one.handle for one in reversed(found)]
        states = [
            self.store.load(
                h.id, tenant=self.tenant, model=self.model.fingerprint, replay=False, tokens=False
            )
            for h in handles
        ]
        if len(states) == 1:
            return states[0]
        acts = None
        if method in (None, "caso", "picaso"):
            try:
                acts = [self._transitions(h) for h in handles]
            except CompositionError:
                if method is not None:
                    raise
        chosen: Method = method or ("sum" if acts is None else "picaso")
        return compose_all([self.model.settle(state) for state in states], chosen, acts)

    def _transitions(self, handle: Handle) -> Transitions:
        content = handle.content or handle.id
        if content not in self._acts:
            ids = self.store.ids(handle.id, tenant=self.tenant)
            if ids is None:
                raise InputError(
                    f"the token ids of state {handle.name or handle.id[:12]} were not kept; compose by sum or average"
                )
            if len(self._acts) >= _ACTS:
                self._acts.pop(next(iter(self._acts)))
            self._acts[content] = transitions(self.model, ids)
        return self._acts[content]

    def ask(
        self, question: str, *, states: int = 1, method: Method | None = None, max_tokens: int = 48
    ) -> Answer:
        """Find the best states, put them together, answer from them alone. Raises InputError when nothing was found."""
        found = self.find(question, limit=states)
        if not found:
            raise InputError("nothing in the library has read about that")
        active = self.activate(found, method=method)
        text = self.model.ask(question, active, max_tokens=max_tokens)
        if len(found) == 1:
            return Answer(text, tuple(found), "alone")
        return Answer(text, tuple(found), active.composition or "exact", active.notes["composed_by"])

    def rebuild(self) -> int:
        """Make the tenant's index anew from what the store holds; returns how many states are in it."""
        self.index.clear(self.tenant)
        handles = [
            h
            for h in self.store.list(tenant=self.tenant, model=model_key(self.model.fingerprint))
            if h.content is not None
        ]
        parents = {h.parent for h in handles}
        contents: set[str] = set()
        for handle in handles:
            superseded = handle.name is None and handle.id in parents
            if handle.content and handle.content not in contents and not superseded:
                contents.add(handle.content)
                self.index_state(handle)
        self.index.optimize()
        return len(contents)
